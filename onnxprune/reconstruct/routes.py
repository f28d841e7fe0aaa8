"""Which outputs of a linear layer the columns of a tensor are, where nothing but moves and scalings lies between.

What is a move is found out by trying (`moves`). What is added on the way and is stored goes along. Everything is in the
sizes that the graph was loaded with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onnxprune.model.graph import Graph, Node
from onnxprune.reconstruct.moves import Moves, shown
from onnxprune.reconstruct.unfolded import Unfolded

__all__ = ["Added", "Layer", "Route", "Unknown", "numbered", "route"]

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
    moves: Moves,
    end: Place,
    layer_of: Callable[[Node], Layer | None],
    owned: Callable[[str], bool],
) -> Route:
    """The route to an input of a node. Raises Unknown.

    layer_of: the linear layer that a node is. owned: whether a stored tensor is one of floats that one node reads.
    """
    return _Tracer(moves, layer_of, owned).route(end)


class _Tracer:
    def __init__(self, moves: Moves, layer_of: Callable[[Node], Layer | None], owned: Callable[[str], bool]) -> None:
        self.moves, self.layer_of, self.owned = moves, layer_of, owned
        self.graph: Graph = moves.graph

    def route(self, end: Place) -> Route:
        layer, path = self.path(end[0].inputs[end[1]])
        start = layer.node.outputs[0]
        channels, rows = numbered(layer.form, self.graph.shapes.get(start))
        at = np.arange(channels.size).reshape(channels.shape)
        added: list[Added] = []
        for node, i, name in path:
            found = self.moves.of(node, i)
            if found is None or name not in found:
                raise _between(node)
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
                raise Unknown(f"{shown(reader)} reads the same outputs of {shown(layer.node)}")
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
            operator = self.moves.registry.get(node.op)
            data = [i for i, n in enumerate(node.inputs) if n and self.moves.computed(n)]
            if len(data) != 1 or operator is None or operator.evaluate is None or node.captured:
                raise _between(node)
            path.append((node, data[0], name))
            name = node.inputs[data[0]]

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
                raise Unknown(f"a body of {shown(inside)} reads the same numbers")
            for node, i in self.graph.consumers.get(name, ()):
                operator = self.moves.registry.get(node.op)
                if operator is not None and operator.from_shape is not None:
                    continue
                found = self.moves.of(node, i)
                if found is None:
                    yield node, i
                else:
                    queue += [(n, marks.reshape(-1)[move.at]) for n, move in found.items()]

    def stored(self, name: str, at: np.ndarray) -> Added:
        value = self.moves.value(name)
        assert value is not None
        return Added(name if self.owned(name) else "", value.reshape(-1), at)


def numbered(form: Unfolded, shape: Sequence[int | None] | None) -> tuple[np.ndarray, np.ndarray]:
    """Of every element of a layer's output tensor: which output it is (flat over groups and outputs), and of which row.
    Raises Unknown."""
    if shape is None or None in shape:
        raise Unknown("the size of a layer's output is unknown")
    sizes = [int(n or 0) for n in shape]
    count = int(np.prod(sizes))
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


def _between(node: Node) -> Unknown:
    return Unknown(f"{shown(node)} lies between a layer and the product")
