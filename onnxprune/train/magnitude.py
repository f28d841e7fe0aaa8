"""Units by their size alone: what the methods without an optimizer of their own have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from onnxprune.train.optim import make_optimizer
from onnxprune.train.settings import TrainSettings
from onnxprune.train.sparsify import Sparsifier
from onnxprune.train.units import UnitTable

__all__ = ["ByMagnitude", "magnitudes"]


@torch.no_grad()
def magnitudes(table: UnitTable) -> Tensor:
    """Mean |w| of the weights of every unit, per unit; of units without weights, of everything that they have.

    A weight has several numbers per unit; what has one (biases, scales of a normalisation) says little of its use.
    """
    per_row = table.spread(torch.ones(table.units, device=table.device), combine="prod")
    every = [torch.ones_like(x) for x in table.x.banks]
    weights = [one if r.numel() < one.numel() else torch.zeros_like(one) for one, r in zip(every, per_row, strict=True)]
    sizes = [x.abs() for x in table.x.banks]
    counts = table.dot(weights, weights)
    everything = table.dot(sizes, every) / table.counts.clamp_min(1)
    return torch.where(counts > 0, table.dot(sizes, weights) / counts.clamp_min(1), everything)


class ByMagnitude(Sparsifier):
    """A table of units beside the optimizer of the settings."""

    def make_optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> Optimizer:
        self.table = UnitTable([p for g in groups for p in g["params"]], [p for g in groups for p in g["parts"]])
        self.redundant = torch.zeros(self.table.units, dtype=torch.bool, device=self.table.device)
        self.dead = self.redundant.clone()
        self._settings = settings
        return make_optimizer([p for g in groups for p in g["params"] if p.requires_grad], settings)

    def _choose(self, share: float, removed: Mapping[str, Any] | None = None) -> None:
        """Let the weakest be redundant, as many as bring the network `share` of the way to its target."""
        scores = self.table.by_family(magnitudes(self.table))
        self.redundant.copy_(self.table.from_families(self.selection(scores, share=share, removed=removed)) > 0)
