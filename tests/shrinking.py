"""A method in training as plain as can be, for tests of everything around methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from onnxprune.axes.analysis import Analysis
from onnxprune.errors import UsageError
from onnxprune.train.hooks import Step
from onnxprune.train.optim import make_optimizer
from onnxprune.train.selection import Selection
from onnxprune.train.settings import TrainSettings
from onnxprune.train.sparsify import Sparsifier
from onnxprune.train.units import UnitTable

__all__ = ["Shrinking"]


@dataclass(frozen=True, kw_only=True)
class ShrinkingOptions:
    """until: the share of the phase in which units shrink."""

    until: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise UsageError(f"until must be above 0 and at most 1, found {self.until:g}")


class Shrinking(Sparsifier):
    """The units of the lowest norm, chosen before the first step, are scaled down to zero step by step."""

    name = "shrinking"
    options = ShrinkingOptions
    share = 0.5

    def __init__(self, analysis: Analysis, selection: Selection, options: ShrinkingOptions) -> None:
        super().__init__(analysis, selection)
        self.until = options.until

    def make_optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> Optimizer:
        tensors = [p for g in groups for p in g["params"]]
        self.table = UnitTable(tensors, [p for g in groups for p in g["parts"]])
        self.dead = torch.zeros(self.table.units, dtype=torch.bool, device=self.table.device)
        norms = self.table.by_family(self._norms())
        self.redundant = self.table.from_families(self.selection(norms)) > 0
        return make_optimizer([p for p in tensors if p.requires_grad], settings)

    def after_step(self, step: Step) -> None:
        left = 1 - min(step.share / self.until, 1.0)
        with torch.no_grad():
            self.table.scale_(torch.where(self.redundant, left, 1.0))
        if left == 0:
            self.dead = self.redundant.clone()

    def angles(self) -> Mapping[str, Tensor]:
        return {"norm": self._norms()}

    def _norms(self) -> Tensor:
        return self.table.square(self.table.x.banks).sqrt()
