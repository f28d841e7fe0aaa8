"""One step of training, and everything that it changes: weights, optimizer, running average, loss statistics.

Nothing here waits for the accelerator, but for a method's hooks and `state`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onnxprune.errors import ModelRejected, UsageError
from onnxprune.train.batching import fitting
from onnxprune.train.device import Upload, arithmetic
from onnxprune.train.distributed import GradientSum, Team
from onnxprune.train.feed import HostBatch
from onnxprune.train.hooks import Hooks, Step
from onnxprune.train.optim import Average, make_optimizer, set_rate
from onnxprune.train.settings import TrainSettings

__all__ = ["Stepper"]


class Stepper:
    """Takes steps. Puts the student into training mode on the device; `finish` gives it the weights of the run's end.

    Raises ModelRejected where there is nothing to train or a weight is not finite to begin with.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        criterion: Callable[..., Tensor],
        settings: TrainSettings,
        *,
        names: tuple[Sequence[str], Sequence[str]],
        device: torch.device,
        team: Team,
        hooks: Hooks,
    ) -> None:
        self.student, self.criterion, self.settings, self.hooks = student, criterion, settings, hooks
        self.input_names, self.output_names = names
        layout = {"memory_format": torch.channels_last} if settings.channels_last else {}
        student.to(device, **layout).train()  # type: ignore[call-overload]
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        if not self.parameters:
            raise ModelRejected("the model has no weights to train")
        self._check_weights()
        team.align([*student.parameters(), *(b for b in student.buffers() if b.is_floating_point())])
        wanted = teacher is not None and getattr(criterion, "needs_teacher", True)
        self.teacher = teacher.to(device, **layout).eval() if teacher is not None and wanted else None  # type: ignore[call-overload]
        self._forward = torch.compile(student) if settings.compile else student
        self._teach = torch.compile(self.teacher) if settings.compile and self.teacher is not None else self.teacher
        self.optimizer = hooks.optimizer(student, settings) or make_optimizer(self.parameters, settings)
        self.average = Average(student, settings.ema) if settings.ema else None
        self._dtype = arithmetic(settings.amp, device)
        self._scaler = torch.amp.GradScaler(device.type) if self._dtype is torch.float16 else None
        self._sum = GradientSum(self.parameters, team)
        self._upload = Upload(device, channels_last=settings.channels_last)
        self._device = device

    @property
    def skips_overflows(self) -> bool:
        """Whether steps with infinite gradients are left out (fp16)."""
        return self._scaler is not None

    def take(self, batches: Sequence[HostBatch], step: Step, *, total: int, parts: int, factor: float) -> Tensor:
        """Take a step and give this process's share of its loss, on the device.

        batches: of this process. total: samples in the batches of all of them. parts: that each batch is computed in.
        factor: of the learning rate.
        """
        set_rate(self.optimizer, factor)
        self.optimizer.zero_grad(set_to_none=True)
        self.hooks.on_step_begin(step)
        loss = self._gradients(batches, total, parts)
        self._sum.finish()
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.hooks.after_backward(step)
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self.hooks.after_step(step)
        if self.average is not None:
            self.average.update()
        return loss

    def _gradients(self, batches: Sequence[HostBatch], total: int, parts: int) -> Tensor:
        """Forward and backward; the parts of the batches add up to the mean over all samples."""
        whole: Tensor | None = None
        left = parts * len(batches)
        for part in (part for batch in batches for part in _parts(self._upload(batch), parts)):
            left -= 1
            if not left:
                self._sum.begin()
            loss = self.loss(part)
            if part.samples != total:
                loss = loss * (part.samples / total)
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            whole = loss.detach() if whole is None else whole + loss.detach()
        assert whole is not None
        return whole

    def loss(self, batch: HostBatch) -> Tensor:
        """The criterion's loss on a batch on the device."""
        taught = None if self._teach is None else self._outputs(self._teach, batch, learn=False)
        outputs = self._outputs(self._forward, batch, learn=True)
        return self.criterion(outputs, teacher=taught, targets=batch.targets)

    def teach(self, batch: HostBatch) -> dict[str, Tensor]:
        """The teacher's outputs on a batch in host memory."""
        assert self._teach is not None
        return self._outputs(self._teach, self._upload(batch), learn=False)

    def _outputs(self, module: Callable[..., Any], batch: HostBatch, *, learn: bool) -> dict[str, Tensor]:
        with torch.set_grad_enabled(learn), self._autocast(), fitting(batch.samples):
            found = module(*[batch.inputs[name] for name in self.input_names])
        outputs = (found,) if isinstance(found, Tensor) else tuple(found)
        return dict(zip(self.output_names, outputs, strict=True))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def finish(self) -> None:
        """Put the weights of the run's end in place."""
        if self.average is not None:
            self.average.place()
        self.hooks.on_finish(self.student)

    def close(self) -> None:
        self._sum.close()
        for p in self.parameters:
            p.grad = None

    # state

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether all weights are finite. Waits for the device."""
        norms = torch._foreach_norm([p.detach() for p in self.parameters], float("inf"))
        return bool(torch.isfinite(torch.stack([n.float() for n in norms])).all())

    def _check_weights(self) -> None:
        for name, p in self.student.named_parameters():
            if p.is_floating_point() and not bool(torch.isfinite(p).all()):
                raise ModelRejected(f"initializer '{name}' holds nan or infinity", "such a model can't be trained")

    def state(self) -> dict[str, Any]:
        """All that a step changes: live tensors, not copies."""
        parts = {"criterion": self.criterion, "hooks": self.hooks, "average": self.average, "scaler": self._scaler}
        return {
            "weights": {n: p.detach() for n, p in self.student.named_parameters()},
            "buffers": dict(self.student.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            **{name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")},
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Take up such a state. Raises UsageError where it is of another network."""
        for kind, live in (
            ("weights", dict(self.student.named_parameters())),
            ("buffers", dict(self.student.named_buffers())),
        ):
            saved = state[kind]
            for name in [*live, *(n for n in saved if n not in live)]:
                shapes = [tuple(x[name].shape) if name in x else None for x in (saved, live)]
                if shapes[0] != shapes[1]:
                    raise UsageError(
                        f"the checkpoint is of another network: '{name}' is {shapes[0]} there and {shapes[1]} here",
                        "start without --resume",
                    )
            for name, tensor in live.items():
                tensor.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hooks.load_state_dict(state["hooks"])
        if hasattr(self.criterion, "load_state_dict"):
            self.criterion.load_state_dict(state["criterion"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])


def _parts(batch: HostBatch, parts: int) -> Iterator[HostBatch]:
    """A batch cut along its samples; arrays that do not have one entry per sample go to every part whole."""
    if parts == 1:
        yield batch
        return
    edges = [batch.samples * i // parts for i in range(parts + 1)]

    def cut(x: Tensor, begin: int, end: int) -> Tensor:
        return x[begin:end] if x.ndim and x.shape[0] == batch.samples else x

    for begin, end in itertools.pairwise(edges):
        yield HostBatch(
            {n: cut(x, begin, end) for n, x in batch.inputs.items()},
            {n: cut(x, begin, end) for n, x in batch.targets.items()},
            end - begin,
        )
