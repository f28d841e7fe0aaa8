"""How good a model file is on data, in onnxruntime: a metric of the written file and not of what was trained.

    metric = parse_metric("top1")
    before = evaluate("model.onnx", source, metric)
    after = evaluate("small.onnx", source, metric)
    Drop(before, after, metric).within(parse_max_drop("1%"))

A metric of one's own is `file.py:callable` or `pkg.module:callable`. The callable gets `predict`, which takes a
dictionary of arrays by input name (any number of samples along the first axis) and gives one by output name, and
returns a number:

    def accuracy(predict):                # or accuracy(predict, batches), with the batches of --data
        found = predict({"image": images})["logits"].argmax(axis=1)
        return (found == labels).mean()

Higher is better unless the callable has an attribute `lower_is_better = True`. With an attribute `is_fraction = True`
a drop is counted in points (0.76 to 0.75 is 1 %), otherwise relative to the number before.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxprune.data.hooks import hook_error
from onnxprune.errors import DataError, UsageError
from onnxprune.metrics import METRICS, Drop, Metric, parse_max_drop, parse_metric
from onnxprune.model.load import load
from onnxprune.model.outputs import OutputKind, output_kinds
from onnxprune.verify.runs import run, session

if TYPE_CHECKING:
    from onnxprune.data.source import Batch, Source

__all__ = ["METRICS", "Drop", "Metric", "Predictor", "evaluate", "parse_max_drop", "parse_metric"]

_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")


def evaluate(
    model: Path | str,
    source: Source | None,
    metric: Metric,
    *,
    original: Path | str | None = None,
    batch: int = 64,
    limit: int | None = None,
    threads: int = 1,
    output: str | None = None,
) -> float:
    """The metric of a model file on data.

    batch: samples at a time; a model of a fixed batch size gets that. limit: samples at most, of a fixed batch size in
    whole batches. output: name of the output that is looked at, instead of the first with floating point numbers (the
    first that has a target of its name, where there is one).
    Raises UsageError where the metric needs something that isn't given, DataError where the data or the user's callable
    fails, ModelRejected where onnxruntime can't load the model.
    """
    predictor = Predictor(model, threads=threads)
    batches = None if source is None else _batches(source, batch, limit, fixed=predictor.fixed)
    if metric.hook is not None:
        return _called(metric.name, metric.hook, predictor, batches)
    assert metric.meter is not None
    if source is None or batches is None:
        raise UsageError(f"metric '{metric.name}' needs data", "give it with --data")
    if metric.needs_targets and not source.targets:
        raise UsageError(
            f"metric '{metric.name}' needs targets and the data has none",
            "--eval agreement compares with the original's outputs instead",
        )
    if metric.needs_original and original is None:
        raise UsageError(f"metric '{metric.name}' needs the original model")
    chosen = _output(predictor, output, source.targets if metric.needs_targets else ())
    target = _target(chosen, source.targets) if metric.needs_targets else chosen
    reference = Predictor(original, threads=threads) if metric.needs_original and original is not None else None
    meter = metric.meter(_kind(original or model, chosen), target)
    seen = 0
    for given in batches:
        found = predictor.run(given.inputs, chosen)
        meter.add(found, given.targets[target] if reference is None else reference.run(given.inputs, chosen))
        seen += given.size
    if not seen:
        raise DataError("the data holds no sample to evaluate on", "give another source with --data")
    return meter.result()


class Predictor:
    """A model file as a function of arrays. fixed: its batch size, where the file names one for all inputs."""

    def __init__(self, model: Path | str, *, threads: int = 1) -> None:
        self.name = Path(model).name
        self.session = session(model, threads=threads)
        self.inputs = {i.name: i.type for i in self.session.get_inputs()}
        self.outputs = {o.name: o.type for o in self.session.get_outputs()}
        leading = [i.shape[0] if i.shape else None for i in self.session.get_inputs()]
        size = leading[0] if len(set(leading)) == 1 else None
        self.fixed: int | None = size if isinstance(size, int) and size > 0 else None

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """All outputs by name, for any number of samples. Raises DataError where onnxruntime refuses the inputs."""
        return dict(zip(self.outputs, self._run(inputs, list(self.outputs)), strict=True))

    def run(self, inputs: Mapping[str, Any], output: str) -> np.ndarray:
        """One output."""
        found = self._run(inputs, [output])[0]
        if not isinstance(found, np.ndarray):
            raise DataError(f"output '{output}' of {self.name} is {self.outputs[output]}, no tensor")
        return found

    def _run(self, inputs: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
        feed = self._feed(inputs)
        count = _samples(feed)
        if self.fixed is None or count in (0, self.fixed) or any(len(x) != count for x in feed.values()):
            return self._once(feed, names)
        parts = []
        for begin in range(0, count, self.fixed):
            part = {n: x[begin : begin + self.fixed] for n, x in feed.items()}
            short = self.fixed - _samples(part)
            if short:
                part = {n: np.concatenate([x, np.repeat(x[-1:], short, axis=0)]) for n, x in part.items()}
            found = self._once(part, names)
            parts.append([self._first(x, self.fixed - short, n) for n, x in zip(names, found, strict=True)])
        return [np.concatenate(xs) for xs in zip(*parts, strict=True)]

    def _first(self, x: Any, samples: int, name: str) -> np.ndarray:
        """The rows of an output that belong to the first samples of a batch of the fixed size."""
        assert self.fixed is not None
        if not isinstance(x, np.ndarray) or x.ndim == 0 or x.shape[0] % self.fixed:
            raise DataError(
                f"{self.name} takes {self.fixed} samples at a time, and output '{name}' can't be told apart by them",
                f"give it {self.fixed} samples at a time",
            )
        return x[: x.shape[0] // self.fixed * samples]

    def _once(self, feed: dict[str, np.ndarray], names: Sequence[str]) -> list[Any]:
        found, reason = run(self.session, feed)
        if found is None:
            shapes = ", ".join(f"'{n}' {x.dtype} ({','.join(map(str, x.shape))})" for n, x in feed.items())
            raise DataError(f"{self.name} can't be run on {shapes}: {reason}", "do the inputs have the model's shapes?")
        by_name = dict(zip(self.outputs, found, strict=True))
        return [by_name[n] for n in names]

    def _feed(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The arrays, floats in the model's precision and integers in its width."""
        if set(inputs) != set(self.inputs):
            raise DataError(f"{self.name} expects inputs {_names(self.inputs)}, found {_names(inputs)}")
        feed = {}
        for name in self.inputs:
            array, wanted = np.asarray(inputs[name]), _NUMPY.get(self.inputs[name])
            if wanted is not None and array.dtype != wanted:
                if not np.can_cast(array.dtype, wanted, "same_kind"):
                    raise DataError(f"{self.name} expects {np.dtype(wanted)} in input '{name}', found {array.dtype}")
                array = array.astype(wanted)
            feed[name] = array
        return feed


def _called(spec: str, hook: Callable[..., Any], predictor: Predictor, batches: Iterator[Batch] | None) -> float:
    """The number that a callable of the user returns."""
    parameter = _second_parameter(hook)
    if parameter is not None and parameter.default is parameter.empty and batches is None:
        raise UsageError(f"metric '{spec}' wants the batches of the data", "give data with --data")
    try:
        value = hook(predictor) if parameter is None else hook(predictor, batches)
    except (Exception, SystemExit) as error:
        raise hook_error(f"metric '{spec}'", error) from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"metric '{spec}' should return a number, it returned {type(value).__name__}") from None
    if math.isnan(number):
        raise DataError(f"metric '{spec}' returned nan", "does it divide by the number of samples, and were there any?")
    return number


def _second_parameter(hook: Any) -> inspect.Parameter | None:
    """The parameter that takes the batches: a second one without a default, or one that is called so."""
    try:
        parameters = inspect.signature(hook).parameters.values()
    except (TypeError, ValueError):
        return None
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return next((p for p in plain[1:2] if p.default is p.empty or p.name == "batches"), None)


def _batches(source: Source, size: int, limit: int | None, *, fixed: int | None) -> Iterator[Batch]:
    """The batches of the data, up to `limit` samples."""
    left = math.inf if limit is None else limit
    for batch in source.batches(fixed or size) if left > 0 else ():
        if batch.size > left and fixed is None:
            rest = slice(int(left))
            inputs, targets = ({n: x[rest] for n, x in part.items()} for part in (batch.inputs, batch.targets))
            batch = replace(batch, inputs=inputs, targets=targets)
        yield batch
        left -= batch.size
        if left <= 0:
            return


def _samples(arrays: Mapping[str, np.ndarray]) -> int:
    """The number of samples: the first axis of the first array that has one."""
    return next((len(x) for x in arrays.values() if np.ndim(x)), 0)


def _output(predictor: Predictor, asked: str | None, targets: Sequence[str]) -> str:
    """The output that is looked at."""
    if asked is not None:
        if asked not in predictor.outputs:
            raise UsageError(f"'{asked}' is no output of {predictor.name}", f"it has {_names(predictor.outputs)}")
        return asked
    floats = [n for n, t in predictor.outputs.items() if t in _FLOATS]
    named = [n for n in predictor.outputs if n in targets]
    return (named + floats + list(predictor.outputs))[0]


def _target(output: str, targets: Sequence[str]) -> str:
    """The target of an output: the one of its name, or the only one."""
    if output in targets:
        return output
    if len(targets) > 1:
        raise UsageError(
            f"none of the targets {_names(targets)} is called as output '{output}'",
            "call the target as its output, or write the metric as file.py:callable",
        )
    return targets[0]


def _kind(model: Path | str, output: str) -> OutputKind:
    """What the graph tells of an output."""
    return next(k for k in output_kinds(load(model)) if k.name == output)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{n}'" for n in names) or "(none)"
