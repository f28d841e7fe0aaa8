"""ISS-P: the weakest units shrink by a share of themselves at every step, and which they are is looked at again and
again, so that those that training pulls up come back.
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
from onnxprune.train.selection import Selection

__all__ = ["ISSP", "ISSPOptions"]


@dataclass(frozen=True, kw_only=True)
class ISSPOptions:
    """efolds: by how many a unit shrinks that is among the weakest all the time. until: the share of this phase by
    which as many are chosen as are to go. selections: how often they are chosen in the phase.
    Raises UsageError where a value makes no sense."""

    efolds: float = 20.0
    until: float = 0.7
    selections: int = 50

    def __post_init__(self) -> None:
        if not (0 < self.efolds < math.inf):
            raise UsageError(f"efolds must be above 0, found {self.efolds:g}", "20 is a good number")
        if not 0 < self.until <= 1:
            raise UsageError(f"until must be above 0 and at most 1, found {self.until:g}")
        if self.selections < 1:
            raise UsageError(f"selections must be at least 1, found {self.selections}")


class ISSP(ByMagnitude):
    """The weakest units shrink a little at every step; which they are is looked at again and again."""

    name: ClassVar[str] = "issp"
    options: ClassVar[type[ISSPOptions]] = ISSPOptions
    share: ClassVar[float] = 0.5

    def __init__(self, analysis: Analysis, selection: Selection, options: ISSPOptions | None = None) -> None:
        super().__init__(analysis, selection)
        self.chosen = options if options is not None else ISSPOptions()
        self.selections = 0
        self.spent = 0.0

    def on_step_begin(self, step: Step) -> None:
        due = 1 + math.floor(step.share * self.chosen.selections)
        if self.selections < due:
            self._choose(min(1.0, due / self.chosen.selections / self.chosen.until))
            self.selections = due

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        efolds = max(self.chosen.efolds * step.share - self.spent, 0.0)
        self.table.scale_(torch.where(self.redundant, math.exp(-efolds), 1.0))
        self.spent += efolds

    @torch.no_grad()
    def on_finish(self, student: nn.Module) -> None:
        self.table.rebind()
        self._choose(1.0)
        super().on_finish(student)

    def values(self) -> dict[str, float]:
        return super().values() | {"efolds": self.spent, "redundant": float(self.redundant.float().mean())}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"selections": self.selections, "spent": self.spent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.selections, self.spent = state["selections"], state["spent"]
