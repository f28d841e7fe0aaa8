"""Learning rates by hand, and how far a run has come."""

from __future__ import annotations

import math
from typing import Any

import pytest

from onnxprune.train.schedule import Horizon, rate


@pytest.mark.parametrize(
    ("share", "schedule", "expected"),
    [
        (0.0, "cosine", 0.0),
        (0.05, "cosine", 0.5),
        (0.1, "cosine", 1.0),
        (0.325, "cosine", 0.5 * (1 + math.sqrt(0.5))),
        (0.55, "cosine", 0.5),
        (1.0, "cosine", 0.0),
        (0.05, "linear", 0.5),
        (0.55, "linear", 0.5),
        (0.775, "linear", 0.25),
        (1.5, "linear", 0.0),
        (0.05, "constant", 0.5),
        (0.99, "constant", 1.0),
    ],
)
def test_the_rate_rises_and_falls(share: float, schedule: str, expected: float) -> None:
    assert rate(share, warmup=0.1, schedule=schedule) == pytest.approx(expected, abs=1e-12)


def test_the_rate_falls_in_steps() -> None:
    milestones = (0.25, 0.5)
    found = [rate(x, warmup=0.1, schedule="steps", milestones=milestones) for x in (0.05, 0.1, 0.24, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.01, 0.01])


def test_without_warm_up_the_rate_begins_at_its_height() -> None:
    assert rate(0.0, warmup=0.0, schedule="cosine") == 1.0


def test_no_step_of_a_run_has_rate_zero() -> None:
    horizon = Horizon(steps=4)
    shares = [horizon.share(step=i, epoch=0, index=i, seconds=0.0) for i in range(4)]
    assert shares == [0.125, 0.375, 0.625, 0.875]


def test_epochs_count_by_their_steps_and_at_their_middle_while_those_are_unknown() -> None:
    assert Horizon(epochs=4, steps_per_epoch=5).share(step=7, epoch=1, index=2, seconds=0.0) == 1.5 / 4
    assert Horizon(epochs=4).share(step=3, epoch=0, index=3, seconds=0.0) == 0.5 / 4
    assert Horizon(epochs=4, steps_per_epoch=5).total == 20


@pytest.mark.parametrize(
    ("horizon", "ends"),
    [
        (Horizon(steps=10, span=(0.0, 0.6)), {"step": 6, "epoch": 0, "index": 6, "seconds": 1.0}),
        (Horizon(epochs=4, steps_per_epoch=5, span=(0.0, 0.6)), {"step": 12, "epoch": 2, "index": 2, "seconds": 1.0}),
        (Horizon(epochs=2, span=(0.0, 0.6)), {"step": 7, "epoch": 2, "index": 0, "seconds": 1.0}),
        (Horizon(seconds=10.0, span=(0.0, 0.6)), {"step": 1, "epoch": 0, "index": 1, "seconds": 6.0}),
    ],
)
def test_a_run_ends_where_its_part_of_the_training_does(horizon: Horizon, ends: dict[str, Any]) -> None:
    """Shares and rates are of the whole training."""
    assert horizon.over(**ends)
    before = {"step": ends["step"] - 1, "index": ends["index"] - 1, "seconds": ends["seconds"] - 0.1}
    before["epoch"] = ends["epoch"] if ends["index"] else ends["epoch"] - 1
    assert not horizon.over(**before)
    assert horizon.within(0.3) == pytest.approx(0.5) and horizon.within(0.6) == horizon.within(0.9) == 1.0


def test_a_time_budget_goes_by_the_clock() -> None:
    horizon = Horizon(seconds=60.0)
    assert horizon.share(step=1000, epoch=9, index=0, seconds=15.0) == 0.25
    assert not horizon.over(step=1000, epoch=9, seconds=59.9)
    assert horizon.over(step=0, epoch=0, seconds=60.0)
