"""`compress --sweep`: one model per target, and the curve through them.

A thin layer over the stages of `compress`: loading, analysis, scores and calibration are shared, each point goes its
own way from there, and what goes wrong at one of them does not stop the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from onnxprune.accuracy import is_first_process
from onnxprune.clock import Clock
from onnxprune.errors import OnnxPruneError, TargetNotReached, UsageError
from onnxprune.output import free
from onnxprune.request import Request
from onnxprune.result import ModelSummary, Result
from onnxprune.stages import Point, Prepared, goal_of

__all__ = ["Sweep", "SweepPoint", "output_of", "sweep", "targets_of"]


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """What came of a target: a result, or why there is none."""

    target: str
    result: Result | None
    error: OnnxPruneError | None


@dataclass(frozen=True, eq=False)
class Sweep:
    """before: the original. timing: of what the points share. picture: path of the curve as an image, where one was
    drawn; notes: why there is none."""

    before: ModelSummary
    points: tuple[SweepPoint, ...]
    timing: dict[str, float]
    picture: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 where all is well, 4 where a target can't be met; what went wrong otherwise goes first."""
        errors = [p.error for p in self.points if p.error is not None]
        worse = [e for e in errors if not isinstance(e, TargetNotReached)]
        return (worse or errors)[0].exit_code if errors else 0


def targets_of(text: str) -> list[str]:
    """'macs=0.9,0.5' as the targets 'macs=0.9' and 'macs=0.5'. Raises UsageError."""
    metric, _, values = text.partition("=")
    found = [f"{metric.strip()}={value.strip()}" for value in values.split(",")]
    if not values or len(set(found)) != len(found):
        raise UsageError(f"'{text}' is no sweep", "name a metric and different values, as in macs=0.9,0.7,0.5")
    return found


def output_of(target: str, output: Path, model: Path) -> Path:
    """The file of a point: in the folder that is named, under the model's name, or beside the file that is named."""
    named = output / model.name if output.is_dir() else output
    stem = named.name.removesuffix(".onnx")
    point = re.sub(r"[^\w.-]", "", target.replace("%", "pct"))
    return named.with_name(f"{stem}.{point}.onnx")


def sweep(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    targets: Sequence[str],
    picture: bool = True,
    **options: Any,
) -> Sweep:
    """Compress a model to several targets.

    output: a folder, or a file beside which there will be one per target ('small.onnx': 'small.macs0.5.onnx'); nothing
    is written where it is None. targets: as `compress` takes them. picture: draw the curve beside the models, where
    matplotlib is installed. options: those of `compress`.
    Raises what `compress` raises before it looks at a target; what it raises then is in the points.
    """
    request = Request(**options)
    if request.run_dir is not None or request.resume:
        raise UsageError("--run-dir keeps one run, and a sweep makes several", "leave it away, or give one --target")
    goals = [goal_of(target, request) for target in targets]
    writing = output is not None and not request.dry_run and is_first_process()
    source = Path(model) if isinstance(model, (str, os.PathLike)) else Path("model.onnx")
    paths = [output_of(goal.text, Path(output), source) if output is not None else None for goal in goals]
    for path in paths:
        if path is not None and writing:
            free(path, model, request.force)
    clock = Clock(request.progress)
    prepared = Prepared.of(model, request, clock)
    shared = dict(clock.stop())
    points = []
    for goal, path in zip(goals, paths, strict=True):
        clock = Clock(_named(goal.text, request.progress))
        with _kept() as errors:
            result = Point(prepared, goal, path if writing else None, clock).run()
        points.append(SweepPoint(goal.text, None if errors else result, errors[0] if errors else None))
    found = Sweep(prepared.before, tuple(points), shared)
    if not picture or not writing or paths[0] is None:
        return found
    return _drawn(found, paths[0].with_name(f"{_stem(Path(str(output)), source)}.sweep.png"))


@contextmanager
def _kept() -> Iterator[list[OnnxPruneError]]:
    """An error of one point is kept, and the next one has its turn."""
    errors: list[OnnxPruneError] = []
    try:
        yield errors
    except OnnxPruneError as error:
        errors.append(error)


def _named(target: str, progress: Callable[[str], None] | None) -> Callable[[str], None] | None:
    return None if progress is None else lambda stage: progress(f"{target}: {stage}")


def _stem(output: Path, model: Path) -> str:
    return (model if output.is_dir() else output).name.removesuffix(".onnx")


def _drawn(found: Sweep, path: Path) -> Sweep:
    """With a picture of the curve, or a note that says why there is none."""
    reached = [p.result for p in found.points if p.result is not None and p.result.after is not None]
    heights = [h for h in map(_height, reached) if h is not None]
    if len(reached) < 2 or len(heights) < len(reached):
        return replace(found, notes=("no picture: it takes two points and a metric (--eval), or repair",))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return replace(found, notes=("no picture: matplotlib is not installed",))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    widths = [r.after.macs / found.before.macs for r in reached if r.after is not None]
    if reached[0].accuracy is not None:
        widths, heights = [1.0, *widths], [reached[0].accuracy.before, *heights]
    axes.plot(widths, heights, marker="o")
    metric = reached[0].accuracy.metric if reached[0].accuracy is not None else "output error, share of the variance"
    axes.set(xlabel="multiply-accumulates left", ylabel=metric, title=found.before.name)
    if reached[0].accuracy is not None:
        axes.axhline(reached[0].accuracy.before, linestyle=":", label="original")
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return replace(found, picture=str(path))


def _height(result: Result) -> float | None:
    """What a point is plotted at: the metric, else what repair has left of the error."""
    if result.accuracy is not None:
        return result.accuracy.after
    return None if result.repair is None else min(result.repair.after, result.repair.before)
