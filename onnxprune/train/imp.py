"""IMP, iterative magnitude pruning, the honest baseline: remove the weakest units, retrain with a rate that falls to 0,
and again.

The last removal is the surgery, and the last retraining that of the small network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from onnxprune.axes.analysis import Analysis
from onnxprune.errors import UsageError
from onnxprune.train.hooks import Step
from onnxprune.train.magnitude import ByMagnitude
from onnxprune.train.schedule import rate
from onnxprune.train.selection import Selection

__all__ = ["IMP", "IMPOptions"]


@dataclass(frozen=True, kw_only=True)
class IMPOptions:
    """rounds: how often units are removed; the last time at the end of this phase. Raises UsageError below 1."""

    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"rounds must be at least 1, found {self.rounds}")


class IMP(ByMagnitude):
    """In each round the weakest units become zero, and the others are retrained with a rate that falls to 0."""

    name: ClassVar[str] = "imp"
    options: ClassVar[type[IMPOptions]] = IMPOptions
    share: ClassVar[float] = 0.5

    def __init__(self, analysis: Analysis, selection: Selection, options: IMPOptions | None = None) -> None:
        super().__init__(analysis, selection)
        self.chosen = options if options is not None else IMPOptions()
        self.removals = 0

    @torch.no_grad()
    def on_step_begin(self, step: Step) -> None:
        # The last removal is the surgery itself: the phase has a retraining less than there are rounds.
        between = max(self.chosen.rounds - 1, 1)
        round_, within = divmod(min(step.share, 1 - 1e-9) * between, 1.0)
        if self.removals <= round_ and self.removals < self.chosen.rounds - 1:
            self._remove((round_ + 1) / self.chosen.rounds)
            self.removals = int(round_) + 1
        self._set_rate(step, 1 - within)

    def _remove(self, share: float) -> None:
        self._choose(share, removed=self.table.by_family(self.dead))
        self.dead |= self.redundant
        self.table.keep_(~self.dead)

    def _set_rate(self, step: Step, factor: float) -> None:
        """The schedule's own factor is taken back; what it was halved by, where the run went back, stays."""
        how = self._settings
        done = how.span[0] + step.share * (how.span[1] - how.span[0])
        by_schedule = rate(done, warmup=how.warmup, schedule=how.schedule, milestones=how.milestones)
        halved = 0.5 ** round(-math.log2(step.lr / (how.lr * by_schedule)))
        for group in step.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor * halved

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        self.table.keep_(~self.dead)

    @torch.no_grad()
    def on_finish(self, student: nn.Module) -> None:
        self.table.rebind()
        self.table.keep_(~self.dead)  # in an average they are not zero yet
        self._choose(1.0, removed=self.table.by_family(self.dead))
        super().on_finish(student)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"removals": self.removals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.removals = state["removals"]
