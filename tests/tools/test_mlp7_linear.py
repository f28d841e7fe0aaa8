"""The experiment on MLP-7-Linear in small: its parts fit together, and it tells a faithful TPP from another."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlp7_linear import ARMS, Digits, Trial, budgeted, make_orthogonal, network, signs

from onnxprune.train.jacobian import mean_jsv


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images and labels as MNIST has them: 300 and 100 of each."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 300), ("t10k", 100)):
        for what, header, shape in (("images-idx3", 16, (count, 28, 28)), ("labels-idx1", 8, (count,))):
            values = rng.integers(0, 10 if len(shape) == 1 else 256, shape).astype(np.uint8)
            with gzip.open(tmp_path / f"mnist-{part}-{what}-ubyte.gz", "wb") as file:
                file.write(bytes(header) + values.tobytes())
    return tmp_path


def test_an_epoch_has_every_image_once(data: Path) -> None:
    digits = Digits.read(data, "train")
    assert digits.images.shape == (300, 1024)
    batches = list(digits.batches(4, seed=0))
    assert [len(y) for _, y in batches] == [100] * 4
    seen = torch.cat([x for x, _ in batches[:3]])
    assert torch.equal(seen.sum(1).sort().values, digits.images.sum(1).sort().values)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_removes_four_fifths_of_the_hidden_units(data: Path, name: str) -> None:
    trial = Trial(Digits.read(data, "train"), Digits.read(data, "t10k"), 0, epochs=1, base_epochs=1, steps=3)
    base = trial.base(data)
    row = trial.arm(name)
    assert 0 <= row["accuracy"] <= 100 and 0 <= row["tuned_0.001"] <= 100 and 0 <= row["tuned_0.01"] <= 100
    assert row["jsv"] == pytest.approx(1.0) if name == "OrthP" else row["jsv"] < base["jsv"]


def test_orthogonal_weights_have_singular_values_of_one() -> None:
    module = network(0)
    make_orthogonal(module)
    assert mean_jsv(module, torch.randn(2, 1024)) == pytest.approx(1.0, abs=1e-5)


def test_the_budget_is_spent_to_the_end() -> None:
    assert sum(budgeted(k, 500) for k in range(500)) * 1e-3 / (1 - 0.9) == pytest.approx(20.0)


def rows(**changes: Any) -> list[dict[str, Any]]:
    found = [
        {"arm": "base", "accuracy": 92.5, "jsv": 2.0},
        {"arm": "L1", "accuracy": 10.0, "jsv": 0.002, "tuned_0.001": 86.0},
        {"arm": "TPP-auto", "accuracy": 91.0, "jsv": 1.5, "tuned_0.001": 91.5} | changes,
    ]
    return found


@pytest.mark.parametrize("changes", [{"accuracy": 89.9}, {"jsv": 1.3}, {"tuned_0.001": 88.9}])
def test_a_sign_that_is_missing_is_noticed(changes: dict[str, float]) -> None:
    assert all(word == "met" for _, word in signs(rows()))
    assert [word for _, word in signs(rows(**changes))].count("MISSED") == 1
