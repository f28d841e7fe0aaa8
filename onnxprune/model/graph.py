"""A model as the stages see it: the ONNX skeleton, its weights on demand, and what is known of every tensor.

The ModelProto is never normalised in place: constants stay where the exporter put them and computed shapes stay
computed. What folding finds out stands beside the graph (`shapes`, `values`), so that a later rewrite changes
only what must change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper

from onnxprune.errors import ModelRejected
from onnxprune.model.payload import Payload
from onnxprune.ops.registry import Operator

__all__ = ["Graph", "Model", "Node", "Parameter", "attribute_value", "subgraphs"]

_SINGLE = {AttributeProto.FLOAT: "f", AttributeProto.INT: "i", AttributeProto.TENSOR: "t", AttributeProto.GRAPH: "g"}
_MANY = {AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints", AttributeProto.GRAPHS: "graphs"}


def attribute_value(attribute: AttributeProto) -> Any:
    """The Python value of a node attribute: int, float, str, list, TensorProto or GraphProto."""
    if attribute.type in _SINGLE:
        return getattr(attribute, _SINGLE[attribute.type])
    if attribute.type == AttributeProto.STRING:
        return attribute.s.decode("utf-8", "replace")
    if attribute.type == AttributeProto.STRINGS:
        return [s.decode("utf-8", "replace") for s in attribute.strings]
    if attribute.type in _MANY:
        return list(getattr(attribute, _MANY[attribute.type]))
    return onnx.helper.get_attribute_value(attribute)


def subgraphs(node: NodeProto) -> Iterator[onnx.GraphProto]:
    """Bodies of a control-flow node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


@dataclass(eq=False, slots=True)
class Node:
    """A node of the graph with its attributes as Python values. `op` is the operator's name, prefixed by its domain
    where that is not ONNX's own; `opset` is the domain's version. `captured` are outer tensors that bodies use."""

    index: int
    proto: NodeProto
    op: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    captured: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The node's name, or its first output where it has none."""
        return self.proto.name or (self.outputs[0] if self.outputs else "")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor that the model stores: an initializer, a Constant node or a constant ConstantOfShape."""

    name: str
    elem_type: int
    shape: tuple[int, ...]
    proto: TensorProto | None  # None: a ConstantOfShape, whose value is `fill`
    node: NodeProto | None = None  # the Constant or ConstantOfShape node that makes it
    fill: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(eq=False)
class Model:
    """A ModelProto without the bytes of its large tensors, and the payloads that hold them, by reference.

    nbytes: size of the model's files; folded: how many of these bytes folding at load made superfluous.
    """

    proto: onnx.ModelProto
    payloads: dict[str, Payload] = field(default_factory=dict)
    source: str = ""
    nbytes: int = 0
    folded: int = 0

    def payload(self, tensor: TensorProto) -> Payload | None:
        """The payload of a tensor; None where its data stands in the proto itself."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return None
        return self.payloads[tensor.external_data[0].value]

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The values of a stored tensor (read-only where it is mapped from a file)."""
        payload = self.payload(tensor)
        try:
            if payload is None:
                return numpy_helper.to_array(tensor)
            return payload.read(tensor.data_type, tuple(tensor.dims))
        except (LookupError, TypeError, ValueError) as error:
            raise ModelRejected(f"tensor '{tensor.name}' can't be read: {error}") from None

    def attach(self, tensor: TensorProto, payload: Payload) -> None:
        """Let `payload` hold the data of `tensor`."""
        reference = f"\x00computed/{len(self.payloads)}"
        self.payloads[reference] = payload
        for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(name)
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=reference)
        tensor.data_location = TensorProto.EXTERNAL


@dataclass(eq=False)
class Graph:
    """The main graph of a model, indexed; nodes in topological order.

    registry: the operators with which shapes and values were found out.
    shapes: per tensor, the sizes under `pins` (None for a size that isn't known); a tensor of unknown rank is absent.
    values: tensors whose value is known without running the model: shape arithmetic and small constants.
    varying: of those, the elements that depend on a symbolic size, so that they must not be taken for constants.
    resized: of those, the ones whose shape depends on a symbolic size, even where their elements don't.
    sized: of those, the ones that are computed from the size of some tensor.
    weighted: of those, the ones that are computed from stored numbers other than sizes.
    static: tensors that don't depend on a graph input.
    """

    model: Model
    nodes: list[Node]
    parameters: dict[str, Parameter]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    registry: Mapping[str, Operator] = field(default_factory=dict)
    pins: Mapping[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    varying: dict[str, np.ndarray] = field(default_factory=dict)
    resized: set[str] = field(default_factory=set)
    sized: set[str] = field(default_factory=set)
    weighted: set[str] = field(default_factory=set)
    static: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def consumers(self) -> dict[str, list[tuple[Node, int]]]:
        """Uses of every tensor as (node, input index)."""
        uses: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for i, name in enumerate(node.inputs):
                if name:
                    uses.setdefault(name, []).append((node, i))
        return uses

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    def array(self, name: str) -> np.ndarray:
        """The values of a parameter, as stored."""
        parameter = self.parameters[name]
        if parameter.proto is None:
            assert parameter.fill is not None
            return np.broadcast_to(parameter.fill.reshape(()), parameter.shape)
        return self.model.array(parameter.proto)

    def release(self, name: str) -> None:
        """The values of a parameter are no longer in use."""
        proto = self.parameters[name].proto
        payload = self.model.payload(proto) if proto is not None else None
        if payload is not None:
            payload.release()


def names_used(graph: onnx.GraphProto) -> set[str]:
    """Names that a body reads from the graphs around it."""
    made = {t.name for t in graph.initializer} | {i.name for i in graph.input}
    made |= {t.values.name for t in graph.sparse_initializer}
    for node in graph.node:
        made.update(node.output)
    used = {o.name for o in graph.output}
    for node in graph.node:
        used.update(node.input)
        for body in subgraphs(node):
            used |= names_used(body)
    return used - made - {""}


def sorted_nodes(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """The nodes in a topological order, the given one where it already is."""
    nodes = list(nodes)
    maker = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    state = [0] * len(nodes)  # 0 not seen, 1 on the stack, 2 done
    order: list[NodeProto] = []
    for root in range(len(nodes)):
        stack = [root]
        while stack:
            k = stack[-1]
            if state[k]:
                stack.pop()
                if state[k] == 1:
                    state[k] = 2
                    order.append(nodes[k])
                continue
            state[k] = 1
            reads = [*nodes[k].input, *(n for body in subgraphs(nodes[k]) for n in sorted(names_used(body)))]
            makers = [maker[n] for n in reversed(reads) if n in maker]
            if any(state[j] == 1 for j in makers):
                raise ModelRejected(f"node '{nodes[k].name or nodes[k].op_type}' depends on its own output")
            stack.extend(j for j in makers if state[j] == 0)
    return order


def index_nodes(protos: Iterable[NodeProto], opsets: Mapping[str, int]) -> list[Node]:
    """Nodes in topological order, with their attributes as Python values. opsets: version per domain."""
    default = opsets.get("", opsets.get("ai.onnx", 1))
    nodes: list[Node] = []
    for proto in sorted_nodes(protos):
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        captured: set[str] = set()
        for body in subgraphs(proto):
            captured |= names_used(body)
        nodes.append(
            Node(
                index=len(nodes),
                proto=proto,
                op=f"{domain}::{proto.op_type}" if domain else proto.op_type,
                opset=opsets.get(domain, default if not domain else 1),
                inputs=tuple(proto.input),
                outputs=tuple(proto.output),
                attributes={a.name: attribute_value(a) for a in proto.attribute},
                captured=tuple(sorted(captured)),
            )
        )
    return nodes


def index_graph(model: Model) -> Graph:
    """Index the main graph of a model. Shapes and values are not known yet: see `infer`."""
    proto = model.proto
    opsets = {o.domain: o.version for o in proto.opset_import}
    parameters = {t.name: Parameter(t.name, t.data_type, tuple(t.dims), t) for t in proto.graph.initializer}
    inputs = tuple(i.name for i in proto.graph.input if i.name not in parameters)
    return Graph(
        model, index_nodes(proto.graph.node, opsets), parameters, inputs, tuple(o.name for o in proto.graph.output)
    )
