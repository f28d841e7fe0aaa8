"""What `compress` does about accuracy: training after the surgery, and a metric before and after it.

Everything that can be refused is refused before any long work: the data is opened, the loss built and the model
mirrored first. torch is imported only where something is trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from onnxprune.errors import OnnxPruneError, TargetNotReached, UsageError
from onnxprune.model.graph import Graph
from onnxprune.model.infer import infer
from onnxprune.model.load import open_model
from onnxprune.model.save import write
from onnxprune.ops.registry import Operator
from onnxprune.result import Accuracy, Result
from onnxprune.train.settings import TrainSettings

if TYPE_CHECKING:
    from onnxprune.data.source import Source
    from onnxprune.metrics import Metric
    from onnxprune.train.log import Row
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
            if run_dir is not None and is_first_process():
                recovery.look_into(Path(run_dir), resume=resume)
        source, judge = None, None
        if metric is not None:
            from onnxprune.metrics import parse_metric

            judge = parse_metric(metric)
            source = _evaluation(graph, recipe, recovery)
        return cls(graph, registry, recovery, judge, source, max_drop, threads)

    def run(
        self,
        pruned: Graph,
        path: Path,
        result: Result,
        *,
        stage: Callable[[str], None],
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        shapes: Mapping[str, Sequence[int]] | None = None,
        on_step: Callable[[Row], None] | None = None,
    ) -> Graph:
        """Train the pruned model in `path`, write it there again, and take the metric. Returns what is written, and
        puts the figures into the result. Raises TargetNotReached where it lost more than allowed."""
        before = after_surgery = None
        judging = self.metric is not None and is_first_process()
        if judging:
            stage("evaluate")
            with _as_file(self.original) as original:
                before = self.value(original, original)
                after_surgery = self.value(path, original) if self.recovery is not None else None
        if self.recovery is not None:
            stage("train")
            folder = None if run_dir is None else Path(run_dir)
            pruned = self._trained(pruned, path, result, shapes, on_step, run_dir=folder, resume=resume)
        if judging and before is not None:
            stage("evaluate")
            with _as_file(self.original) as original:
                self._judge(result, before, after_surgery, self.value(path, original))
        return pruned

    def _trained(
        self,
        pruned: Graph,
        path: Path,
        result: Result,
        shapes: Mapping[str, Sequence[int]] | None,
        on_step: Callable[[Row], None] | None,
        **run: Any,
    ) -> Graph:
        from onnxprune.train.recover import kept_channels, mirror_error

        assert self.recovery is not None
        warn = result.warnings.append
        try:
            left = kept_channels(result.analysis, result.plan)
            model, report, module = self.recovery.run(
                pruned, path, left=left, shapes=shapes, progress=on_step, notify=warn, **run
            )
        except (OnnxPruneError, KeyboardInterrupt) as stop:
            for warning in result.warnings:  # there will be no result to read them in
                stop.add_note(warning)
            raise
        entry = model.proto.metadata_props.add(key=TRAINED_KEY)
        entry.value = json.dumps({"loss": report.loss, "steps": report.steps})
        with TemporaryDirectory(dir=path.parent) as folder:  # `path` is still mapped: the weights are read from it
            model.nbytes = write(model, Path(folder) / path.name)
            for file in Path(folder).iterdir():
                os.replace(file, path.parent / file.name)
        found = infer(open_model(path), self.registry, self.original.pins)
        error = mirror_error(module, found, path, registry=self.registry, shapes=shapes)
        result.training = replace(report, mirror_error_after=error)
        return found

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


def _recovery(
    graph: Graph, data: object, settings: TrainSettings, recipe: Recipe, registry: Mapping[str, Operator]
) -> Recovery:
    try:
        from onnxprune.train.recover import Recovery
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        what = "which is not installed" if missing else f"which can't be imported: {error}"
        raise UsageError(
            f"training wants torch, {what}", "pip install 'onnxprune[train]'; or leave --data away: it works without"
        ) from None
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
