"""TPP in a training run, and its ablations: GReg-1 (arXiv 2012.09243), which only shrinks, and FixReg, whose shrinking
is steady.

How far redundant units have shrunk is what counts, and not lambda: the same lambda does nothing at a low learning rate
and is over at once at a high one. So a run has a budget, e-folds: after 20 of them a weight is 2e-9 of what it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.optim import Optimizer

from onnxprune.axes.analysis import Analysis
from onnxprune.errors import UsageError
from onnxprune.select.importance import IMPORTANCE, scores
from onnxprune.train.gram import Scale
from onnxprune.train.hooks import Step
from onnxprune.train.optim import make_optimizer
from onnxprune.train.selection import Selection
from onnxprune.train.settings import TrainSettings
from onnxprune.train.sparsify import Sparsifier
from onnxprune.train.tpp import TPP, Growing, Reach

__all__ = ["FixReg", "FixRegOptions", "GReg", "GRegOptions", "Penalised", "PenaltyOptions", "TPPOptions", "TPPTraining"]

GONE = 1e-4  # of its norm: a unit that has shrunk to this is taken for zero
LOOK_EVERY = 20  # steps


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions:
    """importance: what the units are chosen by before training: 'magnitude' (mean |w|) or one of `select.importance`.
    efolds: by how many the redundant units shrink in all. until: the share of this phase in which they do; in the rest
    they are zero, and the others settle. reselect: how often the choice is made again in the first half of that.
    Raises UsageError where a value makes no sense."""

    importance: str = "magnitude"
    efolds: float = 20.0
    until: float = 0.8
    reselect: int = 0

    def __post_init__(self) -> None:
        if self.importance != "magnitude" and self.importance not in IMPORTANCE:
            raise UsageError(f"importance '{self.importance}' is none of magnitude, {', '.join(IMPORTANCE)}")
        if not (0 < self.efolds < math.inf):
            raise UsageError(f"efolds must be above 0, found {self.efolds:g}", "20 is a good number")
        if not 0 < self.until <= 1:
            raise UsageError(f"until must be above 0 and at most 1, found {self.until:g}")
        if self.reselect < 0:
            raise UsageError(f"reselect can't be negative, found {self.reselect}")


@dataclass(frozen=True, kw_only=True)
class TPPOptions(PenaltyOptions):
    """scale, rho: of the Gram penalty, see `gram.GramPenalty`. ramp: 'budget': in e-folds, as above; 'paper': lambda
    grows by `by` every `every` steps up to `limit`, and what is left after `hold` more steps becomes zero.
    zero: at the end of the ramp all units become zero at once, or 'in turn', family by family, `apart` steps apart."""

    scale: Scale = "auto"
    rho: float = 0.5
    ramp: Literal["budget", "paper"] = "budget"
    by: float = 1e-4
    limit: float = 1.0
    every: int = 10
    hold: int = 10_000
    zero: Literal["at once", "in turn"] = "at once"
    apart: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, allowed in (
            ("scale", self.scale, ("auto", "paper", "code")),
            ("ramp", self.ramp, ("budget", "paper")),
            ("zero", self.zero, ("at once", "in turn")),
        ):
            if value not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, found '{value}'")
        for name, number in (("rho", self.rho), ("by", self.by), ("limit", self.limit), ("every", self.every)):
            if not (0 < number < math.inf):
                raise UsageError(f"{name} must be above 0, found {number:g}")
        if self.hold < 0 or self.apart < 1:
            raise UsageError(f"hold must be at least 0 and apart at least 1, found {self.hold} and {self.apart}")


@dataclass(frozen=True, kw_only=True)
class GRegOptions(PenaltyOptions):
    """See `PenaltyOptions`. The penalty grows linearly."""


@dataclass(frozen=True, kw_only=True)
class FixRegOptions(PenaltyOptions):
    """See `PenaltyOptions`. lmbda: a constant lambda as in lambda/2 |w|^2, 1 in the paper; None: what spends the budget
    evenly, whatever the learning rate is."""

    lmbda: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lmbda is not None and not (0 < self.lmbda < math.inf):
            raise UsageError(f"lmbda must be above 0, found {self.lmbda:g}")


class Penalised(Sparsifier):
    """Redundant units are chosen once, before training, and shrunk to zero while the network trains.

    Base of `TPPTraining`, `GReg` and `FixReg`. share: the part of a whole training that this phase takes by default.
    """

    name: ClassVar[str]
    options: ClassVar[type[PenaltyOptions]]
    share: ClassVar[float] = 0.4
    grows: ClassVar[bool] = True
    reach: ClassVar[Reach] = "all"

    def __init__(self, analysis: Analysis, selection: Selection, options: PenaltyOptions | None = None) -> None:
        super().__init__(analysis, selection)
        self.chosen = options if options is not None else self.options()
        self.spent = 0.0  # e-folds
        self.chosen_times = 0
        self.over = False  # everything redundant is zero

    # the run

    def make_optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> Optimizer:
        self.tpp = self._penalty(groups)
        self.table, self.redundant, self.dead = self.tpp.table, self.tpp.redundant, self.tpp.dead
        self._lr = settings.lr
        self._adaptive = settings.optimizer != "sgd"
        self._momentum = 0.0 if self._adaptive else settings.momentum
        self._first_norms = self.tpp.norms()
        self._shrunk = self.tpp.per_row(0.0, 0.0)  # e-folds
        self._choose(self._importance())
        learnt = [p for group in groups for p in group["params"] if p.requires_grad]
        return make_optimizer(learnt, settings)

    def on_step_begin(self, step: Step) -> None:
        options = self.chosen
        times = 1 + math.floor(2 * step.share / options.until * (options.reselect + 1))
        if self.chosen_times < min(times, options.reselect + 1):
            self._restore()
            self._choose(self.tpp.magnitudes())
        self._efolds = 0.0 if self.over else self._wanted(step)

    def after_backward(self, step: Step) -> None:
        if not self._adaptive:
            self.tpp.add_gradients(self._gram_strength(step))

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        if self._adaptive:
            self.tpp.descend(self._lr, self._gram_strength(step))
        self.tpp.strength = math.expm1(self._efolds) / self._lr
        self.tpp.shrink(self._lr)
        self.spent += self._efolds
        if self.chosen_times <= self.chosen.reselect:
            torch._foreach_add_(self._shrunk, self.tpp.per_row(self._efolds, 0.0))
        if not self.over and step.index % LOOK_EVERY == LOOK_EVERY - 1:
            small = self.tpp.norms() <= GONE * self._first_norms
            self.tpp.remove(small)
            self.over = not bool((self.redundant & ~self.dead).any())
        if not self.over and self._ends(step):
            self._zero(step)

    def _zero(self, step: Step) -> None:
        """The end of the ramp: what is redundant becomes zero."""
        self.tpp.remove()
        self.over = True

    # what the methods differ by

    def _penalty(self, groups: list[dict[str, Any]]) -> TPP:
        return TPP(groups, gram=False, reach=self.reach)

    def _gram_strength(self, step: Step) -> float:
        """Lambda of the Gram penalty: no step along it overshoots, however few steps the budget is spent in."""
        return -math.expm1(-self._efolds) / self._lr

    def _wanted(self, step: Step) -> float:
        """E-folds that redundant units are to shrink by in this step."""
        done = min(step.share / self.chosen.until, 1.0)
        return max(self.chosen.efolds * (done * done if self.grows else done) - self.spent, 0.0)

    def _ends(self, step: Step) -> bool:
        return step.share >= self.chosen.until

    # choosing

    def _importance(self) -> Mapping[str, np.ndarray]:
        if self.chosen.importance == "magnitude":
            return self.tpp.magnitudes()
        families = self.table.slices
        groups = [g for g in self.analysis.groups if g.id in families]
        return scores(self.analysis, groups, self.chosen.importance)

    def _choose(self, importance: Mapping[str, np.ndarray]) -> None:
        self.tpp.choose(self.selection(importance, removed=self.table.by_family(self.dead)))
        self.chosen_times += 1

    @torch.no_grad()
    def _restore(self) -> None:
        """Undo the shrinking, so that units are compared by what training has made of them."""
        for x, shrunk in zip(self.table.x.banks, self._shrunk, strict=True):
            x.mul_(shrunk.exp())
            shrunk.zero_()

    # what is seen

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        norms = self.tpp.norms().square()
        gone = self.redundant | self.dead
        kept, redundant = ((norms * which).sum().sqrt() for which in (~gone, gone))
        found = {
            "lambda": self.tpp.strength,
            "efolds": self.spent,
            "kept_norm": float(kept),
            "redundant_norm": float(redundant),
        }
        if self.tpp.gram.stacks:
            found["gram"] = float(self.tpp.gram.value())
        return super().values() | found

    def state_dict(self) -> dict[str, Any]:
        return {
            "tpp": self.tpp.state_dict(),
            "spent": self.spent,
            "chosen_times": self.chosen_times,
            "over": self.over,
            "first_norms": self._first_norms,
            "shrunk": self._shrunk,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tpp.load_state_dict(state["tpp"])
        self.spent, self.chosen_times, self.over = state["spent"], state["chosen_times"], state["over"]
        self._first_norms.copy_(state["first_norms"])
        torch._foreach_copy_(self._shrunk, state["shrunk"])


class GReg(Penalised):
    """Growing L2 on everything that produces redundant units, without a Gram matrix (GReg-1)."""

    name = "greg"
    options = GRegOptions


class FixReg(Penalised):
    """Constant L2 on the weights of redundant units alone."""

    name = "fixreg"
    options = FixRegOptions
    grows = False
    reach: ClassVar[Reach] = "weights"
    chosen: FixRegOptions

    def _wanted(self, step: Step) -> float:
        if self.chosen.lmbda is None:
            return super()._wanted(step)
        return math.log1p(step.lr / (1 - self._momentum) * self.chosen.lmbda) if not self._ends(step) else 0.0


class TPPTraining(Penalised):
    """Growing L2, and the Gram penalty."""

    name = "tpp"
    options = TPPOptions
    chosen: TPPOptions

    def _penalty(self, groups: list[dict[str, Any]]) -> TPP:
        return TPP(groups, scale=self.chosen.scale, rho=self.chosen.rho)

    def make_optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> Optimizer:
        how = self.chosen
        self._ramp = Growing(by=how.by, limit=how.limit, every=how.every, hold=how.hold)
        self._first_step: int | None = None
        self._next_zero: int | None = None  # step
        return super().make_optimizer(groups, settings)

    def _index(self, step: Step) -> int:
        """Of a step, from the beginning of this phase."""
        if self._first_step is None:
            self._first_step = step.index
        return step.index - self._first_step

    def _wanted(self, step: Step) -> float:
        if self.chosen.ramp == "budget":
            return super()._wanted(step)
        return math.log1p(step.lr / (1 - self._momentum) * self._ramp.at(self._index(step)))

    def _gram_strength(self, step: Step) -> float:
        if self.chosen.ramp == "budget":
            return super()._gram_strength(step)
        return 0.0 if self.over else self._ramp.at(self._index(step))

    def _ends(self, step: Step) -> bool:
        return super()._ends(step) if self.chosen.ramp == "budget" else self._index(step) >= self._ramp.steps

    def _zero(self, step: Step) -> None:
        if self.chosen.zero == "at once":
            super()._zero(step)
        elif self._next_zero is None or step.index >= self._next_zero:
            waiting = self.table.by_family(self.redundant & ~self.dead)
            families = [f for f, units in waiting.items() if units.any()]
            first = torch.zeros_like(self.redundant)
            for family in families[:1]:
                first[self.table.slices[family]] = True
            self.tpp.remove(first)
            self._next_zero = step.index + self.chosen.apart
            self.over = len(families) <= 1

    def state_dict(self) -> dict[str, Any]:
        own = {"first_step": self._first_step, "next_zero": self._next_zero}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._first_step, self._next_zero = state["first_step"], state["next_zero"]
