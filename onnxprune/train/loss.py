"""What training minimises: distillation from the original network, a loss on targets, or both.

Every term is a mean over samples (and over positions, where an output has them), so that the mean of the losses of
equal shards is the loss of the whole batch. The one statistic that a loss needs beyond its batch, the variance of the
original's outputs, is taken once (`Criterion.calibrate`), is the same in all processes, and belongs to a checkpoint.

Nothing here waits for the device: shapes are checked on the host, and values only where they lie on the host anyway.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from onnxprune.data.hooks import hook_error, load_callable
from onnxprune.errors import DataError, UsageError
from onnxprune.model.outputs import OutputKind, output_kinds
from onnxprune.train.targets import (
    TASKS,
    Task,
    check_kinds,
    expectation,
    log_probabilities,
    names_of,
    pair_targets,
    shape_of,
    wide,
)

__all__ = ["LOSSES", "Criterion", "OutputKind", "criterion", "output_kinds", "pair_targets"]

LOSSES = ("auto", "match", "ce", "bce", "mse", "l1")

VARIANCE_FLOOR = 0.01  # of the median variance of an output's channels
SQUARE_FLOOR = 1e-4  # of a channel's mean square: an output that is constant is matched to about a hundredth of itself
FEWEST = 16  # numbers per channel; of fewer, the channels' variances are not told apart

Tensors = Mapping[str, Tensor]


class Criterion:
    """The loss of a batch: criterion(outputs, teacher=..., targets=...) gives a differentiable scalar.

    outputs, teacher: of the network in training and of the original, by output name. targets: by target name.
    Computed in float32 (float64 where the outputs are), whatever autocast says.
    needs_teacher, needs_targets: what has to be given. Raises DataError where shapes do not fit or the user's callable
    fails, UsageError where targets and outputs don't belong together.

    Distillation divides squared errors by the variance of the original's outputs. `calibrate` takes it; where nobody
    does, the first batch decides (that of all processes, where torch.distributed runs). `state_dict` holds it.
    """

    def __init__(
        self,
        *,
        outputs: Sequence[OutputKind],
        task: Task | None = None,
        hook: Callable[..., Any] | None = None,
        name: str,
        matches: frozenset[str],
        distill: float,
        temperature: float,
        pairs: Mapping[str, OutputKind] | None,
    ) -> None:
        self.outputs = tuple(o for o in outputs if o.learnable)
        self.kinds = tuple(outputs)
        self.name = name
        self.distill = distill
        self.temperature = temperature
        self._matches = matches  # outputs that are compared by squared error and not by divergence
        self._task = task
        self._pairs = pairs
        self._variances: dict[str, Tensor] = {}
        self._hook = hook
        self._hook_takes_teacher = hook is not None and _takes(hook, "teacher")
        self.needs_targets = task is not None
        self.needs_teacher = distill > 0 or self._hook_takes_teacher

    def __call__(self, outputs: Tensors, *, teacher: Tensors | None = None, targets: Tensors | None = None) -> Tensor:
        if self.needs_teacher and teacher is None:
            raise ValueError(f"loss '{self.name}' needs the original's outputs")
        students = {n: wide(x) for n, x in outputs.items()}
        teachers = {n: wide(x).detach() for n, x in (teacher or {}).items()}
        device = next(iter(students.values())).device.type
        with torch.autocast(device, enabled=False):
            terms = []
            if self._hook is not None:
                terms.append(self._called(students, teachers, targets or {}))
            elif self._task is not None:
                terms.append(self._on_targets(students, targets or {}))
            if self.distill > 0:
                terms.append(self.distill * self._distillation(students, teachers))
            return sum(terms[1:], terms[0])

    def calibrate(self, batches: Iterable[Tensors]) -> None:
        """Take the variances of the original's outputs from its outputs on some batches (on this process's share of
        them: processes add theirs up). A few hundred samples are plenty. Raises DataError where there are none, or an
        output is not finite."""
        moments: dict[str, Tensor] = {}
        for batch in batches:
            for o in self.outputs:
                if o.kind != "probabilities":
                    found = _moments(o, batch[o.name].detach())
                    held = moments.get(o.name)
                    if held is not None and held.shape != found.shape:
                        held, found = held.sum(1, keepdim=True), found.sum(1, keepdim=True)
                    moments[o.name] = found if held is None else held + found
        normalised = [o.name for o in self.outputs if o.kind != "probabilities"]
        if normalised and not moments:
            raise DataError("there is no sample to calibrate the loss on", "give data with --data")
        for name in normalised:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(moments[name])
            if not bool(torch.isfinite(moments[name]).all()):
                raise DataError(
                    f"the original gives no finite numbers in output '{name}' on the data",
                    "look for nan, infinities or a wrong scale in the inputs",
                )
            self._variances[name] = _variance(moments[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The variances by output name, on the CPU."""
        return {n: v.cpu() for n, v in self._variances.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the variances of a checkpoint. Raises DataError where they are another model's."""
        expected = {o.name for o in self.outputs if o.kind != "probabilities"}
        if state and set(state) != expected:
            raise DataError(
                f"the checkpoint is of a model with outputs {names_of(state)}, this one has {names_of(expected)}",
                "start without --resume",
            )
        self._variances = {n: v.clone() for n, v in state.items()}

    # terms

    def _distillation(self, students: Tensors, teachers: Tensors) -> Tensor:
        """The mean of one term per output."""
        for o in self.outputs:
            s, t = students[o.name], teachers[o.name]
            if s.shape != t.shape:
                raise DataError(f"output '{o.name}' is {shape_of(s)}, the original's is {shape_of(t)}")
        if any(o.kind != "probabilities" and o.name not in self._variances for o in self.outputs):
            self.calibrate([teachers])
        terms = [self._distilled(o, students[o.name], teachers[o.name]) for o in self.outputs]
        return torch.stack(terms).mean()

    def _distilled(self, o: OutputKind, student: Tensor, teacher: Tensor) -> Tensor:
        if o.kind == "probabilities":
            return _divergence(o, student, teacher, self.temperature)
        term = self._squared(o, student, teacher)
        if o.kind == "logits" and o.name not in self._matches:
            term = term + _divergence(o, student, teacher, self.temperature)
        return term

    def _squared(self, o: OutputKind, student: Tensor, teacher: Tensor) -> Tensor:
        """mean((s - t)^2 / var(t)), the variance by channel where the channels are known."""
        variance = self._variances[o.name]
        if variance.device != student.device:
            variance = self._variances[o.name] = variance.to(student.device)
        square = (student - teacher).square()
        if variance.numel() > 1:
            axis = o.axes[0]
            if square.shape[axis] == variance.numel():
                return (square / variance.reshape(-1, *(1 for _ in square.shape[axis + 1 :]))).mean()
        return square.mean() / variance.mean()

    def _on_targets(self, students: Tensors, targets: Tensors) -> Tensor:
        if self._pairs is None:
            self._pairs = pair_targets(self.kinds, tuple(targets))
        assert self._task is not None
        missing = set(self._pairs) - set(targets)
        if missing:
            raise DataError(f"loss '{self.name}' expects targets {names_of(self._pairs)}, found {names_of(targets)}")
        terms = [self._task(o, students[o.name], name, targets[name]) for name, o in self._pairs.items()]
        return torch.stack(terms).mean()

    def _called(self, students: Tensors, teachers: Tensors, targets: Tensors) -> Tensor:
        """The user's callable, with what it returns checked."""
        assert self._hook is not None
        more = {"teacher": teachers} if self._hook_takes_teacher else {}
        try:
            loss = self._hook(dict(students), dict(targets), **more)
        except (Exception, SystemExit) as error:
            raise hook_error(f"loss '{self.name}'", error) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor {shape_of(loss)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
            raise DataError(f"loss '{self.name}' should return a tensor of one number, it returned {found}")
        if any(s.requires_grad for s in students.values()) and not loss.requires_grad:
            raise DataError(
                f"loss '{self.name}' returned a number that does not depend on the outputs",
                "compute it from the outputs with torch, without .detach(), .item() or torch.no_grad()",
            )
        return wide(loss.reshape(()))


def criterion(
    spec: str = "auto",
    *,
    outputs: Sequence[OutputKind],
    distill: float = 0.0,
    temperature: float = 4.0,
    targets: Sequence[str] | None = None,
) -> Criterion:
    """The loss of this name, for a model with these outputs.

    spec: one of
        auto   distillation from the original, without targets: the mean of one term per output. Of probabilities
               T^2 KL(teacher || student) at temperature T (Hinton, Vinyals and Dean 2015, section 2); of values
               mean((s - t)^2 / var(t)); of a matrix product's rows, which may be logits or a regression, the sum of
               both: a divergence alone sees neither a common offset nor, of numbers far apart, any but the largest
        match  as auto, but squared errors for everything that is no softmax
        ce     cross entropy, with class indices or probabilities. A negative index is a position without a class,
               which adds nothing to the mean over all positions
        bce    binary cross entropy, on logits or sigmoids
        mse    mean squared error
        l1     mean absolute error
        file.py:callable, pkg.module:callable
               called with (outputs, targets), dicts of tensors by name, and with teacher=... where its signature has
               that; returns a tensor of one number
    outputs: of `output_kinds`.
    distill: a weight with which 'auto' is added to a loss on targets ('match' to mse and l1).
    targets: the names of the targets, where known; they are looked for among the outputs at once, otherwise with the
        first batch.
    Raises UsageError where the spec, a number, or the pairing of targets and outputs makes no sense; DataError where
    the callable can't be loaded.
    """
    if not (math.isfinite(distill) and distill >= 0):
        raise UsageError(f"--distill {distill} is no weight", "give a number from 0 on, such as 1")
    if not (math.isfinite(temperature) and temperature > 0):
        raise UsageError(f"a temperature of {temperature} is impossible", "give a number above 0, such as 4")
    floats = frozenset(o.name for o in outputs if o.learnable)
    if not floats:
        raise UsageError(
            f"no output can be learnt from: {names_of(o.name for o in outputs)} hold no floating point numbers",
            "export the model with its scores as an output",
        )
    alone = spec in ("auto", "match")
    if alone and distill:
        raise UsageError(f"--distill adds distillation to a loss on targets, and --loss {spec} is that already")
    pairs = None
    if spec in TASKS and targets is not None:
        pairs = pair_targets(outputs, targets)
        check_kinds(spec, pairs.values())
    return Criterion(
        outputs=outputs,
        task=TASKS.get(spec),
        hook=None if alone or spec in TASKS else _loaded(spec),
        name=spec,
        matches=floats if spec in ("match", "mse", "l1") else frozenset(),
        distill=1.0 if alone else distill,
        temperature=temperature,
        pairs=pairs,
    )


# parts of the terms


def _divergence(o: OutputKind, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the distributions at temperature T, the mean over all positions."""
    if len(o.axes) > 1:
        student, teacher = (x.flatten(o.axes[0], o.axes[-1]) for x in (student, teacher))
    axis = o.axes[0]
    if o.kind == "probabilities":
        student, teacher = (log_probabilities(o, x, axis) for x in (student, teacher))
    log_s, log_t = (F.log_softmax(x / temperature, axis) for x in (student, teacher))
    return expectation(log_t.exp(), log_t - log_s, axis).mean() * temperature**2


def _moments(o: OutputKind, x: Tensor) -> Tensor:
    """Count, sum and sum of squares per channel (of the whole output where no channels are known), (3, channels)."""
    x = x.double()
    rows = x.movedim(o.axes[0], 0).flatten(1) if o.axes and o.axes[0] < x.ndim and x.ndim > 1 else x.reshape(1, -1)
    return torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])


def _variance(moments: Tensor) -> Tensor:
    """What squared errors are divided by: the variance, but not less than what keeps constant channels in bounds."""
    if moments[0, 0] < FEWEST:
        moments = moments.sum(1, keepdim=True)
    count, total, squares = moments
    mean_square = squares / count
    variance = (mean_square - (total / count).square()).clamp(min=0)
    moving = variance[variance > SQUARE_FLOOR * mean_square]
    least = VARIANCE_FLOOR * moving.median() if moving.numel() else variance.new_zeros(())
    floored = torch.maximum(variance, SQUARE_FLOOR * mean_square).clamp(min=least)
    return torch.where(floored > 0, floored, torch.ones_like(floored)).float()


def _loaded(spec: str) -> Callable[..., Any]:
    if ":" not in spec:
        raise UsageError(f"'{spec}' is no loss", f"one of {', '.join(LOSSES)}, or file.py:callable")
    return load_callable(spec)


def _takes(function: Any, name: str) -> bool:
    """Whether a callable has this parameter."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
