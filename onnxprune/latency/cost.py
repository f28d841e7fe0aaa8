"""What a model takes in onnxruntime, as a function of how many units every group keeps.

The time of each kernel is that measured in the model itself. How it falls as axes get shorter is read off the latency
table for operators that multiply, between the sizes in it, and is taken as linear in the elements of the largest tensor
for all others. What no kernel accounts for stays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations
from math import prod

import numpy as np

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import Atom, Expr, atoms, resolve
from onnxprune.latency.anchors import Anchor, Kernels, anchors, sized
from onnxprune.latency.kernels import Kernel, measure
from onnxprune.latency.steps import Step, profile
from onnxprune.latency.table import Table
from onnxprune.model.infer import infer
from onnxprune.model.profile import count
from onnxprune.verify.inputs import pins_of

__all__ = ["LatencyCost", "latency_cost"]

Counts = Mapping[Atom, int]
SHARES = {1: (1.0, 0.75, 0.5, 0.25, 0.125), 2: (1.0, 0.75, 0.5, 0.25, 0.125), 3: (1.0, 0.5, 0.25)}
WORTH = 0.002  # of the whole time: an operator that takes less is not measured at other sizes
SLOPE = 1e-3  # time that falls at least, relative, where the table is flat, so that narrower is never dearer


@dataclass(frozen=True, eq=False)
class Linear:
    """Time in proportion to a product of sizes. axes: those that may shrink."""

    microseconds: float
    axes: tuple[Expr, ...]

    def value(self, counts: Counts) -> float:
        return self.microseconds * prod(count(e, counts) / e.size for e in self.axes)


@dataclass(frozen=True, eq=False)
class Worked:
    """Time in proportion to the multiply-accumulates of an operator that is not in the table."""

    microseconds: float
    anchor: Anchor

    @property
    def axes(self) -> tuple[Expr, ...]:
        return self.anchor.coordinates

    def value(self, counts: Counts) -> float:
        return self.microseconds * self.anchor.work(counts) / max(self.anchor.work({}), 1e-9)


@dataclass(frozen=True, eq=False)
class Tabled:
    """Time between the table's points. sizes: per axis, ascending; shares: time there, 1 at the last point.

    Below the first point, which is a block, time stays as it is there: kernels work in whole blocks.
    """

    microseconds: float
    axes: tuple[Expr, ...]
    sizes: tuple[tuple[int, ...], ...]
    shares: np.ndarray

    def value(self, counts: Counts) -> float:
        corners: list[tuple[tuple[int, float], ...]] = []
        for axis, known in zip(self.axes, self.sizes, strict=True):
            n = count(axis, counts)
            if n == 0:
                return 0.0
            k = bisect_right(known, n)
            if k in (0, len(known)):
                corners.append(((max(k - 1, 0), 1.0),))
                continue
            at = (n - known[k - 1]) / (known[k] - known[k - 1])
            corners.append(((k - 1, 1 - at), (k, at)))
        share = 0.0
        for corner in combinations(*corners):
            weight = prod(w for _, w in corner)
            if weight:
                share += weight * float(self.shares[tuple(k for k, _ in corner)])
        return self.microseconds * share


Part = Linear | Worked | Tabled


@dataclass(frozen=True, eq=False)
class LatencyCost:
    """Microseconds per run, as `select.allocate` wants a cost: a constant and terms over atoms.

    measured: operators that the table was asked for; known: how many of them it held before.
    """

    constant: float
    terms: tuple[Part, ...]
    measured: int = 0
    known: int = 0

    def total(self, counts: Counts) -> float:
        return self.constant + sum(part.value(counts) for part in self.terms)

    def term(self, k: int, counts: Counts) -> float:
        return self.terms[k].value(counts)

    def by_atom(self) -> dict[Atom, list[int]]:
        """The terms that each atom is in."""
        found: dict[Atom, list[int]] = {}
        for k, part in enumerate(self.terms):
            for atom in {a for e in part.axes for a in atoms(e) if a.barrier is None}:
                found.setdefault(atom, []).append(k)
        return found


def latency_cost(
    analysis: Analysis,
    step: Mapping[Atom, int],
    *,
    table: Table,
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seconds: float = 60.0,
    seed: int = 0,
) -> LatencyCost:
    """The cost of a model on this machine.

    step: units per block of every atom that may lose some. seconds: the most that is spent on operators that
    the table lacks. Raises ModelRejected where onnxruntime can't run the model.
    """
    graph, free = analysis.graph, step.keys()
    known = {a.node.index: a for a in anchors(analysis, free)}
    found = profile(graph, known, threads=threads, shapes=shapes, seed=seed)
    pins = pins_of(graph, {name: array.shape for name, array in found.feed.items()})
    here = graph if not pins else infer(graph.model, analysis.registry, {**graph.pins, **pins})
    spent = sum(s.microseconds for s in found.steps)
    scale = min(1.0, found.total_us / spent) if spent else 1.0  # a profiler slows small kernels down
    steps = sorted(found.steps, key=lambda s: -s.microseconds)
    if not any(s.nodes for s in steps):  # nothing could be traced back: the work has to do
        steps = [Step(found.total_us / scale, tuple(known), ())]
    worth = [known[k] for s in steps if s.microseconds * scale >= WORTH * found.total_us for k in s.nodes]
    grids = _Grids(Kernels(analysis, here.shapes), step)
    asked, held = grids.fill(worth, table, threads=threads, seconds=seconds)
    terms: list[Part] = []
    for one in steps:
        terms += _parts(analysis, one, scale, [known[k] for k in one.nodes], grids, free)
    full = sum(part.value({}) for part in terms)
    moving = tuple(part for part in terms if part.axes)
    still = sum(part.value({}) for part in terms if not part.axes)
    return LatencyCost(still + max(found.total_us - full, 0.0), moving, asked, held)


def _parts(
    analysis: Analysis, step: Step, scale: float, held: list[Anchor], grids: _Grids, free: Collection[Atom]
) -> list[Part]:
    """A kernel's time, shared among the operators that it stands for."""
    us = step.microseconds * scale
    if not held:
        return [Linear(us, _largest(analysis, step.tensors, free))]
    tabled = [grids.tabled.get(a) for a in held]
    if any(t is None for t in tabled):
        work = sum(a.work({}) for a in held) or 1.0
        return [Worked(us * a.work({}) / work, a) for a in held]
    alone = sum(t.microseconds for t in tabled if t is not None)
    return [Tabled(us * t.microseconds / alone, t.axes, t.sizes, t.shares) for t in tabled if t is not None]


def _largest(analysis: Analysis, tensors: tuple[str, ...], free: Collection[Atom]) -> tuple[Expr, ...]:
    """The axes that may shrink, of the largest tensor that a kernel touches."""
    best: tuple[Expr, ...] = ()
    size = -1
    for name in tensors:
        axes = analysis.axes.get(name)
        if axes is not None and prod(max(e.size, 1) for e in axes) > size:
            size = prod(max(e.size, 1) for e in axes)
            best = tuple(resolve(e) for e in axes if e.size > 0 and not set(atoms(e)).isdisjoint(free))
    return best


class _Grids:
    """The table's points for every anchor."""

    def __init__(self, kernels: Kernels, step: Mapping[Atom, int]) -> None:
        self.kernels = kernels
        self.step = step
        self.tabled: dict[Anchor, Tabled] = {}

    def fill(self, wanted: list[Anchor], table: Table, *, threads: int, seconds: float) -> tuple[int, int]:
        """Measure what the table lacks, the operators that take longest first. Returns how many points there are, and
        how many the table held."""
        grids = {a: found for a in dict.fromkeys(wanted) if (found := self._points(a)) is not None}
        points: dict[str, Kernel] = {k.key: k for _, points_of in grids.values() for k in points_of.values()}
        missing = [k for key, k in points.items() if table.get(key) is None]
        table.add(measure(missing, threads=threads, seconds=seconds))
        for anchor, (sizes, grid) in grids.items():
            times = {at: table.get(kernel.key) for at, kernel in grid.items()}
            if all(us is not None for us in times.values()):
                self.tabled[anchor] = _tabled(anchor, sizes, {at: us for at, us in times.items() if us is not None})
        return len(points), len(points) - len(missing)

    def _points(self, anchor: Anchor) -> tuple[list[list[int]], dict[tuple[int, ...], Kernel]] | None:
        """Sizes per coordinate, ascending, and the operator at each combination."""
        shares = SHARES.get(len(anchor.coordinates))
        if shares is None:
            return None
        axes = []
        for axis in anchor.coordinates:
            options = [sized(axis, share, self.step) for share in shares]
            axes.append({count(axis, counts): counts for counts in reversed(options)})
        grid: dict[tuple[int, ...], Kernel] = {}
        for at in combinations(*axes):
            counts = {a: n for option, size in zip(axes, at, strict=True) for a, n in option[size].items()}
            kernel = self.kernels.kernel(anchor, counts)
            if kernel is None:
                return None
            grid[at] = kernel
        return [sorted(option) for option in axes], grid


def _tabled(anchor: Anchor, sizes: list[list[int]], times: Mapping[tuple[int, ...], float]) -> Tabled:
    """Times as shares of that at full size, never less at a larger size."""
    values = np.array([times[at] for at in combinations(*sizes)]).reshape([len(s) for s in sizes])
    for axis, known in enumerate(sizes):
        values = np.maximum.accumulate(values, axis)
        shape = [1] * values.ndim
        shape[axis] = -1
        values = values + (np.array(known) / known[-1] * SLOPE * values.flat[-1]).reshape(shape)
    full = float(values.flat[-1])
    return Tabled(full, anchor.coordinates, tuple(map(tuple, sizes)), values / full)
