"""The zero-invariant groups that a walk found, what they cover, and what the rest is blamed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from onnxprune.axes.dead import CONSUMES, EXACT, FOLLOWS, INEXACT, PRODUCES, Role, Use, Verdicts, consumed
from onnxprune.axes.expr import (
    Atom,
    Barrier,
    Expr,
    Product,
    Solution,
    Sum,
    atoms,
    resolve,
)
from onnxprune.axes.walk import NO_PARAMETERS, OUTPUT, Walk, parameter_of
from onnxprune.model.graph import Graph

__all__ = ["BarrierCost", "Coverage", "Group", "Member", "find_coverage", "find_groups"]

TABLE_RANK = 3
SAMPLE = 1 << 20  # elements of a table that are looked at
_POSITIONS = NO_PARAMETERS | {TensorProto.INT32}
_WEAK = {
    "a kernel's extent",
    "not a channel axis",
    "the directions of a recurrent cell",
    "the gates of a recurrent cell",
    "a spatial axis",
}


class Member(NamedTuple):
    """One axis of a parameter, at one of its uses, and what it does to the group's units.

    zeroed: the unit's slice is zero in the masked original (false for variances, divisors and scales).
    """

    initializer: str
    use: Use
    axis: int
    role: Role

    @property
    def zeroed(self) -> bool:
        return self.role == PRODUCES


@dataclass(frozen=True, slots=True)
class Group:
    """A family of `size` zero-invariant groups: units that can be removed one by one, each as a whole."""

    id: str
    atom: Atom
    kind: str
    reason: str
    members: tuple[Member, ...]
    params: int

    @property
    def size(self) -> int:
        """Number of units."""
        return self.atom.size


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many parameters are in a group; `exact` leaves out inexact groups.

    What an exporter stored but nobody learnt is no parameter: integers, and tables of positions (attention masks,
    anchor boxes, sampling grids: constants of rank 3 or more, without a channel, that no product takes in, and of few
    different numbers, as coordinates are and weights are not).
    """

    params_total: int
    params_prunable: int
    params_exact: int

    @property
    def fraction(self) -> float:
        return self.params_prunable / self.params_total if self.params_total else 0.0


@dataclass(frozen=True, slots=True)
class BarrierCost:
    """A reason why parameters are frozen, and how many."""

    barrier: Barrier
    params: int


def find_groups(walk: Walk, verdicts: Verdicts, solution: Solution) -> tuple[Group, ...]:
    graph = walk.graph
    members: dict[Atom, list[Member]] = {}
    params: dict[Atom, int] = {}
    for (n, i), axes in walk.uses.items():
        if i < 0 or n == OUTPUT:
            continue
        node = graph.nodes[n]
        operator = walk.registry.get(node.op)
        name = node.inputs[i]
        for k, expr in enumerate(axes):
            free = solution.free(expr)
            if not free:
                continue
            assert operator is not None
            gone = consumed(walk.consuming(node), i, k, solution)
            for atom in dict.fromkeys(a for a in atoms(expr) if a in free):
                role = FOLLOWS if i in operator.keeps else CONSUMES if atom in gone else PRODUCES
                members.setdefault(atom, []).append(Member(name, (n, i), k, role))
    groups: list[Group] = []
    for atom, found in members.items():
        if not any(m.role != FOLLOWS and graph.parameters[m.initializer].elem_type not in _POSITIONS for m in found):
            continue
        params[atom] = sum(graph.parameters[n].size for n in {m.initializer for m in found})
        kind = verdicts.kind.get(atom, EXACT)
        reason = verdicts.reason.get(atom, "")
        groups.append(Group(f"g{len(groups)}", atom, kind, reason, tuple(found), params[atom]))
    return tuple(groups)


def _uncovered(expr: Expr, covered: set[Atom]) -> float:
    """Fraction of an axis' indices that no group can remove."""
    expr = resolve(expr)
    if isinstance(expr, Atom):
        return 0.0 if expr in covered else 1.0
    if isinstance(expr, Product):
        return prod(_uncovered(f, covered) for f in expr.factors)
    assert isinstance(expr, Sum)
    return sum(p.size * _uncovered(p, covered) for p in expr.parts) / max(expr.size, 1)


def _blame(axes: Sequence[Expr]) -> Barrier | None:
    """The barrier to name for a parameter's frozen part: the first that isn't there by nature."""
    found = [a.barrier for e in axes for a in atoms(e) if a.barrier is not None]
    strong = [b for b in found if b.reason not in _WEAK]
    inner = [b for b in strong if b.op_type not in ("input", "output")]  # those at the rim nobody can lift
    return next(iter(inner or strong or found), None)


def _only_broadcast(walk: Walk, name: str) -> bool:
    """True where a constant, or what is made of it and other constants without a contraction, meets data only in
    elementwise operators, or as a position in those that say so."""
    graph = walk.graph
    found, pending = False, [name]
    made = set(pending)
    while pending:
        for node, i in graph.consumers.get(pending.pop(), ()):
            operator = walk.registry.get(node.op)
            constant = all(n in made or n in graph.static or n in graph.sized for n in node.inputs if n)
            if operator is not None and constant and node.index not in walk.contractions:
                pending += [n for n in node.outputs if n not in made]
                made.update(node.outputs)
            elif operator is not None and (operator.broadcasts or i in operator.keeps):
                found = True
            else:
                return False
    return found


def _few_numbers(graph: Graph, name: str) -> bool:
    """True of coordinates: no more different numbers than its axes are long, twice over."""
    array = graph.array(name).reshape(-1)
    return len(np.unique(array[:SAMPLE])) <= 2 * sum(graph.parameters[name].shape)


def find_coverage(walk: Walk, groups: Sequence[Group]) -> tuple[Coverage, tuple[BarrierCost, ...], dict[str, float]]:
    graph = walk.graph
    covered = {g.atom for g in groups}
    exact = {g.atom for g in groups if g.kind != INEXACT}
    all_exact = len(exact) == len(covered)
    best: dict[str, tuple[float, float, Barrier | None]] = {}
    for use, axes in walk.uses.items():
        name = parameter_of(graph, use)
        if graph.parameters[name].elem_type in NO_PARAMETERS:
            continue
        left = prod(_uncovered(e, covered) for e in axes)
        left_exact = left if all_exact else prod(_uncovered(e, exact) for e in axes)
        barrier = _blame(axes) if left > 0 else None
        known = best.get(name)
        if known is None or left < known[0]:
            best[name] = (left, min(left_exact, known[1] if known else 1.0), barrier)
    total = prunable = exactly = 0.0
    costs: dict[Barrier, float] = {}
    for name, parameter in graph.parameters.items():
        if name not in best:  # nothing reads it, or it holds positions
            continue
        left, left_exact, barrier = best[name]
        table = left == 1 and len(parameter.shape) >= TABLE_RANK
        if table and _only_broadcast(walk, name) and _few_numbers(graph, name):
            continue
        total += parameter.size
        prunable += parameter.size * (1 - left)
        exactly += parameter.size * (1 - left_exact)
        if left > 0:
            why = barrier or Barrier("", "scalar", "no axis to prune")
            costs[why] = costs.get(why, 0.0) + parameter.size * left
    rows = sorted((BarrierCost(b, round(c)) for b, c in costs.items() if round(c)), key=lambda r: -r.params)
    covered_by_name = {name: 1 - entry[0] for name, entry in best.items()}
    return Coverage(round(total), round(prunable), round(exactly)), tuple(rows), covered_by_name
