"""A model of one operator, surrounded such that its rule alone decides what is free and what stays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

__all__ = ["runs", "surrounded"]


def surrounded(
    original: onnx.ModelProto, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
) -> onnx.ModelProto:
    """Float inputs become parameters, times a scalar that is the only graph input; float outputs are multiplied by
    parameters and summed up. Other inputs become constants, other outputs stay as they are."""
    model = onnx.ModelProto()
    model.CopyFrom(original)
    graph = model.graph
    names = [i.name for i in graph.input], [o.name for o in graph.output]
    before, inside, after = [helper.make_node("Abs", ["the scalar"], ["the factor"])], list(graph.node), []
    for field in ("node", "input", "output"):
        graph.ClearField(field)
    graph.input.append(helper.make_tensor_value_info("the scalar", TensorProto.FLOAT, []))
    rng = np.random.default_rng(0)
    for name, x in zip(names[0], inputs, strict=True):
        free = is_free(x)
        graph.initializer.append(numpy_helper.from_array(x, f"{name}_parameter" if free else name))
        if free:
            before.append(helper.make_node("Mul", [f"{name}_parameter", "the factor"], [name]))
    for name, y in zip(names[1], outputs, strict=True):
        if is_free(y):
            scale = rng.uniform(0.5, 1.5, y.shape).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
            after.append(helper.make_node("Mul", [name, f"{name}_scale"], [f"{name}_scaled"]))
            after.append(helper.make_node("ReduceSum", [f"{name}_scaled"], [f"{name}_sum"], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(f"{name}_sum", TensorProto.FLOAT, []))
        else:
            graph.output.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(y.dtype), y.shape))
    graph.node.extend(before + inside + after)
    return model


def is_free(x: np.ndarray) -> bool:
    return x.dtype == np.float32 and x.ndim > 0 and x.size > 0


def runs(model: onnx.ModelProto) -> bool:
    """True where onnxruntime has the operator in this form."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True
