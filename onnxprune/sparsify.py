"""`compress --method`: the part of it that comes before the surgery.

The whole network is trained until the units that are to go are exactly zero. Then it is a model like any other: it is
analysed again, its zero units are a plan, and what removes them, proves that and trains what is left is what one-shot
compression has. That the units are zero in the stored weights is checked here, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from onnxprune.axes.analysis import Analysis, Group, analyse
from onnxprune.axes.dead import INEXACT
from onnxprune.axes.vanish import removable
from onnxprune.errors import NothingPrunable, UsageError, VerificationFailed
from onnxprune.model.infer import infer
from onnxprune.model.save import write
from onnxprune.result import Result, Sparsified, TargetOutcome
from onnxprune.select.align import steps
from onnxprune.select.allocate import highest, lowest
from onnxprune.select.choose import candidates, cost_of
from onnxprune.select.plan import Plan
from onnxprune.select.target import Target
from onnxprune.verify.equivalence import prove
from onnxprune.verify.reference import not_zero

if TYPE_CHECKING:
    from onnxprune.model.graph import Graph, Model
    from onnxprune.train.log import Row
    from onnxprune.train.methods import Method
    from onnxprune.train.recover import Recovery, Trained
    from onnxprune.train.selection import Selection

__all__ = ["Wanted", "Zeroed", "check_length", "prove_zero", "run_folders", "trainable", "zeroed"]

FIRST, SECOND = "sparsify", "tune"  # folders of a run directory


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What units are chosen by. See `pipeline.compress`."""

    target: Target
    scope: str
    floor: float
    align: int
    allow_inexact: bool

    def about(self, analysis: Analysis) -> dict[str, object]:
        """Plain values that decide which units may go."""
        return {
            "target": self.target.text,
            "scope": self.scope,
            "floor": self.floor,
            "block": self.align,
            "inexact groups": self.allow_inexact,
            "exclude": list(analysis.exclude),
        }

    def selection(self, analysis: Analysis, families: Sequence[str]) -> Selection:
        from onnxprune.train.selection import Selection

        return Selection(
            analysis,
            self.target,
            families,
            scope=self.scope,
            floor=self.floor,
            align=self.align,
            allow_inexact=self.allow_inexact,
        )


@dataclass(frozen=True, eq=False)
class Zeroed:
    """A trained network with units that are zero.

    analysis: of it. plan: what is left without them; outcome, block: what that makes of the target, in which blocks.
    trained: how the training went, and where it stands. error: of the trained mirror against the model in onnxruntime.
    about: what a run that goes on is known by.
    """

    analysis: Analysis
    plan: Plan
    outcome: TargetOutcome
    block: int
    trained: Trained
    error: float
    summary: Sparsified
    about: Mapping[str, Any]

    def rest(self) -> dict[str, Any]:
        """What `Recovery.run` is told of the second part of the training."""
        span = (self.summary.share, 1.0)
        begun = {"begun at step": self.trained.position.step}
        return {"span": span, "start": self.trained.position, "identity": {**self.about, **begun}}


def trainable(recovery: Recovery, analysis: Analysis, *, allow_inexact: bool) -> list[str]:
    """The ids of the groups that training can drive to zero. Raises NothingPrunable."""
    from onnxprune.train.families import trainable_groups

    groups = candidates(analysis, allow_inexact=allow_inexact)
    found = [g.id for g in trainable_groups(recovery.whole, analysis, allow_inexact=allow_inexact)]
    if not found:
        raise NothingPrunable(
            f"no unit can be driven to zero in training: none of the {len(groups)} groups is made by weights that are "
            f"learnt, such as {groups[0].id} ({groups[0].members[0].initializer})",
            "--method oneshot removes them without",
        )
    return found


def check_length(recovery: Recovery, method: Method) -> None:
    """Raise UsageError where the training is too short to be parted, or can't be."""
    settings, share = recovery.settings, method.share
    if share == 1:
        return
    if settings.steps is not None and not 0 < round(share * settings.steps) < settings.steps:
        raise UsageError(
            f"{settings.steps} steps can't be parted into {share:.0%} for the method {method.name} and the rest",
            "train for more --steps, or give --method-option share=1",
        )
    if settings.epochs == 1 and recovery.source.size is None:
        raise UsageError(
            "one epoch of data whose length isn't known can't be parted into two phases",
            "--steps N, or --epochs 2",
        )


def run_folders(run_dir: Path | None) -> tuple[Path | None, Path | None]:
    """Where the two parts of a training keep their checkpoints."""
    return (None, None) if run_dir is None else (run_dir / FIRST, run_dir / SECOND)


def zeroed(
    recovery: Recovery,
    original: Path,
    analysis: Analysis,
    wanted: Wanted,
    families: Sequence[str],
    method: Method,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[Row], None] | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Zeroed:
    """Train the whole network with the method, for its share of the training.

    original: the analysed model as a file. families: ids of the groups that may lose units.
    Raises what training raises, and VerificationFailed where a unit that is to go is not exactly zero.
    """
    selection = wanted.selection(analysis, families)
    hooks = method.hooks(analysis, selection)
    about = {**method.about(), **wanted.about(analysis)}
    trained = recovery.run(
        recovery.original,
        original,
        span=(0.0, method.share),
        shapes=shapes,
        run_dir=run_folders(run_dir)[0],
        resume=resume,
        identity=about,
        hooks=hooks,
        progress=progress,
        notify=notify,
    )
    again = _analysed(trained, analysis)
    with TemporaryDirectory(prefix="onnxprune-") as folder:
        from onnxprune.train.recover import mirror_error

        path = Path(folder) / "trained.onnx"
        write(again.graph.model, path)
        error = mirror_error(trained.module, again.graph, path, registry=analysis.registry, shapes=shapes)
    plan = selection.plan(hooks.removed)
    if not plan.keep:
        raise VerificationFailed(
            f"the method {method.name} left no unit zero", "train longer (--steps), or please report the model's graph"
        )
    wrong = not_zero(again, plan)
    if wrong:
        raise VerificationFailed(
            f"units that were to vanish in training are not exactly zero, such as in '{wrong[0]}'",
            "this is a bug of onnxprune: please report the model's graph",
        )
    units = sum(g.size for g in analysis.groups if g.id in hooks.removed)
    summary = Sparsified(
        method=method.name,
        options=method.options(),
        share=method.share,
        steps=trained.report.steps,
        seconds=trained.report.seconds,
        units=units,
        zero=sum(int(gone.sum()) for gone in hooks.removed.values()),
        max_rel_error=None,
        families=trained.families,
    )
    outcome, block = _reached(again, plan, wanted, families)
    return Zeroed(again, plan, outcome, block, trained, error, summary, about)


def prove_zero(
    result: Result, path: Path, *, seed: int, shapes: Mapping[str, Sequence[int]] | None, model: Model
) -> None:
    """Prove that the pruned model in `path` gives what the trained network gives with its zero units in place, and put
    the error into the result. Groups that are inexact change the function: then there is nothing to prove.

    Raises VerificationFailed.
    """
    analysis, plan = result.analysis, result.plan
    assert result.sparsified is not None and result.verification is not None
    if any(g.kind == INEXACT for g in plan.pruned(analysis)):
        return
    found = prove(analysis, plan, path, seed=seed, shapes=shapes, model=model, unmasked=True)
    result.sparsified = replace(result.sparsified, max_rel_error=found.max_rel_error)


def _analysed(trained: Trained, analysis: Analysis) -> Analysis:
    """The analysis of the trained model: that of the original, for it looks at no weight."""
    registry = analysis.registry
    graph: Graph = infer(trained.model, registry, analysis.graph.pins)
    again = analyse(graph, registry=registry, exclude=analysis.exclude)
    if [(g.id, g.size, g.kind) for g in again.groups] != [(g.id, g.size, g.kind) for g in analysis.groups]:
        raise VerificationFailed(
            "the trained network has other groups than the original",
            "this is a bug of onnxprune: please report the model's graph",
        )
    return again


def _reached(analysis: Analysis, plan: Plan, wanted: Wanted, families: Sequence[str]) -> tuple[TargetOutcome, int]:
    """What a plan makes of the target, which is met as in one-shot selection, and the size of the blocks that go."""
    groups = candidates(analysis, allow_inexact=wanted.allow_inexact)
    cost = cost_of(wanted.target, analysis, groups)
    groups = [g for g in groups if g.id in families]
    total = cost.total({})
    goal = wanted.target.goal(total)
    counts = {g.atom: len(plan.keep[g.id]) if g.id in plan.keep else g.size for g in groups}
    remaining = cost.total(counts)
    block = wanted.align
    while block > 1 and any(counts[g.atom] % n and g.id in plan.keep for g, n in _blocks(analysis, groups, block)):
        block //= 2
    whole = removable(analysis) if wanted.floor == 0 else ()
    least = {
        g.atom: 0 if g.atom in whole else lowest(g.size, n, wanted.floor) for g, n in _blocks(analysis, groups, block)
    }
    enough = remaining <= highest(cost.total(least), goal)
    return TargetOutcome(wanted.target.metric, wanted.target.text, goal / total, remaining / total, enough), block


def _blocks(analysis: Analysis, groups: Sequence[Group], block: int) -> list[tuple[Group, int]]:
    sizes = steps(analysis, list(groups), block)
    return [(g, sizes[g.id]) for g in groups]
