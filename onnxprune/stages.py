"""The stages of `compress`: load, analyse, select, rewrite, verify, in that order, with plain values between.

A method in training comes between select and rewrite: it gives the trained network, and which of its units are zero.
Repair and training come after the proof of the surgery.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import onnx

from onnxprune.accuracy import Work, is_first_process, training_imports
from onnxprune.axes.analysis import Analysis
from onnxprune.axes.analysis import analyse as analyse_graph
from onnxprune.clock import Clock
from onnxprune.errors import ModelRejected, TargetNotReached, UsageError
from onnxprune.model.graph import Graph, Model
from onnxprune.model.infer import infer
from onnxprune.model.load import open_model, understood
from onnxprune.model.profile import costs, summary
from onnxprune.model.save import place, write
from onnxprune.ops.registry import Operator
from onnxprune.output import spare_external_data
from onnxprune.ranking import Ranking, ranking
from onnxprune.request import Request
from onnxprune.result import Latency, ModelSummary, Result
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.align import aligned_counts, block_size
from onnxprune.select.choose import Choice, candidates, choose
from onnxprune.select.target import Target, parse_target
from onnxprune.sparsify import Wanted, Zeroed, prove_zero
from onnxprune.train.methods import Method, find_method
from onnxprune.verify.equivalence import prove

if TYPE_CHECKING:
    from onnxprune.latency.search import Reached

__all__ = ["Point", "Prepared", "goal_of", "load_graph"]

Shapes = Mapping[str, Sequence[int]]


def goal_of(target: str, request: Request) -> Target:
    """The target, as far as the method can be given it. Raises UsageError."""
    goal = parse_target(target)
    if goal.metric == "latency" and request.in_training:
        raise UsageError(
            f"target {goal.text} is planned by measuring, and method {request.method} plans in training",
            "find out what it takes with --method oneshot --dry-run, and ask for that with macs=",
        )
    return goal


@dataclass(eq=False)
class Prepared:
    """What is known before a target is: the model, its analysis, the data, and how units are ranked. The points of a
    sweep share it.

    block: what kept counts are multiples of. method: in training, None for one-shot; families: ids of the groups that
    it may take units of.
    """

    request: Request
    graph: Graph
    analysis: Analysis
    work: Work
    before: ModelSummary
    block: int
    method: Method | None
    families: list[str] | None

    @classmethod
    def of(cls, model: str | os.PathLike[str] | onnx.ModelProto, request: Request, clock: Clock) -> Self:
        """Load, open what else there is, and analyse: all that can be refused is refused here."""
        block = block_size(request.deploy, request.align)
        method = _method(request)
        clock.start("load")
        graph = load_graph(model, request.registry, request.input_shapes)
        work = Work.prepared(graph, request, method)
        clock.start("analyse")
        analysis = analyse_graph(graph, registry=request.registry, exclude=request.exclude)
        clock.start("select")
        before = summary(graph.model, Path(graph.model.source).name or "model", costs(analysis))
        families = None if method is None else work.families(analysis)
        return cls(request, graph, analysis, work, before, block, method, families)

    @cached_property
    def ranked(self) -> Ranking:
        """Of a method in training, what a dry run shows instead."""
        request = self.request
        if self.method is not None:
            return Ranking("l2", about="l2")
        return ranking(
            self.analysis,
            candidates(self.analysis, allow_inexact=request.allow_inexact),
            self.work.source,
            importance=request.importance,
            allocate=request.allocate,
            stored=None if request.sensitivity is None else Path(request.sensitivity),
            samples=request.samples,
            repaired=self.work.repairs_on_data,
            seed=request.seed,
        )

    def plan(self, goal: Target, **more: Any) -> Choice:
        """The units to keep for a target. more: what else `choose` is told."""
        request = self.request
        return choose(
            self.analysis,
            goal,
            **more,
            importance=self.ranked.importance,
            losses=self.ranked.losses,
            scope=request.scope,
            floor=request.floor,
            align=self.block,
            allow_inexact=request.allow_inexact,
            seed=request.seed,
            only=self.families,
        )


@dataclass(eq=False)
class Point:
    """One target, from the plan to the file. The methods are called in the order in which they stand here.

    measured: the plan of a latency, which was found by measuring. zero: what a method in training left behind.
    """

    prepared: Prepared
    goal: Target
    destination: Path | None
    clock: Clock
    measured: Reached | None = None
    zero: Zeroed | None = None

    def run(self) -> Result:
        """Raises what `compress` raises."""
        self.clock.start("select")
        result = self.selected()
        if not self.prepared.request.dry_run:
            self.sparsify(result)
            self.clock.start("rewrite")
            self.deliver(result, rewrite(result.analysis, result.plan))
        result.timing = self.clock.stop()
        return result

    def selected(self) -> Result:
        """The plan, and what it makes of the target."""
        prepared, request, block = self.prepared, self.prepared.request, self.prepared.block
        if self.goal.metric == "latency":
            self.measured = self.reached()
        choice = prepared.plan(self.goal) if self.measured is None else self.measured.choice
        if not choice.outcome.met and self.measured is None and not request.best_effort:
            raise TargetNotReached(
                f"target {self.goal.text} can't be reached: at most {1 - choice.least:.1%} of {self.goal.metric} can "
                f"go, which leaves {choice.least:.1%}",
                "ask for less, or write the closest model with --best-effort",
            )
        found = Result(
            prepared.before,
            None,
            choice.outcome,
            choice.plan,
            prepared.analysis,
            align=choice.align,
            aligned=aligned_counts(prepared.analysis, choice.plan, block),
            ranking=prepared.ranked.about,
        )
        tentative = prepared.method is not None and not request.dry_run
        found.warnings = _warnings(prepared.graph, block if tentative else choice.align, block)
        if self.measured is None and not choice.outcome.met and not tentative:
            found.warnings.append(_missed(choice))
        if self.measured is not None:
            found.warnings += self.measured.warnings
            found.latency = self.measured.latency
        if prepared.method is not None and request.dry_run:
            name = prepared.method.name
            found.warnings.append(f"method {name} chooses units in training; those of the lowest l2 norm stand here")
        return found

    def reached(self) -> Reached:
        """The plan for a latency, found by measuring."""
        from onnxprune.latency.keep import reached_once
        from onnxprune.latency.search import reach

        prepared, request = self.prepared, self.prepared.request
        search = partial(
            reach,
            prepared.analysis,
            self.goal,
            prepared.plan,
            align=prepared.block,
            allow_inexact=request.allow_inexact,
            best_effort=request.best_effort,
            threads=request.threads,
            shapes=request.input_shapes,
            seed=request.seed,
            progress=request.progress,
        )
        return reached_once(search, prepared.analysis, self.goal, run_dir=request.run_dir, resume=request.resume)

    def sparsify(self, result: Result) -> None:
        """Let a method in training make units zero, and go on with the trained network and those units as the plan."""
        prepared, request, block = self.prepared, self.prepared.request, self.prepared.block
        if prepared.method is None or prepared.families is None:
            return
        self.clock.start("sparsify")
        wanted = Wanted(
            target=self.goal,
            scope=request.scope,
            floor=request.floor,
            align=block,
            allow_inexact=request.allow_inexact,
        )
        self.zero = zero = prepared.work.zeroed(
            prepared.analysis, wanted, prepared.families, prepared.method, warnings=result.warnings
        )
        result.analysis, result.plan, result.target = zero.analysis, zero.plan, zero.outcome
        result.sparsified, result.align = zero.summary, zero.block
        result.ranking = f"method {zero.summary.method}"
        result.aligned = aligned_counts(zero.analysis, zero.plan, block)
        result.warnings += _smaller_blocks(zero.block, block)
        if not zero.outcome.met and not request.best_effort:
            raise TargetNotReached(
                f"the method {zero.summary.method} left {zero.outcome.reached:.1%} of {zero.outcome.metric} after "
                f"{zero.summary.steps} steps, more than {zero.outcome.spec}",
                "train longer (--steps), or write the closest model with --best-effort",
            )

    def deliver(self, result: Result, pruned: Model) -> None:
        """Put the file where it is wanted once all is proved and done; before that nothing is there."""
        if self.destination is None:
            with TemporaryDirectory(prefix="onnxprune-") as folder:
                self.produce(result, pruned, Path(folder) / "pruned.onnx")
            return
        spare_external_data(self.destination, self.prepared.graph.model)
        place(self.destination, lambda path: self.produce(result, pruned, path))
        result.output = str(self.destination)

    def produce(self, result: Result, pruned: Model, path: Path) -> None:
        """Write the pruned model, prove it, make it better, and measure it."""
        prepared, request = self.prepared, self.prepared.request
        pruned.nbytes = _written(pruned, path)
        self.clock.start("verify")
        how: dict[str, Any] = {"seed": request.seed, "shapes": request.input_shapes, "model": pruned}
        result.verification = prove(result.analysis, result.plan, path, **how)
        if result.sparsified is not None:
            prove_zero(result, path, **how)
        surgery = infer(open_model(path), request.registry, prepared.graph.pins)
        final = prepared.work.run(surgery, path, result, stage=self.clock.start, before=self.zero)
        result.model = pruned if final is surgery else final.model
        shown = self.destination.name if self.destination else f"{prepared.before.name} (pruned)"
        result.after = summary(final.model, shown, costs(analyse_graph(final, registry=request.registry)))
        self.time(result, path)
        self.clock.start("write")

    def time(self, result: Result, path: Path) -> None:
        """Latency of both files, where it was asked for; a plan that was measured is measured again only where the
        weights have changed since."""
        request, source = self.prepared.request, self.prepared.graph.model.source
        asked = request.latency if self.measured is None else self.prepared.work.changes_weights
        if not asked or not is_first_process() or not source:
            return
        self.clock.start("latency")
        result.latency = _latency(source, path, request.threads, request.input_shapes, request.seed, result.warnings)
        if self.measured is not None and result.latency is not None:
            result.target = self.measured.outcome(self.goal, result.latency, result.warnings)


def _method(request: Request) -> Method | None:
    """The method in training that was asked for, None for one-shot. Raises UsageError."""
    method = request.method
    if request.in_training and request.data is None:
        name = method if isinstance(method, str) else method.__name__
        raise UsageError(f"the method {name} works in training, which wants data", "give it with --data")
    with training_imports():
        return find_method(method, request.method_options)


def load_graph(
    model: str | os.PathLike[str] | onnx.ModelProto, registry: Mapping[str, Operator], shapes: Shapes | None
) -> Graph:
    """A model that is understood, at input shapes where they are given. Raises ModelRejected, UsageError."""
    opened = open_model(model)
    if not shapes:
        return understood(opened, registry)
    from onnxprune.verify.inputs import pins_of

    first = infer(opened, registry)
    unknown = set(shapes) - set(first.inputs)
    if unknown:
        raise UsageError(
            f"--input-shapes names '{sorted(unknown)[0]}', which is no input",
            f"the inputs are {', '.join(first.inputs)}",
        )
    return understood(opened, registry, pins_of(first, shapes))


def _written(model: Model, path: Path) -> int:
    try:
        return write(model, path)
    except OSError as error:
        raise UsageError(f"the pruned model can't be written: {error.strerror or error}") from None


def _warnings(graph: Graph, used: int, block: int) -> list[str]:
    found = _smaller_blocks(used, block)
    if graph.problems:
        found.append(f"{len(graph.problems)} nodes whose shapes could not be inferred, such as {graph.problems[0]}")
    return found


def _missed(choice: Choice) -> str:
    kept = f"{choice.outcome.reached:.1%} of {choice.outcome.metric}"
    return f"target {choice.outcome.spec} is out of reach: {kept} is the closest"


def _smaller_blocks(used: int, block: int) -> list[str]:
    if used == block:
        return []
    return [
        f"whole blocks of {block} channels don't reach the target: blocks of {used} were used, which may run slower"
    ]


def _latency(
    original: str, pruned: Path, threads: int, shapes: Shapes | None, seed: int, warnings: list[str]
) -> Latency | None:
    """Both models, turn by turn; a failure here is a warning, for the proof has passed."""
    from onnxprune.verify.latency import compare

    try:
        return compare(original, pruned, threads=threads, shapes=shapes, seed=seed)
    except ModelRejected as error:
        warnings.append(f"latency was not measured: {error}")
        return None
