"""Models of one node, run through the mirror: against onnxruntime, and against numerical derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper

from onnxprune.mirroring import mirror

__all__ = ["agree", "arrays", "differentiable", "one_node", "run_mirror", "run_onnxruntime"]

Array = np.ndarray


def one_node(
    op: str,
    inputs: Sequence[Array | None],
    *,
    stored: Sequence[int] = (),
    count: int = 1,
    opset: int = 17,
    domain: str = "",
    symbolic: bool = True,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model and what to feed it. stored: inputs that are initializers; the others have symbolic sizes."""
    names = ["" if x is None else f"x{k}" for k, x in enumerate(inputs)]
    fed = {
        n: np.asarray(x)
        for k, (n, x) in enumerate(zip(names, inputs, strict=True))
        if x is not None and k not in stored
    }
    outputs = [f"y{j}" for j in range(count)]
    node = helper.make_node(op, names, outputs, "node", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(
                n,
                helper.np_dtype_to_tensor_dtype(x.dtype),
                [f"{n}_{k}" for k in range(x.ndim)] if symbolic else x.shape,
            )
            for n, x in fed.items()
        ],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(np.asarray(inputs[k]), names[k]) for k in stored if inputs[k] is not None],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 21 else 10), fed


def run_onnxruntime(model: onnx.ModelProto, fed: dict[str, Array]) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, fed)


def arrays(found: Any) -> list[Any]:
    """What a mirror gives, as onnxruntime gives it."""
    outputs = found if isinstance(found, tuple) else (found,)
    return [[x.detach().numpy() for x in y] if isinstance(y, list) else y.detach().numpy() for y in outputs]


def run_mirror(model: onnx.ModelProto, fed: dict[str, Array]) -> list[Any]:
    return arrays(mirror(model)(*(torch.from_numpy(np.array(x)) for x in fed.values())))


def agree(model: onnx.ModelProto, fed: dict[str, Array], *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """The mirror's outputs are onnxruntime's, in values, types and shapes."""
    for got, wanted in zip(run_mirror(model, fed), run_onnxruntime(model, fed), strict=True):
        pairs = zip(got, wanted, strict=True) if isinstance(wanted, list) else [(got, wanted)]
        for a, b in pairs:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def differentiable(op: str, inputs: Sequence[Array | None], *, stored: Sequence[int] = (), **attributes: Any) -> None:
    """The mirror's derivatives by all float inputs are the numerical ones, in float64 and along random directions."""
    doubled = [x.astype(np.float64) if x is not None and x.dtype == np.float32 else x for x in inputs]
    model, fed = one_node(op, doubled, stored=stored, **attributes)
    module = mirror(model)
    given = [torch.from_numpy(np.array(x)).requires_grad_(x.dtype == np.float64) for x in fed.values()]

    def function(*xs: torch.Tensor) -> Any:
        found = module(*xs)
        outputs = found if isinstance(found, tuple) else (found,)
        return tuple(y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point())

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
