"""Tells a run that has failed from one that is noisy, by its losses alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["Guard"]

SMOOTHING = 0.95
# The losses of this package are normalised (of the order of 1 where nothing has been learnt). A minimum below this is
# luck or a network that began as a copy of its teacher, and no measure of what a bad loss would be.
LEAST_MINIMUM = 0.01


class Guard:
    """Follows the loss: `feed` gives None, or the reason why the run has to go back.

    factor, patience: the smoothed loss may be above `factor` times its own minimum for less than `patience` steps in a
    row; factor None: for ever. tolerated: losses in a row that may be nan or infinite (fp16 skips such steps).
    """

    def __init__(self, *, factor: float | None, patience: int, tolerated: int = 0) -> None:
        self.factor, self.patience, self.tolerated = factor, patience, tolerated
        self.smoothed = math.nan
        self.minimum = math.inf
        self.above = 0
        self.infinite = 0

    @property
    def suspicious(self) -> bool:
        """Whether the state of the run may turn out to be a bad one; no checkpoint is taken of it."""
        return self.above > 0 or self.infinite > 0

    def feed(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            self.infinite += 1
            return f"the loss became {loss}" if self.infinite > self.tolerated else None
        self.infinite = 0
        self.smoothed = loss if math.isnan(self.smoothed) else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        self.minimum = min(self.minimum, self.smoothed)
        least = max(self.minimum, LEAST_MINIMUM)
        if self.factor is None or self.smoothed <= self.factor * least:
            self.above = 0
            return None
        self.above += 1
        if self.above < self.patience:
            return None
        return f"the loss rose from {self.minimum:.4g} to {self.smoothed:.4g} and stayed there"

    def state_dict(self) -> dict[str, float]:
        return {"smoothed": self.smoothed, "minimum": self.minimum, "above": self.above, "infinite": self.infinite}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.smoothed, self.minimum = state["smoothed"], state["minimum"]
        self.above, self.infinite = int(state["above"]), int(state["infinite"])
