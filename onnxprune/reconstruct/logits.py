"""Products of two tensors that are both computed from the data and both lost columns: queries and keys.

What the removed columns gave is predicted from the kept ones by a matrix per head between the two (`bilinear`). It is
absorbed into the linear layer that one of them comes from, where nothing but moves and scalings lies between the two
(`routes`): for one projection of queries, keys and values, into the queries' rows alone. What comes before a mask or a
softmax is what the original's products are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import Atom, atoms, kept
from onnxprune.model.graph import Graph, Node
from onnxprune.ops.rules import Contraction
from onnxprune.reconstruct.bilinear import DENSE, Grams
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
class Operand:
    """One factor. name: in the pruned model; of: in the original. masks: per axis there, what the plan keeps, and all
    of the columns. order: its labels' places as (samples, heads, rows, columns), each some labels; None: it has no such
    axis, and the same for all of them."""

    name: str
    of: str
    masks: tuple[np.ndarray | None, ...]
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
        for axis, mask in enumerate(self.masks):
            tensor = tensor if mask is None else tensor.index_select(axis, torch.from_numpy(mask))
        return tensor


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
        """Add at most so many samples of a batch."""
        q, k, whole_q, whole_k = self.rows(factors, originals)
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
    pruned: Graph,
    nodes: tuple[Node, Node],
    contraction: Contraction,
    groups: tuple[str, ...],
    layer_of: Callable[[Node], Layer | None],
    owned: Callable[[str], bool],
) -> Logits | str:
    """The product at a node (of the original, and what it became), or why it is left. keep: kept indices by atom."""
    node, small = nodes
    if len(contraction.operands) != 2:
        return "it is a product of more than two tensors"
    first, second = (i for i, _ in contraction.operands)
    rule = analysis.registry[node.op].linear
    shapes = [pruned.shapes.get(n) if n else None for n in small.inputs]
    linear = rule(small, second, shapes) if rule is not None else None
    form = unfolded(linear) if linear is not None else None
    if linear is None or form is None or linear.x != first or len(form.columns) != 1:
        return "both operands are computed from the data, and this form of the operator has no closed form"
    gone = set(atoms(contraction.over))
    whole = {a: m for a, m in keep.items() if a not in gone}
    reasons = []
    for left, right, views in (
        ((first, 0), (second, 1), (linear.unfold, linear.unfold_weight)),
        ((second, 1), (first, 0), (linear.unfold_weight, linear.unfold)),
    ):
        try:
            found = route(pruned, analysis.registry, (small, left[0]), layer_of, owned)
            heads, channels, mixed = _mixed(found, linear.terms[left[1]], form.columns[0], views[0], pruned, owned)
        except Unknown as reason:
            reasons.append(str(reason))
            continue
        if channels.shape[1] > WIDEST:
            return f"{channels.shape[1]} columns that two tensors computed from the data share are too many"
        samples = tuple(n for n in form.groups if n not in heads)
        operands = []
        for (i, term), view in zip((left, right), views, strict=True):
            labels = linear.terms[term]
            rows = tuple(n for n in labels if n not in (*samples, *heads, *form.columns))
            order = tuple(
                tuple(labels.index(n) if n in labels else None for n in part)
                for part in (samples, heads, rows, form.columns)
            )
            masks = tuple(kept(e, whole) for e in analysis.axes[node.inputs[i]])
            operands.append(Operand(small.inputs[i], node.inputs[i], masks, view, order))
        layer = found.layer
        one, other = operands
        return Logits(node.label, node.op, groups, one, other, layer.form, layer.weight, channels, mixed)
    return f"both operands are computed from the data: {'; '.join(dict.fromkeys(reasons))}"


def _mixed(
    found: Route,
    labels: Sequence[str],
    column: str,
    unfold: Callable[[Tensor], Tensor],
    pruned: Graph,
    owned: Callable[[str], bool],
) -> tuple[tuple[str, ...], np.ndarray, tuple[Mixed, ...]]:
    """Labels of heads, channels (heads, columns) and what goes along. Raises Unknown where a head's columns are not a
    set of the layer's outputs of their own, at every place the same."""
    if not owned(found.layer.weight):
        raise Unknown("several nodes share the weight of its layer")

    def seen(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(unfold(torch.from_numpy(np.array(array))).numpy(), labels.index(column), -1)

    others = [n for n in labels if n != column]
    channels, rows = seen(found.channels), seen(found.rows)
    if not np.all(rows == rows[..., :1]):
        raise Unknown("its columns come from several rows of its layer")
    varies = [k for k in range(len(others)) if not np.all(channels == channels.take([0], k))]
    heads = channels[tuple(slice(None) if k in varies else 0 for k in range(len(others)))]
    sizes, width = heads.shape[:-1], heads.shape[-1]
    heads = heads.reshape(-1, width)
    g, _, o = found.layer.form.sizes()
    if len(np.unique(heads)) < heads.size or not np.all(heads // o == heads[:, :1] // o):
        raise Unknown("several heads share its columns" if g == 1 else "its columns are of several groups of its layer")
    laid = np.arange(len(heads)).reshape([sizes[varies.index(k)] if k in varies else 1 for k in range(len(others))])
    head = np.broadcast_to(laid, channels.shape[:-1]).reshape(-1)
    mixed = [_along(a.name, a.values, seen(a.at).reshape(-1, width), head) for a in found.added]
    mixed.append(_bias(found.layer, heads, pruned, owned))
    return tuple(others[k] for k in varies), heads, tuple(m for m in mixed if m is not None)


def _along(name: str, values: np.ndarray, at: np.ndarray, heads: np.ndarray) -> Mixed | None:
    """What a stored tensor adds to the columns of the heads, row by row; None where it adds nothing."""
    if not values[at].any():
        return None
    if not name:
        raise Unknown("what is added to it is no stored tensor of floats of its own")
    tuples = np.unique(np.concatenate([heads[:, None], at], 1), axis=0)
    if len(np.unique(tuples[:, 1:])) < tuples[:, 1:].size:
        raise Unknown("what is added to it is the same for several of its columns or heads")
    return Mixed(name, tuples[:, 1:], tuples[:, 0])


def _bias(layer: Layer, heads: np.ndarray, pruned: Graph, owned: Callable[[str], bool]) -> Mixed | None:
    linear = layer.form.linear
    names = layer.node.inputs
    name = names[linear.bias] if linear.bias is not None and linear.bias < len(names) else ""
    if not name:
        return None
    if name not in pruned.parameters:
        raise Unknown("the bias of its layer is no stored tensor")
    g, _, o = layer.form.sizes()
    order = np.argsort(np.asarray(linear.lay(np.arange(g * o))).reshape(-1))
    values = pruned.array(name).reshape(-1)
    if len(order) != values.size:
        raise Unknown("the bias of its layer is not one number per output")
    return _along(name if owned(name) else "", values, order[heads], np.arange(len(heads)))
