"""From an analysis and a target to a plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnxprune.axes.analysis import Analysis, Group
from onnxprune.axes.dead import INEXACT
from onnxprune.axes.expr import Atom
from onnxprune.axes.vanish import removable
from onnxprune.errors import NothingPrunable, TargetNotReached, UsageError
from onnxprune.model.profile import Cost, costs
from onnxprune.result import TargetOutcome
from onnxprune.select.align import steps
from onnxprune.select.allocate import DEAR, ROUGHLY, TOLERANCE, Allocation, Budget, allocate, highest
from onnxprune.select.importance import Criterion, Scores, scores
from onnxprune.select.plan import Plan
from onnxprune.select.target import Target

if TYPE_CHECKING:
    from onnxprune.calibrate.calibration import Calibration

__all__ = ["Choice", "candidates", "choose"]

SLOW_BELOW = 4  # channels: onnxruntime falls back to a layout that is slower than what pruning gains


@dataclass(frozen=True)
class Choice:
    """A plan, how far it gets, and the block size that it was made with.

    least: what would remain with every group at its floor, as a share; above the target, it can't be reached.
    """

    plan: Plan
    outcome: TargetOutcome
    align: int
    least: float


def candidates(analysis: Analysis, *, allow_inexact: bool) -> list[Group]:
    """The groups that may be pruned. Raises NothingPrunable with what stands in the way."""
    found = [g for g in analysis.groups if g.kind != INEXACT or (allow_inexact and analysis.provable(g))]
    if not found:
        raise NothingPrunable(_why_nothing(analysis), _what_then(analysis))
    return found


def _why_nothing(analysis: Analysis) -> str:
    inexact = [g for g in analysis.groups if g.kind == INEXACT]
    if inexact:
        return (
            f"nothing can be pruned exactly: {len(inexact)} inexact groups, "
            f"such as {inexact[0].id}: {inexact[0].reason}"
        )
    if not analysis.coverage.params_total:
        return "nothing can be pruned: the model has no parameters that a node uses"
    worst = "; ".join(
        f"{b.barrier.op_type} {b.barrier.node} ({b.barrier.reason}: {b.params:,} parameters)".replace("  ", " ")
        for b in analysis.barriers[:3]
    )
    return f"nothing can be pruned: {worst or 'no axis of a parameter is free'}"


def _what_then(analysis: Analysis) -> str:
    if any(g.kind == INEXACT for g in analysis.groups):
        return "--allow-inexact prunes them all the same; the function changes, so retrain or check the accuracy"
    return "`onnxprune inspect` lists every barrier"


def choose(
    analysis: Analysis,
    target: Target,
    *,
    importance: str | Criterion | Scores = "l2",
    scope: str = "global",
    floor: float = 0.1,
    align: int = 1,
    allow_inexact: bool = False,
    seed: int = 0,
    only: Collection[str] | None = None,
    share: float = 1.0,
    cost: Budget | None = None,
    halve: bool = True,
    fill: bool = False,
    calibration: Calibration | None = None,
    losses: Mapping[str, np.ndarray] | None = None,
) -> Choice:
    """Rank the units and choose a plan that meets the target, in blocks of `align`.

    importance: a criterion or its name, or scores per group id (`select.importance.normalised` to mean 1).
    calibration: for criteria that are taken on data. losses: per group id, what the model is expected to lose when 0,
        1, ... of its units are gone, as `sensitivity` measures it; None: it is guessed from the importance.
    only: ids of the groups that may lose units; None: all. share: of the way to the target that is gone.
    cost: what the target's metric counts; None: one that the graph alone tells. halve: whether blocks are halved where
        whole ones could reach the target but stay above it. fill: whether the last of the way is filled with whatever
        fits, at any price, so that plans for growing shares grow out of each other; only the last, for the whole way,
        goes past the target where it has to.
    floor: least share that a group keeps, and one block at least; 0 lets residual branches go as a whole.
    Where whole blocks don't come within 1 % of the target, they are halved until they do. From 4 channels on they may
    go past it for that; below, which is slow, they are halved only where it is missed by more than 5 %, above or
    below. What comes nearest is taken.
    Raises NothingPrunable, UsageError.
    """
    if scope not in ("global", "local"):
        raise UsageError(f"scope '{scope}' is neither global nor local")
    if not 0 <= floor < 1:
        raise UsageError(f"floor {floor} is outside 0 to 1")
    groups = candidates(analysis, allow_inexact=allow_inexact)
    if cost is None:
        cost = cost_of(target, analysis, groups)
    total = cost.total({})
    goal = total - share * (total - target.goal(total))
    if goal >= total:
        raise UsageError(
            f"target {target.text} asks for {goal:,.0f} {target.metric}, and the model has {total:,.0f}",
            "ask for less than there is",
        )
    groups = [g for g in groups if only is None or g.id in only]
    ranked = scores(analysis, groups, importance, seed=seed, calibration=calibration)
    whole = removable(analysis) if floor == 0 else ()
    best: tuple[bool, float, Allocation, int] | None = None
    block, least = align, total
    while True:
        found = allocate(
            groups,
            ranked,
            cost,
            goal,
            steps(analysis, groups, block),
            scope=scope,
            floor=floor,
            dear=math.inf if fill else DEAR,
            settle=not fill and (block <= SLOW_BELOW or not halve),
            overshoot=block == 1,
            meet=block == 1 and share >= 1,
            whole=whole,
            losses=losses,
        )
        least = min(least, found.least)
        missed = abs(found.remaining - goal) / goal
        misses = found.remaining > highest(least, goal)
        if found.keep and (best is None or (misses, missed) < (best[0], best[1] * 0.999)):
            best = (misses, missed, found, block)
        close = missed <= ROUGHLY and found.least <= goal and found.keep
        enough = (block <= SLOW_BELOW and close) or (not halve and found.least <= goal)
        if missed <= TOLERANCE or block == 1 or enough:
            break
        block //= 2
    if best is None:
        raise TargetNotReached(
            f"target {target.text} can't be approached: no group may lose a unit", "lower --floor, or ask for less"
        )
    *_, allocation, block = best
    outcome = TargetOutcome(
        target.metric,
        target.text,
        goal / total,
        allocation.remaining / total,
        allocation.remaining <= highest(least, goal),
    )
    return Choice(Plan(allocation.keep), outcome, block, least / total)


def cost_of(target: Target, analysis: Analysis, groups: list[Group]) -> Cost:
    """The metric that a target speaks of."""
    if target.metric == "channels":
        free: dict[Atom, None] = dict.fromkeys(g.atom for g in groups)
        return Cost(0.0, tuple((1.0, (a,)) for a in free))
    return costs(analysis)[target.metric]
