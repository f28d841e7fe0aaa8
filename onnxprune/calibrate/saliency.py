"""What removing a unit costs its readers after they have made the best of the others: structured brain surgery.

A reader is a linear layer y = W x. With H the covariance of x (a free constant in y takes care of means), taking out
the columns S of a unit and solving for the rest costs tr(W_S (H^-1_SS)^-1 W_S') (arXiv 2203.07259, eq. 6). Summed over
the readers, each relative to the variance of its output. Removal is greedy, with W <- W - W_S (H^-1_SS)^-1 H^-1_S: and
H^-1 <- H^-1 - H^-1_:S (H^-1_SS)^-1 H^-1_S:, so that of two units that say the same one stays dear when the other went.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from onnxprune.axes.analysis import Group
from onnxprune.calibrate.reads import reads_of
from onnxprune.calibrate.watched import Batches, Watched
from onnxprune.model.weights import FLOATS
from onnxprune.reconstruct.unfolded import Unfolded, unfolded
from onnxprune.select.importance import unit_of
from onnxprune.workers import add_squares, in_order

__all__ = ["greedy_saliency", "saliencies"]

MEMORY = 1 << 30  # bytes of covariances that are gathered in one pass
RIDGE = 1e-3  # of the mean diagonal
ROWS_PER_COLUMN = 32  # of a batch are enough
STEPS = 64  # down-dates of a group; of more units, several go at a time


def saliencies(watched: Watched, batches: Batches) -> dict[str, np.ndarray]:
    """Per group id and unit, what the unit cost when it went, in greedy order: never less than what went before it.
    Groups that no layer with a closed form reads are absent. Passes over the data until all covariances were seen."""
    readers = {g.id: list(_readers(watched, g)) for g in watched.analysis.groups}
    sizes = {g.id: g.size for g in watched.analysis.groups}
    found: dict[str, np.ndarray] = {}
    for chunk in _chunks(readers):
        wanted = {r.key: r for gid in chunk for r in readers[gid]}
        covariances = _covariances(watched, batches, list(wanted.values()))

        def of_group(gid: str, covariances: Mapping[tuple[int, int], np.ndarray] = covariances) -> np.ndarray | None:
            layers = [layer for r in readers[gid] for layer in r.layers(watched, covariances[r.key])]
            return greedy_saliency(layers, sizes[gid]) if layers else None

        costs = zip(chunk, in_order(of_group, chunk), strict=True)
        found |= {gid: cost for gid, cost in costs if cost is not None}
    return found


@dataclass(frozen=True, eq=False)
class Layer:
    """One matrix product that reads units. weight: (o, p); covariance: (p, p) of its input; units: (p), -1 for columns
    of no unit of the group."""

    weight: np.ndarray
    covariance: np.ndarray
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class _Reader:
    """A node that reads a group, by its operator's `linear` rule."""

    key: tuple[int, int]
    tensor: str
    form: Unfolded
    initializer: str
    units: np.ndarray  # (g, p)

    @property
    def nbytes(self) -> int:
        groups, columns, _ = self.form.sizes()
        return 8 * groups * columns**2

    def rows(self, x: Tensor) -> np.ndarray:
        """(g, n, p) in float64 of the node's input; of very many rows an even choice."""
        labels = self.form.linear.terms[0]
        order = [labels.index(n) for n in (*self.form.rows, *self.form.groups, *self.form.columns)]
        seen = self.form.linear.unfold(x).permute(order)
        groups, columns, _ = self.form.sizes()
        places = tuple(seen.shape[: len(self.form.rows)])
        count = prod(places)
        step = max(1, count // (ROWS_PER_COLUMN * columns))
        at = np.unravel_index(np.arange(0, count, step), places) if places else ()
        picked = seen[tuple(torch.from_numpy(a) for a in at)] if places else seen
        return picked.reshape(-1, groups, columns).transpose(0, 1).double().numpy()

    def layers(self, watched: Watched, covariance: np.ndarray) -> Iterator[Layer]:
        weight = self.form.matrix(watched.analysis.graph.array(self.initializer))
        for k in range(len(weight)):
            if (self.units[k] >= 0).any():
                yield Layer(weight[k], covariance[k], self.units[k])


def _readers(watched: Watched, group: Group) -> Iterator[_Reader]:
    analysis = watched.analysis
    graph = analysis.graph
    for read in reads_of(analysis).get(group.atom, ()):
        if read.weight is None or len(read.operands) != 1 or read.operands[0].input is None:
            continue
        node, (w, axis) = graph.nodes[read.node], read.weight
        rule = analysis.registry[node.op].linear
        parameter = graph.parameters[node.inputs[w]]
        linear = rule(node, w, [graph.shapes.get(n) if n else None for n in node.inputs]) if rule is not None else None
        form = None if linear is None or parameter.elem_type not in FLOATS else unfolded(linear)
        if (
            form is None
            or linear is None
            or not linear.weight_shape
            or node.inputs[linear.x] != read.operands[0].tensor
        ):
            continue
        units = unit_of(analysis.uses[read.node, w][axis], group.atom)
        laid = units.reshape([-1 if k == axis else 1 for k in range(len(parameter.shape))])
        columns = form.matrix(np.broadcast_to(laid, parameter.shape))[:, 0] / linear.scale
        yield _Reader((read.node, w), read.operands[0].tensor, form, node.inputs[w], np.rint(columns).astype(int))


def _chunks(readers: Mapping[str, Sequence[_Reader]]) -> Iterator[list[str]]:
    """Groups whose covariances are gathered together."""
    chunk: list[str] = []
    held: dict[tuple[int, int], int] = {}
    for gid, found in readers.items():
        more = {r.key: r.nbytes for r in found}
        if chunk and sum((held | more).values()) > MEMORY:
            yield chunk
            chunk, held = [], {}
        chunk.append(gid)
        held |= more
    if chunk:
        yield chunk


def _covariances(watched: Watched, batches: Batches, readers: Sequence[_Reader]) -> dict[tuple[int, int], np.ndarray]:
    run = _Gathered(watched, readers)
    with torch.no_grad():
        for batch in batches:
            run.run(*batches.tensors(batch))
    found = {}
    for key, (n, first, second) in run.sums.items():
        mean = first / n
        second /= n
        second -= mean[:, :, None] * mean[:, None, :]
        found[key] = second
    return found


class _Gathered(Interpreter):
    """Adds up the rows of readers' inputs, and their products."""

    def __init__(self, watched: Watched, readers: Sequence[_Reader]) -> None:
        super().__init__(watched.module)
        self.sums: dict[tuple[int, int], list[Any]] = {}
        self.at = {
            node: [r for r in readers if r.tensor in names]
            for node, names in watched.tensors.items()
            if any(r.tensor in names for r in readers)
        }

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        for reader in self.at.get(node, ()):
            rows = reader.rows(result)
            held = self.sums.setdefault(
                reader.key, [0, np.zeros(rows.shape[::2]), np.zeros((len(rows), rows.shape[2], rows.shape[2]))]
            )
            held[0] += rows.shape[1]
            held[1] += rows.sum(1)
            add_squares(held[2], rows)
        return result


def greedy_saliency(layers: Sequence[Layer], size: int) -> np.ndarray:
    """What each of `size` units costs when it is the least costly of those that are left."""
    work = [_Surgery(layer, size) for layer in layers]
    left = np.arange(size)
    found = np.zeros(size)
    paid = 0.0
    at_a_time = max(1, size // STEPS)
    while len(left):
        cost = np.sum([w.costs(left) for w in work], axis=0)
        chosen = np.argsort(cost, kind="stable")[:at_a_time]
        for k in chosen:
            paid = found[left[k]] = max(paid, cost[k])
        if len(left) > len(chosen):
            for w in work:
                w.remove(left[chosen])
        left = np.delete(left, chosen)
    return found


class _Surgery:
    """One layer while units go."""

    def __init__(self, layer: Layer, size: int) -> None:
        self.columns = [np.flatnonzero(layer.units == u) for u in range(size)]
        self.weight = layer.weight.copy()
        spread = np.einsum("op,op->", layer.weight @ layer.covariance, layer.weight)
        self.scale = 1 / spread if spread > 0 else 0.0
        matrix = layer.covariance.copy()
        diagonal = np.einsum("ii->i", matrix)
        diagonal += RIDGE * max(diagonal.mean(), np.finfo(float).tiny)
        self.inverse = np.linalg.inv(matrix)

    def costs(self, units: np.ndarray) -> np.ndarray:
        """Per unit tr(W_S (H^-1_SS)^-1 W_S'), relative to the output's variance."""
        found = np.zeros(len(units))
        by_width: dict[int, list[int]] = {}
        for k, u in enumerate(units):
            by_width.setdefault(len(self.columns[u]), []).append(k)
        for width, members in by_width.items():
            if width:
                at = np.stack([self.columns[units[k]] for k in members])
                blocks = np.linalg.inv(self.inverse[at[:, :, None], at[:, None, :]])
                weights = self.weight[:, at].transpose(1, 0, 2)
                found[members] = np.einsum("uos,uos->u", weights @ blocks, weights)
        return np.maximum(found, 0) * self.scale

    def remove(self, units: np.ndarray) -> None:
        gone = np.concatenate([self.columns[u] for u in units])
        if len(gone):
            rows = self.inverse[gone]
            pulled = np.linalg.solve(rows[:, gone], rows)  # (H^-1_SS)^-1 H^-1_S:
            self.weight -= self.weight[:, gone] @ pulled
            self.inverse -= rows.T @ pulled
