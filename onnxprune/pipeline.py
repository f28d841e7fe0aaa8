"""compress(): load, analyse, select, rewrite, verify, in that order, with plain values between.

A method in training comes between select and rewrite: it gives the trained network, and which of its units are zero.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any

import onnx

from onnxprune.accuracy import DEFAULT_RECIPE, TRAINED_KEY, Recipe, Work, is_first_process, training_imports
from onnxprune.axes.analysis import Analysis
from onnxprune.axes.analysis import analyse as analyse_graph
from onnxprune.errors import ModelRejected, TargetNotReached, UsageError
from onnxprune.model.graph import Graph, Model
from onnxprune.model.infer import infer
from onnxprune.model.load import load, open_model, understood
from onnxprune.model.payload import Mapped
from onnxprune.model.profile import costs, summary
from onnxprune.model.save import place, write
from onnxprune.ops import OPERATORS
from onnxprune.ops.registry import Operator
from onnxprune.ranking import Ranking, measured_samples, ranking
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


class _Clock:
    """Seconds per stage, by name."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress
        self.stage = ""
        self.since = time.perf_counter()

    def start(self, stage: str) -> None:
        now = time.perf_counter()
        if self.stage:
            self.seconds[f"{self.stage}_s"] = now - self.since
        self.stage, self.since = stage, now
        if stage and self.progress is not None:
            self.progress(stage)

    def stop(self) -> dict[str, float]:
        self.start("")
        return self.seconds


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
    """Prune a model to a target, prove the surgery in onnxruntime, train what is left where there is data, and write
    it.

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
    data: what to train on, in any form that `data.open_data` takes. train: how, and for how long. recipe: the loss, and
        what is done to the data.
    evaluate: a metric of `metrics.parse_metric`, taken in onnxruntime of the original, the pruned and the written
        model. max_drop: what it may lose, as a fraction.
    run_dir, resume: where the training keeps checkpoints, and whether it goes on from there.
    progress: called with the name of each stage, on_step: with the state of the training.

    Raises UsageError, ModelRejected, NothingPrunable, TargetNotReached, VerificationFailed; DataError for what goes
    wrong in data, hooks and training; NotMirrored where the model can't be trained. Where it raises, nothing has been
    written (but for checkpoints in run_dir).
    """
    goal = parse_target(target)
    if goal.metric == "latency" and method != ONESHOT:
        raise UsageError(
            f"target {goal.text} is planned by measuring, and method {method} plans in training",
            "find out what it takes with --method oneshot --dry-run, and ask for that with macs=",
        )
    block = block_size(deploy, align)
    chosen = _method(method, method_options, data)
    first = is_first_process()
    destination = None if output is None or not first else _free(Path(output), model, force)
    clock = _Clock(progress)
    clock.start("load")
    graph = _load(model, registry, input_shapes)
    work = Work.prepared(
        graph,
        data,
        train,
        evaluate,
        max_drop,
        recipe,
        registry=registry,
        threads=threads,
        method=chosen,
        run_dir=run_dir,
        resume=resume,
    )
    clock.start("analyse")
    analysis = analyse_graph(graph, registry=registry, exclude=exclude)
    clock.start("select")
    name = Path(graph.model.source).name or "model"
    before = summary(graph.model, name, costs(analysis))
    wanted = Wanted(target=goal, scope=scope, floor=floor, align=block, allow_inexact=allow_inexact)
    families = None if chosen is None or work is None else work.families(analysis, allow_inexact=allow_inexact)
    ranked = Ranking("l2")
    if chosen is None:
        ranked = ranking(
            analysis,
            candidates(analysis, allow_inexact=allow_inexact),
            None if work is None or work.recovery is None else work.recovery.source,
            importance=importance,
            allocate=allocate,
            stored=None if sensitivity is None else Path(sensitivity),
            seed=seed,
        )
    plan = partial(
        choose,
        analysis,
        importance=ranked.importance,
        calibration=ranked.calibration,
        losses=ranked.losses,
        scope=scope,
        floor=floor,
        align=block,
        allow_inexact=allow_inexact,
        seed=seed,
        only=families,
    )
    measured = None
    if goal.metric == "latency":
        measured = _measured(analysis, goal, plan, block, allow_inexact=allow_inexact, best_effort=best_effort,
                             threads=threads, shapes=input_shapes, seed=seed, progress=progress,
                             run_dir=run_dir, resume=resume)  # fmt: skip
    choice = plan(goal) if measured is None else measured.choice
    result = Result(
        before,
        None,
        choice.outcome,
        choice.plan,
        analysis,
        align=choice.align,
        aligned=aligned_counts(analysis, choice.plan, block),
        warnings=[
            *_warnings(graph, choice.align if chosen is None or dry_run else block, block),
            *(() if measured is None else measured.warnings),
        ],
        latency=None if measured is None else measured.latency,
    )
    if not choice.outcome.met and not best_effort:
        raise TargetNotReached(
            f"target {goal.text} can't be reached: at most {1 - choice.least:.1%} of {goal.metric} can go, "
            f"which leaves {choice.least:.1%}",
            "ask for less, or write the closest model with --best-effort",
        )
    if dry_run:
        if chosen is not None:
            result.warnings.append(
                f"method {chosen.name} chooses units in training; those of the lowest l2 norm stand here"
            )
        result.timing = clock.stop()
        return result
    in_training: dict[str, Any] = {"run_dir": run_dir, "resume": resume, "shapes": input_shapes, "on_step": on_step}
    zero = None
    if chosen is not None and work is not None and families is not None:
        clock.start("sparsify")
        zero = work.zeroed(analysis, wanted, families, chosen, warnings=result.warnings, **in_training)
        _take(result, zero, block, best_effort=best_effort)
    clock.start("rewrite")
    pruned = rewrite(result.analysis, result.plan)

    def produce(path: Path) -> None:
        pruned.nbytes = _written(pruned, path)
        clock.start("verify")
        result.verification = prove(result.analysis, result.plan, path, seed=seed, shapes=input_shapes, model=pruned)
        if result.sparsified is not None:
            prove_zero(result, path, seed=seed, shapes=input_shapes, model=pruned)
        smaller = infer(open_model(path), registry, graph.pins)
        result.model = pruned
        if work is not None:
            smaller = work.run(smaller, path, result, stage=clock.start, before=zero, **in_training)
            result.model = smaller.model
        shown = destination.name if destination else f"{name} (pruned)"
        result.after = summary(smaller.model, shown, costs(analyse_graph(smaller, registry=registry)))
        if (latency if measured is None else work is not None) and first and graph.model.source:
            clock.start("latency")
            result.latency = _latency(graph.model.source, path, threads, input_shapes, seed, result.warnings)
            if measured is not None and result.latency is not None:
                result.target = measured.outcome(goal, result.latency, result.warnings)
        clock.start("write")

    if destination is None:
        with TemporaryDirectory(prefix="onnxprune-") as folder:
            produce(Path(folder) / "pruned.onnx")
    else:
        _spare_external_data(destination, graph.model)
        place(destination, produce)
        result.output = str(destination)
    result.timing = clock.stop()
    return result


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

    Of a model that was trained since, the surgery is done again and proved, and the file must be what came out with
    other weights; the notes say so. Raises VerificationFailed, ModelRejected.
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
    if any(p.key == TRAINED_KEY for p in small.proto.metadata_props):
        return prove_trained(analysis, plan, Path(pruned), small, seed=seed, shapes=input_shapes)
    return prove(analysis, plan, Path(pruned), seed=seed, shapes=input_shapes, model=small)


def _method(method: str | type[Sparsifier], options: Mapping[str, Any] | None, data: object) -> Method | None:
    """The method in training that was asked for, None for one-shot. Raises UsageError."""
    if method != ONESHOT and data is None:
        name = method if isinstance(method, str) else method.__name__
        raise UsageError(f"the method {name} works in training, which wants data", "give it with --data")
    with training_imports():
        return find_method(method, options)


def _take(result: Result, zero: Zeroed, block: int, *, best_effort: bool) -> None:
    """Go on with a trained network whose zero units are the plan. Raises TargetNotReached."""
    result.analysis, result.plan, result.target = zero.analysis, zero.plan, zero.outcome
    result.sparsified, result.align = zero.summary, zero.block
    result.aligned = aligned_counts(zero.analysis, zero.plan, block)
    result.warnings += _smaller_blocks(zero.block, block)
    if not zero.outcome.met and not best_effort:
        raise TargetNotReached(
            f"the method {zero.summary.method} left {zero.outcome.reached:.1%} of {zero.outcome.metric} after "
            f"{zero.summary.steps} steps, more than {zero.outcome.spec}",
            "train longer (--steps), or write the closest model with --best-effort",
        )


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


def _free(path: Path, model: object, force: bool) -> Path:
    """Refuse an output that can't or must not be written, before any work."""
    if isinstance(model, (str, os.PathLike)) and path.exists() and Path(model).exists() and path.samefile(model):
        raise UsageError(f"{path} is the input itself", "name another output")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "name a file in it")
    for taken in (path, path.with_name(f"{path.name}.data")):
        if taken.exists() and not force:
            raise UsageError(f"{taken} exists already", "--force overwrites it")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder", "create it first")
    try:
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{path.parent} can't be written to: {error.strerror}", "name an output elsewhere") from None
    return path


def _spare_external_data(path: Path, model: Model) -> None:
    """The input's own external data is never replaced, whatever --force says."""
    data = path.with_name(f"{path.name}.data")
    for payload in model.payloads.values():
        if isinstance(payload, Mapped) and data.exists() and data.samefile(payload.file.path):
            raise UsageError(f"{data} holds the input's own weights", "name another output")


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


def _measured(
    analysis: Analysis,
    goal: Target,
    plan: Callable[..., Choice],
    block: int,
    *,
    run_dir: str | os.PathLike[str] | None,
    resume: bool,
    **how: Any,
) -> Reached:
    """The plan for a latency, found by measuring."""
    from onnxprune.latency.keep import reached_once
    from onnxprune.latency.search import reach

    search = partial(reach, analysis, goal, plan, align=block, **how)
    return reached_once(search, analysis, goal, run_dir=run_dir, resume=resume)


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
