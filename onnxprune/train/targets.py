"""Losses on targets: cross entropies and errors of one output and its target, and which target is whose.

Each is a function of (kind of the output, output, target's name, target) that gives the mean over samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from onnxprune.errors import DataError, UsageError
from onnxprune.model.outputs import OutputKind

__all__ = [
    "TASKS",
    "Task",
    "check_kinds",
    "expectation",
    "log_probabilities",
    "names_of",
    "pair_targets",
    "shape_of",
    "wide",
]

LEAST_PROBABILITY = 1e-10  # probabilities are cut off below before their logarithm is taken

Task = Callable[[OutputKind, Tensor, str, Tensor], Tensor]


def pair_targets(outputs: Sequence[OutputKind], targets: Sequence[str]) -> dict[str, OutputKind]:
    """Which output each target belongs to: the one of its name, or the only one. Raises UsageError."""
    by_name = {o.name: o for o in outputs if o.learnable}
    if not targets:
        raise UsageError(
            "the loss needs targets and the data has none", "--loss auto learns from the original's outputs instead"
        )
    if all(t in by_name for t in targets):
        return {t: by_name[t] for t in targets}
    if len(targets) == 1 and len(by_name) == 1:
        return {targets[0]: next(iter(by_name.values()))}
    raise UsageError(
        f"targets {names_of(targets)} and outputs {names_of(by_name)} do not pair up",
        "call each target as the output that it belongs to, or write the loss as file.py:callable",
    )


# losses on targets: (kind, output, target's name, target) to a scalar


def _cross_entropy(o: OutputKind, output: Tensor, name: str, target: Tensor) -> Tensor:
    check_kinds("ce", [o])
    if o.kind == "probabilities" and len(o.axes) > 1:
        output = output.flatten(o.axes[0], o.axes[-1])
        o = OutputKind(o.name, o.kind, o.axes[:1], o.log)
    soft = target.shape == output.shape and output.ndim > 1
    axis: int | None = None
    if soft:
        axis = o.axes[0] if o.axes and o.axes[0] < output.ndim else 1
    elif not target.is_floating_point():
        axis = o.class_axis(output.shape, target.shape)
    if axis is None or output.shape[axis] < 2:
        raise DataError(
            f"target '{name}' should hold integer class indices, or probabilities as output '{o.name}' "
            f"{shape_of(output)}; found {_dtype(target)} {shape_of(target)}",
            "a single score per sample is learnt with --loss bce, numbers with --loss mse",
        )
    log = log_probabilities(o, output, axis)
    return expectation(target.to(log.dtype), -log, axis).mean() if soft else _picked(log, axis, name, target)


def _picked(log: Tensor, axis: int, name: str, target: Tensor) -> Tensor:
    """Minus the logarithm at the class indices; an index that is no class is an error, or nan on a device that we do
    not wait for."""
    classes = log.shape[axis]
    indices = target.long() if target.ndim == log.ndim else target.long().unsqueeze(axis)
    if indices.device.type == "cpu" and indices.numel() and int(indices.max()) >= classes:
        raise DataError(
            f"target '{name}' holds class {int(indices.max())}, the output has classes 0 to {classes - 1}",
            "mark positions without a class by a negative number",
        )
    found = -log.gather(axis, indices.clamp(0, classes - 1))
    found = torch.where(indices < 0, torch.zeros_like(found), found)
    return torch.where(indices >= classes, torch.full_like(found, math.nan), found).mean()


def _binary_cross_entropy(o: OutputKind, output: Tensor, name: str, target: Tensor) -> Tensor:
    check_kinds("bce", [o])
    target = _as_output(o, output, name, target)
    if target.device.type == "cpu" and target.numel() and not (0 <= float(target.min()) <= float(target.max()) <= 1):
        raise DataError(
            f"target '{name}' should lie within 0 to 1, found {float(target.min()):g} to {float(target.max()):g}",
            "class indices are learnt with --loss ce",
        )
    if o.kind == "sigmoid":
        return F.binary_cross_entropy(output, target)
    return F.binary_cross_entropy_with_logits(output, target)


def _squared_error(o: OutputKind, output: Tensor, name: str, target: Tensor) -> Tensor:
    return (output - _as_output(o, output, name, target)).square().mean()


def _absolute_error(o: OutputKind, output: Tensor, name: str, target: Tensor) -> Tensor:
    return (output - _as_output(o, output, name, target)).abs().mean()


TASKS: dict[str, Task] = {
    "ce": _cross_entropy,
    "bce": _binary_cross_entropy,
    "mse": _squared_error,
    "l1": _absolute_error,
}


def check_kinds(spec: str, kinds: Iterable[OutputKind]) -> None:
    """Refuse a cross entropy of the other sort. Raises UsageError."""
    for o in kinds:
        if spec == "ce" and o.kind == "sigmoid":
            raise UsageError(f"output '{o.name}' is a sigmoid, which has no cross entropy over classes", "use bce")
        if spec == "bce" and o.kind == "probabilities":
            raise UsageError(f"output '{o.name}' is a softmax over classes, not single probabilities", "use ce")


def _as_output(o: OutputKind, output: Tensor, name: str, target: Tensor) -> Tensor:
    """The target in the output's type and shape, from which axes of size 1 may be missing."""
    if [d for d in target.shape if d != 1] != [d for d in output.shape if d != 1]:
        raise DataError(
            f"target '{name}' should be {shape_of(output)} as output '{o.name}', found {shape_of(target)}",
            "class indices are learnt with --loss ce",
        )
    return target.to(output.dtype).reshape(output.shape)


def log_probabilities(o: OutputKind, x: Tensor, axis: int) -> Tensor:
    """Logarithms of the probabilities that an output stands for."""
    if o.kind != "probabilities":
        return F.log_softmax(x, axis)
    return x if o.log else x.clamp(min=LEAST_PROBABILITY).log()


def expectation(probabilities: Tensor, x: Tensor, axis: int) -> Tensor:
    """The sum of p x over an axis, where nothing counts as 0 times infinity (a class that is masked)."""
    return torch.where(probabilities > 0, probabilities * x, torch.zeros_like(x)).sum(axis)


def wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def names_of(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(f"'{n}'" for n in names) or "(none)"


def shape_of(x: Tensor) -> str:
    """A shape for a message."""
    return "(" + ",".join(map(str, x.shape)) + ")"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
