"""DHSPG and HESSO as methods of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnxprune.errors import UsageError
from onnxprune.train.dhspg import DHSPGOptions, DHSPGTraining
from onnxprune.train.hesso import HESSOOptions, HESSOTraining
from onnxprune.train.unit_training import STORED, UnitTraining
from tests.train.method_runs import macs_left, trained
from tests.train.runs import same

METHODS: dict[type[UnitTraining], Any] = {DHSPGTraining: DHSPGOptions, HESSOTraining: HESSOOptions}


def zero_units(hooks: UnitTraining) -> torch.Tensor:
    return hooks.table.square(hooks.table.x.banks) == 0


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw", "lr": 0.002}, {"ema": 0.9}, {"channels_last": True}])
@pytest.mark.parametrize("kind", METHODS)
def test_what_is_redundant_is_zero_and_meets_the_target(kind: type[UnitTraining], settings: dict[str, Any]) -> None:
    _, hooks, _ = trained(kind, **settings)
    assert macs_left(hooks) == pytest.approx(0.5, abs=0.05)
    hooks.table.rebind()
    assert torch.equal(zero_units(hooks), hooks.dead) and torch.equal(hooks.dead, hooks.redundant)
    assert {f: int(r.sum()) for f, r in hooks.removed.items()} == {
        f: int(z.sum()) for f, z in hooks.table.by_family(zero_units(hooks)).items()
    }
    keep = hooks.selection.choice.plan.keep
    for family, gone in hooks.removed.items():
        assert np.flatnonzero(~gone).tolist() == (keep[family].tolist() if family in keep else [*range(len(gone))])


@pytest.mark.parametrize("kind", METHODS)
def test_the_schedule_is_a_share_of_the_run(kind: type[UnitTraining]) -> None:
    """40 steps, counted at their middles: from 0.5 to 0.75."""
    options = METHODS[kind](start=0.5, stop=0.75, window=0.1)
    _, _, seen = trained(
        kind,
        options,
        look=lambda step: (
            step.optimizer.phase,
            bool(step.optimizer.dead.all() or step.optimizer.dead.equal(step.optimizer.redundant)),
        ),
    )
    phases = [phase for phase, _ in seen]
    assert phases[:20] == ["warm-up"] * 20 and phases[30:] == ["done"] * 10
    assert set(phases[20:30]) == {"projecting"} or set(phases[20:30]) == {"shrinking"}
    assert all(over for _, over in seen[30:])


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("length", [{"steps": 1}, {"steps": 3}, {"time_budget_s": 0.2, "steps": None}])
def test_a_run_of_any_length_meets_its_target(kind: type[UnitTraining], length: dict[str, Any]) -> None:
    _, hooks, _ = trained(kind, **length)
    assert macs_left(hooks) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(zero_units(hooks), hooks.dead) and hooks.dead.any()


@pytest.mark.parametrize("fail_at", [5, 18, 38])
@pytest.mark.parametrize("kind", METHODS)
def test_a_run_that_broke_off_goes_on_as_if_it_had_not(kind: type[UnitTraining], fail_at: int, tmp_path: Path) -> None:
    how: dict[str, Any] = {"checkpoint_every_steps": 4, "checkpoint_every_s": None}
    whole, hooks, _ = trained(kind, **how)
    with pytest.raises(ZeroDivisionError):
        trained(kind, fail_at=fail_at, run_dir=tmp_path / "run", **how)
    rest, resumed, seen = trained(kind, run_dir=tmp_path / "run", resume=True, **how)
    assert len(seen) < 40 and same(whole, rest)
    assert {f: r.tolist() for f, r in hooks.removed.items()} == {f: r.tolist() for f, r in resumed.removed.items()}


@pytest.mark.parametrize("saliency", STORED)
def test_criteria_of_one_shot_selection_choose_by_the_weights_of_the_moment(saliency: str) -> None:
    options = DHSPGOptions(start=0.5, stop=0.9, saliency=saliency)
    _, hooks, _ = trained(DHSPGTraining, options)
    assert macs_left(hooks) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(zero_units(hooks), hooks.dead)


def test_trials_correct_the_choice_in_a_run() -> None:
    options = HESSOOptions(start=0.2, stop=0.9, saliency="mixture", trials=3, trial=0.1)
    _, hooks, seen = trained(HESSOTraining, options, look=lambda step: step.optimizer.phase)
    assert 4 <= seen.count("trial") <= 12 and seen[-1] == "done"
    assert torch.equal(zero_units(hooks), hooks.dead) and hooks.dead.any()


def test_what_dhspg_decides_by_is_seen() -> None:
    found: list[Any] = []
    how = DHSPGOptions(start=0.2, stop=0.9, taper=0.1, lmbda=50.0)
    _, hooks, _ = trained(DHSPGTraining, how)
    for state in hooks.families():
        assert set(state.angles) == {"cosine", "lambda", "projected"}
        assert -1 <= state.angles["cosine"] <= 1 and state.units - state.left == state.redundant
        found.append(state.angles["projected"] > 0)
    assert any(found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (lambda: DHSPGOptions(start=0.5, stop=0.4), "no part of a run"),
        (lambda: DHSPGOptions(window=2), "window must be within"),
        (lambda: DHSPGOptions(saliency="luck"), "none of mixture"),
        (lambda: DHSPGOptions(taper=0), "taper must be above 0"),
        (lambda: DHSPGOptions(epsilon=1), "epsilon must be at least 0"),
        (lambda: DHSPGOptions(lmbda=-1), "lmbda must be above 0"),
        (lambda: HESSOOptions(periods=0), "periods must be 1"),
        (lambda: HESSOOptions(trials=10, trial=0.1), "don't fit"),
        (lambda: HESSOOptions(trials=1, saliency="l2"), "weights alone"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        options()
