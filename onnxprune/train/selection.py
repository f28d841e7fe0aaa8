"""Which units are redundant: what a method in training asks when it has scores, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxprune.axes.analysis import Analysis
from onnxprune.select.choose import Choice, choose
from onnxprune.select.plan import Plan
from onnxprune.select.target import Target

__all__ = ["Selection", "least_share"]

REMOVED_BEFORE = 0.0  # the score of units that are gone already: they cost nothing


@dataclass(eq=False)
class Selection:
    """Chooses redundant units so that removing them meets a target, with the floors and blocks of `select.choose`.

    families: ids of the groups whose units may go. choice: the last one that was made.
    """

    analysis: Analysis
    target: Target
    families: Collection[str]
    scope: str = "global"
    floor: float = 0.1
    align: int = 1
    allow_inexact: bool = False
    choice: Choice | None = field(default=None, init=False)

    def __call__(
        self,
        scores: Mapping[str, np.ndarray],
        *,
        share: float = 1.0,
        removed: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Per family, which units are redundant (bool). scores: per family, the higher the more a unit matters.

        share: of the way to the target that is to be gone by now. removed: units that are gone, and stay so.
        Raises TargetNotReached where no group may lose a unit.
        """
        gone = removed or {}
        ranked = {f: np.where(gone[f], REMOVED_BEFORE, s) if f in gone else s for f, s in scores.items()}
        self.choice = choose(
            self.analysis,
            self.target,
            importance=ranked,
            scope=self.scope,
            floor=self.floor,
            align=self.align,
            allow_inexact=self.allow_inexact,
            only=self.families,
            share=share,
            fill=True,
        )
        found = {}
        for family, values in scores.items():
            redundant = np.zeros(len(values), bool) if family not in gone else gone[family].copy()
            if family in self.choice.plan.keep:
                left = np.zeros(len(values), bool)
                left[self.choice.plan.keep[family]] = True
                redundant |= ~left
            found[family] = redundant
        return found

    def plan(self, removed: Mapping[str, np.ndarray]) -> Plan:
        """What is left where these units are gone."""
        return Plan({f: np.flatnonzero(~gone) for f, gone in removed.items() if gone.any()})


def least_share(scores: Mapping[str, np.ndarray], sparsity: float, *, floor: float = 0.0) -> dict[str, np.ndarray]:
    """The `sparsity` * N units of the lowest scores over all families, but of no family more than 1 - floor.

    The target of the papers (K zero-invariant groups), for optimizers that are used by hand.
    """
    families = list(scores)
    owner = np.concatenate([np.full(len(scores[f]), k) for k, f in enumerate(families)])
    index = np.concatenate([np.arange(len(scores[f])) for f in families])
    values = np.concatenate([scores[f] for f in families])
    left = round(sparsity * len(values))
    may = [int((1 - floor) * len(scores[f])) for f in families]
    found = {f: np.zeros(len(scores[f]), bool) for f in families}
    for k in np.argsort(values, kind="stable"):
        if left == 0:
            break
        if may[owner[k]] > 0:
            may[owner[k]] -= 1
            left -= 1
            found[families[owner[k]]][index[k]] = True
    return found
