"""Products of two tensors that are both computed from the data and both lost columns: queries and keys.

What the removed columns gave is predicted from the kept ones by a matrix per head between the two (`bilinear`). It is
absorbed into the linear layer that one of them comes from, where nothing but moves and scalings lies between the two
(`routes`): for one projection of queries, keys and values, into the queries' rows alone. What comes before a mask or a
softmax is what the original's products are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import Atom, Expr, atoms, kept
from onnxprune.model.graph import Graph, Node
from onnxprune.ops.rules import Contraction, Linear
from onnxprune.reconstruct.bilinear import DENSE, Grams
from onnxprune.reconstruct.moves import Moves
from onnxprune.reconstruct.routes import Layer, Route, Unknown, route
from onnxprune.reconstruct.unfolded import Unfolded, unfolded

__all__ = ["Logits", "Mixed", "logits"]

WIDEST = 256  # columns of a head
SAMPLES = 256  # of heads that are solved iteratively: each gives as many equations as it has products


@dataclass(frozen=True, eq=False, slots=True)
class Mixed:
    """A stored tensor that a head's matrix mixes: (tuples, columns) of flat indices, and each tuple's head."""

    name: str
    at: np.ndarray
    heads: np.ndarray


@dataclass(frozen=True, eq=False, slots=True)
class Mask:
    """Kept indices of an axis. sizes: (-1, n) or (n, -1) where they are of one factor of the axis, and its size; the
    other one is a batch."""

    axis: int
    kept: np.ndarray
    size: int
    sizes: tuple[int, int] | None = None

    def taken(self, tensor: Tensor) -> Tensor:
        kept = torch.from_numpy(self.kept)
        if self.sizes is None:
            return tensor.index_select(self.axis, kept)
        at = self.axis + int(self.sizes[0] < 0)
        return tensor.unflatten(self.axis, self.sizes).index_select(at, kept).flatten(self.axis, self.axis + 1)

    def fits(self, tensor: Tensor) -> bool:
        size = tensor.shape[self.axis]
        return size == self.size if self.sizes is None else not size % max(self.sizes)

    def of_factor(self, sizes: tuple[int, int]) -> Mask:
        """Of the factor that has so many indices left, where it is one of it."""
        left = max(sizes)
        others = len(self.kept) // left
        size = self.size // others
        inner = sizes[0] < 0
        kept = self.kept[:left] if inner else self.kept[::others] // others
        index = np.arange(others)
        whole = index[:, None] * size + kept if inner else kept[:, None] * others + index
        if not np.array_equal(whole.reshape(-1), self.kept):
            return self
        return Mask(self.axis, kept, self.size, (-1, size) if inner else (size, -1))


@dataclass(frozen=True, eq=False, slots=True)
class Operand:
    """One factor. name: in the pruned model; of: in the original. masks: by axis there, what the plan keeps, and all of
    the columns. order: its labels' places as (samples, heads, rows, columns), each some labels; None: it has no such
    axis, and the same for all of them."""

    name: str
    of: str
    masks: tuple[Mask, ...]
    unfold: Callable[[Tensor], Tensor]
    order: tuple[tuple[int | None, ...], ...]

    def laid(self, tensor: Tensor) -> Tensor:
        """As (samples, heads, rows, columns), with several axes for each of them."""
        view = self.unfold(tensor)
        flat = [k for part in self.order for k in part]
        view = view.permute([k for k in flat if k is not None])
        for place, k in enumerate(flat):
            view = view.unsqueeze(place) if k is None else view
        return view

    def whole(self, tensor: Tensor) -> Tensor:
        """The original's, with what the plan keeps of everything but the columns."""
        for mask in self.masks:
            tensor = mask.taken(tensor)
        return tensor

    def fits(self, tensor: Tensor) -> bool:
        """Whether the original's tensor has axes that the masks are of."""
        return all(m.fits(tensor) for m in self.masks)


@dataclass(frozen=True, eq=False, slots=True)
class Logits:
    """A product that is solved for, and the layer that absorbs the solution: the one behind `left`.

    channels: (heads, columns): which output of the layer each column is. weight: the layer's. mixed: what is added on
    the way from there, and goes along.
    """

    label: str
    op: str
    groups: tuple[str, ...]
    left: Operand
    right: Operand
    form: Unfolded
    weight: str
    channels: np.ndarray
    mixed: tuple[Mixed, ...]

    def sizes(self) -> tuple[int, int]:
        """Heads, columns."""
        return self.channels.shape[0], self.channels.shape[1]

    def limit(self, room: int) -> int:
        """How many samples may be taken, so that their moments fit."""
        heads, width = self.sizes()
        found = max(1, room // Grams.nbytes(1, heads, width))
        return found if width * width <= DENSE else min(found, SAMPLES)

    def gather(
        self,
        grams: Grams,
        factors: tuple[Tensor, Tensor],
        originals: tuple[Tensor, Tensor],
        limit: int,
        rng: np.random.Generator,
    ) -> None:
        """Add at most so many samples of a batch; none where its axes are other ones than those that were analysed."""
        if not self.left.fits(originals[0]) or not self.right.fits(originals[1]):
            return
        q, k, whole_q, whole_k = self.rows(factors, originals)
        if q.shape[1] != len(self.channels) or any(a.shape[:3] != b.shape[:3] for a, b in ((q, whole_q), (k, whole_k))):
            return
        if len(q) > limit:
            chosen = np.sort(rng.choice(len(q), limit, replace=False))
            q, k, whole_q, whole_k = (x[chosen] for x in (q, k, whole_q, whole_k))
        grams.add(*(np.ascontiguousarray(x, np.float64) for x in (q, k, whole_q, whole_k)))

    def rows(self, factors: tuple[Tensor, Tensor], originals: tuple[Tensor, Tensor]) -> list[np.ndarray]:
        """Both factors and the original's as (samples, heads, rows, columns)."""
        found = []
        for pair in (factors, (self.left.whole(originals[0]), self.right.whole(originals[1]))):
            laid = [o.laid(t) for o, t in zip((self.left, self.right), pair, strict=True)]
            counts = [[len(part) for part in o.order] for o in (self.left, self.right)]
            shared = counts[0][0] + counts[0][1]
            outer = laid[0].shape[:shared]
            samples = prod(outer[: counts[0][0]])
            for tensor, count in zip(laid, counts, strict=True):
                inner = tensor.shape[shared:]
                whole = tensor.expand(*outer, *inner)
                found.append(whole.reshape(samples, -1, prod(inner[: count[2]]), inner[-1]).numpy())
        return found

    def turn(self, tensor: Tensor, matrices: np.ndarray) -> Tensor:
        """The left factor with its columns mixed, as the layer gives it once it has absorbed the matrices."""
        made = tensor.contiguous().clone()
        view = self.left.laid(made)
        samples, heads, rows, _ = ([view.shape[n] for n in part] for part in _places(self.left.order))
        flat = view.reshape(prod(samples), prod(heads), prod(rows), -1)
        view.copy_((flat.double() @ torch.from_numpy(matrices)).reshape(view.shape))
        return made

    def absorbed(self, matrices: np.ndarray, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """New values of the weight and of what goes along. matrices: (heads, columns, columns)."""
        shape = stored[self.weight].shape
        matrix = self.form.matrix(stored[self.weight])
        rows = matrix.reshape(-1, matrix.shape[-1])
        rows[self.channels] = matrices.swapaxes(1, 2) @ rows[self.channels]
        found = {self.weight: self.form.stored(matrix, shape)}
        for mixed in self.mixed:
            values = np.array(stored[mixed.name], np.float64)
            flat = values.reshape(-1)
            flat[mixed.at] = np.einsum("nij,ni->nj", matrices[mixed.heads], flat[mixed.at])
            found[mixed.name] = values
        return found


def _places(order: Sequence[Sequence[int | None]]) -> list[range]:
    found, start = [], 0
    for part in order:
        found.append(range(start, start + len(part)))
        start += len(part)
    return found


def logits(
    analysis: Analysis,
    keep: Mapping[Atom, np.ndarray],
    moves: Moves,
    nodes: tuple[Node, Node],
    contraction: Contraction,
    groups: tuple[str, ...],
    layer_of: Callable[[Node], Layer | None],
    owned: Callable[[str], bool],
) -> Logits | str:
    """The product at a node (of the original, and what it became), or why it is left. keep: kept indices by atom;
    moves: of the pruned graph."""
    (node, small), pruned = nodes, moves.graph
    if len(contraction.operands) != 2:
        return "it is a product of more than two tensors"
    first, second = (i for i, _ in contraction.operands)
    rule = analysis.registry[node.op].linear
    shapes = [pruned.shapes.get(n) if n else None for n in small.inputs]
    linear = rule(small, second, shapes) if rule is not None else None
    form = unfolded(linear) if linear is not None else None
    if linear is None or form is None or linear.x != first or len(form.columns) != 1:
        return "this form of the operator has no closed form for two computed operands"
    gone = set(atoms(contraction.over))
    whole = {a: m for a, m in keep.items() if a not in gone}
    masks = [_masks(analysis.axes[node.inputs[i]], whole) for i in (first, second)]
    reasons = []
    for side in (0, 1):
        try:
            found = route(moves, (small, (first, second)[side]), layer_of, owned)
            divided = _divided(_Terms.of(linear), found, side, form.columns[0], masks[side])
            heads, channels, mixed = _mixed(found, divided, side, form.columns[0], pruned, owned)
        except Unknown as reason:
            reasons.append(str(reason))
            continue
        if channels.shape[1] > WIDEST:
            return f"{channels.shape[1]} columns that two tensors computed from the data share are too many"
        orders = divided.orders(heads, form.columns)
        made = [
            Operand(small.inputs[i], node.inputs[i], divided.masks(n, masks[n]), divided.unfold[n], orders[n])
            for n, i in enumerate((first, second))
        ]
        layer = found.layer
        sides = made[side], made[1 - side]
        return Logits(node.label, node.op, groups, *sides, layer.form, layer.weight, channels, mixed)
    return "; ".join(dict.fromkeys(reasons))


def _masks(axes: Sequence[Expr], keep: Mapping[Atom, np.ndarray]) -> tuple[Mask, ...]:
    found = ((k, e, kept(e, keep)) for k, e in enumerate(axes))
    return tuple(Mask(k, m, e.size) for k, e, m in found if m is not None)


@dataclass(frozen=True, eq=False, slots=True)
class _Terms:
    """Labels of both operands' axes, and the views that have these axes. parted: per operand, the axes of the tensor
    that are two labels, and their sizes."""

    labels: tuple[tuple[str, ...], tuple[str, ...]]
    unfold: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    parted: tuple[Mapping[int, tuple[int, int]], Mapping[int, tuple[int, int]]] = ({}, {})

    @classmethod
    def of(cls, linear: Linear) -> _Terms:
        return cls((linear.terms[0], linear.terms[1]), (linear.unfold, linear.unfold_weight))

    def seen(self, side: int, array: np.ndarray, column: str) -> np.ndarray:
        """An array of an operand's shape with its columns last."""
        view = self.unfold[side](torch.from_numpy(np.array(array))).numpy()
        return np.moveaxis(view, self.labels[side].index(column), -1)

    def split(self, label: str, sizes: tuple[int, int]) -> _Terms:
        """With two labels in place of one, which both operands have."""
        labels, views, parted = [], [], []
        for own, unfold in zip(self.labels, self.unfold, strict=True):
            at = own.index(label)
            labels.append((*own[:at], f"{label}.0", f"{label}.1", *own[at + 1 :]))
            views.append(partial(_unflattened, unfold, at, sizes))
            parted.append({at: sizes})
        return _Terms((labels[0], labels[1]), (views[0], views[1]), (parted[0], parted[1]))

    def masks(self, side: int, masks: Sequence[Mask]) -> tuple[Mask, ...]:
        parted = self.parted[side]
        return tuple(m.of_factor(parted[m.axis]) if m.axis in parted else m for m in masks)

    def orders(self, heads: Sequence[str], columns: Sequence[str]) -> list[tuple[tuple[int | None, ...], ...]]:
        """`Operand.order` of both."""
        samples = [n for n in self.labels[0] if n in self.labels[1] and n not in (*heads, *columns)]
        found = []
        for own in self.labels:
            rows = [n for n in own if n not in (*samples, *heads, *columns)]
            parts = (samples, heads, rows, columns)
            found.append(tuple(tuple(own.index(n) if n in own else None for n in part) for part in parts))
        return found


def _unflattened(unfold: Callable[[Tensor], Tensor], axis: int, sizes: tuple[int, int], x: Tensor) -> Tensor:
    return unfold(x).unflatten(axis, sizes)


def _divided(terms: _Terms, found: Route, side: int, column: str, masks: Sequence[Mask]) -> _Terms:
    """With batches and heads told apart where they share an axis. masks: of the operand in the original."""
    channels = terms.seen(side, found.channels, column)
    if channels.size != found.channels.size or channels.ndim != found.channels.ndim:
        return terms
    by_axis = {m.axis: m for m in masks}
    for k, label in enumerate(n for n in terms.labels[side] if n != column):
        rows = np.moveaxis(channels, k, 0).reshape(channels.shape[k], -1, channels.shape[-1])[:, 0]
        heads, of = np.unique(rows, axis=0, return_inverse=True)
        of, count, mask = of.reshape(-1), len(heads), by_axis.get(terms.labels[side].index(label))
        if count == len(rows) or len(rows) % count or label not in terms.labels[1 - side] or (count == 1 and not mask):
            continue
        inner = np.all(of.reshape(-1, count) == of[:count])
        outer = np.all(of.reshape(count, -1) == of[:: len(rows) // count, None])
        for holds, sizes in ((inner, (-1, count)), (outer, (count, -1))):
            if holds and (mask is None or mask.of_factor(sizes) is not mask):
                return terms.split(label, sizes)
    return terms


def _mixed(
    found: Route, terms: _Terms, side: int, column: str, pruned: Graph, owned: Callable[[str], bool]
) -> tuple[tuple[str, ...], np.ndarray, tuple[Mixed, ...]]:
    """Labels of heads, channels (heads, columns) and what goes along. Raises Unknown where a head's columns are not a
    set of the layer's outputs of their own, at every place the same."""
    if not owned(found.layer.weight):
        raise Unknown("several nodes share the weight of the layer in front")
    others = [n for n in terms.labels[side] if n != column]
    channels, rows = (terms.seen(side, a, column) for a in (found.channels, found.rows))
    if not np.all(rows == rows[..., :1]):
        raise Unknown("the columns come from several rows of a layer")
    varies = [k for k in range(len(others)) if not np.all(channels == channels.take([0], k))]
    heads = channels[tuple(slice(None) if k in varies else 0 for k in range(len(others)))]
    sizes, width = heads.shape[:-1], heads.shape[-1]
    heads = heads.reshape(-1, width)
    g, _, o = found.layer.form.sizes()
    if len(np.unique(heads)) < heads.size or not np.all(heads // o == heads[:, :1] // o):
        raise Unknown("several heads share columns" if g == 1 else "the columns are of several groups of a layer")
    laid = np.arange(len(heads)).reshape([sizes[varies.index(k)] if k in varies else 1 for k in range(len(others))])
    head = np.broadcast_to(laid, channels.shape[:-1]).reshape(-1)
    mixed = [_along(a.name, a.values, terms.seen(side, a.at, column).reshape(-1, width), head) for a in found.added]
    mixed.append(_bias(found.layer, heads, pruned, owned))
    return tuple(others[k] for k in varies), heads, tuple(m for m in mixed if m is not None)


def _along(name: str, values: np.ndarray, at: np.ndarray, heads: np.ndarray) -> Mixed | None:
    """What a stored tensor adds to the columns of the heads, row by row; None where it adds nothing."""
    if not values[at].any():
        return None
    if not name:
        raise Unknown("what is added to the columns is no stored tensor of floats of their own")
    tuples = np.unique(np.concatenate([heads[:, None], at], 1), axis=0)
    if len(np.unique(tuples[:, 1:])) < tuples[:, 1:].size:
        raise Unknown("what is added to the columns is the same for several of them, or of the heads")
    return Mixed(name, tuples[:, 1:], tuples[:, 0])


def _bias(layer: Layer, heads: np.ndarray, pruned: Graph, owned: Callable[[str], bool]) -> Mixed | None:
    linear = layer.form.linear
    names = layer.node.inputs
    name = names[linear.bias] if linear.bias is not None and linear.bias < len(names) else ""
    if not name:
        return None
    if name not in pruned.parameters:
        raise Unknown("the bias of the layer in front is no stored tensor")
    g, _, o = layer.form.sizes()
    order = np.argsort(np.asarray(linear.lay(np.arange(g * o))).reshape(-1))
    values = pruned.array(name).reshape(-1)
    if len(order) != values.size:
        raise Unknown("the bias of the layer in front is not one number per output")
    return _along(name if owned(name) else "", values, order[heads], np.arange(len(heads)))
