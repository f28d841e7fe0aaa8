"""What two processes do in training: run by torchrun, every scenario writes what each process saw to a folder.

torchrun --nproc-per-node 2 -m tests.train.team FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onnxprune.train.dhspg import DHSPGTraining
from onnxprune.train.hesso import HESSOTraining
from onnxprune.train.hooks import Hooks, Step
from onnxprune.train.sparsify import Sparsifier
from tests.train.method_runs import trained
from tests.train.runs import ArraySource, Stateless, convnet, run

RANK = int(os.environ["RANK"])


class Part(nn.Module):
    """A network with a layer that nothing uses, and one that only batches that begin with a positive number use."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet(norm=False)
        self.unused = nn.Linear(4, 4)
        self.sometimes = nn.Linear(5, 5)
        with torch.no_grad():
            self.sometimes.weight.copy_(0.1 * torch.eye(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return self.sometimes(y) + y if x[0, 0, 0, 0] > 0 else y


def compare(**how: Any) -> dict[str, Any]:
    student, result = run(criterion=Stateless(), **how)
    return {"weights": student.state_dict(), "losses": (result.first_loss, result.last_loss)}


def signalled(folder: Path) -> dict[str, Any]:
    class Kill(Hooks):
        def on_step_begin(self, step: Step) -> None:
            if step.index == 5 and RANK == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    how: dict[str, Any] = {
        "ema": 0.9,
        "criterion": Stateless(),
        "model": convnet(dropout=0.3),
        "source": ArraySource(40, kind="drawing"),
    }
    try:
        run(run_dir=folder / "signalled", hooks=Kill(), **how)
        return {"raised": None}
    except KeyboardInterrupt as stop:
        raised = str(stop)
    how["model"] = convnet(dropout=0.3)
    rest, result = run(run_dir=folder / "signalled", resume=True, **how)
    how["model"] = convnet(dropout=0.3)
    whole, _ = run(**how)
    return {"raised": raised, "from": result.resumed_from, "rest": rest.state_dict(), "whole": whole.state_dict()}


def failing_data() -> dict[str, Any]:
    source = ArraySource(40)

    def fail(epoch: int, number: int) -> None:
        if number == 3 and RANK == 1:
            raise OSError("gone")

    source.before_batch = fail
    try:
        run(source=source)
        return {"raised": None}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}


def nan_in_one() -> dict[str, Any]:
    class Burst(Hooks):
        times = 1

        def after_backward(self, step: Step) -> None:
            if step.index == 7 and self.times:
                self.times = 0
                for p in step.optimizer.param_groups[0]["params"]:
                    p.grad.fill_(torch.nan)

    student, result = run(hooks=Burst(), checkpoint_every_steps=5, notify=lambda _: None)
    return {"backoffs": result.backoffs, "steps": result.steps, "weights": student.state_dict()}


def nan_data() -> dict[str, Any]:
    class Poisoned(ArraySource):
        def batches(self, *args: Any, **more: Any) -> Any:
            for number, batch in enumerate(super().batches(*args, **more)):
                if number == 2 and RANK == 1:
                    batch.inputs["x"][1] = float("nan")
                yield batch

    try:
        run(source=Poisoned(40))
        return {"raised": None}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}


def budget() -> dict[str, Any]:
    student, result = run(time_budget_s=0.3)
    return {"steps": result.steps, "weights": student.state_dict()}


def refused(folder: Path) -> dict[str, Any]:
    run(run_dir=folder / "refused", steps=2)
    try:
        run(run_dir=folder / "refused", steps=2)
        return {"raised": None}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}


def few() -> dict[str, Any]:
    """An epoch of 11 samples in batches of 5: the last one is left out, and so is nothing of 3 in a batch of 5."""
    _, dropped = run(source=ArraySource(11, known=False), epochs=2, batch=5, accumulate=2)
    _, small = run(source=ArraySource(3), epochs=2, batch=5)
    return {"dropped": dropped.steps, "small": small.steps}


def method(kind: type[Sparsifier]) -> dict[str, Any]:
    """Units that are removed, and the weights."""
    module, hooks, _ = trained(kind, on="plain", criterion=Stateless())
    return {"removed": {f: r.tolist() for f, r in hooks.removed.items()}, "weights": module.state_dict()}


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "norm": lambda _: compare(batch=9, clip=0.5),
    "parts": lambda _: compare(model=convnet(norm=False), batch=9, accumulate=2, ema=0.9),
    "adamw": lambda _: compare(model=convnet(norm=False), batch=8, optimizer="adamw", lr=0.001),
    "part": lambda _: compare(model=Part(), batch=2, weight_decay=0.1, steps=40),
    "signalled": signalled,
    "failing_data": lambda _: failing_data(),
    "nan_in_one": lambda _: nan_in_one(),
    "nan_data": lambda _: nan_data(),
    "budget": lambda _: budget(),
    "refused": refused,
    "few": lambda _: few(),
    "dhspg": lambda _: method(DHSPGTraining),
    "hesso": lambda _: method(HESSOTraining),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    found = {name: scenario(folder) for name, scenario in SCENARIOS.items()}
    torch.save(found, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
