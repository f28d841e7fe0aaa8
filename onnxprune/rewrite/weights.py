"""New values for the weights of a model; everything else stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from onnxprune.model.graph import Graph, Model
from onnxprune.model.payload import Computed, dtype_of
from onnxprune.model.wire import INLINE_LIMIT
from onnxprune.rewrite.edit import LISTED_BEFORE_IR

__all__ = ["Path", "with_weights"]

# from the outside to the inside, first output and attribute of every control-flow node; then the tensor's name
Path = tuple[str, ...]


def with_weights(graph: Graph, values: Mapping[Path, np.ndarray]) -> Model:
    """A copy of the graph's model in which stored tensors have other values of the same shape, in the types that the
    model stores them in. Values are referenced, not copied, until the model is written.

    Raises KeyError where the model stores no such tensor, ValueError where a shape differs.
    """
    source = graph.model
    model = Model(onnx.ModelProto(), dict(source.payloads), source.source, source.nbytes)
    model.proto.CopyFrom(source.proto)
    left = dict(values)
    _exchange(model, model.proto.graph, (), left)
    if left:
        raise KeyError(f"the model stores no tensor '{'/'.join(next(iter(left)))}'")
    return model


def _exchange(model: Model, graph: onnx.GraphProto, path: Path, left: dict[Path, np.ndarray]) -> None:
    for tensor in graph.initializer:
        if (array := left.pop((*path, tensor.name), None)) is not None:
            _set(model, tensor, array)
    filled = []
    for k, node in enumerate(graph.node):
        for name in node.output:
            if (array := left.pop((*path, name), None)) is None:
                continue
            if not node.input:  # it holds its tensor itself
                _set(model, _value(node), array)
            elif (array != _fill(node)).any():  # of a ConstantOfShape the values are no longer all the same
                filled.append(k)
                graph.initializer.add(name=name, data_type=_filled_type(node), dims=array.shape)
                _set(model, graph.initializer[-1], array)
                if model.proto.ir_version < LISTED_BEFORE_IR:
                    graph.input.append(helper.make_tensor_value_info(name, _filled_type(node), array.shape))
        for attribute in node.attribute:
            inside = (*path, node.output[0] if node.output else "", attribute.name)
            if attribute.type == AttributeProto.GRAPH and any(inside == key[: len(inside)] for key in left):
                _exchange(model, attribute.g, inside, left)
    for k in reversed(filled):
        del graph.node[k]


def _set(model: Model, tensor: TensorProto, array: np.ndarray) -> None:
    if tuple(tensor.dims) != array.shape:
        raise ValueError(f"'{tensor.name}' is {tuple(tensor.dims)}, its new value {array.shape}")
    dtype = dtype_of(tensor.data_type)
    if array.size * dtype.itemsize > INLINE_LIMIT:
        model.attach(tensor, Computed(lambda: array.astype(dtype, copy=False)))
        return
    elem, name, doc, properties = tensor.data_type, tensor.name, tensor.doc_string, list(tensor.metadata_props)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.astype(dtype)).reshape(array.shape), name))
    tensor.data_type, tensor.doc_string = elem, doc
    tensor.metadata_props.extend(properties)


def _value(node: NodeProto) -> TensorProto:
    """The tensor of a Constant node; floats given in another form become one."""
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
    form = node.attribute[0]
    array = np.array(helper.get_attribute_value(form), np.float32)
    del node.attribute[:]
    made = node.attribute.add(name="value", type=AttributeProto.TENSOR)
    made.t.CopyFrom(numpy_helper.from_array(array))
    return made.t


def _fill(node: NodeProto) -> np.ndarray:
    value = next((a.t for a in node.attribute if a.name == "value"), None)
    return np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)


def _filled_type(node: NodeProto) -> int:
    value = next((a.t for a in node.attribute if a.name == "value"), None)
    return TensorProto.FLOAT if value is None else value.data_type
