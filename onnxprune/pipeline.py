"""compress(): load, analyse, select, rewrite, verify, in that order, with plain values between."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING

import onnx

from onnxprune.accuracy import DEFAULT_RECIPE, TRAINED_KEY, Recipe, Work, is_first_process
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
from onnxprune.result import Latency, ModelSummary, Result, Verification
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.align import aligned_counts, block_size
from onnxprune.select.choose import Choice, choose
from onnxprune.select.importance import Criterion
from onnxprune.select.plan import METADATA_KEY, plan_from_text, stored_settings
from onnxprune.select.target import parse_target
from onnxprune.train.settings import TrainSettings
from onnxprune.verify.equivalence import prove
from onnxprune.verify.trained import prove_trained

if TYPE_CHECKING:
    import torch.fx

    from onnxprune.train.log import Row

__all__ = ["Inspection", "analyse", "compress", "inspect", "mirror", "verify"]

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
    importance: str | Criterion = "l2",
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
    target: what is to remain, such as 'macs=0.5', 'params=40%', 'size=5MB', 'macs=1.2G', 'channels=0.5'.
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
    block = block_size(deploy, align)
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
        run_dir=run_dir,
        resume=resume,
    )
    clock.start("analyse")
    analysis = analyse_graph(graph, registry=registry, exclude=exclude)
    clock.start("select")
    name = Path(graph.model.source).name or "model"
    before = summary(graph.model, name, costs(analysis))
    choice = choose(
        analysis,
        goal,
        importance=importance,
        scope=scope,
        floor=floor,
        align=block,
        allow_inexact=allow_inexact,
        seed=seed,
    )
    result = Result(
        before,
        None,
        choice.outcome,
        choice.plan,
        analysis,
        align=choice.align,
        aligned=aligned_counts(analysis, choice.plan, block),
        warnings=_warnings(graph, choice, block),
    )
    if not choice.outcome.met and not best_effort:
        raise TargetNotReached(
            f"target {goal.text} can't be reached: at most {1 - choice.least:.1%} of {goal.metric} can go, "
            f"which leaves {choice.least:.1%}",
            "ask for less, or write the closest model with --best-effort",
        )
    if dry_run:
        result.timing = clock.stop()
        return result
    clock.start("rewrite")
    pruned = rewrite(analysis, choice.plan)

    def produce(path: Path) -> None:
        pruned.nbytes = _written(pruned, path)
        clock.start("verify")
        result.verification = prove(analysis, choice.plan, path, seed=seed, shapes=input_shapes, model=pruned)
        smaller = infer(open_model(path), registry, graph.pins)
        result.model = pruned
        if work is not None:
            how = partial(work.run, run_dir=run_dir, resume=resume, shapes=input_shapes, on_step=on_step)
            smaller = how(smaller, path, result, stage=clock.start)
            result.model = smaller.model
        shown = destination.name if destination else f"{name} (pruned)"
        result.after = summary(smaller.model, shown, costs(analyse_graph(smaller, registry=registry)))
        if latency and first and graph.model.source:
            clock.start("latency")
            result.latency = _latency(graph.model.source, path, threads, input_shapes, seed, result.warnings)
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


def _warnings(graph: Graph, choice: Choice, block: int) -> list[str]:
    found = []
    if choice.align != block:
        found.append(
            f"whole blocks of {block} channels don't reach the target: blocks of {choice.align} were used, "
            "which may run slower"
        )
    if graph.problems:
        found.append(f"{len(graph.problems)} nodes whose shapes could not be inferred, such as {graph.problems[0]}")
    return found


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
