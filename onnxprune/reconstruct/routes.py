"""Which outputs of a linear layer the columns of a tensor are, where nothing but moves and scalings lies between.

A node is a move where every element of its output is one element of its input, times one number: found out by what it
gives for numbers that name their places, so that no operator needs to be known here. What is added on the way and is
stored goes along. Everything is in the sizes that the graph was loaded with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onnxprune.model.graph import Graph, Node
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MALFORMED
from onnxprune.reconstruct.unfolded import Unfolded

__all__ = ["Added", "Layer", "Route", "Unknown", "route"]

Place = tuple[Node, int]


class Unknown(Exception):
    """There is no such route, for this reason."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer of the graph: its node, its form and its stored weight."""

    node: Node
    form: Unfolded
    weight: str


@dataclass(frozen=True, eq=False, slots=True)
class Added:
    """What is added to the columns: a stored tensor (or '' and the values), and per element of the operand its flat
    index there."""

    name: str
    values: np.ndarray
    at: np.ndarray


@dataclass(frozen=True, eq=False, slots=True)
class Route:
    """From a layer to an operand. channels, rows: for every element of the operand, which output of the layer it is
    (flat over groups and outputs), and of which row."""

    layer: Layer
    channels: np.ndarray
    rows: np.ndarray
    added: tuple[Added, ...]


def route(
    graph: Graph,
    registry: Mapping[str, Operator],
    end: Place,
    layer_of: Callable[[Node], Layer | None],
    owned: Callable[[str], bool],
) -> Route:
    """The route to an input of a node. Raises Unknown.

    layer_of: the linear layer that a node is. owned: whether a stored tensor is one of floats that one node reads.
    """
    return _Tracer(graph, registry, layer_of, owned).route(end)


@dataclass(frozen=True, eq=False, slots=True)
class _Move:
    """at: for every element of the output, the flat index of the element of the input that it is."""

    at: np.ndarray
    added: str | None = None
    added_at: np.ndarray | None = None


class _Tracer:
    def __init__(
        self,
        graph: Graph,
        registry: Mapping[str, Operator],
        layer_of: Callable[[Node], Layer | None],
        owned: Callable[[str], bool],
    ) -> None:
        self.graph, self.registry, self.layer_of, self.owned = graph, registry, layer_of, owned
        self.moves: dict[tuple[int, int], dict[str, _Move] | str] = {}

    def route(self, end: Place) -> Route:
        layer, path = self.path(end[0].inputs[end[1]])
        start = layer.node.outputs[0]
        channels, rows = self.outputs(layer, start)
        at = np.arange(channels.size).reshape(channels.shape)
        added: list[Added] = []
        for node, i, name in path:
            found = self.moved(node, i)
            if isinstance(found, str):
                raise Unknown(found)
            if name not in found:
                raise Unknown(f"{_shown(node)} lies between a layer and the product")
            move = found[name]
            at = at.reshape(-1)[move.at]
            added = [Added(a.name, a.values, a.at.reshape(-1)[move.at]) for a in added]
            if move.added is not None:
                assert move.added_at is not None
                added.append(self.stored(move.added, move.added_at))
        channels = channels.reshape(-1)
        result = Route(layer, channels[at], rows.reshape(-1)[at], tuple(added))
        wanted = np.zeros(int(channels.max()) + 1, bool)
        wanted[result.channels] = True
        for reader, i in self.readers(start, wanted[channels]):
            if (reader.index, i) != (end[0].index, end[1]):
                raise Unknown(f"{_shown(reader)} reads the same outputs of {_shown(layer.node)}")
        return result

    def path(self, name: str) -> tuple[Layer, list[tuple[Node, int, str]]]:
        """Back to a layer: it, and the nodes behind it with the input and the output that the way leads through."""
        path: list[tuple[Node, int, str]] = []
        while True:
            node = self.graph.producers.get(name)
            if node is None:
                raise Unknown("an operand is no layer's output")
            layer = self.layer_of(node)
            if layer is not None:
                return layer, path[::-1]
            operator = self.registry.get(node.op)
            data = [i for i, n in enumerate(node.inputs) if n and self.computed(n)]
            if len(data) != 1 or operator is None or operator.evaluate is None or node.captured:
                raise Unknown(f"{_shown(node)} lies between a layer and the product")
            path.append((node, data[0], name))
            name = node.inputs[data[0]]

    def computed(self, name: str) -> bool:
        return name not in self.graph.static and name not in self.graph.values

    def outputs(self, layer: Layer, start: str) -> tuple[np.ndarray, np.ndarray]:
        """Of every element of the layer's output tensor: which output it is, and of which row."""
        shape = self.graph.shapes.get(start)
        if shape is None or None in shape:
            raise Unknown("the size of a layer's output is unknown")
        sizes = [int(n or 0) for n in shape]
        form, count = layer.form, int(np.prod(sizes))
        view = form.linear.unfold_output(torch.arange(count).reshape(sizes)).numpy()
        labels = form.linear.terms[2]
        if view.size != count or view.ndim != len(labels):
            raise Unknown("a layer's output is no view of a matrix")
        own = [k for k, n in enumerate(labels) if n in form.groups or n in form.outputs]
        order = [labels.index(n) for n in (*form.groups, *form.outputs)]
        found = []
        for axes in (order, [k for k in range(view.ndim) if k not in own]):
            extents = [view.shape[k] for k in axes]
            index = np.arange(int(np.prod(extents))).reshape(extents)
            laid = np.expand_dims(index.transpose(np.argsort(axes)), [k for k in range(view.ndim) if k not in axes])
            flat = np.empty(count, np.int64)
            flat[view.reshape(-1)] = np.broadcast_to(laid, view.shape).reshape(-1)
            found.append(flat.reshape(sizes))
        return found[0], found[1]

    def readers(self, start: str, wanted: np.ndarray) -> Iterator[Place]:
        """Nodes that do more than move what they read, and read something wanted."""
        queue = [(start, wanted)]
        while queue:
            name, marks = queue.pop()
            if not marks.any():
                continue
            if name in self.graph.outputs:
                raise Unknown(f"the model's output '{name}' holds the same numbers")
            inside = next((n for n in self.graph.nodes if name in n.captured), None)
            if inside is not None:
                raise Unknown(f"a body of {_shown(inside)} reads the same numbers")
            for node, i in self.graph.consumers.get(name, ()):
                operator = self.registry.get(node.op)
                if operator is not None and operator.from_shape is not None:
                    continue
                found = self.moved(node, i)
                if isinstance(found, str):
                    yield node, i
                else:
                    queue += [(n, marks.reshape(-1)[move.at]) for n, move in found.items()]

    def moved(self, node: Node, i: int) -> dict[str, _Move] | str:
        """By output, what a node does with input i; or why it is no move."""
        key = (node.index, i)
        if key not in self.moves:
            try:
                self.moves[key] = self.move(node, i)
            except Unknown as reason:
                self.moves[key] = str(reason)
        return self.moves[key]

    def move(self, node: Node, i: int) -> dict[str, _Move]:
        operator = self.registry.get(node.op)
        shape = self.graph.shapes.get(node.inputs[i])
        refusal = Unknown(f"{_shown(node)} lies between a layer and the product")
        if operator is None or operator.evaluate is None or node.captured or shape is None or None in shape:
            raise refusal
        others = [n for k, n in enumerate(node.inputs) if n and k != i]
        if any(self.computed(n) for n in others) or any(self.value(n) is None for n in others):
            raise refusal
        sizes = [int(n or 0) for n in shape]
        added = None
        if operator.shift is not None:
            j, _, axis = operator.shift(node, i)
            if axis is not None or j == i:
                raise refusal
            added = node.inputs[j]
        noise = np.random.default_rng(0).standard_normal(sizes) * 10 ** np.random.default_rng(1).uniform(-3, 3, sizes)
        try:
            ones, places, seen = (
                self.evaluated(operator, node, i, x, added)
                for x in (np.ones(sizes), np.arange(1.0, noise.size + 1).reshape(sizes), noise)
            )
        except MALFORMED:
            raise refusal from None
        found = {}
        for name, one, place, value in zip(node.outputs, ones, places, seen, strict=False):
            if not name:
                continue
            scale = one.flat[0] if one.size else 0.0
            if not scale or not np.all(one == scale):
                raise refusal
            at = np.rint(place / scale).astype(np.int64) - 1
            if at.min() < 0 or at.max() >= noise.size:
                raise refusal
            if not np.allclose(value, scale * noise.reshape(-1)[at], rtol=1e-5, atol=0):
                raise refusal
            added_at = None
            if added is not None:
                of = self.value(added)
                assert of is not None
                added_at = np.broadcast_to(np.arange(of.size).reshape(of.shape), place.shape)
            found[name] = _Move(at, added, added_at)
        return found

    def evaluated(
        self, operator: Operator, node: Node, i: int, x: np.ndarray, added: str | None
    ) -> Sequence[np.ndarray]:
        """The node's outputs where input i is x and nothing is added."""
        values: list[np.ndarray | None] = [self.value(n) if n and k != i else None for k, n in enumerate(node.inputs)]
        values[i] = x
        for k, name in enumerate(node.inputs):
            of = values[k]
            if k != i and name == added and of is not None:
                values[k] = np.zeros_like(of)
        assert operator.evaluate is not None
        results = operator.evaluate(node, *values)
        return [np.asarray(r, np.float64) for r in (results if isinstance(results, tuple) else (results,))]

    def value(self, name: str) -> np.ndarray | None:
        found = self.graph.values.get(name)
        return self.graph.array(name) if found is None and name in self.graph.parameters else found

    def stored(self, name: str, at: np.ndarray) -> Added:
        value = self.value(name)
        assert value is not None
        return Added(name if self.owned(name) else "", value.reshape(-1), at)


def _shown(node: Node) -> str:
    return f"{node.op} '{node.label}'"
