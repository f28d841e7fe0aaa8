"""What `compress` does about accuracy: training after the surgery, and a metric before and after it.

Everything that can be refused is refused before any long work: the data is opened, the loss built and the model
mirrored first. torch is imported only where something is trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from onnxprune.errors import OnnxPruneError, TargetNotReached, UsageError
from onnxprune.model.graph import Graph, Model
from onnxprune.model.infer import infer
from onnxprune.model.load import open_model
from onnxprune.model.save import write
from onnxprune.ops.registry import Operator
from onnxprune.result import Accuracy, Result, Training
from onnxprune.sparsify import Wanted, Zeroed, check_length, run_folders, trainable, zeroed
from onnxprune.train.settings import TrainSettings

if TYPE_CHECKING:
    from onnxprune.axes.analysis import Analysis
    from onnxprune.data.source import Source
    from onnxprune.metrics import Metric
    from onnxprune.train.log import Row
    from onnxprune.train.methods import Method
    from onnxprune.train.recover import Recovery

__all__ = ["DEFAULT_RECIPE", "TRAINED_KEY", "TRAIN_STEPS", "Recipe", "Work", "is_first_process"]

TRAIN_STEPS = 500
TRAINED_KEY = "onnxprune.trained"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is learnt from the data.

    preprocess: what is done to it, as `data.Preprocess.parse` has it. loss, distill, temperature: as
    `train.loss.criterion` has them. rebn: put folded BatchNormalization back for training; None: where there is none.
    eval_data: what the metric is taken on, instead of what is trained on.
    """

    preprocess: str | None = None
    loss: str = "auto"
    distill: float = 0.0
    temperature: float = 4.0
    rebn: bool | None = None
    eval_data: object = None


DEFAULT_RECIPE = Recipe()


def is_first_process() -> bool:
    """Of several processes that train together (torchrun), one writes."""
    return int(os.environ.get("RANK", "0") or 0) == 0


@dataclass(eq=False)
class Work:
    """Training and a metric, as far as they were asked for."""

    original: Graph
    registry: Mapping[str, Operator]
    recovery: Recovery | None
    metric: Metric | None
    source: Source | None  # what the metric is taken on
    max_drop: float | None
    threads: int

    @classmethod
    def prepared(
        cls,
        graph: Graph,
        data: object,
        train: TrainSettings | None,
        metric: str | None,
        max_drop: float | None,
        recipe: Recipe,
        *,
        registry: Mapping[str, Operator],
        threads: int,
        method: Method | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> Work | None:
        """None where neither was asked for. Raises UsageError, DataError, NotMirrored."""
        if max_drop is not None and metric is None:
            raise UsageError("a limit to the drop wants a metric", "--max-drop goes with --eval top1, for instance")
        if data is None and (train is not None or recipe.loss != "auto" or recipe.distill):
            raise UsageError("training wants data", "give it with --data")
        if data is None and metric is None:
            return None
        recovery = None
        if data is not None:
            recovery = _recovery(graph, data, train or TrainSettings(steps=TRAIN_STEPS), recipe, registry)
            if method is not None:
                check_length(recovery, method)
            if run_dir is not None and is_first_process():
                look_into(recovery, Path(run_dir), method, resume=resume)
        source, judge = None, None
        if metric is not None:
            from onnxprune.metrics import parse_metric

            judge = parse_metric(metric)
            source = _evaluation(graph, recipe, recovery)
        return cls(graph, registry, recovery, judge, source, max_drop, threads)

    def families(self, analysis: Analysis, *, allow_inexact: bool) -> list[str]:
        """Ids of the groups that a method in training may take units of. Raises NothingPrunable."""
        assert self.recovery is not None
        return trainable(self.recovery, analysis, allow_inexact=allow_inexact)

    def zeroed(
        self,
        analysis: Analysis,
        wanted: Wanted,
        families: Sequence[str],
        method: Method,
        *,
        warnings: list[str],
        shapes: Mapping[str, Sequence[int]] | None = None,
        on_step: Callable[[Row], None] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> Zeroed:
        """The first part of the training, in which a method makes units zero: see `sparsify.zeroed`."""
        assert self.recovery is not None
        folder = None if run_dir is None else Path(run_dir)
        with _as_file(self.original) as path, _noting(warnings):
            return zeroed(
                self.recovery,
                path,
                analysis,
                wanted,
                families,
                method,
                run_dir=folder,
                resume=resume,
                shapes=shapes,
                progress=on_step,
                notify=warnings.append,
            )

    def run(
        self,
        pruned: Graph,
        path: Path,
        result: Result,
        *,
        stage: Callable[[str], None],
        before: Zeroed | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        shapes: Mapping[str, Sequence[int]] | None = None,
        on_step: Callable[[Row], None] | None = None,
    ) -> Graph:
        """Train the pruned model in `path`, write it there again, and take the metric. Returns what is written, and
        puts the figures into the result. Raises TargetNotReached where it lost more than allowed.

        before: the first part of the training, where there was one.
        """
        whole = after_surgery = None
        judging = self.metric is not None and is_first_process()
        if judging:
            stage("evaluate")
            with _as_file(self.original) as original:
                whole = self.value(original, original)
                after_surgery = self.value(path, original) if self.recovery is not None else None
        if self.recovery is not None:
            stage("train")
            folder = None if run_dir is None else Path(run_dir)
            pruned = self._trained(pruned, path, result, before, shapes, on_step, run_dir=folder, resume=resume)
        if judging and whole is not None:
            stage("evaluate")
            with _as_file(self.original) as original:
                self._judge(result, whole, after_surgery, self.value(path, original))
        return pruned

    def _trained(
        self,
        pruned: Graph,
        path: Path,
        result: Result,
        before: Zeroed | None,
        shapes: Mapping[str, Sequence[int]] | None,
        on_step: Callable[[Row], None] | None,
        *,
        run_dir: Path | None,
        resume: bool,
    ) -> Graph:
        from onnxprune.train.recover import kept_channels, mirror_error

        assert self.recovery is not None
        if before is not None and before.summary.share == 1:
            result.training = replace(before.trained.report, mirror_error_after=before.error)
            self._rewrite(marked(pruned.model, before.trained.report, before), path)
            return infer(open_model(path), self.registry, self.original.pins)
        how: dict[str, Any] = {"left": kept_channels(result.analysis, result.plan), "run_dir": run_dir}
        if before is not None:
            how = {"left": None, "run_dir": run_folders(run_dir)[1], **before.rest()}
        with _noting(result.warnings):
            trained = self.recovery.run(
                pruned, path, shapes=shapes, progress=on_step, notify=result.warnings.append, resume=resume, **how
            )
        report = trained.report if before is None else joined(before.trained.report, trained.report)
        self._rewrite(marked(trained.model, report, before), path)
        found = infer(open_model(path), self.registry, self.original.pins)
        error = mirror_error(trained.module, found, path, registry=self.registry, shapes=shapes)
        result.training = replace(report, mirror_error_after=error)
        return found

    def _rewrite(self, model: Model, path: Path) -> None:
        with TemporaryDirectory(dir=path.parent) as folder:  # `path` is still mapped: the weights are read from it
            model.nbytes = write(model, Path(folder) / path.name)
            for file in Path(folder).iterdir():
                os.replace(file, path.parent / file.name)

    def value(self, path: Path, original: Path) -> float:
        """The metric of a file."""
        from onnxprune.evaluate import evaluate

        assert self.metric is not None
        return evaluate(path, self.source, self.metric, original=original, threads=self.threads)

    def _judge(self, result: Result, before: float, pruned: float | None, after: float) -> None:
        from onnxprune.metrics import Drop

        assert self.metric is not None
        drop = Drop(before, after, self.metric)
        result.accuracy = Accuracy(
            self.metric.name, self.metric.higher_is_better, before, pruned, after, drop.amount, self.metric.is_fraction
        )
        if self.max_drop is not None and not drop.within(self.max_drop):
            raise TargetNotReached(
                f"{self.metric.name} goes from {before:.4g} to {after:.4g}, more than the {self.max_drop:.2%} allowed",
                "train longer (--steps), remove less (--target), or allow more (--max-drop)",
            )


def marked(model: Model, report: Training, before: Zeroed | None) -> Model:
    """A model that says that its weights were trained."""
    entry = model.proto.metadata_props.add(key=TRAINED_KEY)
    method = {} if before is None else {"method": before.summary.method}
    entry.value = json.dumps({"loss": report.loss, "steps": report.steps, **method})
    return model


def joined(first: Training, second: Training) -> Training:
    """Two parts of one training in one report: the second goes on counting steps, epochs and seconds."""
    return replace(
        second,
        first_loss=first.first_loss,
        backoffs=first.backoffs + second.backoffs,
        resumed_from=second.resumed_from if second.resumed_from is not None else first.resumed_from,
        mirror_error_before=first.mirror_error_before,
    )


def look_into(recovery: Recovery, run_dir: Path, method: Method | None, *, resume: bool) -> None:
    """Refuse a run directory that this training can't use, before the work. Raises UsageError."""
    parted = [folder for folder in run_folders(run_dir) if folder is not None and (folder / "checkpoints").is_dir()]
    other = parted if method is None else (run_dir / "checkpoints").is_dir()
    if other:
        kind = "with a method in training" if method is None else "with --method oneshot"
        raise UsageError(f"{run_dir} holds a run {kind}", "give another --run-dir")
    if method is None:
        recovery.look_into(run_dir, resume=resume)
        return
    spans = (0.0, method.share), (method.share, 1.0)
    for folder, span in zip(run_folders(run_dir), spans, strict=True):
        if folder is not None and span[0] < 1:
            recovery.look_into(folder, resume=resume, span=span, identity=method.about())


@contextmanager
def _noting(warnings: Sequence[str]) -> Iterator[None]:
    """What stops the work takes the warnings along: there will be no result to read them in."""
    try:
        yield
    except (OnnxPruneError, KeyboardInterrupt) as stop:
        for warning in warnings:
            stop.add_note(warning)
        raise


def _recovery(
    graph: Graph, data: object, settings: TrainSettings, recipe: Recipe, registry: Mapping[str, Operator]
) -> Recovery:
    with training_imports():
        from onnxprune.train.recover import Recovery
    return Recovery.prepared(
        graph,
        data,
        settings,
        registry=registry,
        preprocess=recipe.preprocess,
        loss=recipe.loss,
        distill=recipe.distill,
        temperature=recipe.temperature,
        rebn=recipe.rebn,
    )


@contextmanager
def training_imports() -> Iterator[None]:
    """Around imports that want torch. Raises UsageError where it is missing."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        what = "which is not installed" if missing else f"which can't be imported: {error}"
        raise UsageError(
            f"training wants torch, {what}", "pip install 'onnxprune[train]'; or leave --data away: it works without"
        ) from None


def _evaluation(graph: Graph, recipe: Recipe, recovery: Recovery | None) -> Source | None:
    """What the metric is taken on; a callable may bring data of its own."""
    if recipe.eval_data is None:
        return None if recovery is None else recovery.source
    from onnxprune.data.signature import signature_of
    from onnxprune.data.source import open_data

    return open_data(recipe.eval_data, signature_of(graph), preprocess=recipe.preprocess)


class _as_file:
    """The original as a file: its own, or a temporary one where it came from memory."""

    def __init__(self, graph: Graph) -> None:
        self.model = graph.model
        self.folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Path:
        if self.model.source:
            return Path(self.model.source)
        self.folder = TemporaryDirectory(prefix="onnxprune-")
        path = Path(self.folder.name) / "original.onnx"
        write(self.model, path)
        return path

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self.folder.cleanup()
