"""What the tools about methods share: a network trained, one compressed, and rows that outlive an interruption."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import onnxprune
from onnxprune import TrainSettings
from onnxprune.train.loop import train

__all__ = ["LOSSES", "Arm", "Rows", "compressed", "trained"]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": F.cross_entropy, "l1": F.l1_loss}
"""By the names that `--loss` has, for networks of one output."""

Row = dict[str, Any]


def trained(
    module: nn.Module, source: Any, loss: str, settings: TrainSettings, *, run_dir: Path | None = None
) -> tuple[nn.Module, float]:
    """The module trained on a source of one input and one target, and the seconds it took.

    run_dir: for checkpoints; what stands there is gone on with, and removed at the end.
    """
    criterion = LOSSES[loss]

    def of_batch(outputs: Mapping[str, Tensor], *, teacher: object, targets: Mapping[str, Tensor]) -> Tensor:
        return criterion(outputs["output"].float(), next(iter(targets.values())))

    inputs = tuple(source.inputs)
    result = train(
        module,
        source,
        of_batch,
        settings,
        input_names=inputs,
        output_names=("output",),
        run_dir=run_dir,
        resume=run_dir is not None,
    )
    _forget(run_dir)
    return module.eval(), result.seconds


def _forget(run_dir: Path | None) -> None:
    if run_dir is not None:
        shutil.rmtree(run_dir, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make a network smaller. options: what `compress` takes beside the data and the settings."""

    method: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    method_options: Mapping[str, Any] = field(default_factory=dict)


def compressed(
    arm: Arm,
    original: Path,
    written: Path,
    source: Any,
    loss: str,
    settings: TrainSettings,
    *,
    seed: int = 0,
    run_dir: Path | None = None,
) -> Row:
    """Compress a model and tell what is left of it: shares of MACs and parameters, seconds, steps.

    source: what is trained on. run_dir: for checkpoints; what stands there is gone on with, and removed at the end. The
    metric is the caller's to take, of the written file.
    """
    start = time.perf_counter()
    result = onnxprune.compress(
        original,
        written,
        target=arm.target,
        method=arm.method,
        method_options=dict(arm.method_options),
        data=source,
        train=settings,
        repair="none",  # the papers train what is left as it is
        recipe=onnxprune.Recipe(loss=loss),
        seed=seed,
        force=True,
        run_dir=run_dir,
        resume=run_dir is not None,
        **arm.options,
    )
    _forget(run_dir)
    assert result.after is not None and result.training is not None
    return {
        "macs": result.after.macs / result.before.macs,
        "params": result.after.params / result.before.params,
        "steps": result.training.steps,
        "epochs": result.training.epochs,
        "seconds": time.perf_counter() - start,
        "warnings": result.warnings,
    }


class Rows:
    """Results in a file of JSON lines: each under a key of plain values, and computed once.

    What is interrupted or fails is computed again the next time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[Row]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line]

    def get(self, key: Row) -> Row | None:
        """The newest row of this key that holds no failure."""
        found = [r for r in self.all() if r["key"] == _plain(key) and "failure" not in r]
        return found[-1] if found else None

    def once(self, key: Row, work: Callable[[], Row]) -> Row:
        """The row of this key; `work` is done where there is none, and its failure is a row, too."""
        row = self.get(key)
        if row is not None:
            return row
        try:
            row = {"key": key, **work()}
        except onnxprune.OnnxPruneError as error:
            row = {"key": key, "failure": f"{type(error).__name__}: {error}"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def _plain(key: Row) -> Any:
    return json.loads(json.dumps(key))
