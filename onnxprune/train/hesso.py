"""HESSO: chooses redundant units in several periods, and shrinks each period's to zero on a line (arXiv 2409.09085)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from onnxprune.errors import UsageError
from onnxprune.train.cric import Trials
from onnxprune.train.saliency import SALIENCY, Saliency
from onnxprune.train.unit_optimizer import Choose, Measured, UnitOptimizer
from onnxprune.train.unit_training import STORED, ScheduleOptions, UnitTraining

__all__ = ["HESSO", "HESSOOptions", "HESSOTraining"]

LAST = np.iinfo(np.int64).max  # the place of a unit that stays


class HESSO(UnitOptimizer):
    r"""Hybrid efficient structured sparse optimizer (arXiv 2409.09085).

    From `start` to `stop` there are `periods` of T steps. Each begins with the choice of units so that all together are
    redundant that the target wants by then, by their saliency over the `window` steps before. In step t of a period,
    with d the direction of the base optimizer and a its rate, its units go by

        x <- (x - a d) (T - t - 1) / (T - t)

    and are zero from its end on. All else goes by x <- x - a d.

    criterion: what a unit matters, 'mixture' by default: a name in `saliency.SALIENCY`, or a function.
    trials, trial: with CRIC (`cric`), how many trials of how many steps the choice is corrected by at most, from
        `start` on. Then it is made once for all periods, which take its least salient units first.
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
        trials: int = 0,
        trial: float = 20,
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
        if trials and (trial <= 0 or start + trials * trial >= stop):
            raise UsageError(
                f"{trials} trials of {trial:g} don't end before stop {stop:g}", "make them fewer or shorter"
            )
        self.start, self.stop, self.periods = start, stop, periods
        self.trial, self._trials = trial, trials
        self.trials = Trials(self.table) if trials else None
        self._trial_end = 0.0
        self._first = start  # where the periods begin: behind the trials
        self._place = torch.full_like(self.redundant, LAST, dtype=torch.int64)  # among the chosen, after trials
        self.begun = 0  # periods

    # the host's half

    def _edge(self, k: int) -> float:
        """When period k, from 0, begins and period k - 1 ends."""
        return self._first + (self.stop - self._first) * k / self.periods

    def schedule(self, now: float, then: float) -> None:
        if self.trials is not None and not self.begun and not self._correct(now, then):
            return
        due = sum(now >= self._edge(k) for k in range(self.periods))
        if due > self.begun and (self.samples or self._settled or now >= self.stop):
            self._begin(due)
        if self.begun:
            end = self._edge(self.begun)
            if now >= end:
                self.dead |= self.redundant
                self._factor.zero_()
            else:
                self._factor.fill_(max(0.0, end - then) / (end - now))
        choosing = self.begun < self.periods and not self._settled
        self.measures = choosing and now >= self._edge(self.begun) - self.window
        if now >= self.stop:
            self.phase = "done"

    def _begin(self, period: int) -> None:
        self.dead |= self.redundant
        if self._settled:
            chosen = int((self._place < LAST).sum())
            self.redundant |= self._place < round(chosen * period / self.periods)
            self.forget()
        else:
            self.choose(period / self.periods)
        self.begun, self.phase = period, "shrinking"

    def conclude(self) -> None:
        if self.trials is not None and self.trials.running:
            self._end_trial()
        if self.begun < self.periods:
            self._begin(self.periods)
            self.phase = "done"

    # trials

    @property
    def _settled(self) -> bool:
        """Whether trials have settled what goes."""
        return self.trials is not None and self.trials.known is not None and not self.trials.running

    def _correct(self, now: float, then: float) -> bool:
        """The schedule of trials; whether they are over."""
        trials = self.trials
        assert trials is not None
        if trials.running and now >= self._trial_end:
            chosen = self._end_trial()
            again = trials.count < self._trials and now + self.trial < self.stop
            if again and bool((chosen & ~trials.tried).any()):
                self._begin_trial(now, chosen)
            else:
                self._first = now
        elif not trials.running and trials.known is None and now >= self.start:
            if self.samples:
                self._begin_trial(now, self._chosen(self.choice(1.0)))
                self.forget()
            self.measures = True
        if trials.running:
            self._factor.fill_(max(0.0, self._trial_end - then) / (self._trial_end - now))
        return self._settled or now < self.start or (now >= self.stop and not trials.running)

    def _begin_trial(self, now: float, units: Tensor) -> None:
        assert self.trials is not None
        self.trials.begin(units)
        self._trial_end = now + self.trial
        self.phase, self.measures = "trial", True

    def _end_trial(self) -> Tensor:
        """Put everything back, judge anew, and note who is to go in which order."""
        assert self.trials is not None
        self.trials.end(self.statistics() if self.samples else None)
        self.forget()
        self.phase, self.measures = "warm-up", False
        scores = self.scores(self.trials.known)
        chosen = self._chosen(self.choice(1.0, scores))
        values = np.concatenate([*scores.values(), np.zeros(0)])
        order = np.argsort(np.where(chosen.cpu().numpy(), values, np.inf), kind="stable")
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        self._place.copy_(torch.from_numpy(place))
        self._place.masked_fill_(~chosen, LAST)
        return chosen

    # the device's half

    @torch.no_grad()
    def move(self) -> None:
        if self.trials is not None and self.trials.running:
            self._try(self.trials)
            return
        keep = torch.where(self.redundant, self._factor, 1.0).masked_fill(self.dead, 0.0)
        if self.measures:
            measured = self.measure()
            self.record(measured)
            self.apply(measured, self.table.spread_rows(keep, combine="prod") if self.begun else None)
        else:
            self.base.move()
            if self.begun:
                self.table.scale_(keep)

    def _try(self, trials: Trials) -> None:
        """Measure the gradient, here, against the weights as they were; and go on towards zero."""
        g, x = trials.gradient(), trials.saved.banks
        norm, g_norm = self.table.square(x).sqrt(), self.table.square(g).sqrt()
        inner, bound = self.table.dot(x, g), norm * g_norm
        self.cosine.copy_(torch.where(bound > 0, inner / bound, 0.0))
        self.record(Measured(g, 0.0, None, norm, g_norm, inner))
        self.table.scale_(torch.where(trials.trial, self._factor, 1.0))

    # state

    def unit_state(self) -> dict[str, Any]:
        more = {"begun": self.begun, "first": self._first, "trial_end": self._trial_end, "place": self._place}
        return super().unit_state() | more | {"trials": self.trials.state() if self.trials is not None else None}

    def load_unit_state(self, state: Mapping[str, Any]) -> None:
        super().load_unit_state(state)
        self.begun, self._first, self._trial_end = state["begun"], state["first"], state["trial_end"]
        if self.trials is not None:
            self.trials.load(state["trials"])


@dataclass(frozen=True, kw_only=True)
class HESSOOptions(ScheduleOptions):
    """periods: choices that are made between start and stop. trials: by how many trials the choice is corrected at most
    (0: none), trial: the share of the run that one takes; see `cric`. Raises UsageError.

    The published criterion is 'mixture'; see `DHSPGOptions` about this one.
    """

    start: float = 0.1
    stop: float = 0.9
    saliency: str = "l2"
    periods: int = 10
    trials: int = 0
    trial: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.periods < 1:
            raise UsageError(f"periods must be 1 or more, found {self.periods}")
        if self.trials < 0 or (self.trials and not 0 < self.trials * self.trial < self.stop - self.start):
            raise UsageError(
                f"{self.trials} trials of {self.trial:g} of the run don't fit between start and stop",
                "make them fewer or shorter",
            )
        if self.trials and self.saliency in STORED:
            raise UsageError(
                f"trials find nothing for saliency '{self.saliency}', which looks at weights alone",
                f"one of {', '.join(SALIENCY)}",
            )


class HESSOTraining(UnitTraining):
    """HESSO in a training run."""

    name: ClassVar[str] = "hesso"
    options: ClassVar[type[ScheduleOptions]] = HESSOOptions
    share: ClassVar[float] = 0.3

    def build(self, groups: list[dict[str, Any]], how: dict[str, Any]) -> UnitOptimizer:
        o = self.chosen
        return HESSO(groups, periods=o.periods, trials=o.trials, trial=o.trial, **how)
