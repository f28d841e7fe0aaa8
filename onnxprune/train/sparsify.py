"""What the methods that prune in training have in common: hooks that leave redundant units exactly zero.

A run with such hooks is the first part of `compress --method`: the whole network is trained, and at its end
`removed` says which units are zero. What follows (the surgery, its proof, training what is left) knows nothing of the
method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from onnxprune.axes.analysis import Analysis
from onnxprune.train.families import params_and_groups
from onnxprune.train.hooks import Hooks
from onnxprune.train.selection import Selection
from onnxprune.train.settings import TrainSettings
from onnxprune.train.units import UnitTable

__all__ = ["FamilyState", "Sparsifier"]


@dataclass(frozen=True, slots=True)
class FamilyState:
    """One family in a run. units, left: all, and those that are not zero. redundant: chosen to go, zero or not.

    sparsity: share of the units that are zero. smallest_kept, largest_redundant: norms; nan where there are none.
    """

    family: str
    units: int
    left: int
    redundant: int
    sparsity: float
    smallest_kept: float
    largest_redundant: float
    angles: Mapping[str, float]

    def row(self) -> dict[str, Any]:
        """Plain values, for a log."""
        return asdict(self) | {"angles": dict(self.angles)}


class Sparsifier(Hooks):
    """Base of the methods. A method says in `make_optimizer` what moves the weights, sets `redundant` when it has
    chosen, and `dead` where units have become zero for good; both are bool, per unit.

    selection: chooses redundant units. allow_inexact: as the selection has it.
    """

    loss_may_rise = True

    def __init__(self, analysis: Analysis, selection: Selection) -> None:
        self.analysis, self.selection = analysis, selection
        self.table: UnitTable
        self.redundant: Tensor
        self.dead: Tensor
        self.removed: dict[str, np.ndarray] = {}

    def optimizer(self, student: nn.Module, settings: TrainSettings) -> Optimizer | None:
        assert isinstance(student, GraphModule)
        groups = params_and_groups(
            student,
            self.analysis,
            weight_decay=settings.weight_decay,
            allow_inexact=self.selection.allow_inexact,
        )
        return self.make_optimizer(groups, settings)

    def make_optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> Optimizer:
        """The optimizer of the run; sets `table`, and `redundant` and `dead` to nothing."""
        raise TypeError(f"{type(self).__name__} has no optimizer")

    def on_finish(self, student: nn.Module) -> None:
        """What is redundant becomes zero, in an average of the weights as well."""
        with torch.no_grad():
            self.dead = self.dead | self.redundant
            self.table.rebind()
            self.table.keep_(~self.dead)
        self.removed = {f: gone.astype(bool) for f, gone in self.table.by_family(self.dead).items()}

    # what is seen

    def angles(self) -> Mapping[str, Tensor]:
        """Statistics per unit that the method decides by, for the log: name -> (units,)."""
        return {}

    def values(self) -> dict[str, float]:
        return {"sparsity": float(self.dead.float().mean()) if self.table.units else 0.0}

    @torch.no_grad()
    def families(self) -> list[FamilyState]:
        """The state of every family. Waits for the device."""
        table = self.table
        norms = table.by_family(table.square(table.x.banks).sqrt())
        redundant, dead = table.by_family(self.redundant), table.by_family(self.dead)
        angles = {name: table.by_family(values) for name, values in self.angles().items()}
        found = []
        for family, sizes in norms.items():
            gone = redundant[family] | dead[family]
            zero = int((sizes == 0).sum())
            found.append(
                FamilyState(
                    family,
                    len(sizes),
                    len(sizes) - zero,
                    int(gone.sum()),
                    zero / len(sizes),
                    float(sizes[~gone].min()) if not gone.all() else math.nan,
                    float(sizes[gone].max()) if gone.any() else math.nan,
                    {name: float(values[family].mean()) for name, values in angles.items()},
                )
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"redundant": self.redundant, "dead": self.dead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.redundant.copy_(state["redundant"])
        self.dead.copy_(state["dead"])
