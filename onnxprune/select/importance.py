"""How much a unit matters: one number per unit of every group, comparable across the network.

A criterion sees one group at a time, as the slices of its parameters; its scores are divided by their mean in the
group, so that layers of different scale share one ranking. Parameters are read one after another and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from onnxprune.axes.analysis import Analysis, Group, Member
from onnxprune.axes.dead import CONSUMES, FOLLOWS
from onnxprune.axes.expr import Atom, Expr, Product, Sum, atoms, resolve
from onnxprune.errors import UsageError

__all__ = ["IMPORTANCE", "Criterion", "Scores", "normalised", "scores", "unit_of"]

Criterion = Callable[["Slices", np.random.Generator], np.ndarray]
Scores = Mapping[str, np.ndarray]  # per group id, one number per unit


def unit_of(expr: Expr, atom: Atom) -> np.ndarray:
    """For every index of an axis, the unit of `atom` that it belongs to, or -1."""
    expr = resolve(expr)
    if isinstance(expr, Atom):
        return np.arange(expr.size) if expr is atom else np.full(expr.size, -1)
    if isinstance(expr, Sum):
        return np.concatenate([unit_of(p, atom) for p in expr.parts])
    assert isinstance(expr, Product)
    result = np.full([f.size for f in expr.factors], -1)
    for k, factor in enumerate(expr.factors):
        if atom in set(atoms(factor)):
            shape = [1] * result.ndim
            shape[k] = -1
            result = np.maximum(result, unit_of(factor, atom).reshape(shape))
    return result.reshape(-1)


class Slices:
    """The parameters of one group, unit by unit."""

    def __init__(self, analysis: Analysis, group: Group) -> None:
        self.analysis = analysis
        self.group = group

    @property
    def units(self) -> int:
        return self.group.size

    def members(self, *, producing_only: bool = False) -> list[Member]:
        """One member per parameter and axis; floating point (or quantised) ones that are zeroed or consumed."""
        seen: dict[tuple[str, int], Member] = {}
        for m in self.group.members:
            if m.role != FOLLOWS and not (producing_only and m.role == CONSUMES):
                seen.setdefault((m.initializer, m.axis), m)
        return list(seen.values())

    def reduced(self, member: Member, power: int) -> np.ndarray:
        """Sum of |w| ** power over everything but the member's axis, gathered per unit."""
        graph = self.analysis.graph
        array = graph.array(member.initializer)
        if array.dtype.kind not in "fiu":
            array = array.astype(np.float32)
        moved = np.moveaxis(array, member.axis, 0)
        total = np.empty(len(moved), np.float64)
        step = max(1, (1 << 22) // max(1, moved[0].size))
        for k in range(0, len(moved), step):
            block = np.asarray(moved[k : k + step], np.float64).reshape(len(moved[k : k + step]), -1)
            total[k : k + step] = np.abs(block).sum(1) if power == 1 else np.einsum("ij,ij->i", block, block)
        graph.release(member.initializer)
        units = unit_of(self.analysis.uses[member.use][member.axis], self.group.atom)
        inside = units >= 0
        return np.bincount(units[inside], total[inside], minlength=self.units)

    def rows(self, member: Member) -> np.ndarray:
        """The member's slices as (units, numbers)."""
        graph = self.analysis.graph
        units = unit_of(self.analysis.uses[member.use][member.axis], self.group.atom)
        order = np.argsort(units, kind="stable")[np.count_nonzero(units < 0) :]
        array = np.take(graph.array(member.initializer), order, member.axis).astype(np.float64)
        graph.release(member.initializer)
        return np.moveaxis(array, member.axis, 0).reshape(self.units, -1)

    def gammas(self) -> list[Member]:
        """Members that scale the output of a normalisation."""
        registry, graph = self.analysis.registry, self.analysis.graph
        return [m for m in self.members(producing_only=True) if registry[graph.nodes[m.use[0]].op].gamma == m.use[1]]


def l1(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """Sum of absolute values over all slices of the unit (Li et al., arXiv 1608.08710)."""
    return np.sum([slices.reduced(m, 1) for m in slices.members()], axis=0)


def l2(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """Euclidean norm over all slices of the unit."""
    return np.sqrt(np.sum([slices.reduced(m, 2) for m in slices.members()], axis=0))


def bn(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """|gamma| of the BatchNormalization (network slimming, arXiv 1708.06519); the L2 norm where there is none."""
    gammas = slices.gammas()
    return np.sum([slices.reduced(m, 1) for m in gammas], axis=0) if gammas else l2(slices, rng)


def random(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """Noise: the baseline that every criterion must beat."""
    return rng.uniform(0.5, 1.5, slices.units)


def fpgm(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """Sum of distances to the other units of the group: small near the geometric median (arXiv 1811.00250, eq. 4)."""
    members = slices.members(producing_only=True) or slices.members()
    gram = np.zeros((slices.units, slices.units))
    for member in members:
        rows = slices.rows(member)
        gram += rows @ rows.T
    norms = np.diag(gram)
    return np.sqrt(np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0)).sum(1)


IMPORTANCE: Mapping[str, Criterion] = {"l1": l1, "l2": l2, "bn": bn, "random": random, "fpgm": fpgm}


def scores(
    analysis: Analysis, groups: list[Group], importance: str | Criterion | Scores, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Per group id, the importance of every unit, with mean 1. Raises UsageError for an unknown criterion."""
    if isinstance(importance, Mapping):
        return {g.id: normalised(importance[g.id]) for g in groups}
    if callable(importance):
        criterion = importance
    elif importance in IMPORTANCE:
        criterion = IMPORTANCE[importance]
    else:
        raise UsageError(f"importance '{importance}' is none of {', '.join(IMPORTANCE)}")
    rng = np.random.default_rng(seed)
    return {g.id: normalised(criterion(Slices(analysis, g), rng)) for g in groups}


def normalised(raw: np.ndarray) -> np.ndarray:
    """A group's scores with mean 1; what is not finite counts as nothing."""
    raw = np.nan_to_num(np.asarray(raw, np.float64))
    mean = raw.mean()
    return raw / mean if mean > 0 else np.ones(len(raw))
