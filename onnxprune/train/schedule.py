"""The learning rate over a run, and how far a run has come.

Both meet in one number, the share of the run that is done (0 to 1): of its steps, of its epochs, or of its time.
A step is counted at its middle, so that no step has rate 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxprune.train.settings import TrainSettings

__all__ = ["Horizon", "rate"]


def rate(share: float, *, warmup: float, schedule: str) -> float:
    """The factor of the learning rate where `share` of the run is done: rises from 0 to 1 over the share `warmup`,
    then falls to 0 along half a cosine or a line, or stays 1."""
    share = min(max(share, 0.0), 1.0)
    if share < warmup:
        return share / warmup
    rest = (share - warmup) / (1 - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    return 1 - rest if schedule == "linear" else 1.0


@dataclass
class Horizon:
    """How long a run is. Exactly one of steps, epochs and seconds is given.

    steps_per_epoch: None until the first epoch of data of unknown length is over; that epoch counts at its middle.
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    steps_per_epoch: int | None = None

    @classmethod
    def of(cls, settings: TrainSettings, size: int | None) -> Horizon:
        """For these settings and data of `size` samples."""
        per_epoch = None if size is None else max(1, size // settings.batch)
        return cls(settings.steps, settings.epochs, settings.time_budget_s, per_epoch)

    @property
    def total(self) -> int | None:
        """The number of steps, where it is known."""
        if self.epochs is not None and self.steps_per_epoch is not None:
            return self.epochs * self.steps_per_epoch
        return self.steps

    def share(self, *, step: int, epoch: int, index: int, seconds: float) -> float:
        """What part of the run is done in the middle of a step (for a time budget: at its beginning).

        step, epoch: that are over. index: steps of this epoch that are over. seconds: since the run began.
        """
        if self.steps is not None:
            return (step + 0.5) / self.steps
        if self.epochs is not None:
            within = 0.5 if self.steps_per_epoch is None else min(1.0, (index + 0.5) / self.steps_per_epoch)
            return (epoch + within) / self.epochs
        assert self.seconds is not None
        return min(1.0, seconds / self.seconds)

    def over(self, *, step: int, epoch: int, seconds: float) -> bool:
        """Whether the run has come to its end."""
        if self.steps is not None:
            return step >= self.steps
        if self.epochs is not None:
            return epoch >= self.epochs
        assert self.seconds is not None
        return seconds >= self.seconds
