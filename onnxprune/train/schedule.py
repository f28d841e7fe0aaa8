"""The learning rate over a training, and how far a run has come.

Both meet in one number, the share of the training that is done (0 to 1): of its steps, of its epochs, or of its time.
A training may be parted into several runs, one going on where the other ended; each covers a `span` of it.
A step is counted at its middle, so that no step has rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxprune.train.settings import TrainSettings

__all__ = ["Horizon", "Position", "rate"]

FALL = 0.1  # of the rate at a milestone


def rate(share: float, *, warmup: float, schedule: str, milestones: Sequence[float] = ()) -> float:
    """The factor of the learning rate where `share` of the training is done: rises from 0 to 1 over the share
    `warmup`, then falls to 0 along half a cosine or a line, falls to a tenth at every milestone, or stays 1."""
    share = min(max(share, 0.0), 1.0)
    if share < warmup:
        return share / warmup
    if schedule == "steps":
        return FALL ** sum(share >= m for m in milestones)
    rest = (share - warmup) / (1 - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    return 1 - rest if schedule == "linear" else 1.0


@dataclass(frozen=True)
class Position:
    """Where a run stands, for another that goes on there.

    step, epoch: that are over. index, epoch_steps: batches and steps of this epoch that are. seconds: of training.
    steps_per_epoch: where it is known. drop_last: whether the rests of epochs are left out.
    """

    step: int = 0
    epoch: int = 0
    index: int = 0
    epoch_steps: int = 0
    seconds: float = 0.0
    steps_per_epoch: int | None = None
    drop_last: bool | None = None


@dataclass
class Horizon:
    """How long a training is. Exactly one of steps, epochs and seconds is given.

    steps_per_epoch: None until the first epoch of data of unknown length is over; that epoch counts at its middle.
    span: the part of it that the run covers. A run that ends within an epoch whose length is unknown ends with it.
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    steps_per_epoch: int | None = None
    span: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def of(cls, settings: TrainSettings, size: int | None) -> Horizon:
        """For these settings and data of `size` samples."""
        per_epoch = None if size is None else max(1, size // settings.batch)
        return cls(settings.steps, settings.epochs, settings.time_budget_s, per_epoch, settings.span)

    @property
    def total(self) -> int | None:
        """The number of steps of the whole training, where it is known."""
        if self.epochs is not None and self.steps_per_epoch is not None:
            return self.epochs * self.steps_per_epoch
        return self.steps

    def share(self, *, step: int, epoch: int, index: int, seconds: float) -> float:
        """What part of the training is done in the middle of a step (for a time budget: at its beginning).

        step, epoch: that are over. index: steps of this epoch that are over. seconds: since the training began.
        """
        if self.steps is not None:
            return (step + 0.5) / self.steps
        if self.epochs is not None:
            within = 0.5 if self.steps_per_epoch is None else min(1.0, (index + 0.5) / self.steps_per_epoch)
            return (epoch + within) / self.epochs
        assert self.seconds is not None
        return min(1.0, seconds / self.seconds)

    def within(self, share: float) -> float:
        """A share of the training as one of the run, 0 to 1."""
        begin, end = self.span
        if self.steps is not None:
            begin, end = (round(x * self.steps) / self.steps for x in (begin, end))
        return min(max((share - begin) / max(end - begin, 1e-9), 0.0), 1.0)

    def over(self, *, step: int, epoch: int, seconds: float, index: int = 0) -> bool:
        """Whether the run has come to its end."""
        end = self.span[1]
        if self.steps is not None:
            return step >= round(end * self.steps)
        if self.epochs is not None:
            if epoch >= end * self.epochs or end == 1 or self.steps_per_epoch is None:
                return epoch >= end * self.epochs
            return epoch + index / self.steps_per_epoch >= end * self.epochs - 1e-9
        assert self.seconds is not None
        return seconds >= end * self.seconds
