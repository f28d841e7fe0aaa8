"""Which losses send a run back."""

from __future__ import annotations

import math

import pytest

from onnxprune.train.guard import Guard


def first_reason(losses: list[float], **how: object) -> tuple[int, str] | None:
    guard = Guard(**({"factor": 10.0, "patience": 20} | how))  # type: ignore[arg-type]
    for number, loss in enumerate(losses):
        reason = guard.feed(loss)
        if reason is not None:
            return number, reason
    return None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_noticed_at_once(bad: float) -> None:
    found = first_reason([1.0, 0.9, bad])
    assert found is not None and found[0] == 2


def test_fp16_may_skip_some() -> None:
    assert first_reason([1.0, math.inf, math.inf, 1.0, math.inf, math.inf], tolerated=2) is None
    found = first_reason([1.0, math.inf, math.inf, math.inf], tolerated=2)
    assert found is not None and found[0] == 3


def test_a_rise_for_long_is_divergence_and_a_spike_is_not() -> None:
    assert first_reason([0.5] * 50 + [40.0] + [0.5] * 100) is None
    found = first_reason([0.5] * 50 + [40.0] * 100)
    assert found is not None and "0.5" in found[1]
    assert 50 + 19 <= found[0] <= 50 + 25


def test_a_network_that_began_as_a_copy_of_its_teacher_may_lose_that() -> None:
    assert first_reason([0.0] * 20 + [0.09] * 500) is None


def test_divergence_may_be_switched_off() -> None:
    assert first_reason([0.1] * 50 + [1e6] * 500, factor=None) is None


def test_a_guard_goes_on_where_its_state_was_taken() -> None:
    losses = [0.5] * 50 + [40.0] * 10
    one = Guard(factor=10.0, patience=20)
    for loss in losses:
        one.feed(loss)
    other = Guard(factor=10.0, patience=20)
    other.load_state_dict(one.state_dict())
    rest = [one.feed(40.0) for _ in range(30)]
    assert [other.feed(40.0) for _ in range(30)] == rest
    assert any(rest)
