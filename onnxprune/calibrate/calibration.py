"""What criteria ask of calibration data, found out when it is first asked for and kept: small arrays, no activations.

torch is imported only then, so that whoever ranks by weights alone does without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxprune.axes.analysis import Analysis, Group
from onnxprune.axes.expr import Atom
from onnxprune.calibrate.reads import Read, reads_of
from onnxprune.data.source import Source
from onnxprune.errors import UsageError

if TYPE_CHECKING:
    from onnxprune.calibrate.moments import Moments
    from onnxprune.calibrate.predicted import Predictor
    from onnxprune.calibrate.watched import Batches, Watched

__all__ = ["SAMPLES", "Calibration"]

SAMPLES = 512
SMALL = 5e9  # multiply-accumulates of a batch: so small a network gains little by several threads


@dataclass(eq=False)
class Calibration:
    """Statistics of a network on data.

    source: the data; of it `samples` samples are taken, drawn by `seed`. loss: a loss on targets, as
    `train.loss.criterion` has them ('ce'), for what a unit does to the task; by default the original's own outputs are
    what counts, and no targets are needed.
    Whatever is asked of it first builds the mirror: NotMirrored where nodes have no form in torch, UsageError where
    torch is not installed, DataError for what is wrong in the data.
    """

    analysis: Analysis
    source: Source
    samples: int = SAMPLES
    seed: int = 0
    loss: str | None = None

    @cached_property
    def reads(self) -> Mapping[Atom, tuple[Read, ...]]:
        """Where the units of every group are read."""
        return reads_of(self.analysis)

    @cached_property
    def watched(self) -> Watched:
        try:
            from onnxprune.calibrate.watched import Watched
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise UsageError(
                "calibration wants torch, which is not installed", "pip install 'onnxprune[train]'"
            ) from None
        return Watched(self.analysis)

    @cached_property
    def batches(self) -> Batches:
        from onnxprune.calibrate.watched import Batches

        return Batches.fitting(self.watched, self.source, samples=self.samples, seed=self.seed)

    @cached_property
    def moments(self) -> Mapping[tuple[str, int], Moments]:
        """Of the activations where units are read, by tensor and axis."""
        from onnxprune.calibrate.moments import activation_moments

        with self.threads():
            return activation_moments(self.analysis, self.watched, self.batches)

    @cached_property
    def information(self) -> Mapping[str, np.ndarray]:
        """Per group id, what the output (or the loss on targets) loses with each unit, to second order."""
        from onnxprune.calibrate import gradients

        with self.threads():
            if self.loss is None:
                return gradients.fisher_information(self.watched, self.batches, seed=self.seed)
            return gradients.task_information(self.watched, self.batches, self._criterion())

    @cached_property
    def slopes(self) -> Mapping[str, np.ndarray]:
        """Per group id, the slope of the distillation loss in each unit, where some others are gone."""
        from onnxprune.calibrate.gradients import distillation_slopes

        with self.threads():
            return distillation_slopes(self.watched, self.batches, seed=self.seed)

    @cached_property
    def predictor(self) -> Predictor:
        """What stands for removed units after a repair."""
        from onnxprune.calibrate.predicted import Predictor

        with self.threads():
            return Predictor(self.watched, self.batches)

    @cached_property
    def saliencies(self) -> Mapping[str, np.ndarray]:
        """Per group id, what each unit costs its readers after they have made the best of the others."""
        from onnxprune.calibrate.saliency import saliencies

        with self.threads(small=True):  # most of the time goes into many small matrices
            return saliencies(self.watched, self.batches)

    def threads(self, *, small: bool = False) -> AbstractContextManager[None]:
        """To compute in. small: that it doesn't gain by several threads is known."""
        from onnxprune.model.profile import costs
        from onnxprune.workers import sparing_threads

        work = costs(self.analysis)["macs"].total({}) * self.batches.size
        return sparing_threads() if small or work < SMALL else nullcontext()

    def _criterion(self) -> Any:
        from onnxprune.train.loss import criterion, output_kinds

        assert self.loss is not None
        return criterion(self.loss, outputs=output_kinds(self.analysis.graph), targets=self.source.targets)

    def reads_of(self, group: Group) -> tuple[Read, ...]:
        return self.reads.get(group.atom, ())
