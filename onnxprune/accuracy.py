"""What `compress` does about accuracy: repair and training after the surgery, and a metric before and after them.

Everything that can be refused is refused before any long work: the data is opened, the loss built and the model
mirrored first. torch is imported only where something is repaired or trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from onnxprune.data.signature import signature_of
from onnxprune.data.source import Source, open_data
from onnxprune.errors import OnnxPruneError, TargetNotReached, UsageError
from onnxprune.imports import wants_torch
from onnxprune.model.graph import Graph, Model
from onnxprune.model.infer import infer
from onnxprune.model.load import open_model
from onnxprune.model.save import write
from onnxprune.repairs import Repairing, chosen_mode
from onnxprune.request import DEFAULT_RECIPE, TRAIN_STEPS, Recipe, Request
from onnxprune.result import Accuracy, Result, Training
from onnxprune.sparsify import Wanted, Zeroed, check_length, run_folders, trainable, zeroed
from onnxprune.train.settings import TrainSettings
from onnxprune.verify.runs import feeds_that_run, session

if TYPE_CHECKING:
    from onnxprune.axes.analysis import Analysis
    from onnxprune.metrics import Metric
    from onnxprune.train.methods import Method
    from onnxprune.train.recover import Recovery

__all__ = ["DEFAULT_RECIPE", "TRAINED_KEY", "TRAIN_STEPS", "Recipe", "Work", "is_first_process"]

TRAINED_KEY = "onnxprune.trained"


def is_first_process() -> bool:
    """Of several processes that train together (torchrun), one writes."""
    return int(os.environ.get("RANK", "0") or 0) == 0


@dataclass(eq=False)
class Work:
    """Repair, training and a metric, as far as they were asked for.

    source: what the model is calibrated and repaired on. judged: what the metric is taken on.
    """

    original: Graph
    request: Request
    source: Source | None
    recovery: Recovery | None
    repairing: Repairing | None
    metric: Metric | None
    judged: Source | None
    _whole: float | None = None  # the metric of the original

    @classmethod
    def prepared(cls, graph: Graph, request: Request, method: Method | None) -> Work:
        """Raises UsageError, DataError, NotMirrored."""
        if request.max_drop is not None and request.evaluate is None:
            raise UsageError("a limit to the drop wants a metric", "--max-drop goes with --eval top1, for instance")
        settings = request.training()
        chosen_mode(request)
        recovery = None
        if settings is not None:
            recovery = _recovery(graph, request, settings)
            if method is not None:
                check_length(recovery, method)
            if request.run_dir is not None and is_first_process():
                look_into(recovery, Path(request.run_dir), method, resume=request.resume)
        source = None
        if request.data is not None:
            source = _opened(graph, request.data, request) if recovery is None else recovery.source
        repairing = Repairing.prepared(graph, request, source, mirrored=recovery is not None)
        judged, metric = None, None
        if request.evaluate is not None:
            from onnxprune.metrics import parse_metric

            metric = parse_metric(request.evaluate)
            judged = source if request.recipe.eval_data is None else _opened(graph, request.recipe.eval_data, request)
        return cls(graph, request, source, recovery, repairing, metric, judged)

    @property
    def repairs_on_data(self) -> bool:
        return self.repairing is not None and self.repairing.source is not None

    @property
    def changes_weights(self) -> bool:
        """Whether anything comes after the surgery."""
        return self.recovery is not None or self.repairing is not None

    def families(self, analysis: Analysis) -> list[str]:
        """Ids of the groups that a method in training may take units of. Raises NothingPrunable."""
        assert self.recovery is not None
        return trainable(self.recovery, analysis, allow_inexact=self.request.allow_inexact)

    def zeroed(
        self, analysis: Analysis, wanted: Wanted, families: Sequence[str], method: Method, *, warnings: list[str]
    ) -> Zeroed:
        """The first part of the training, in which a method makes units zero: see `sparsify.zeroed`."""
        assert self.recovery is not None
        request = self.request
        with _as_file(self.original) as path, _noting(warnings):
            return zeroed(
                self.recovery,
                path,
                analysis,
                wanted,
                families,
                method,
                run_dir=None if request.run_dir is None else Path(request.run_dir),
                resume=request.resume,
                shapes=request.input_shapes,
                progress=request.on_step,
                notify=warnings.append,
            )

    def run(
        self, pruned: Graph, path: Path, result: Result, *, stage: Callable[[str], None], before: Zeroed | None = None
    ) -> Graph:
        """Repair and train the pruned model in `path`, write it there again, and take the metric. Returns what is
        written, and puts the figures into the result. Raises TargetNotReached where it lost more than allowed.

        before: the first part of the training, where there was one.
        """
        values: list[float] = []

        def judge() -> None:
            if self.metric is not None and is_first_process():
                stage("evaluate")
                values.append(self.value(path))

        if self.changes_weights:
            judge()
        if self.repairing is not None:
            stage("repair")
            pruned = self._repaired(pruned, path, result)
            if self.recovery is not None:
                judge()
        if self.recovery is not None:
            stage("train")
            pruned = self._trained(pruned, path, result, before)
        judge()
        if values:
            self._judge(result, values)
        return pruned

    def _repaired(self, pruned: Graph, path: Path, result: Result) -> Graph:
        from onnxprune.train.batching import Unfitting

        assert self.repairing is not None
        try:
            with _as_file(self.original) as original:
                model, result.repair = self.repairing.run(result.analysis, result.plan, original)
        except Unfitting as error:
            if self.request.repair != "auto" or self.request.calibrate is not None:
                error.hint = "--repair none prunes it without repair"
                raise
            result.warnings.append(f"nothing was repaired: {error}")
            return pruned
        if model is None:
            return pruned
        self._rewrite(model, path)
        found = infer(open_model(path), self.request.registry, self.original.pins)
        feeds_that_run(found, session(path), self.request.seed, self.request.input_shapes)
        return found

    def _trained(
        self,
        pruned: Graph,
        path: Path,
        result: Result,
        before: Zeroed | None,
    ) -> Graph:
        from onnxprune.train.recover import kept_channels, mirror_error

        assert self.recovery is not None
        request = self.request
        run_dir = None if request.run_dir is None else Path(request.run_dir)
        if before is not None and before.summary.share == 1:
            result.training = replace(before.trained.report, mirror_error_after=before.error)
            self._rewrite(marked(pruned.model, before.trained.report, before), path)
            return infer(open_model(path), request.registry, self.original.pins)
        how: dict[str, Any] = {"left": kept_channels(result.analysis, result.plan), "run_dir": run_dir}
        if self.repairing is not None:
            how["identity"] = self.repairing.about()
        if before is not None:
            how = {"left": None, "run_dir": run_folders(run_dir)[1], **before.rest()}
        with _noting(result.warnings):
            trained = self.recovery.run(
                pruned,
                path,
                shapes=request.input_shapes,
                progress=request.on_step,
                notify=result.warnings.append,
                resume=request.resume,
                **how,
            )
        report = trained.report if before is None else joined(before.trained.report, trained.report)
        self._rewrite(marked(trained.model, report, before), path)
        found = infer(open_model(path), request.registry, self.original.pins)
        error = mirror_error(trained.module, found, path, registry=request.registry, shapes=request.input_shapes)
        result.training = replace(report, mirror_error_after=error)
        return found

    def _rewrite(self, model: Model, path: Path) -> None:
        with TemporaryDirectory(dir=path.parent) as folder:  # `path` is still mapped: the weights are read from it
            model.nbytes = write(model, Path(folder) / path.name)
            for file in Path(folder).iterdir():
                os.replace(file, path.parent / file.name)

    def value(self, path: Path) -> float:
        """The metric of a file."""
        from onnxprune.evaluate import evaluate

        assert self.metric is not None
        with _as_file(self.original) as original:
            measure = partial(evaluate, threads=self.request.threads, original=original)
            if self._whole is None:
                self._whole = measure(original, self.judged, self.metric)
            return measure(path, self.judged, self.metric)

    def _judge(self, result: Result, values: Sequence[float]) -> None:
        """values: of the model as it was after each step, the last is what is written."""
        from onnxprune.metrics import Drop

        assert self.metric is not None and self._whole is not None
        before, after = self._whole, values[-1]
        drop = Drop(before, after, self.metric)
        result.accuracy = Accuracy(
            self.metric.name,
            self.metric.higher_is_better,
            before,
            values[0] if len(values) > 1 else None,
            after,
            drop.amount,
            self.metric.is_fraction,
            repaired=values[1] if len(values) > 2 else None,
        )
        limit = self.request.max_drop
        if limit is not None and not drop.within(limit):
            raise TargetNotReached(
                f"{self.metric.name} goes from {before:.4g} to {after:.4g}, more than the {limit:.2%} allowed",
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


def _recovery(graph: Graph, request: Request, settings: TrainSettings) -> Recovery:
    with training_imports():
        from onnxprune.train.recover import Recovery
    recipe = request.recipe
    return Recovery.prepared(
        graph,
        request.data,
        settings,
        registry=request.registry,
        preprocess=recipe.preprocess,
        loss=recipe.loss,
        distill=recipe.distill,
        temperature=recipe.temperature,
        rebn=recipe.rebn,
    )


def training_imports() -> AbstractContextManager[None]:
    """Around imports that training wants. Raises UsageError where torch is missing."""
    return wants_torch("training", "leave --steps away: pruning works without")


def _opened(graph: Graph, data: object, request: Request) -> Source:
    return open_data(data, signature_of(graph), preprocess=request.recipe.preprocess)


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
