"""ISS-P: the weakest units shrink, and may come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnxprune import UsageError
from onnxprune.train.issp import ISSP, ISSPOptions
from tests.train.method_runs import macs_left, trained
from tests.train.runs import same


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_redundant_units_are_zero_at_the_end(optimizer: str) -> None:
    _, hooks, _ = trained(ISSP, optimizer=optimizer, ema=0.9)
    assert torch.equal(hooks.table.square(hooks.table.x.banks) == 0, hooks.dead)
    assert 0.495 <= macs_left(hooks) <= 0.53


def test_more_and_more_units_are_chosen() -> None:
    left: list[float] = []

    class Spying(ISSP):
        def after_step(self, step: Any) -> None:
            super().after_step(step)
            left.append(macs_left(self))

    trained(Spying, ISSPOptions(until=0.5, selections=20), lr=1e-5, on="plain")
    np.testing.assert_allclose(left, [1 - 0.5 * min((k // 2 + 1) / 10, 1) for k in range(40)], atol=0.05)


def test_a_unit_that_grows_is_let_off() -> None:
    class Helped(ISSP):
        def after_step(self, step: Any) -> None:
            super().after_step(step)
            if step.index == 10:
                self.helped = int(self.redundant.nonzero()[0])
                factor = torch.ones_like(self.redundant, dtype=torch.float32)
                factor[self.helped] = 1e3
                self.table.scale_(factor)

    _, hooks, _ = trained(Helped, lr=1e-5)
    assert not bool(hooks.dead[hooks.helped]) and int(hooks.dead.sum()) > 0


def test_what_is_chosen_all_the_time_shrinks_by_the_budget() -> None:
    class Spying(ISSP):
        def on_step_begin(self, step: Any) -> None:
            super().on_step_begin(step)
            if step.index == 0:
                self.always, self.begun = self.redundant.clone(), self.table.square(self.table.x.banks).sqrt()
            self.always &= self.redundant

        def after_step(self, step: Any) -> None:
            super().after_step(step)
            if step.index == 39:
                self.left = (self.table.square(self.table.x.banks).sqrt() / self.begun)[self.always]

    _, hooks, _ = trained(Spying, ISSPOptions(efolds=3), lr=1e-9, weight_decay=0.0, on="plain")
    assert len(hooks.left)
    wanted = torch.full_like(hooks.left, float(np.exp(-3 * 39.5 / 40)))
    torch.testing.assert_close(hooks.left, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("at", [5, 20, 33])
def test_a_run_that_was_broken_off_ends_with_the_same_weights(tmp_path: Path, at: int) -> None:
    how: dict[str, Any] = {"ema": 0.9, "checkpoint_every_steps": 4}
    whole, one, _ = trained(ISSP, **how)
    with pytest.raises(ZeroDivisionError):
        trained(ISSP, run_dir=tmp_path, fail_at=at, **how)
    rest, other, _ = trained(ISSP, run_dir=tmp_path, resume=True, **how)
    assert same(whole, rest) and all(np.array_equal(one.removed[f], other.removed[f]) for f in one.removed)


@pytest.mark.parametrize("options", [{"efolds": 0.0}, {"until": 0.0}, {"selections": 0}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ISSPOptions(**options)
