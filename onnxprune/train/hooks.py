"""Where a pruning method takes part in training: what the loop calls, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from onnxprune.train.settings import TrainSettings

__all__ = ["Hooks", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """A step that is being taken. index: from 0. share: of the run that is done, 0 to 1 (of its own span, where it is a
    part of a training). lr: the rate of this step."""

    index: int
    epoch: int
    share: float
    lr: float
    optimizer: Optimizer


class Hooks:
    """A method's part in training; this one does nothing. With several processes, all call all of it alike, and see
    the same gradients and weights.

    loss_may_rise: the method takes away what the network has, so that a rising loss is no sign of divergence.
    """

    loss_may_rise = False

    def optimizer(self, student: nn.Module, settings: TrainSettings) -> Optimizer | None:
        """The optimizer of the run; None: the one of the settings. Its groups' rates are scaled by the schedule."""
        return None

    def on_step_begin(self, step: Step) -> None:
        """Before the forward pass."""

    def after_backward(self, step: Step) -> None:
        """The gradients are those of the global batch, unscaled and clipped; what is added here is not clipped."""

    def after_step(self, step: Step) -> None:
        """The optimizer has moved the weights; the running average has not taken them in yet."""

    def on_finish(self, student: nn.Module) -> None:
        """The weights that the run ends with are in place (their running average, where one is kept: what is exactly
        zero in the last step need not be zero there)."""

    def values(self) -> Mapping[str, float]:
        """What the log shows: 'sparsity' and 'metric' have their own places. Called a few times a second at most."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up such a state."""
