"""HESSO: chooses redundant units in several periods, and shrinks each period's to zero on a line (arXiv 2409.09085)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from onnxprune.errors import UsageError
from onnxprune.train.saliency import Saliency
from onnxprune.train.unit_optimizer import Choose, UnitOptimizer
from onnxprune.train.unit_training import ScheduleOptions, UnitTraining

__all__ = ["HESSO", "HESSOOptions", "HESSOTraining"]


class HESSO(UnitOptimizer):
    r"""Hybrid efficient structured sparse optimizer (arXiv 2409.09085).

    From `start` to `stop` there are `periods` of T steps. Each begins with the choice of units so that all together are
    redundant that the target wants by then, by their saliency over the `window` steps before. In step t of a period,
    with d the direction of the base optimizer and a its rate, its units go by

        x <- (x - a d) (T - t - 1) / (T - t)

    and are zero from its end on. All else goes by x <- x - a d.

    criterion: what a unit matters, 'mixture' by default: a name in `saliency.SALIENCY`, or a function.
    See DHSPG for all other arguments. Raises UsageError.
    """

    def __init__(
        self,
        params_and_groups: Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        *,
        variant: str = "sgd",
        target: float | Choose = 0.5,
        start: float,
        stop: float,
        periods: int = 10,
        window: float = 20,
        weight_decay: float = 0.0,
        criterion: str | Saliency = "mixture",
        by_family: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(
            params_and_groups,
            lr=lr,
            weight_decay=weight_decay,
            variant=variant,
            target=target,
            criterion=criterion,
            by_family=by_family,
            window=window,
            **base,
        )
        if stop <= start:
            raise UsageError(f"stop {stop:g} is not behind start {start:g}")
        if periods < 1:
            raise UsageError(f"periods must be 1 or more, found {periods}")
        self.start, self.stop, self.periods = start, stop, periods
        self.begun = 0  # periods

    def _edge(self, k: int) -> float:
        """When period k, from 0, begins and period k - 1 ends."""
        return self.start + (self.stop - self.start) * k / self.periods

    def schedule(self, now: float, then: float) -> None:
        due = sum(now >= self._edge(k) for k in range(self.periods))
        if due > self.begun and (self.samples or now >= self.stop):
            self._begin(due)
        if self.begun:
            if now >= self._edge(self.begun):
                self.dead |= self.redundant
                self._factor.zero_()
            else:
                end = self._edge(self.begun)
                self._factor.fill_(max(0.0, end - then) / (end - now))
        self.measures = self.begun < self.periods and now >= self._edge(self.begun) - self.window
        if now >= self.stop:
            self.phase = "done"

    def _begin(self, period: int) -> None:
        self.dead |= self.redundant
        self.choose(period / self.periods)
        self.begun, self.phase = period, "shrinking"

    def conclude(self) -> None:
        if self.begun < self.periods:
            self._begin(self.periods)
            self.phase = "done"

    @torch.no_grad()
    def move(self) -> None:
        keep = torch.where(self.redundant, self._factor, 1.0).masked_fill(self.dead, 0.0)
        if self.measures:
            measured = self.measure()
            self.record(measured)
            self.apply(measured, self.table.spread_rows(keep, combine="prod") if self.begun else None)
        else:
            self.base.move()
            if self.begun:
                self.table.scale_(keep)

    def unit_state(self) -> dict[str, Any]:
        return super().unit_state() | {"begun": self.begun}

    def load_unit_state(self, state: Any) -> None:
        super().load_unit_state(state)
        self.begun = state["begun"]


@dataclass(frozen=True, kw_only=True)
class HESSOOptions(ScheduleOptions):
    """periods: choices that are made between start and stop. Raises UsageError."""

    start: float = 0.4
    stop: float = 0.9
    saliency: str = "mixture"
    periods: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.periods < 1:
            raise UsageError(f"periods must be 1 or more, found {self.periods}")


class HESSOTraining(UnitTraining):
    """HESSO in a training run."""

    name: ClassVar[str] = "hesso"
    options: ClassVar[type[ScheduleOptions]] = HESSOOptions
    share: ClassVar[float] = 0.3

    def build(self, groups: list[dict[str, Any]], how: dict[str, Any]) -> UnitOptimizer:
        return HESSO(groups, periods=self.chosen.periods, **how)
