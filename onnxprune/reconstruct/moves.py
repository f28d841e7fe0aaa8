"""Nodes that move numbers: every element of an output is one element of an input, times one number.

That is found out by what a node gives for numbers that name their places, so that no operator needs to be known here.
A weight that reaches its layer through such nodes can be solved for as if it were stored there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.mirroring.quantised import INTEGERS, Quantised
from onnxprune.model.graph import Graph, Node
from onnxprune.model.weights import FLOATS
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MALFORMED

__all__ = ["Move", "Moves", "Stored", "shown"]


@dataclass(frozen=True, eq=False, slots=True)
class Move:
    """at: for every element of the output, the flat index of the element of the input that it is, times `scale`.
    added: the stored tensor that is added on the way, and added_at: flat indices there."""

    at: np.ndarray
    scale: float
    added: str | None = None
    added_at: np.ndarray | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """Where the numbers of a tensor are stored, each of them once: in the parameter `name`. reason: why they are
    nowhere, as a predicate.

    names: of the parameter and of what lies between. at: for every element of the tensor the flat index of the one that
    it is, times `scale`; None where it is the parameter itself. integers: how the parameter's integers stand for them.
    """

    name: str = ""
    names: tuple[str, ...] = ()
    at: np.ndarray | None = None
    scale: float = 1.0
    reason: str = ""
    integers: Quantised | None = None

    def seen(self, stored: np.ndarray) -> np.ndarray:
        """The tensor's numbers, where the parameter holds these, or integers that stand for them."""
        return stored if self.at is None else stored.reshape(-1)[self.at] * self.scale

    def back(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The parameter's, of this shape, where the tensor's are to be these: the inverse of `seen`."""
        if self.at is None:
            return tensor.reshape(shape)
        found = np.empty(tensor.size, np.float64)
        found[self.at.reshape(-1)] = tensor.reshape(-1) / self.scale
        return found.reshape(shape)


class Moves:
    """What the nodes of a graph do to single inputs of theirs."""

    def __init__(self, graph: Graph, registry: Mapping[str, Operator]) -> None:
        self.graph, self.registry = graph, registry
        self.found: dict[tuple[int, int], dict[str, Move] | None] = {}
        self.known: dict[str, Stored | None] = {}

    def of(self, node: Node, i: int) -> dict[str, Move] | None:
        """By output, what a node does with input i; None where it is no move."""
        key = (node.index, i)
        if key not in self.found:
            try:
                self.found[key] = self._probed(node, i)
            except MALFORMED:
                self.found[key] = None
        return self.found[key]

    def stored(self, name: str) -> Stored | None:
        """Where the numbers of a tensor are stored; None where they are computed from the data."""
        if name not in self.known:
            self.known[name] = self._stored(name)
        return self.known[name]

    def computed(self, name: str) -> bool:
        """Whether a tensor is computed from the data."""
        return name not in self.graph.static and name not in self.graph.values

    def value(self, name: str) -> np.ndarray | None:
        found = self.graph.values.get(name)
        return self.graph.array(name) if found is None and name in self.graph.parameters else found

    def numbers(self, source: Stored) -> np.ndarray:
        """What a parameter holds, or its integers stand for."""
        array = self.graph.array(source.name)
        return array if source.integers is None else source.integers.reals(array)

    def _stored(self, name: str) -> Stored | None:
        graph = self.graph
        if name in graph.parameters:
            return Stored(name, (name,))
        if name not in graph.static or name not in graph.producers:
            return None
        node = graph.producers[name]
        integers = self._integers(node)
        if integers is not None:
            return Stored(node.inputs[0], (node.inputs[0], name), integers=integers)
        numbers = [i for i, n in enumerate(node.inputs) if n and graph.types.get(n) in FLOATS]
        if len(numbers) > 1:  # all but one are factors
            numbers = [i for i in numbers if any(k != 1 for k in graph.shapes.get(node.inputs[i], ()))]
        source = self.stored(node.inputs[numbers[0]]) if len(numbers) == 1 else None
        refusal = Stored(reason=f"is computed from what is stored by {shown(node)}")
        if graph.types.get(node.inputs[0]) not in FLOATS:
            return Stored(reason=f"is stored in integers, which {shown(node)} turns into numbers")
        if source is None:
            return refusal
        move = (self.of(node, numbers[0]) or {}).get(name) if not source.reason else None
        if move is None or move.added is not None:
            return source if source.reason else refusal
        at = move.at if source.at is None else source.at.reshape(-1)[move.at]
        if at.size != graph.parameters[source.name].size or len(np.unique(at)) < at.size:
            return refusal
        return Stored(source.name, (*source.names, name), at, move.scale * source.scale, integers=source.integers)

    def _integers(self, node: Node) -> Quantised | None:
        """How stored integers stand for the numbers that a DequantizeLinear gives; None where it is none of such."""
        operator, parameter = self.registry.get(node.op), self.graph.parameters.get(node.inputs[0])
        if operator is None or not operator.dequantises or parameter is None or parameter.elem_type not in INTEGERS:
            return None
        scale, zero = (self.value(n) if n else np.zeros(()) for n in (*node.inputs, "")[1:3])
        if scale is None or zero is None:
            return None
        axis, block = (int(node.attributes.get(n, d)) for n, d in (("axis", 1), ("block_size", 0)))
        return Quantised(parameter.elem_type, scale, zero, axis, block)

    def _probed(self, node: Node, i: int) -> dict[str, Move] | None:
        operator = self.registry.get(node.op)
        shape = self.graph.shapes.get(node.inputs[i])
        if operator is None or operator.evaluate is None or node.captured or shape is None or None in shape:
            return None
        others = [n for k, n in enumerate(node.inputs) if n and k != i]
        if any(self.computed(n) for n in others) or any(self.value(n) is None for n in others):
            return None
        sizes = [int(n or 0) for n in shape]
        added = None
        if operator.shift is not None:
            j, _, axis = operator.shift(node, i)
            if axis is not None or j == i:
                return None
            added = node.inputs[j]
        noise = np.random.default_rng(0).standard_normal(sizes) * 10 ** np.random.default_rng(1).uniform(-3, 3, sizes)
        ones, places, seen = (
            self._evaluated(operator, node, i, x, added)
            for x in (np.ones(sizes), np.arange(1.0, noise.size + 1).reshape(sizes), noise)
        )
        found = {}
        for name, one, place, value in zip(node.outputs, ones, places, seen, strict=False):
            if not name:
                continue
            scale = float(one.flat[0]) if one.size else 0.0
            if not scale or not np.all(one == scale):
                return None
            at = np.rint(place / scale).astype(np.int64) - 1
            if at.min() < 0 or at.max() >= noise.size:
                return None
            if not np.allclose(value, scale * noise.reshape(-1)[at], rtol=1e-5, atol=0):
                return None
            added_at = None
            if added is not None:
                of = self.value(added)
                assert of is not None
                added_at = np.broadcast_to(np.arange(of.size).reshape(of.shape), place.shape)
            found[name] = Move(at, scale, added, added_at)
        return found

    def _evaluated(
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


def shown(node: Node) -> str:
    """As messages name it."""
    return f"{node.op} '{node.label}'"
