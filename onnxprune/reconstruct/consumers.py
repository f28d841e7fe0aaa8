"""The linear layers behind a plan's groups: what is solved for, where its numbers stand, and what has to be left.

A consumer is an operand that a node contracts with a stored weight, along an axis that lost units. How it is unfolded
into rows comes from the operator's `linear` rule; a constant goes into the node's own bias, or into what the only
reader of its output adds or subtracts per channel (a BatchNormalization's mean, an Add of a stored tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import atoms, kept
from onnxprune.model.graph import Graph, Node
from onnxprune.model.weights import FLOATS
from onnxprune.ops.rules import Contraction, Kind, Linear
from onnxprune.reconstruct.beyond import Beyond, beyond
from onnxprune.reconstruct.logits import Logits, logits
from onnxprune.reconstruct.moves import Moves, Stored
from onnxprune.reconstruct.routes import Layer, Unknown, numbered
from onnxprune.reconstruct.unfolded import Unfolded, unfolded
from onnxprune.rewrite.edit import take
from onnxprune.select.plan import Plan

__all__ = ["Consumer", "Left", "Place", "consumers"]

LARGEST = 1 << 24  # elements of a layer's output that are followed one by one
MULTIPLIES = frozenset({Kind.PRODUCT, Kind.STATE})


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Where a constant per channel can go: a stored tensor of the pruned model and what is added to it."""

    name: str
    lay: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False, slots=True)
class Consumer:
    """A linear layer of the pruned model that is solved for.

    x, y: its input and output in the pruned model; y is that of the original, which the targets are taken from, unless
    they lie inside the node: then they are made from `source`, the original's input, with the original's weight.
    kept: per axis of the targets (as the original's tensor has them), what the plan keeps. offset: the constant that
    the node adds per channel now, (g, o). beyond: where the output goes from y.
    """

    label: str
    op: str
    groups: tuple[str, ...]
    form: Unfolded
    weight: str
    x: str
    y: str
    place: Place | None
    offset: np.ndarray
    kept: tuple[np.ndarray | None, ...]
    source: str = ""
    original: tuple[Unfolded, np.ndarray] | None = None
    beyond: Beyond | None = None

    def sizes(self) -> tuple[int, int, int]:
        """Groups, columns, outputs."""
        return self.form.sizes()


@dataclass(frozen=True, slots=True)
class Left:
    """A consumer that is left as it is, and why."""

    label: str
    op: str
    groups: tuple[str, ...]
    reason: str


def consumers(
    analysis: Analysis, plan: Plan, pruned: Graph, *, behind: bool
) -> tuple[list[Consumer | Logits], list[Left]]:
    """Every consumer of a group that loses units, in the pruned graph's order.

    behind: and every other linear layer behind one of them, whose input is complete but no longer quite the same.
    """
    found: list[Consumer | Logits] = []
    left: list[Left] = []
    finder = _Finder(analysis, plan, pruned)
    for node, contraction, groups in finder.contracted(behind=behind):
        made = finder.consumer(node, contraction, groups)
        if isinstance(made, Consumer | Logits):
            found.append(made)
        elif groups:
            left.append(Left(node.label, node.op, groups, made))
    return found, left


class _Finder:
    def __init__(self, analysis: Analysis, plan: Plan, pruned: Graph) -> None:
        self.analysis, self.graph, self.pruned = analysis, analysis.graph, pruned
        self.keep = plan.by_atom(analysis)
        self.ids = {g.atom: g.id for g in plan.pruned(analysis)}
        self.moves, self.whole_moves = Moves(pruned, analysis.registry), Moves(self.graph, analysis.registry)
        self.captured = {n for node in pruned.nodes for n in node.captured}

    def contracted(self, *, behind: bool) -> Iterator[tuple[Node, Contraction, tuple[str, ...]]]:
        changed: set[str] = set()
        for node in self.graph.nodes:
            differs = any(n in changed for n in node.inputs)
            for contraction in self.analysis.contractions.get(node.index, ()):
                groups = tuple(dict.fromkeys(self.ids[a] for a in atoms(contraction.over) if a in self.ids))
                wanted = contraction.kind in MULTIPLIES and not contraction.through
                if wanted and (groups or (behind and differs)):
                    yield node, contraction, groups
                differs |= bool(groups)
            if differs:
                changed.update(n for n in node.outputs if n)

    def consumer(self, node: Node, contraction: Contraction, groups: tuple[str, ...]) -> Consumer | Logits | str:
        """Or why there is none."""
        if contraction.kind is Kind.STATE:
            return "its input is its own output, one step earlier"
        w = self.weight(node, contraction)
        if w is None:
            return self.product(node, contraction, groups)
        small = self.in_pruned(node)
        if small is None:
            return "all of its inputs were removed"
        source = self.moves.stored(small.inputs[w])
        if source is None or source.reason:
            return f"its weight {'is computed from the data' if source is None else source.reason}"
        if not self.real(source):
            return "its weight is stored in integers"
        linear, form = self.form(self.pruned, small, w, source)
        if linear is None or form is None or not linear.weight_shape:
            return "this form of the operator has no closed form"
        if not all(map(self.single, source.names)):
            return "several nodes share its weight"
        bias = small.inputs[linear.bias] if linear.bias is not None and linear.bias < len(small.inputs) else ""
        if bias and self.numbers(bias) is None:
            return "its bias is no stored tensor"
        if linear.inside:
            return self.inside(node, small, form, w, groups)
        y = node.outputs[0]
        offset, place = self.constant(small, linear, y, form)
        masks = tuple(kept(e, self.keep) for e in self.analysis.axes[y])
        further = beyond(self.analysis, self.keep, self.pruned, y)
        x = small.inputs[linear.x]
        return Consumer(node.label, node.op, groups, form, source.name, x, y, place, offset, masks, beyond=further)

    def product(self, node: Node, contraction: Contraction, groups: tuple[str, ...]) -> Logits | str:
        """Both operands are computed from the data."""
        small = self.in_pruned(node)
        if small is None:
            return "all of its inputs were removed"
        if not groups:
            return "it lost no columns"
        nodes = (node, small)
        return logits(self.analysis, self.keep, self.moves, nodes, contraction, groups, self.layer, self.own)

    def weight(self, node: Node, contraction: Contraction) -> int | None:
        """The input that does not depend on the data; None where all operands do."""
        fixed = [i for i, _ in contraction.operands if node.inputs[i] in self.graph.static]
        return fixed[-1] if fixed else None

    def form(self, graph: Graph, node: Node, w: int, source: Stored) -> tuple[Linear | None, Unfolded | None]:
        rule = self.analysis.registry[node.op].linear
        shapes = [graph.shapes.get(n) if n else None for n in node.inputs]
        linear = rule(node, w, shapes) if rule is not None else None
        return linear, None if linear is None else unfolded(linear, source)

    @cached_property
    def became(self) -> dict[int, tuple[Node, int]]:
        """By the index of a node of the pruned graph, the original's node and its stored weight's input."""
        found: dict[int, tuple[Node, int]] = {}
        for node in self.graph.nodes:
            for contraction in self.analysis.contractions.get(node.index, ()):
                w = self.weight(node, contraction) if contraction.kind is Kind.PRODUCT else None
                small = self.in_pruned(node) if w is not None else None
                if small is not None and w is not None:
                    found[small.index] = node, w
        return found

    def layer(self, small: Node) -> Layer | None:
        """A node of the pruned graph as a linear layer, whose output is a tensor of its own."""
        node, w = self.became.get(small.index, (None, 0))
        source = self.moves.stored(small.inputs[w]) if node is not None else None
        if source is None or source.reason:
            return None
        linear, form = self.form(self.pruned, small, w, source)
        return None if linear is None or form is None or linear.inside else Layer(small, form, source.name)

    def inside(self, node: Node, small: Node, form: Unfolded, w: int, groups: tuple[str, ...]) -> Consumer | str:
        """Targets that no tensor holds: made from the original's input and weight, less the rows that went."""
        source = self.whole_moves.stored(node.inputs[w])
        if source is None or source.reason:
            return "this form of the operator has no closed form"
        linear, whole = self.form(self.graph, node, w, source)
        if linear is None or whole is None:
            return "this form of the operator has no closed form"
        gone = {
            label for label, size in zip(linear.terms[1], linear.weight_shape, strict=True) if label in whole.columns
        }
        masks = tuple(
            None if label in gone else kept(e, self.keep)
            for label, e in zip(linear.terms[1], self.analysis.uses[node.index, w], strict=True)
        )
        weight = take(source.seen(self.whole_moves.numbers(source)), masks)
        g, _, o = form.sizes()
        place = self.own_place(small, form.linear)
        return Consumer(
            node.label,
            node.op,
            groups,
            form,
            form.source.name,
            small.inputs[form.linear.x],
            "",
            place,
            np.zeros((g, o)),
            (),
            node.inputs[linear.x],
            (whole, weight.astype(np.float64) * linear.scale),
        )

    def in_pruned(self, node: Node) -> Node | None:
        """The node of the pruned graph that this one became."""
        made = self.pruned.producers.get(node.outputs[0])
        while made is not None and (made.op, made.proto.name) != (node.op, node.proto.name):
            # a constant was added behind it: see `rewrite.fold`
            made = self.pruned.producers.get(made.inputs[0]) if made.inputs else None
        return made

    def constant(self, node: Node, linear: Linear, y: str, form: Unfolded) -> tuple[np.ndarray, Place | None]:
        """What the node adds to its product now, up to the tensor y; and where more of it can go."""
        g, _, o = form.sizes()
        offset = np.zeros(g * o)
        place = self.own_place(node, linear)
        bias = node.inputs[linear.bias] if linear.bias is not None and linear.bias < len(node.inputs) else ""
        added = self.numbers(bias) if bias else None
        if added is not None:
            offset += added.reshape(-1).astype(np.float64) * linear.bias_scale
        output = node.outputs[0]
        while output != y:  # constants of dead units, added by the rewriter
            reader, i = self.pruned.consumers[output][0]
            offset += self.pruned.array(reader.inputs[1 - i]).reshape(-1).astype(np.float64)
            place = place or self.follower_place(output, form)
            output = reader.outputs[0]
        place = place or self.follower_place(y, form)
        return offset.reshape(g, o), place

    def numbers(self, name: str) -> np.ndarray | None:
        """Of a tensor that is stored."""
        source = self.moves.stored(name)
        return None if source is None or source.reason else source.seen(self.moves.numbers(source))

    def own_place(self, node: Node, linear: Linear) -> Place | None:
        bias = node.inputs[linear.bias] if linear.bias is not None and linear.bias < len(node.inputs) else ""
        return self.placed(bias, lambda c: linear.lay(c) / linear.bias_scale) if bias else None

    def placed(self, name: str, lay: Callable[[np.ndarray], np.ndarray]) -> Place | None:
        """Where the numbers of a tensor are stored, if nothing else reads them."""
        source = self.moves.stored(name)
        if source is None or source.reason or not all(map(self.single, source.names)):
            return None
        if not self.real(source):
            return None
        shape = self.pruned.parameters[source.name].shape
        return Place(source.name, lambda c: source.back(lay(c), shape))

    def real(self, source: Stored) -> bool:
        """Whether the mirror has the numbers as reals, whatever the file stores."""
        return source.integers is not None or self.pruned.parameters[source.name].elem_type in FLOATS

    def own(self, name: str) -> bool:
        """Whether it is a stored tensor of floats that one node reads."""
        parameter = self.pruned.parameters.get(name)
        return parameter is not None and parameter.elem_type in FLOATS and self.single(name)

    def single(self, name: str) -> bool:
        """Whether nothing but one node reads its numbers."""
        return len(self.readers(name)) == 1 and name not in self.captured and name not in self.pruned.outputs

    def readers(self, name: str) -> list[tuple[Node, int]]:
        """Nodes that read more of a tensor than its shape."""
        registry = self.analysis.registry
        found = ((node, i, registry.get(node.op)) for node, i in self.pruned.consumers.get(name, ()))
        return [(node, i) for node, i, operator in found if operator is None or operator.from_shape is None]

    def follower_place(self, y: str, form: Unfolded) -> Place | None:
        """In what is added to a tensor or taken off it, where nothing but moves lies between."""
        channels: np.ndarray | None = None
        scale = 1.0
        while self.single(y):
            ((reader, i),) = self.readers(y)
            operator = self.analysis.registry.get(reader.op)
            if operator is None or (operator.shift is None and operator.evaluate is None):
                return None
            if channels is None:
                place = self.direct_place(reader, i, form) if operator.shift is not None else None
                channels = None if place is not None else self.channels(y, form)
                if channels is None:
                    return place
            found = self.added_place(reader, i, channels, scale)
            moves = (self.moves.of(reader, i) or {}) if found is None else {}
            if len(moves) != 1:
                return found
            ((y, move),) = moves.items()
            channels, scale = channels.reshape(-1)[move.at], scale * move.scale
        return None

    def channels(self, y: str, form: Unfolded) -> np.ndarray | None:
        """Of every element of a layer's output, which channel it is; None where that is unknown, or too many."""
        shape = self.pruned.shapes.get(y)
        if shape is None or prod(n or 0 for n in shape) > LARGEST:
            return None
        try:
            return numbered(form, shape)[0]
        except Unknown:
            return None

    def direct_place(self, reader: Node, i: int, form: Unfolded) -> Place | None:
        """As `added_place`, of a layer's own output with its channels on one axis: what most layers are."""
        shape, channel, count = self.pruned.shapes.get(reader.inputs[i]), form.linear.channel, prod(form.sizes()[::2])
        j, sign, axis = self.shift(reader, i)
        found = self.pruned.shapes.get(reader.inputs[j]) if j != i and j < len(reader.inputs) else None
        if channel is None or shape is None or found is None:
            return None
        channel %= len(shape)
        laid = found if axis is not None else (1,) * (len(shape) - len(found)) + found
        wanted = (count,) if axis is not None else tuple(count if k == channel else 1 for k in range(len(shape)))
        if laid != wanted or (axis is not None and axis != channel):
            return None
        return self.placed(reader.inputs[j], lambda c: sign * c)

    def added_place(self, reader: Node, i: int, channels: np.ndarray, scale: float) -> Place | None:
        """In what a node adds to its input i. channels: of every element of that, the layer's channel."""
        j, sign, axis = self.shift(reader, i)
        name = reader.inputs[j] if j != i and j < len(reader.inputs) else ""
        shape = self.pruned.shapes.get(name)
        if shape is None or name not in self.pruned.static:
            return None
        sizes = tuple(int(n or 0) for n in shape)
        index = np.arange(prod(sizes))
        index = index.reshape(sizes) if axis is None else index.reshape([-1, *[1] * (channels.ndim - axis - 1)])
        try:
            at = np.broadcast_to(index, channels.shape)
        except ValueError:  # it makes the output larger
            return None
        channel = np.full(index.size, -1)
        channel[at.reshape(-1)] = channels.reshape(-1)
        if (channel[at] != channels).any():
            return None  # several channels share a number
        return self.placed(name, lambda c: (sign * scale) * c[channel].reshape(sizes))

    def shift(self, reader: Node, i: int) -> tuple[int, int, int | None]:
        rule = self.analysis.registry[reader.op].shift
        return (i, 1, None) if rule is None else rule(reader, i)
