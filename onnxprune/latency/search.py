"""From a latency target to a plan that meets it: plan by the latency table, measure, correct, plan again.

The table says where time can be saved; what counts is the clock. Every candidate is written, opened in onnxruntime and
run in turns with the original, and the line through what was planned and what was measured says what to plan next. A
candidate that seems to meet the target is measured again, for longer, and only that second figure is believed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnxprune.axes.analysis import Analysis
from onnxprune.errors import TargetNotReached, UsageError
from onnxprune.latency.cost import LatencyCost, latency_cost
from onnxprune.latency.table import Table, cache_folder
from onnxprune.model.graph import Model
from onnxprune.model.save import write
from onnxprune.result import Latency, TargetOutcome
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.align import steps
from onnxprune.select.choose import Choice, candidates
from onnxprune.select.target import Target
from onnxprune.verify.latency import compare

__all__ = ["Reached", "Tried", "outcome_of", "reach"]

MOST_TRIES = 7
AIM = 0.985  # of the target: below it by about what two measurements of one model differ
OVER, UNDER = 0.01, 0.05  # how far above and below the target a candidate ends the search
MET = 0.02  # how far above the target still meets it: no measurement is more exact
SECONDS, SURE_SECONDS = (
    2.0,
    5.0,
)  # of a measurement, per model: of a candidate, and of one that seems to meet the target
NUDGE, NUDGES = 0.985, 12  # how a plan that was tried is left: by growing steps, so many of them

Measure = Callable[[Choice, float], Latency]


@dataclass(frozen=True, eq=False)
class Tried:
    """A candidate: what the table promised and what was measured, as shares of the original's latency.

    sure: measured for longer.
    """

    choice: Choice
    planned: float
    measured: float
    latency: Latency
    sure: bool = False


@dataclass(frozen=True)
class Reached:
    """A plan for a latency, how it was measured, and what was tried on the way."""

    choice: Choice
    latency: Latency
    tried: tuple[Tried, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know of the measurement."""
        if self.latency.significant:
            return ()
        before, after = self.latency.before, self.latency.after
        return (
            f"latency could not be measured exactly: single runs took {before.min_ms:.3g} to {before.p90_ms:.3g} ms "
            f"before and {after.min_ms:.3g} to {after.p90_ms:.3g} ms after; repeat it when the machine is free",
        )

    def outcome(self, target: Target, latency: Latency, warnings: list[str]) -> TargetOutcome:
        """What a later measurement, after training or a repair, says of the target."""
        found = outcome_of(target, latency)
        if self.choice.outcome.met and not found.met:
            warnings.append(
                f"target {target.text} was met when it was planned ({self.choice.outcome.reached:.1%} of the time), "
                f"but not when the written model was measured ({found.reached:.1%})"
            )
        return found


def reach(
    analysis: Analysis,
    target: Target,
    plan: Callable[..., Choice],
    *,
    align: int = 1,
    allow_inexact: bool = False,
    best_effort: bool = False,
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    table: Table | None = None,
    progress: Callable[[str], None] | None = None,
) -> Reached:
    """The plan whose model takes the target's share of the original's time, or its milliseconds, on this machine.

    plan: `select.choose.choose` but for the target, the cost and whether to halve blocks, which it is called with.
    align, allow_inexact: as it has them. table: where times of operators are kept; None: the usual file.
    progress: told what is being measured.
    Raises TargetNotReached with what was reached and why, unless best_effort; ModelRejected where onnxruntime can't run
    the model; NothingPrunable, UsageError.
    """
    say = progress or (lambda text: None)
    say("latency table")
    cost = _cost(analysis, align, allow_inexact, table or Table(threads, cache_folder()), threads, shapes, seed)
    total = cost.total({}) / 1e3
    if target.goal(total) >= total:
        raise UsageError(
            f"target {target.text} asks for {target.goal(total):.3g} ms, and the model takes {total:.3g} ms",
            "ask for less than there is",
        )

    def planned(share: float) -> Choice:
        return plan(Target(target.metric, share, None, target.text), cost=cost, halve=False)

    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        original = _original(analysis.graph.model, Path(folder))

        def measure(choice: Choice, seconds: float) -> Latency:
            path = Path(folder, "candidate.onnx")
            write(rewrite(analysis, choice.plan), path)
            return compare(original, path, threads=threads, shapes=shapes, seed=seed, seconds=seconds)

        tried = _search(planned, measure, target, target.goal(total) / total, say)
    return _best(tried, target, cost, best_effort=best_effort)


def _cost(
    analysis: Analysis,
    align: int,
    allow_inexact: bool,
    table: Table,
    threads: int,
    shapes: Mapping[str, Sequence[int]] | None,
    seed: int,
) -> LatencyCost:
    groups = candidates(analysis, allow_inexact=allow_inexact)
    step = steps(analysis, groups, align)
    return latency_cost(
        analysis,
        {g.atom: step[g.id] for g in groups},
        table=table,
        threads=threads,
        shapes=shapes,
        seed=seed,
    )


def _original(model: Model, folder: Path) -> Path:
    """The file to compare with; a model from memory is written first."""
    if model.source:
        return Path(model.source)
    path = folder / "original.onnx"
    write(model, path)
    return path


def _search(
    plan: Callable[[float], Choice], measure: Measure, target: Target, wanted: float, say: Callable[[str], None]
) -> list[Tried]:
    """Candidates, in the order in which they were measured; the one that `_pick` picks was measured for long.

    wanted: share of the original's time that the target leaves, as far as it is known before anything was measured.
    """
    tried: list[Tried] = []
    while len(tried) < MOST_TRIES:
        share = _planned_for(tried, wanted * AIM)
        choice = _unseen(plan, share, tried, wanted * AIM)
        if choice is None:
            break
        say(f"candidate {len(tried) + 1}")
        latency = measure(choice, SECONDS)
        found = Tried(choice, choice.outcome.reached, share_measured(latency), latency)
        if _fits(found, target):
            found = _surely(found, measure)
        tried.append(found)
        if _fits(found, target):
            break
        wanted = share_wanted(target, found.latency)
    while tried and not (best := _pick(tried, target)).sure:
        tried[tried.index(best)] = _surely(best, measure)
    return tried


def _surely(found: Tried, measure: Measure) -> Tried:
    """The candidate measured again, for longer."""
    latency = measure(found.choice, SURE_SECONDS)
    return replace(found, measured=share_measured(latency), latency=latency, sure=True)


def _pick(tried: Sequence[Tried], target: Target) -> Tried:
    """The slowest candidate that meets the target, or else the fastest."""
    meets = [t for t in tried if outcome_of(target, t.latency).met]
    return max(meets, key=lambda t: t.measured) if meets else min(tried, key=lambda t: t.measured)


def outcome_of(target: Target, latency: Latency) -> TargetOutcome:
    """What a measurement says of a latency target."""
    wanted, reached = share_wanted(target, latency), share_measured(latency)
    return TargetOutcome(target.metric, target.text, wanted, reached, reached <= wanted * (1 + MET))


def share_measured(latency: Latency) -> float:
    """What is left of the original's time."""
    return latency.after.median_ms / latency.before.median_ms


def share_wanted(target: Target, latency: Latency) -> float:
    """What the target leaves of the original's time, which the same measurement tells."""
    return target.goal(latency.before.median_ms) / latency.before.median_ms


def _fits(found: Tried, target: Target) -> bool:
    wanted = share_wanted(target, found.latency)
    return wanted * (1 - UNDER) <= found.measured <= wanted * (1 + OVER)


def _planned_for(tried: Sequence[Tried], aim: float) -> float:
    """What to plan in order to measure `aim`: on the line between the nearest points above and below it."""
    if not tried:
        return aim
    points = [(1.0, 1.0), *((t.planned, t.measured) for t in tried)]
    above = min((p for p in points if p[1] > aim), key=lambda p: p[1], default=(1.0, 1.0))
    below = max((p for p in points if p[1] <= aim), key=lambda p: p[1], default=None)
    if below is None:  # all are too slow: go on along the line from the original
        slope = (1 - above[1]) / (1 - above[0]) if above[0] < 1 and above[1] < 1 else 1.0
        return max(above[0] / 2, above[0] - (above[1] - aim) / max(slope, 0.25))
    if above[1] - below[1] < 1e-6 or above[0] <= below[0]:  # noise has turned them round
        return below[0] * NUDGE
    return below[0] + (above[0] - below[0]) * (aim - below[1]) / (above[1] - below[1])


def _unseen(plan: Callable[[float], Choice], share: float, tried: Sequence[Tried], aim: float) -> Choice | None:
    """The plan for a share; where it has been tried, the next one on the way to the aim. None where there is none."""
    known = {_sizes(t.choice): t for t in tried}
    turned: set[bool] = set()
    for k in range(1, NUDGES + 1):
        try:
            choice = plan(min(max(share, 1e-6), 1 - 1e-6))
        except TargetNotReached:  # the smallest block is larger than what is to go
            share *= NUDGE**k
            continue
        seen = known.get(_sizes(choice))
        if seen is None:
            return choice
        faster = seen.measured > aim
        turned.add(faster)
        if len(turned) > 1 or (faster and choice.least >= share):
            return None  # two neighbouring plans lie on either side, or every group is at its floor
        share *= NUDGE**k if faster else NUDGE**-k
    return None


def _sizes(choice: Choice) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((gid, len(kept)) for gid, kept in choice.plan.keep.items()))


def _best(tried: Sequence[Tried], target: Target, cost: LatencyCost, *, best_effort: bool) -> Reached:
    """What `_pick` picks. Raises TargetNotReached."""
    if not tried:
        raise TargetNotReached(
            f"target {target.text} can't be approached: no group may lose a unit", "lower --floor, or ask for less"
        )
    best = _pick(tried, target)
    outcome = outcome_of(target, best.latency)
    if not outcome.met and not best_effort:
        hint = "ask for less, lower --floor, or write the fastest candidate with --best-effort"
        raise TargetNotReached(_why_not(tried, best, outcome, cost), hint)
    return Reached(replace(best.choice, outcome=outcome), best.latency, tuple(tried))


def _why_not(tried: Sequence[Tried], best: Tried, outcome: TargetOutcome, cost: LatencyCost) -> str:
    """What was reached, and where the rest of the time goes."""
    latency = best.latency
    still = cost.constant / cost.total({})
    return (
        f"target {outcome.spec} was not met: the fastest of {len(tried)} models measured takes {outcome.reached:.1%} "
        f"of the original's time ({latency.after.median_ms:.3g} of {latency.before.median_ms:.3g} ms), not "
        f"{outcome.wanted:.1%}; {still:.1%} of that time is spent where no group shrinks anything, and with every "
        f"group at its floor the latency table expects {best.choice.least:.1%}"
    )
