"""IMP: rounds of removing and retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnxprune import UsageError
from onnxprune.train.imp import IMP, IMPOptions
from tests.train.method_runs import macs_left, trained
from tests.train.runs import same


def rates(**settings: Any) -> list[float]:
    return trained(IMP, look=lambda step: step.optimizer.param_groups[0]["lr"], lr=0.04, **settings)[2]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_falls_to_nothing_in_every_round_whatever_the_schedule(schedule: str) -> None:
    """Three rounds, the last of which has its retraining after this phase."""
    wanted = [0.04 * (1 - ((k + 0.5) / 20) % 1) for k in range(40)]
    np.testing.assert_allclose(rates(schedule=schedule, warmup=0.1), wanted, rtol=1e-6)


def test_units_go_round_by_round_and_stay_away() -> None:
    counts: list[int] = []
    dead: list[torch.Tensor] = []

    class Spying(IMP):
        def after_step(self, step: Any) -> None:
            super().after_step(step)
            zero = self.table.square(self.table.x.banks) == 0
            assert torch.equal(zero, self.dead)
            counts.append(int(zero.sum()))
            dead.append(zero)

    _, hooks, _ = trained(Spying)
    assert counts[:20] == [counts[0]] * 20 and counts[20:] == [counts[20]] * 20
    assert 0 < counts[0] < counts[20] < int(hooks.dead.sum())
    assert bool((dead[20] | ~dead[0]).all()) and bool((hooks.dead | ~dead[20]).all())
    assert 0.495 <= macs_left(hooks) <= 0.53


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_redundant_units_are_zero_at_the_end(optimizer: str, rounds: int) -> None:
    _, hooks, _ = trained(IMP, IMPOptions(rounds=rounds), optimizer=optimizer, ema=0.9)
    assert torch.equal(hooks.table.square(hooks.table.x.banks) == 0, hooks.dead)
    assert hooks.removals == rounds - 1 and 0.475 <= macs_left(hooks) <= 0.525


@pytest.mark.parametrize("at", [5, 20, 33])
def test_a_run_that_was_broken_off_ends_with_the_same_weights(tmp_path: Path, at: int) -> None:
    how: dict[str, Any] = {"ema": 0.9, "checkpoint_every_steps": 4}
    whole, one, _ = trained(IMP, **how)
    with pytest.raises(ZeroDivisionError):
        trained(IMP, run_dir=tmp_path, fail_at=at, **how)
    rest, other, _ = trained(IMP, run_dir=tmp_path, resume=True, **how)
    assert same(whole, rest) and all(np.array_equal(one.removed[f], other.removed[f]) for f in one.removed)


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        IMPOptions(rounds=0)
