"""DHSPG and HESSO in a training run: their schedules are shares of the run, whatever it is measured in."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.errors import UsageError
from onnxprune.mirroring.rebn import fold
from onnxprune.mirroring.values import stored_values
from onnxprune.model.infer import infer
from onnxprune.rewrite.weights import with_weights
from onnxprune.select.importance import CALIBRATED, IMPORTANCE, scores
from onnxprune.train.hooks import Step
from onnxprune.train.saliency import SALIENCY
from onnxprune.train.selection import Selection
from onnxprune.train.settings import TrainSettings
from onnxprune.train.sparsify import Sparsifier
from onnxprune.train.unit_optimizer import UnitOptimizer

__all__ = ["STORED", "ScheduleOptions", "UnitTraining", "stored_importance"]

STORED = tuple(name for name in IMPORTANCE if name not in CALIBRATED and name not in SALIENCY)
"""Criteria of one-shot selection that look at weights alone."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """start, stop: of the run, from where and until when redundant units go to zero. window: share of it before a
    choice that the statistics are taken over; one step at least. saliency: what units are chosen by, of
    `saliency.SALIENCY`; or one of `STORED`, of the weights as they are then. Raises UsageError where a value makes no
    sense."""

    start: float
    stop: float
    saliency: str
    window: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise UsageError(
                f"start {self.start:g} and stop {self.stop:g} are no part of a run",
                "they are shares of it, start below stop",
            )
        if not 0 <= self.window <= 1:
            raise UsageError(f"window must be within 0 and 1, found {self.window:g}")
        if self.saliency not in (*SALIENCY, *STORED):
            raise UsageError(f"saliency '{self.saliency}' is none of {', '.join((*SALIENCY, *STORED))}")


class UnitTraining(Sparsifier, ABC):
    """Base of the two. share: the part of a whole training that this phase takes by default."""

    name: ClassVar[str]
    options: ClassVar[type[ScheduleOptions]]
    share: ClassVar[float]

    def __init__(self, analysis: Analysis, selection: Selection, options: Any = None) -> None:
        super().__init__(analysis, selection)
        self.chosen: Any = options if options is not None else self.options()  # type: ignore[call-arg]
        self.optimized: UnitOptimizer

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], how: dict[str, Any]) -> UnitOptimizer:
        """The optimizer. how: the arguments that both have."""

    def optimizer(self, student: nn.Module, settings: TrainSettings) -> Optimizer | None:
        assert isinstance(student, GraphModule)
        self._student = student
        return super().optimizer(student, settings)

    def make_optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> Optimizer:
        by_weights = self.chosen.saliency in STORED
        how: dict[str, Any] = {"lr": settings.lr, "variant": settings.optimizer}
        how["target"] = self._by_weights if by_weights else self.selection
        if settings.optimizer == "sgd":
            how["momentum"] = settings.momentum
        how |= {"start": self.chosen.start, "stop": self.chosen.stop, "window": self.chosen.window}
        criterion = "norm" if by_weights else self.chosen.saliency
        self.optimized = self.build(groups, how | {"criterion": criterion, "by_family": True})
        self.table = self.optimized.table
        self.redundant, self.dead = self.optimized.redundant, self.optimized.dead
        return self.optimized

    def _by_weights(
        self,
        scores: Mapping[str, np.ndarray],
        *,
        share: float = 1.0,
        removed: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        found = stored_importance(self._student, self.analysis, self.chosen.saliency, scores)
        return self.selection(found, share=share, removed=removed)

    def on_step_begin(self, step: Step) -> None:
        self.optimized.tell(step.share)

    def on_finish(self, student: nn.Module) -> None:
        self.optimized.finish()
        self.removed = {f: gone.astype(bool) for f, gone in self.table.by_family(self.dead).items()}

    def angles(self) -> Mapping[str, Tensor]:
        return {"cosine": self.optimized.cosine}

    def state_dict(self) -> dict[str, Any]:
        return {}  # the optimizer's has it all

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def stored_importance(
    student: GraphModule, analysis: Analysis, criterion: str, families: Collection[str]
) -> dict[str, np.ndarray]:
    """Per family, a criterion of one-shot selection on the weights that a mirror of the analysed graph has now."""
    folded = copy.deepcopy(student)
    fold(folded)
    graph = infer(with_weights(analysis.graph, stored_values(folded)), analysis.registry, analysis.graph.pins)
    again = analyse(graph, registry=analysis.registry, exclude=analysis.exclude)
    return scores(again, [g for g in again.groups if g.id in families], criterion)
