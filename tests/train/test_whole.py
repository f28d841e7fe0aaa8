"""The loop with the package's own data and losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from onnxprune.data import Port, Signature, open_data
from onnxprune.errors import DataError
from onnxprune.model.outputs import OutputKind
from onnxprune.train.hooks import Hooks, Step
from onnxprune.train.loop import train
from onnxprune.train.loss import criterion
from onnxprune.train.run import TrainResult
from tests.train.runs import convnet, same, settings

RNG = np.random.default_rng(4)
X = RNG.standard_normal((43, 3, 8, 8)).astype(np.float32)
LABELS = RNG.integers(0, 5, 43)


def signature(batch: int | None = None) -> Signature:
    return Signature(
        (Port("x", np.dtype(np.float32), (batch, 3, 8, 8)),), (Port("y", np.dtype(np.float32), (batch, 5)),)
    )


class Reader:
    """As onnxruntime's CalibrationDataReader: one pass, and no way back."""

    def __init__(self) -> None:
        self.rows = iter(range(0, 40, 4))

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self.rows, None)
        return None if row is None else {"x": X[row : row + 4], "label": LABELS[row : row + 4]}


def augmented() -> Iterator[tuple[np.ndarray, int]]:
    """Single samples, moved about by the global generators."""
    for i in np.random.permutation(len(X)):
        yield X[i] + np.float32(torch.rand(()).item()), int(LABELS[i])


SPECS: dict[str, Any] = {
    "arrays": lambda: {"x": X, "label": LABELS},
    "reader": Reader,
    "augmented": lambda: augmented,
    "small stream": lambda: lambda: iter([(X[:3], LABELS[:3]), (X[3:5], LABELS[3:5])]),
}


class Break(Hooks):
    def __init__(self, at: int | None) -> None:
        self.at = at

    def after_backward(self, step: Step) -> None:
        if step.index == self.at:
            raise ZeroDivisionError


def once(
    spec: str, folder: Path, *, at: int | None = None, resume: bool = False, loss: str = "ce", batch: int | None = None
) -> tuple[nn.Module, TrainResult]:
    source = open_data(SPECS[spec](), signature(batch), cache=folder)
    student, teacher = convnet(dropout=0.2, norm=batch is None), convnet(norm=batch is None)
    kinds = (OutputKind("y", "logits", (1,)),)
    result = train(
        student,
        source,
        criterion(loss, outputs=kinds, targets=source.targets if loss == "ce" else None),
        settings(steps=17, checkpoint_every_steps=3, ema=0.9, optimizer="adamw", lr=0.002),
        input_names=["x"],
        output_names=["y"],
        teacher=teacher,
        run_dir=folder / "run" if at is not None or resume else None,
        resume=resume,
        hooks=Break(at),
    )
    return student, result


@pytest.mark.parametrize("loss", ["ce", "auto"])
@pytest.mark.parametrize("spec", list(SPECS))
def test_broken_off_and_continued(tmp_path: Path, spec: str, loss: str) -> None:
    whole, result = once(spec, tmp_path, loss=loss)
    for at in (4, 11):
        folder = tmp_path / str(at)
        folder.mkdir()
        with pytest.raises(ZeroDivisionError):
            once(spec, folder, at=at, loss=loss)
        rest, other = once(spec, folder, resume=True, loss=loss)
        assert other.resumed_from == at - at % 3
        assert same(whole, rest) and other.last_loss == result.last_loss


def test_a_model_of_fixed_batch_takes_its_batch_in_pieces(tmp_path: Path) -> None:
    """43 samples one at a time, 8 of them a step: 5 steps are an epoch."""
    _, result = once("arrays", tmp_path, batch=1)
    assert result.steps == 17 and result.epochs == 3


def test_distillation_recovers_its_teacher(tmp_path: Path) -> None:
    source = open_data({"x": X}, signature())
    student, teacher = convnet(), convnet().eval()
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(0.7)
    loss = criterion("auto", outputs=(OutputKind("y", "logits", (1,)),))
    result = train(
        student, source, loss, settings(steps=150, optimizer="adamw", lr=0.01), input_names=["x"], output_names=["y"], teacher=teacher
    )  # fmt: skip
    assert result.last_loss < 0.1 * result.first_loss
    assert set(loss.state_dict()) == {"y"}, "calibrated before the first step"


def test_nan_and_what_is_raised_in_a_users_code_are_told(tmp_path: Path) -> None:
    poisoned = X.copy()
    poisoned[30, 0, 0, 0] = np.nan

    def raising() -> Iterator[np.ndarray]:
        yield from X[:20]
        raise RuntimeError("no more")

    for spec, words in (({"x": poisoned, "label": LABELS}, "(?i)nan"), (raising, "no more")):
        with pytest.raises(DataError, match=words):
            train(
                convnet(),
                open_data(spec, signature()),
                criterion("auto", outputs=(OutputKind("y", "logits", (1,)),)),
                settings(),
                input_names=["x"],
                output_names=["y"],
                teacher=convnet(),
            )
