"""What a training run is told: the numbers that decide its result, and a few that don't.

The first kind is written beside every checkpoint; a run is continued under the same ones only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from onnxprune.errors import UsageError

__all__ = ["TrainSettings", "differences"]

# Where a run is computed, saved and shown may change between its parts.
FREE = frozenset({"device", "checkpoint_every_s", "keep", "log_file", "log_every", "tensorboard"})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Exactly one of steps, epochs and time_budget_s says for how long.

    batch: samples per step, over all processes and all `accumulate` parts that a step is computed in.
    warmup: share of the training over which the rate rises from 0. schedule: how it falls to 0 afterwards (or stays);
        'steps' divides it by 10 at each of `milestones`, which are shares of the training.
    span: the part of the training that a run is; the others are runs of their own, under the same settings.
    weight_decay: not applied to parameters of one dimension or none (biases, scales).
    clip: bound of the gradients' common 2-norm. ema: decay of an average of the weights, which the run then ends with.
    amp: arithmetic of the forward pass; 'auto' is bf16 where the device computes it natively.
    deterministic: ask torch for its deterministic algorithms.
    divergence: multiple of the smoothed loss's minimum that the smoothed loss may stay above for `patience` steps;
        None: only nan and infinity count.
    checkpoint_every_steps: checkpoints at multiples of it, checkpoint_every_s: when that many seconds have passed.
    log_file: .csv or .jsonl, a row every `log_every` steps. tensorboard: a folder.
    Raises UsageError where a value makes no sense.
    """

    steps: int | None = None
    epochs: int | None = None
    time_budget_s: float | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 32
    accumulate: int = 1
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "constant", "steps"] = "cosine"
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)
    span: tuple[float, float] = (0.0, 1.0)
    clip: float | None = None
    ema: float | None = None
    amp: Literal["auto", "bf16", "fp16", "none"] = "auto"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = True
    seed: int = 0
    device: str = "auto"
    divergence: float | None = 10.0
    patience: int = 100
    checkpoint_every_steps: int | None = None
    checkpoint_every_s: float | None = 120.0
    keep: int = 2
    log_file: Path | None = None
    log_every: int = 10
    tensorboard: Path | None = None

    def __post_init__(self) -> None:
        lengths = {"steps": self.steps, "epochs": self.epochs, "time budget": self.time_budget_s}
        given = {name: value for name, value in lengths.items() if value is not None}
        if len(given) != 1:
            raise UsageError(
                f"training wants one of steps, epochs and a time budget, found {' and '.join(given) or 'none'}",
                "give --steps 1000, --epochs 10 or --time-budget 30m",
            )
        positive = given | {"batch": self.batch, "accumulate": self.accumulate, "keep": self.keep}
        positive |= {"log_every": self.log_every, "patience": self.patience, "lr": self.lr}
        optional = {"clip": self.clip, "checkpoint_every_steps": self.checkpoint_every_steps}
        positive |= {name: value for name, value in optional.items() if value is not None}
        for name, value in positive.items():
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name} must be above 0, found {value:g}")
        ranges: dict[str, tuple[float, float, float]] = {
            "warmup": (self.warmup, 0, 1),
            "momentum": (self.momentum, 0, 1),
            "ema": (self.ema or 0.0, 0, 1),
        }
        ranges["seed"] = (self.seed, 0, 2**63)
        ranges["weight_decay"] = (self.weight_decay, 0, math.inf)
        for name, (value, low, high) in ranges.items():
            if not low <= value < high:
                raise UsageError(f"{name} must be within {low} and {high}, found {value:g}")
        if self.divergence is not None and self.divergence <= 1:
            raise UsageError(f"divergence must be above 1, found {self.divergence:g}")
        if self.accumulate > self.batch:
            raise UsageError(f"a batch of {self.batch} can't be computed in {self.accumulate} parts")
        if not all(a < b for a, b in pairwise((0.0, *self.milestones, 1.0))):
            raise UsageError(f"milestones must rise between 0 and 1, found {', '.join(map(str, self.milestones))}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise UsageError(f"a run must be a part of the training, found {self.span[0]:g} to {self.span[1]:g} of it")
        _one_of("optimizer", self.optimizer, "sgd", "adam", "adamw")
        _one_of("schedule", self.schedule, "cosine", "linear", "constant", "steps")
        _one_of("amp", self.amp, "auto", "bf16", "fp16", "none")
        if self.log_file is not None:
            _one_of("the log file's suffix", Path(self.log_file).suffix, ".csv", ".jsonl")

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same in two sets of plain values, in words: 'lr was 0.1, is 0.01'."""
    names = [*before, *(name for name in now if name not in before)]
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names if before.get(name) != now.get(name)]


def _one_of(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, found '{value}'")
