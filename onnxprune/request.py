"""What `compress` is asked for, in one value: everything but the model, the target and the output."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from onnxprune.errors import UsageError
from onnxprune.ops import OPERATORS
from onnxprune.ops.registry import Operator
from onnxprune.train.methods import ONESHOT
from onnxprune.train.settings import TrainSettings

if TYPE_CHECKING:
    from onnxprune.select.importance import Criterion
    from onnxprune.train.log import Row
    from onnxprune.train.sparsify import Sparsifier

__all__ = ["DEFAULT_RECIPE", "TRAIN_STEPS", "Recipe", "Request"]

TRAIN_STEPS = 500


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is learnt from the data.

    preprocess: what is done to it, as `data.Preprocess.parse` has it. loss, distill, temperature: as
    `train.loss.criterion` has them. rebn: put folded BatchNormalization back for training; None: where there is none.
    eval_data: what the metric is taken on, instead of the data itself.
    """

    preprocess: str | None = None
    loss: str = "auto"
    distill: float = 0.0
    temperature: float = 4.0
    rebn: bool | None = None
    eval_data: object = None


DEFAULT_RECIPE = Recipe()


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `pipeline.compress`, which says what each of them means."""

    method: str | type[Sparsifier] = ONESHOT
    method_options: Mapping[str, Any] | None = None
    importance: str | Criterion = "auto"
    allocate: str = "importance"
    sensitivity: str | os.PathLike[str] | None = None
    scope: str = "global"
    floor: float = 0.1
    deploy: str = "ort-cpu"
    align: int | None = None
    exclude: Sequence[str] = ()
    allow_inexact: bool = False
    best_effort: bool = False
    seed: int = 0
    dry_run: bool = False
    force: bool = False
    latency: bool = False
    threads: int = 1
    input_shapes: Mapping[str, Sequence[int]] | None = None
    data: object = None
    samples: int | None = None
    repair: str = "auto"
    calibrate: str | None = None
    train: TrainSettings | None = None
    evaluate: str | None = None
    max_drop: float | None = None
    recipe: Recipe = DEFAULT_RECIPE
    run_dir: str | os.PathLike[str] | None = None
    resume: bool = False
    registry: Mapping[str, Operator] = field(default_factory=lambda: OPERATORS)
    progress: Callable[[str], None] | None = None
    on_step: Callable[[Row], None] | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Out of a function's arguments, those that are options."""
        return cls(**{f.name: arguments[f.name] for f in fields(cls)})

    @property
    def in_training(self) -> bool:
        """Whether the units to remove are found in training."""
        return self.method != ONESHOT

    def training(self) -> TrainSettings | None:
        """How to train; None where that was not asked for: by a length, or by a method that works in training.

        Raises UsageError where something is said about training that is not asked for, or that has no data.
        """
        if self.data is None:
            if self.train is not None or self.recipe.loss != "auto" or self.recipe.distill:
                raise UsageError("training wants data", "give it with --data")
            return None
        if self.train is not None or self.in_training:
            return self.train or TrainSettings(steps=TRAIN_STEPS, seed=self.seed)
        plain = DEFAULT_RECIPE
        said = {
            "a loss": self.recipe.loss != plain.loss,
            "--distill": self.recipe.distill != plain.distill,
            "--temperature": self.recipe.temperature != plain.temperature,
            "--rebn": self.recipe.rebn != plain.rebn,
            "--run-dir": self.run_dir is not None or self.resume,
        }
        for what, given in said.items():
            if given:
                raise UsageError(f"{what} is about training, which is not asked for", f"--steps {TRAIN_STEPS} trains")
        return None
