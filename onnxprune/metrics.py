"""Metrics of a model's output: shares of right classes, errors, PSNR, agreement with the original; and their drop.

A metric is taken by a meter that sees one batch after the other and keeps sums (of PSNR, one number per image), so that
data of any length goes through, and batches of any size give the same number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from onnxprune.data.hooks import load_callable
from onnxprune.errors import DataError, UsageError
from onnxprune.model.outputs import OutputKind

__all__ = ["METRICS", "Drop", "Meter", "Metric", "parse_max_drop", "parse_metric"]

EXACT = 100.0  # dB of an image that is reproduced exactly, and the most that any counts
TOLERANCE = 1e-9  # by which a drop may pass its limit: rounding of the subtraction


class Meter(Protocol):
    """A metric that is being taken."""

    def add(self, output: np.ndarray, reference: np.ndarray) -> None:
        """Count a batch: the model's output, and its target or the original's output."""

    def result(self) -> float:
        """The metric of all batches."""


@dataclass(frozen=True)
class Metric:
    """What is measured.

    is_fraction: a share of right answers, whose drop is counted in points. needs_targets, needs_original: what the
    output is compared with. meter: starts to take it, of an output of this kind and a target of this name; None for a
    callable of the user (`hook`).
    """

    name: str
    higher_is_better: bool
    is_fraction: bool
    needs_targets: bool
    needs_original: bool
    meter: Callable[[OutputKind, str], Meter] | None = None
    hook: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Drop:
    """How much worse a model got."""

    before: float
    after: float
    metric: Metric

    @property
    def amount(self) -> float:
        """Positive where it got worse: in points (0.01 is one percentage point) for fractions, relative to `before`
        for other metrics. Infinite where the metric is nan, or worse than a `before` of 0."""
        if self.before == self.after:
            return 0.0
        worse = self.before - self.after if self.metric.higher_is_better else self.after - self.before
        if math.isnan(worse):
            return math.inf
        if self.metric.is_fraction:
            return worse
        return worse / abs(self.before) if self.before else math.copysign(math.inf, worse)

    def within(self, max_drop: float) -> bool:
        """Whether it got worse by no more than that."""
        return self.amount <= max_drop + TOLERANCE


def parse_max_drop(text: str) -> float:
    """`1%`, `1pp` or `0.01`: all of them 0.01. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|pp)?\s*", text.lower())
    if match is None:
        raise UsageError(f"--max-drop '{text}' is no amount", "write it as 1% or 0.01")
    value = float(match[1]) / (100 if match[2] else 1)
    if not match[2] and value >= 1:
        raise UsageError(f"--max-drop {text.strip()} would be {value:.0%}", f"write {text.strip()}% if that is meant")
    return value


def parse_metric(spec: str) -> Metric:
    """The metric of this name.

    top1, top5   share of samples (of pixels, where the output has a class per pixel) whose class is first, or among the
                 first five. Targets are class indices, or scores per class; negative indices are left out
    mse          mean squared difference from the target; lower is better
    psnr         peak signal-to-noise ratio in dB, the mean over images. The peak is 1, 2 or 255: the width of the
                 first of the ranges 0..1, -1..1 and 0..255 that holds all targets
    agreement    with the original's output: the share of samples with the same class where that is a classifier's (or
                 is no floating point number), otherwise 1 - |output - original| / |original - its mean|, at least 0,
                 with Euclidean norms over all data
    file.py:callable, pkg.module:callable    see onnxprune.evaluate

    Raises UsageError for another name, DataError where the callable can't be loaded.
    """
    if spec in METRICS:
        return METRICS[spec]
    if ":" not in spec:
        raise UsageError(f"'{spec}' is no metric", f"one of {', '.join(METRICS)}, or file.py:callable")
    hook = load_callable(spec)
    return Metric(
        spec,
        higher_is_better=not getattr(hook, "lower_is_better", False),
        is_fraction=bool(getattr(hook, "is_fraction", False)),
        needs_targets=False,
        needs_original=False,
        hook=hook,
    )


class _Share:
    """The share of positions that are right."""

    def __init__(self) -> None:
        self.right = self.count = 0

    def tally(self, right: np.ndarray, valid: np.ndarray | None = None) -> None:
        if valid is not None:
            right = right[valid]
        self.right += int(np.count_nonzero(right))
        self.count += right.size

    def result(self) -> float:
        if not self.count:
            raise DataError("no target names a class", "negative class indices are left out")
        return self.right / self.count


class _Top(_Share):
    """Whether the target's class is among the first k. Equal scores rank by their index; a nan makes it wrong."""

    def __init__(self, k: int, kind: OutputKind, target: str) -> None:
        super().__init__()
        self.k, self.kind, self.target = k, kind, target

    def add(self, output: np.ndarray, reference: np.ndarray) -> None:
        kind, target = self.kind, reference
        axis: int | None
        if kind.kind == "discrete":  # the model names the class itself
            if self.k > 1 or not _same(output.shape, target.shape):
                raise self._unfit(output, target)
            self.tally(output.reshape(target.shape) == target)
            return
        if len(kind.axes) > 1 and kind.kind == "probabilities":
            output = output.reshape(*output.shape[: kind.axes[0]], -1, *output.shape[kind.axes[-1] + 1 :])
        if target.shape == output.shape and output.ndim > 1 and output.shape[self._axis(output)] > 1:
            axis = self._axis(output)
            target = np.expand_dims(target.argmax(axis), axis)
        elif np.issubdtype(target.dtype, np.floating):
            raise self._unfit(output, target)
        else:
            axis = kind.class_axis(output.shape, target.shape)
            if axis is None:
                raise self._unfit(output, target)
            target = target if target.ndim == output.ndim else np.expand_dims(target, axis)
        if output.shape[axis] == 1:  # one score: two classes
            output, axis = _two_classes(output, self.kind, axis)
        self._rank(output, target.astype(np.int64), axis)

    def _rank(self, scores: np.ndarray, target: np.ndarray, axis: int) -> None:
        classes = scores.shape[axis]
        if classes <= self.k:
            raise UsageError(
                f"output '{self.kind.name}' has {classes} classes, of which the first {self.k} are always right",
                "--eval top1 tells more",
            )
        if target.size and int(target.max()) >= classes:
            raise DataError(
                f"target '{self.target}' holds class {int(target.max())}, output '{self.kind.name}' "
                f"has classes 0 to {classes - 1}",
                "mark positions without a class by a negative number",
            )
        own = np.take_along_axis(scores, target.clip(0), axis)
        index = np.arange(classes).reshape([-1 if k == axis else 1 for k in range(scores.ndim)])
        ahead = (scores > own) | ((scores == own) & (index < target))
        right = (ahead.sum(axis, keepdims=True) < self.k) & ~np.isnan(scores).any(axis, keepdims=True)
        self.tally(right, target >= 0)

    def _axis(self, output: np.ndarray) -> int:
        return self.kind.axes[0] if self.kind.axes and self.kind.axes[0] < output.ndim else 1

    def _unfit(self, output: np.ndarray, target: np.ndarray) -> DataError:
        return DataError(
            f"target '{self.target}' should hold integer class indices for output '{self.kind.name}' "
            f"{_shape(output)}, found {target.dtype} {_shape(target)}"
        )


class _Squared:
    """The mean squared difference."""

    def __init__(self, kind: OutputKind, target: str) -> None:
        self.kind, self.target = kind, target
        self.total = 0.0
        self.count = 0

    def add(self, output: np.ndarray, reference: np.ndarray) -> None:
        difference = _difference(self.kind, self.target, output, reference)
        self.total += float(np.square(difference).sum())
        self.count += difference.size

    def result(self) -> float:
        return self.total / self.count if self.count else math.nan


class _Psnr:
    """10 log10(peak^2 / mean squared difference), the mean over images."""

    def __init__(self, kind: OutputKind, target: str) -> None:
        self.kind, self.target = kind, target
        self.errors: list[np.ndarray] = []
        self.low, self.high = math.inf, -math.inf

    def add(self, output: np.ndarray, reference: np.ndarray) -> None:
        difference = _difference(self.kind, self.target, output, reference)
        if difference.ndim and difference.size:
            self.errors.append(np.square(difference.reshape(len(difference), -1)).mean(axis=1))
            self.low = min(self.low, float(reference.min()))
            self.high = max(self.high, float(reference.max()))

    def result(self) -> float:
        ranges = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
        peak = next((b - a for a, b in ranges if a <= self.low and self.high <= b), None)
        if peak is None:
            raise DataError(
                f"target '{self.target}' is no image: it runs from {self.low:g} to {self.high:g}",
                "psnr is for values within 0 to 1, -1 to 1 or 0 to 255; mse takes any",
            )
        errors = np.concatenate(self.errors)
        with np.errstate(divide="ignore"):
            return float(np.minimum(10 * np.log10(peak**2 / errors), EXACT).mean())


class _SameClass(_Share):
    """Whether output and original name the same class."""

    def __init__(self, kind: OutputKind) -> None:
        super().__init__()
        self.kind = kind

    def add(self, output: np.ndarray, reference: np.ndarray) -> None:
        _fits(self.kind, output, reference)
        if self.kind.kind == "discrete":
            self.tally(output == reference)
            return
        axes = self.kind.axes
        if len(axes) > 1:
            output, reference = (
                x.reshape(*x.shape[: axes[0]], -1, *x.shape[axes[-1] + 1 :]) for x in (output, reference)
            )
        same = output.argmax(axes[0]) == reference.argmax(axes[0])
        self.tally(same & ~np.isnan(output).any(axes[0]))


class _Closeness:
    """1 - |output - original| / |original - its mean|, at least 0; of a constant original, relative to itself."""

    def __init__(self, kind: OutputKind) -> None:
        self.kind = kind
        self.error = self.total = self.squares = 0.0
        self.count = 0

    def add(self, output: np.ndarray, reference: np.ndarray) -> None:
        self.error += float(np.square(_difference(self.kind, self.kind.name, output, reference)).sum())
        reference = reference.astype(np.float64)
        self.total += float(reference.sum())
        self.squares += float(np.square(reference).sum())
        self.count += reference.size

    def result(self) -> float:
        if self.error == 0:
            return 1.0
        spread = self.squares - self.total**2 / max(self.count, 1)
        if spread <= 1e-12 * self.squares:
            spread = self.squares
        share = 1 - math.sqrt(self.error / spread) if spread else 0.0
        return share if math.isnan(share) else max(0.0, share)


def _agreement(kind: OutputKind, target: str) -> Meter:
    return _SameClass(kind) if kind.kind in ("logits", "probabilities", "discrete") else _Closeness(kind)


METRICS = {
    m.name: m
    for m in (
        Metric("top1", True, True, True, False, partial(_Top, 1)),
        Metric("top5", True, True, True, False, partial(_Top, 5)),
        Metric("mse", False, False, True, False, _Squared),
        Metric("psnr", True, False, True, False, _Psnr),
        Metric("agreement", True, True, False, True, _agreement),
    )
}
"""The metrics that need no code of the user, by name."""


def _two_classes(scores: np.ndarray, kind: OutputKind, axis: int) -> tuple[np.ndarray, int]:
    """One score per position as two: of a sigmoid the second class is likelier above 1/2, of others above 0."""
    middle = 0.5 if kind.kind == "sigmoid" else 0.0
    return np.concatenate([np.where(np.isnan(scores), scores, middle), scores], axis), axis


def _difference(kind: OutputKind, target: str, output: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """output - reference in float64, where axes of size 1 may be missing in one."""
    if not _same(output.shape, reference.shape):
        raise DataError(
            f"target '{target}' should be {_shape(output)} as output '{kind.name}', found {_shape(reference)}"
        )
    return output.astype(np.float64) - reference.astype(np.float64).reshape(output.shape)


def _fits(kind: OutputKind, output: np.ndarray, reference: np.ndarray) -> None:
    if output.shape != reference.shape:
        raise DataError(f"output '{kind.name}' is {_shape(output)}, the original's is {_shape(reference)}")


def _same(a: Iterable[int], b: Iterable[int]) -> bool:
    return [n for n in a if n != 1] == [n for n in b if n != 1]


def _shape(x: np.ndarray) -> str:
    return "(" + ",".join(map(str, x.shape)) + ")"
