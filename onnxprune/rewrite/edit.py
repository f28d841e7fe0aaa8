"""A copy of a model in which parameters and nodes are exchanged one by one; everything else stays as it was.

A parameter is exchanged per use. Uses that ask for the same thing share one tensor, under the parameter's own name
where it is the first; a use that asks for something else gets a tensor of its own. Values are made only when they
are written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxprune.axes.dead import Use
from onnxprune.axes.walk import OUTPUT, parameter_of
from onnxprune.model.graph import Graph, Model, Parameter, names_used, subgraphs
from onnxprune.model.payload import Computed
from onnxprune.model.wire import INLINE_LIMIT

__all__ = ["Change", "Edit", "Kept", "take"]

Kept = np.ndarray | None  # kept positions of an axis; None where all are kept

UNUSED = "_unused"
LISTED_BEFORE_IR = 4  # initializers had to be listed as graph inputs


def take(array: np.ndarray, masks: Sequence[Kept]) -> np.ndarray:
    """The kept indices along every axis."""
    for axis, mask in enumerate(masks):
        if mask is not None:
            array = np.take(array, mask, axis)
    return array


@dataclass(frozen=True)
class Change:
    """What a use of a parameter asks for. Equal keys mean equal values; `make` turns the stored values into them."""

    key: Hashable
    shape: tuple[int, ...]
    make: Callable[[np.ndarray], np.ndarray]
    uniform: bool = True  # of a tensor with one value throughout, only the shape changes


class Edit:
    """Builds the edited model. Nodes are taken in topological order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = [NodeProto() for _ in graph.nodes]
        for new, old in zip(self.nodes, graph.nodes, strict=True):
            new.CopyFrom(old.proto)
        self.before: dict[int, list[NodeProto]] = {}
        self.after: dict[int, list[NodeProto]] = {}
        self.head: list[NodeProto] = []
        self.changes: dict[Use, Change] = {}
        self.later: list[Callable[[], None]] = []  # steps that need the new names of exchanged parameters
        self.dropped: set[int] = set()
        self.undeclared: set[str] = set()  # tensors whose declared shape no longer holds
        self.new_tensors: list[tuple[TensorProto, Callable[[], np.ndarray] | None]] = []
        self.taken = {n for node in graph.nodes for n in (*node.inputs, *node.outputs)} | set(graph.parameters)
        self.taken |= set(graph.inputs) | set(graph.outputs)
        self.resized: dict[str, tuple[int, ...]] = {}

    def name(self, base: str) -> str:
        """A tensor name that is not in use, made from `base`."""
        name, k = base, 0
        while name in self.taken:
            k += 1
            name = f"{base}_{k}"
        self.taken.add(name)
        return name

    def constant(self, base: str, value: np.ndarray) -> str:
        """Add a small initializer; returns its name."""
        name = self.name(base)
        self.new_tensors.append((numpy_helper.from_array(np.asarray(value, order="C"), name), None))
        return name

    def drop(self, k: int) -> None:
        """Leave node k out of the new graph."""
        self.dropped.add(k)

    def replace(self, name: str, value: np.ndarray) -> None:
        """Let a constant stand in for the output of a node that is dropped."""
        self.new_tensors.append((numpy_helper.from_array(np.asarray(value, order="C"), name), None))

    def insert_after(self, k: int, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.after.setdefault(k, []).append(
            helper.make_node(op, inputs, [output], name=self.name(f"{output}_{op}"), **attributes)
        )

    def insert_before(self, k: int, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.before.setdefault(k, []).append(
            helper.make_node(op, inputs, [output], name=self.name(f"{output}_{op}"), **attributes)
        )

    def build(self) -> Model:
        """The edited model. Its payloads refer to the original's."""
        source = self.graph.model
        model = Model(onnx.ModelProto(), dict(source.payloads), source.source, 0)
        model.proto.CopyFrom(source.proto)
        graph = model.proto.graph
        self._exchange(model)
        for step in self.later:
            step()
        for tensor, make in self.new_tensors:
            added = graph.initializer.add()
            added.CopyFrom(tensor)
            if make is not None:
                model.attach(added, Computed(make))
            if model.proto.ir_version < LISTED_BEFORE_IR:
                graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        nodes = [*self.head]
        for k, node in enumerate(self.nodes):
            if k in self.dropped:
                continue
            nodes += [*self.before.get(k, ()), node, *self.after.get(k, ())]
        del graph.node[:]
        graph.node.extend(nodes)
        self._drop_unread(model)
        self._resize(model)
        return model

    def _exchange(self, model: Model) -> None:
        stored = {t.name: t for t in model.proto.graph.initializer}
        by_name: dict[str, list[Use]] = {}
        for use in self.changes:
            by_name.setdefault(parameter_of(self.graph, use), []).append(use)
        uses_of: dict[str, set[Use]] = {}
        for k, node in enumerate(self.graph.nodes):
            for i, name in enumerate(node.inputs):
                if name in by_name:
                    uses_of.setdefault(name, set()).add((k, i))
            for i, name in enumerate(node.captured):
                if name in by_name:
                    uses_of.setdefault(name, set()).add((k, -1 - i))
        for i, name in enumerate(self.graph.outputs):
            if name in by_name:
                uses_of.setdefault(name, set()).add((OUTPUT, i))
        for name, uses in by_name.items():
            kinds: dict[Hashable, list[Use]] = {}
            for use in uses:
                kinds.setdefault(self.changes[use].key, []).append(use)
            untouched = bool(uses_of[name] - set(uses))
            for k, same in enumerate(kinds.values()):
                change = self.changes[same[0]]
                if k == 0 and not untouched:
                    self._change_in_place(model, stored, self.graph.parameters[name], change)
                else:
                    new = self._copy_changed(self.graph.parameters[name], change)
                    for n, i in same:
                        self.nodes[n].input[i] = new

    def _make(self, parameter: Parameter, change: Change) -> Callable[[], np.ndarray]:
        graph = self.graph

        def make() -> np.ndarray:
            made = change.make(graph.array(parameter.name))
            graph.release(parameter.name)
            return made

        return make

    def _change_in_place(
        self, model: Model, stored: Mapping[str, TensorProto], parameter: Parameter, change: Change
    ) -> None:
        if parameter.proto is None:
            self._refill(parameter, change, parameter.name)
            return
        if parameter.node is None:
            tensor = stored[parameter.name]
        else:
            node = next(n for n in self.nodes if parameter.name in n.output)
            found = next((a for a in node.attribute if a.name == "value"), None)
            if found is None:  # value_floats and its like
                del node.attribute[:]
                found = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
            tensor = found.t
        self._set(model, tensor, parameter, change)

    def _set(self, model: Model, tensor: TensorProto, parameter: Parameter, change: Change) -> None:
        name, doc, props = tensor.name, tensor.doc_string, list(tensor.metadata_props)
        make = self._make(parameter, change)
        size = int(np.prod(change.shape, dtype=np.int64))
        if size * 8 <= INLINE_LIMIT:
            tensor.CopyFrom(_small(make(), parameter.elem_type, change.shape, name))
        else:
            tensor.ClearField("dims")
            tensor.dims.extend(change.shape)
            tensor.data_type = parameter.elem_type
            model.attach(tensor, Computed(make))
        tensor.name = name
        if doc:
            tensor.doc_string = doc
        if props and not tensor.metadata_props:
            tensor.metadata_props.extend(props)

    def _copy_changed(self, parameter: Parameter, change: Change) -> str:
        name = self.name(parameter.name)
        if parameter.proto is None and change.uniform:
            self._refill(parameter, change, name)
            return name
        tensor = TensorProto(name=name, data_type=parameter.elem_type, dims=change.shape)
        self.new_tensors.append((tensor, self._make(parameter, change)))
        return name

    def _refill(self, parameter: Parameter, change: Change, name: str) -> None:
        """A ConstantOfShape of another size; or, where the values are no longer all the same, a dense tensor."""
        node = next(n for n in self.nodes if parameter.name in n.output)
        if not change.uniform:
            node.output[0] = self.name(f"{name}{UNUSED}")
            tensor = TensorProto(name=name, data_type=parameter.elem_type, dims=change.shape)
            self.new_tensors.append((tensor, self._make(parameter, change)))
            return
        shape = self.constant(f"{name}_shape", np.array(change.shape, np.int64))
        if name == parameter.name:
            node.input[0] = shape
        else:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.input[0], copy.output[0] = shape, name
            copy.name = self.name(f"{name}_ConstantOfShape")
            self.head.append(copy)

    def _drop_unread(self, model: Model) -> None:
        """What was read before and is not any more: nodes, parameters and constants. What nothing ever read stays."""
        graph = model.proto.graph
        was_read = {n for node in self.graph.nodes for n in (*node.inputs, *node.captured)} | set(self.graph.outputs)
        read = {o.name for o in graph.output}
        unread: list[int] = []
        for k in reversed(range(len(graph.node))):
            node = graph.node[k]
            once = any(o in was_read for o in node.output) or (node.output and node.output[0].endswith(UNUSED))
            if once and not any(o in read for o in node.output if o):
                unread.append(k)
                continue
            read.update(node.input)
            for body in subgraphs(node):
                read |= names_used(body)
        for k in unread:
            del graph.node[k]
        gone = {
            t.name for t in graph.initializer if t.name not in read and (t.name in was_read or t.name in self.taken)
        }
        gone -= {t.name for t in self.graph.model.proto.graph.initializer if t.name not in was_read}
        for entries in (graph.initializer, graph.input):
            for k in reversed([k for k, entry in enumerate(entries) if entry.name in gone]):
                del entries[k]

    def _resize(self, model: Model) -> None:
        """Declared shapes follow; symbols stay symbols."""
        graph = model.proto.graph
        sizes = {t.name: tuple(t.dims) for t in graph.initializer}
        made = {o for n in graph.node for o in n.output} | {i.name for i in graph.input}
        for value in (*graph.value_info, *graph.input, *graph.output):
            after = sizes.get(value.name) or self.resized.get(value.name)
            dims = value.type.tensor_type.shape.dim
            if after is None or len(after) != len(dims):
                continue
            for dim, n in zip(dims, after, strict=True):
                if (
                    dim.HasField("dim_value")
                    and dim.dim_value != n
                    and (value.name in sizes or value.name in self.resized)
                ):
                    dim.dim_value = n
        known = (made | sizes.keys()) - self.undeclared
        stale = [k for k, v in enumerate(graph.value_info) if v.name not in known]
        for k in reversed(stale):
            del graph.value_info[k]


def _small(array: np.ndarray, elem_type: int, shape: tuple[int, ...], name: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(shape), name)
    tensor.data_type = elem_type
    return tensor
