"""Bodies of control flow as graphs of their own.

What a body reads from the graphs around it becomes a constant of its own where it is one, and a further input where it
is not. Sizes that are the same for every input of the model are given to it; the others are symbols, so that shape
arithmetic inside the body works as it does outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx
from onnx import numpy_helper

from onnxprune.model.graph import Graph, Model, names_used
from onnxprune.model.infer import infer

if TYPE_CHECKING:
    from onnxprune.mirroring.build import Builder

__all__ = ["Source", "inner_graph"]

Source = tuple[str, "int | None"]  # an outer tensor that is a body's input, and the axis that is taken off it


def inner_graph(
    outer: Builder, body: onnx.GraphProto, sources: Sequence[Source | None] = (), *, carried: int = 0
) -> tuple[Graph, list[str], set[str]]:
    """The body with types and shapes, the outer tensors that follow its own inputs, and those that became constants.

    sources: what the body's inputs are in the first iteration, where that is known.
    carried: how many of the last sources are what the body's outputs from the second one on become in the next
        iteration. They are taken to keep their rank if they do so in one iteration.
    """
    captured = sorted(names_used(body))
    proto = onnx.GraphProto()
    proto.CopyFrom(body)
    constants, wanted, pins = set(), [], {}
    for name in captured:
        value = outer.constant(name)
        if value is not None and value.dtype.kind in "iufb":
            proto.initializer.append(numpy_helper.from_array(value, name))
            constants.add(name)
        else:
            pins.update(_declare(outer, proto.input.add(name=name), name))
            wanted.append(name)
    for info, source in zip(proto.input, sources, strict=False):
        if source is not None:
            _declare_rank(outer, info, *source)
    graph = _inferred(outer, proto, pins)
    first = len(sources) - carried
    for k in range(first, len(sources)):
        before, after = proto.input[k].name, proto.output[1 + k - first].name
        if len(graph.shapes.get(before, ())) != len(graph.shapes.get(after, ())):
            for info in proto.input[first : len(sources)]:
                info.type.tensor_type.ClearField("shape")
            return _inferred(outer, proto, pins), wanted, constants
    return graph, wanted, constants


def _inferred(outer: Builder, body: onnx.GraphProto, pins: dict[str, int]) -> Graph:
    model = outer.graph.model
    proto = onnx.ModelProto(ir_version=model.proto.ir_version, graph=body)
    proto.opset_import.extend(model.proto.opset_import)
    return infer(Model(proto, model.payloads), outer.registry, pins)


def _declare(outer: Builder, info: onnx.ValueInfoProto, name: str) -> dict[str, int]:
    """The type of an outer tensor; returns the sizes that its symbols have."""
    graph = outer.graph
    if name not in graph.types:
        return {}
    tensor, pins = info.type.tensor_type, {}
    tensor.elem_type = graph.types[name]
    shape = graph.shapes.get(name)
    if shape is None:
        return {}
    tensor.shape.SetInParent()
    for size in shape:
        dim = tensor.shape.dim.add()
        if size is not None and (not graph.pins or name in graph.parameters):
            dim.dim_value = size
        elif size is not None:
            dim.dim_param = f"size{size}"
            pins[dim.dim_param] = size
    return pins


def _declare_rank(outer: Builder, info: onnx.ValueInfoProto, name: str, axis: int | None) -> None:
    """The type and the rank of an outer tensor (less an axis), where the body itself doesn't say them."""
    if info.type.HasField("sequence_type") or info.type.HasField("optional_type"):
        return
    tensor = info.type.tensor_type
    if not tensor.elem_type:
        tensor.elem_type = outer.graph.types.get(name, 0)
    shape = outer.graph.shapes.get(name)
    if shape is None or tensor.HasField("shape"):
        return
    tensor.shape.SetInParent()
    for _ in range(len(shape) - (axis is not None)):
        tensor.shape.dim.add()
