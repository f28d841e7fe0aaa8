"""Small networks, data and losses for tests of the training loop; run as a script, one training run to a file.

python -m tests.train.runs OUT.pt '{"settings": {...}, "run_dir": "...", "resume": true, ...}'
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onnxprune.train.loop import TrainResult, train
from onnxprune.train.settings import TrainSettings


@dataclass(frozen=True)
class Arrays:
    inputs: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]

    @property
    def size(self) -> int:
        return len(next(iter(self.inputs.values())))


class ArraySource:
    """Images and classes, permuted by (seed, epoch). kind: 'indexed', or 'drawing', which passes over batches by making
    them and adds noise from numpy's and torch's global generators. known: whether its size is."""

    targets = ("label",)
    description = "arrays"

    def __init__(self, count: int, *, kind: str = "indexed", known: bool = True, size: int = 8, fixed: int = 0) -> None:
        rng = np.random.default_rng(5)
        self.x = rng.standard_normal((count, 3, size, size)).astype(np.float32)
        self.y = (self.x.mean((1, 2, 3)) * 40).astype(np.int64).clip(-2, 2) + 2
        self.kind, self.fixed = kind, fixed
        self.size = count if known else None
        self.before_batch: Callable[[int, int], None] = lambda epoch, number: None

    def batches(
        self, size: int, *, epoch: int, seed: int, shuffle: bool, start: int, rank: int, world: int, drop_last: bool
    ) -> Iterator[Arrays]:
        size = self.fixed or size
        order = np.random.default_rng([seed, epoch]).permutation(len(self.x)) if shuffle else np.arange(len(self.x))
        count = len(order) // size if drop_last else -(-len(order) // size)
        for number in range(count):
            if number < start and self.kind == "indexed":
                continue
            rows = np.array_split(order[number * size : (number + 1) * size], world)[rank]
            x = self.x[rows]
            if self.kind == "drawing":
                x = x + np.float32(0.1) * np.random.standard_normal(x.shape).astype(np.float32)
                x = x + 0.1 * torch.rand(x.shape).numpy() + np.float32(random.random())
            if number < start:
                continue
            self.before_batch(epoch, number)
            yield Arrays({"x": x}, {"label": self.y[rows]})


def convnet(*, norm: bool = True, dropout: float = 0.0, width: int = 6) -> nn.Module:
    """(N,3,8,8) to (N,5), always with the same weights."""
    torch.manual_seed(3)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    layers += [nn.BatchNorm2d(width)] if norm else []
    layers += [nn.ReLU(), nn.Conv2d(width, width, 3, stride=2)]
    layers += [nn.BatchNorm2d(width)] if norm else []
    layers += [nn.Tanh(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(width * 9, 5)]
    return nn.Sequential(*layers)


class CrossEntropy:
    """A criterion with a state, as those of the package have: the running mean of the loss."""

    needs_teacher = False

    def __init__(self) -> None:
        self.mean = torch.zeros(())

    def __call__(self, outputs: dict[str, Tensor], *, teacher: Any, targets: dict[str, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(outputs["y"].float(), targets["label"])
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss + 0.01 * self.mean * outputs["y"].float().square().mean()

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean = state["mean"].clone()


class Stateless(CrossEntropy):
    """Cross entropy alone: a mean over samples, with nothing that depends on how they are parted."""

    def __call__(self, outputs: dict[str, Tensor], *, teacher: Any, targets: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs["y"].float(), targets["label"])


def settings(**changes: Any) -> TrainSettings:
    """Of a short run in float32."""
    length = {} if {"epochs", "time_budget_s"} & changes.keys() else {"steps": 12}
    return TrainSettings(
        **(length | {"optimizer": "sgd", "lr": 0.05, "batch": 8, "amp": "none", "device": "cpu"} | changes)
    )  # type: ignore[arg-type]


def run(
    *, model: nn.Module | None = None, source: Any = None, criterion: Any = None, **more: Any
) -> tuple[nn.Module, TrainResult]:
    """Train a network; what is not settings goes to `train`."""
    others = {"run_dir", "resume", "teacher", "hooks", "progress", "should_stop", "notify", "identity", "start"}
    arguments = {k: v for k, v in more.items() if k in others}
    chosen = settings(**{k: v for k, v in more.items() if k not in others})
    student = model if model is not None else convnet()
    result = train(
        student,
        source if source is not None else ArraySource(40),
        criterion if criterion is not None else CrossEntropy(),
        chosen,
        input_names=["x"],
        output_names=["y"],
        **arguments,
    )
    return student, result


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether all weights and buffers are equal, bit for bit."""
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def main(out: str, asked: dict[str, Any]) -> None:
    """As described above. pace_s: pause before every batch. kill_at_rename: before which renaming of a file this process
    kills itself by SIGKILL, counted from 1."""
    torch.set_num_threads(1)
    source = ArraySource(asked.get("samples", 40), kind=asked.get("kind", "indexed"), known=asked.get("known", True))
    source.before_batch = lambda epoch, number: time.sleep(asked.get("pace_s", 0.0))
    renamed, replace = itertools.count(1), os.replace

    def rename(old: Any, new: Any) -> None:
        if next(renamed) == asked.get("kill_at_rename"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)

    os.replace = rename
    model = convnet(norm=asked.get("norm", True), dropout=asked.get("dropout", 0.0))
    criterion = Stateless() if asked.get("stateless") else CrossEntropy()
    run_dir = Path(asked["run_dir"]) if "run_dir" in asked else None
    run(
        model=model,
        source=source,
        criterion=criterion,
        run_dir=run_dir,
        resume=asked.get("resume", False),
        **asked["settings"],
    )
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(model.state_dict(), out)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
