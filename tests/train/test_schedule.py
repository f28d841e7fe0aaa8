"""Learning rates by hand, and how far a run has come."""

from __future__ import annotations

import math

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


def test_a_time_budget_goes_by_the_clock() -> None:
    horizon = Horizon(seconds=60.0)
    assert horizon.share(step=1000, epoch=9, index=0, seconds=15.0) == 0.25
    assert not horizon.over(step=1000, epoch=9, seconds=59.9)
    assert horizon.over(step=0, epoch=0, seconds=60.0)
