"""How much a unit matters: one number per unit of every group, comparable across the network.

A criterion sees one group at a time, as the slices of its parameters; its scores are divided by their mean in the
group, so that layers of different scale share one ranking. Parameters are read one after another and let go.

Criteria that want to know how the units are used on data ask `Slices.calibration` for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from onnxprune.axes.analysis import Analysis, Group, Member
from onnxprune.axes.dead import CONSUMES, FOLLOWS
from onnxprune.axes.expr import Atom, Expr, Product, Sum, atoms, resolve
from onnxprune.errors import UsageError

if TYPE_CHECKING:
    from onnxprune.calibrate.calibration import Calibration
    from onnxprune.calibrate.reads import Operand, Read

__all__ = ["CALIBRATED", "IMPORTANCE", "Criterion", "Scores", "Slices", "normalised", "scores", "unit_of"]

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
    """The parameters of one group, unit by unit, and what is known of its activations."""

    def __init__(self, analysis: Analysis, group: Group, calibration: Calibration | None = None) -> None:
        self.analysis = analysis
        self.group = group
        self._calibration = calibration

    @property
    def calibration(self) -> Calibration:
        """Statistics on data. Raises UsageError where there is none."""
        if self._calibration is None:
            raise UsageError("this importance is taken on data, and there is none", "give it with --data")
        return self._calibration

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
        total = self.sums(member.initializer, member.axis, power)
        return self.per_unit(self.analysis.uses[member.use][member.axis], total)

    def sums(self, initializer: str, axis: int, power: int) -> np.ndarray:
        """Sum of |w| ** power over everything but an axis."""
        graph = self.analysis.graph
        array = graph.array(initializer)
        if array.dtype.kind not in "fiu":
            array = array.astype(np.float32)
        moved = np.moveaxis(array, axis, 0)
        total = np.empty(len(moved), np.float64)
        step = max(1, (1 << 22) // max(1, moved[0].size))
        for k in range(0, len(moved), step):
            block = np.asarray(moved[k : k + step], np.float64).reshape(len(moved[k : k + step]), -1)
            total[k : k + step] = np.abs(block).sum(1) if power == 1 else np.einsum("ij,ij->i", block, block)
        graph.release(initializer)
        return total

    def per_unit(self, expr: Expr, numbers: np.ndarray) -> np.ndarray:
        """Numbers of an axis' indices, added up per unit."""
        units = unit_of(expr, self.group.atom)
        inside = units >= 0
        return np.bincount(units[inside], numbers[inside], minlength=self.units)

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


def wanda(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """Sum of |w| times the root mean square of what it multiplies (Wanda, arXiv 2306.11695, eq. 1), over all weights
    that read the unit; each reader's share of its own total, so that none drowns the others."""

    def of(read: Read) -> np.ndarray:
        energy = [_energy(slices, o) for o in read.operands]
        if len(energy) > 1:  # both factors of a product carry the units
            return np.sqrt(np.prod([slices.per_unit(o.expr, e) for o, e in zip(read.operands, energy, strict=True)], 0))
        operand, node = read.operands[0], slices.analysis.graph.nodes[read.node]
        if read.weight is None:
            return np.sqrt(slices.per_unit(operand.expr, energy[0]))
        i, axis = read.weight
        weight = slices.sums(node.inputs[i], axis, 1)
        if len(weight) == len(energy[0]):
            return slices.per_unit(operand.expr, weight * np.sqrt(energy[0]))
        units = slices.per_unit(slices.analysis.uses[read.node, i][axis], weight)  # a grouped convolution's
        return units * np.sqrt(slices.per_unit(operand.expr, energy[0]))

    return _over_reads(slices, of)


def _energy(slices: Slices, operand: Operand) -> np.ndarray:
    return slices.calibration.moments[operand.tensor, operand.axis].square


def variance(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """Variance of the unit's activation where it is read: what a constant in its place can't make up for."""

    def of(read: Read) -> np.ndarray:
        found = [slices.per_unit(o.expr, slices.calibration.moments[o.tensor, o.axis].variance) for o in read.operands]
        return np.prod(found, 0)

    return _over_reads(slices, of)


def _over_reads(slices: Slices, of: Callable[[Read], np.ndarray]) -> np.ndarray:
    """The sum over a group's reads of each one's shares; the L2 norm where nothing that runs on data reads it."""
    seen = slices.calibration.moments
    reads = (
        r for r in slices.calibration.reads_of(slices.group) if all((o.tensor, o.axis) in seen for o in r.operands)
    )
    return _shares(map(of, reads), slices)


def _shares(found: Iterator[np.ndarray], slices: Slices) -> np.ndarray:
    shares = [f / f.sum() for f in found if f.sum() > 0]
    return np.sum(shares, axis=0) if shares else l2(slices, np.random.default_rng(0))


def taylor(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """What the output, or with labels the loss, loses with the unit: see `calibrate.gradients`."""
    return _or_l2(slices, slices.calibration.information[slices.group.id])


def distill(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """First order of the distance from the original's output, where a tenth of the network is gone already."""
    return _or_l2(slices, slices.calibration.slopes[slices.group.id])


def obs(slices: Slices, rng: np.random.Generator) -> np.ndarray:
    """What the unit costs its readers after they have made the best of the others, in greedy order: see
    `calibrate.saliency`. As `wanda` where nothing with a closed form reads it."""
    found = slices.calibration.saliencies.get(slices.group.id)
    return wanda(slices, rng) if found is None or not found.any() else found


def _or_l2(slices: Slices, found: np.ndarray) -> np.ndarray:
    return found if found.any() else l2(slices, np.random.default_rng(0))


IMPORTANCE: Mapping[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "bn": bn,
    "random": random,
    "fpgm": fpgm,
    "wanda": wanda,
    "variance": variance,
    "taylor": taylor,
    "distill": distill,
    "obs": obs,
}
CALIBRATED = ("wanda", "variance", "taylor", "distill", "obs")
"""Those that are taken on data."""


def scores(
    analysis: Analysis,
    groups: list[Group],
    importance: str | Criterion | Scores,
    *,
    seed: int = 0,
    calibration: Calibration | None = None,
) -> dict[str, np.ndarray]:
    """Per group id, the importance of every unit, with mean 1. importance: a criterion or its name, or numbers that
    were found elsewhere, by group id. calibration: for criteria that are taken on data.

    Raises UsageError for an unknown criterion, one that lacks data, or numbers that don't fit the groups.
    """
    if isinstance(importance, Mapping):
        return {g.id: normalised(_given(importance, g)) for g in groups}
    if callable(importance):
        criterion = importance
    elif importance in CALIBRATED and calibration is None:
        raise UsageError(f"importance '{importance}' is taken on data, and there is none", "give it with --data")
    elif importance in IMPORTANCE:
        criterion = IMPORTANCE[importance]
    else:
        raise UsageError(f"importance '{importance}' is none of {', '.join(IMPORTANCE)}")
    rng = np.random.default_rng(seed)
    return {g.id: normalised(criterion(Slices(analysis, g, calibration), rng)) for g in groups}


def normalised(raw: np.ndarray) -> np.ndarray:
    """A group's scores with mean 1; what is not finite counts as nothing."""
    raw = np.nan_to_num(np.asarray(raw, np.float64))
    mean = raw.mean()
    return raw / mean if mean > 0 else np.ones(len(raw))


def _given(importance: Scores, group: Group) -> np.ndarray:
    found = importance.get(group.id)
    if found is None or np.shape(found) != (group.size,):
        what = "nothing" if found is None else f"shape {np.shape(found)}"
        raise UsageError(f"importance of group {group.id} should be {group.size} numbers, found {what}")
    return np.asarray(found)
