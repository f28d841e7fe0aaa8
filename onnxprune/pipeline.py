"""compress(): load, analyse, select, rewrite, verify, in that order, with plain values between.

A method in training comes between select and rewrite: it gives the trained network, and which of its units are zero.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import onnx

from onnxprune.accuracy import TRAINED_KEY, Work, is_first_process, training_imports
from onnxprune.axes.analysis import Analysis
from onnxprune.axes.analysis import analyse as analyse_graph
from onnxprune.clock import Clock
from onnxprune.errors import ModelRejected, TargetNotReached, UsageError
from onnxprune.model.graph import Graph, Model
from onnxprune.model.infer import infer
from onnxprune.model.load import load, open_model, understood
from onnxprune.model.profile import costs, summary
from onnxprune.model.save import place, write
from onnxprune.ops import OPERATORS
from onnxprune.ops.registry import Operator
from onnxprune.output import free, spare_external_data
from onnxprune.ranking import Ranking, measured_samples, ranking
from onnxprune.repairs import REPAIRED_KEY
from onnxprune.request import DEFAULT_RECIPE, Recipe, Request
from onnxprune.result import Latency, ModelSummary, Result, Verification
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.align import aligned_counts, block_size
from onnxprune.select.choose import Choice, candidates, choose
from onnxprune.select.importance import Criterion
from onnxprune.select.plan import METADATA_KEY, plan_from_text, stored_settings
from onnxprune.select.target import Target, parse_target
from onnxprune.sparsify import Wanted, Zeroed, prove_zero
from onnxprune.train.methods import ONESHOT, Method, find_method
from onnxprune.train.settings import TrainSettings
from onnxprune.verify.equivalence import prove
from onnxprune.verify.trained import prove_trained

if TYPE_CHECKING:
    import torch.fx

    from onnxprune.latency.search import Reached
    from onnxprune.sensitivity import Sensitivity
    from onnxprune.train.log import Row
    from onnxprune.train.sparsify import Sparsifier

__all__ = ["Inspection", "analyse", "compress", "inspect", "mirror", "sensitivity", "verify"]

Shapes = Mapping[str, Sequence[int]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found out."""

    summary: ModelSummary
    analysis: Analysis
    load_s: float
    analyse_s: float


def compress(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    target: str,
    method: str | type[Sparsifier] = ONESHOT,
    method_options: Mapping[str, Any] | None = None,
    importance: str | Criterion = "l2",
    allocate: str = "importance",
    sensitivity: str | os.PathLike[str] | None = None,
    scope: str = "global",
    floor: float = 0.1,
    deploy: str = "ort-cpu",
    align: int | None = None,
    exclude: Sequence[str] = (),
    allow_inexact: bool = False,
    best_effort: bool = False,
    seed: int = 0,
    dry_run: bool = False,
    force: bool = False,
    latency: bool = False,
    threads: int = 1,
    input_shapes: Shapes | None = None,
    data: object = None,
    samples: int | None = None,
    repair: str = "auto",
    calibrate: str | None = None,
    train: TrainSettings | None = None,
    evaluate: str | None = None,
    max_drop: float | None = None,
    recipe: Recipe = DEFAULT_RECIPE,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    registry: Mapping[str, Operator] = OPERATORS,
    progress: Progress | None = None,
    on_step: Callable[[Row], None] | None = None,
) -> Result:
    """Prune a model to a target, prove the surgery in onnxruntime, repair what is left where there is data, train it
    where that is asked for, and write it.

    output: where to write; nothing is written where it is None (the pruned model is in the result).
    target: what is to remain, such as 'macs=0.5', 'params=40%', 'size=5MB', 'macs=1.2G', 'channels=0.5',
        'latency=0.6' or 'latency=12ms' in onnxruntime on this machine with `threads` threads.
    method: 'oneshot' removes the units of least importance; 'dhspg', 'hesso', 'tpp', 'greg', 'fixreg', 'imp' and 'issp'
        (`train.methods`) drive units to zero in training on `data` and then remove them. method_options: by name;
        'share' is the part of the training that comes before the removal. importance, allocate: for 'oneshot', as
        `ranking.ranking` takes them; sensitivity: a file that `sensitivity` wrote, which tells both.
    deploy, align: the block that kept counts are multiples of (`select.align`). floor: least share a group keeps.
    exclude: regular expressions of initializer and node names to leave alone.
    input_shapes: sizes of inputs with symbolic dimensions, for costs, the proof and latency.
    data: what to repair, rank and train on, in any form that `data.open_data` takes. samples: how many of its inputs
        are for ranking and repair, 512 unless told otherwise.
    repair: 'affine' solves for the weights and biases of the layers behind the surgery so that they give what they
        gave, 'ls' for the weights, 'mean' for the biases, 'none' for nothing; 'auto' is 'affine' where there is data
        and no method in training. calibrate: 'random' repairs without data, on inputs drawn at random, which can hurt.
    train: how, and for how long; where it is None, only methods in training train. recipe: the loss, and what is done
        to the data.
    evaluate: a metric of `metrics.parse_metric`, taken in onnxruntime of the original, the pruned and the written
        model. max_drop: what it may lose, as a fraction.
    run_dir, resume: where the training keeps checkpoints, and whether it goes on from there.
    progress: called with the name of each stage, on_step: with the state of the training.

    Raises UsageError, ModelRejected, NothingPrunable, TargetNotReached, VerificationFailed; DataError for what goes
    wrong in data, hooks and training; NotMirrored where the model can't be trained. Where it raises, nothing has been
    written (but for checkpoints in run_dir).
    """
    request = Request.of(locals())
    goal = goal_of(target, request)
    destination = None if output is None or not is_first_process() else free(Path(output), model, force)
    clock = Clock(progress)
    return Point(Prepared.of(model, request, clock), goal, destination, clock).run()


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
        graph = _load(model, request.registry, request.input_shapes)
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
            return Ranking("l2")
        return ranking(
            self.analysis,
            candidates(self.analysis, allow_inexact=request.allow_inexact),
            self.work.source,
            importance=request.importance,
            allocate=request.allocate,
            stored=None if request.sensitivity is None else Path(request.sensitivity),
            samples=request.samples,
            seed=request.seed,
        )

    def plan(self, goal: Target) -> Choice:
        """The units to keep for a target."""
        request = self.request
        return choose(
            self.analysis,
            goal,
            importance=self.ranked.importance,
            calibration=self.ranked.calibration,
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
        if not choice.outcome.met and not request.best_effort:
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
        )
        tentative = prepared.method is not None and not request.dry_run
        found.warnings = _warnings(prepared.graph, block if tentative else choice.align, block)
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


def inspect(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    exclude: Sequence[str] = (),
    input_shapes: Shapes | None = None,
    registry: Mapping[str, Operator] = OPERATORS,
) -> Inspection:
    """The groups of a model, what they cover, and every barrier. Raises ModelRejected, UsageError."""
    start = time.perf_counter()
    graph = _load(model, registry, input_shapes)
    loaded = time.perf_counter()
    analysis = analyse_graph(graph, registry=registry, exclude=exclude)
    done = time.perf_counter()
    name = Path(graph.model.source).name or "model"
    return Inspection(summary(graph.model, name, costs(analysis)), analysis, loaded - start, done - loaded)


def analyse(
    model: str | os.PathLike[str] | onnx.ModelProto | Graph,
    *,
    exclude: Sequence[str] = (),
    input_shapes: Shapes | None = None,
    registry: Mapping[str, Operator] = OPERATORS,
) -> Analysis:
    """Groups, axes, coverage and barriers of a model. Raises ModelRejected, UsageError."""
    graph = model if isinstance(model, Graph) else _load(model, registry, input_shapes)
    return analyse_graph(graph, registry=registry, exclude=exclude)


def sensitivity(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: object,
    *,
    preprocess: str | None = None,
    importance: str | Criterion = "obs",
    evaluate: str = "agreement",
    samples: int | None = None,
    repaired: bool = False,
    exclude: Sequence[str] = (),
    allow_inexact: bool = False,
    input_shapes: Shapes | None = None,
    seed: int = 0,
    registry: Mapping[str, Operator] = OPERATORS,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Analysis, Sensitivity]:
    """What a model loses with the units of each group, more and more of them, one group at a time. Wants torch.

    data, preprocess: as `compress` takes them. importance: the order in which units go. evaluate: the metric beside the
    distillation loss, such as 'top1'. samples: how many to measure on; None: what takes a few minutes.
    repaired: whether what is left makes up for what is gone, as closed-form repair will.
    Raises UsageError, DataError, ModelRejected, NothingPrunable, NotMirrored.
    """
    from onnxprune.calibrate import Calibration
    from onnxprune.calibrate.calibration import SAMPLES
    from onnxprune.data import open_data, signature_of
    from onnxprune.metrics import parse_metric
    from onnxprune.sensitivity import measure

    graph = _load(model, registry, input_shapes)
    analysis = analyse_graph(graph, registry=registry, exclude=exclude)
    groups = candidates(analysis, allow_inexact=allow_inexact)
    source = open_data(data, signature_of(graph), preprocess=preprocess)
    calibration = Calibration(analysis, source, samples or SAMPLES, seed)
    few = samples or measured_samples(analysis, groups, SAMPLES)
    metric = parse_metric(evaluate)
    return analysis, measure(
        analysis,
        groups,
        calibration,
        importance=importance,
        metric=metric,
        samples=few,
        repaired=repaired,
        seed=seed,
        progress=progress,
    )


def mirror(
    model: str | os.PathLike[str] | onnx.ModelProto | Graph,
    *,
    half: torch.dtype | None = None,
    registry: Mapping[str, Operator] = OPERATORS,
) -> torch.fx.GraphModule:
    """A model as a torch module that computes the same function: see `mirroring.mirror`. Wants torch.

    Raises ModelRejected; NotMirrored where nodes have no form in torch; UsageError where torch is not installed.
    """
    try:
        from onnxprune.mirroring import mirror as build
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError("a mirror wants torch, which is not installed", "pip install 'onnxprune[train]'") from None
    return build(model, half=half, registry=registry)


def verify(
    original: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    *,
    seed: int = 0,
    input_shapes: Shapes | None = None,
    registry: Mapping[str, Operator] = OPERATORS,
) -> Verification:
    """Repeat the proof from the plan stored in a pruned model.

    Of a model that was repaired or trained since, the surgery is done again and proved, and the file must be what came
    out with other weights; the notes say so. Raises VerificationFailed, ModelRejected.
    """
    small = open_model(pruned)
    text = next((p.value for p in small.proto.metadata_props if p.key == METADATA_KEY), None)
    if text is None:
        raise ModelRejected(
            f"{pruned} holds no plan: it was not written by onnxprune",
            "`onnxprune verify ORIGINAL PRUNED`, in this order",
        )
    pins, exclude = stored_settings(text)
    analysis = analyse_graph(load(original, registry=registry, pins=pins), registry=registry, exclude=exclude)
    plan = plan_from_text(text, analysis)
    marks = {p.key for p in small.proto.metadata_props}
    if TRAINED_KEY in marks or REPAIRED_KEY in marks:
        found = prove_trained(analysis, plan, Path(pruned), small, seed=seed, shapes=input_shapes)
        notes = found.notes if TRAINED_KEY in marks else [n.replace("trained:", "repaired:", 1) for n in found.notes]
        return replace(found, notes=tuple(notes))
    return prove(analysis, plan, Path(pruned), seed=seed, shapes=input_shapes, model=small)


def _method(request: Request) -> Method | None:
    """The method in training that was asked for, None for one-shot. Raises UsageError."""
    method = request.method
    if request.in_training and request.data is None:
        name = method if isinstance(method, str) else method.__name__
        raise UsageError(f"the method {name} works in training, which wants data", "give it with --data")
    with training_imports():
        return find_method(method, request.method_options)


def _load(
    model: str | os.PathLike[str] | onnx.ModelProto, registry: Mapping[str, Operator], shapes: Shapes | None
) -> Graph:
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
