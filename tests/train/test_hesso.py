"""HESSO: as the paper has it, unit by unit; what it leaves at zero; resuming."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onnxprune.errors import UsageError
from onnxprune.train.hesso import HESSO
from tests.train.test_dhspg import BASES, _copied, largest_difference, parameters, take
from tests.train.unit_problems import disjoint, gradients, overlapping
from tests.train.unit_reference import Problem, ReferenceHESSO

START, STEPS, PERIODS, WINDOW = 5, 9, 3, 4
STOP = START + STEPS * PERIODS


def optimizer(problem: Problem, variant: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> HESSO:
    schedule = {"start": START, "stop": STOP, "periods": PERIODS, "window": WINDOW}
    how: dict[str, Any] = {"variant": variant, "target": 0.6, **schedule} | changes
    return HESSO(problem.param_groups(dtype), **how)


@pytest.mark.parametrize("missing", [False, True], ids=["all gradients", "some missing"])
@pytest.mark.parametrize("make", [disjoint, overlapping])
@pytest.mark.parametrize("base", BASES)
def test_it_is_the_paper_unit_by_unit(base: str, make: Any, missing: bool) -> None:
    variant, options = BASES[base]
    problem = make(**options)
    made = optimizer(problem, variant)
    reference = ReferenceHESSO(problem, variant, start=START, steps=STEPS, periods=PERIODS, window=WINDOW, target=0.6)
    chosen = []
    for t, row in enumerate(gradients(problem, STOP + 5, missing=missing)):
        take(made, problem, row)
        reference.step(t, row)
        assert largest_difference(made, problem, reference.x) < 1e-12, t
        assert set(np.flatnonzero(made.redundant)) == reference.redundant
        chosen.append(int(made.redundant.sum()))
    units = made.table.units
    assert chosen[START - 1 :: STEPS][:4] == [0, *(round(0.6 * units * k / 3) for k in (1, 2, 3))]
    assert torch.equal(made.table.square(made.table.x.banks) == 0, made.redundant)


def test_a_unit_shrinks_on_a_line() -> None:
    problem = disjoint(momentum=0.0)
    made = optimizer(problem, "sgd", periods=1, window=1)
    still = [torch.zeros_like(t) for t in problem.tensors]
    first = None
    for t in range(STOP):
        take(made, problem, still)
        norms = made.table.square(made.table.x.banks).sqrt()
        first = norms if first is None else first
        left = 1 - max(0, t + 1 - START) / (STEPS * PERIODS)
        torch.testing.assert_close(norms, torch.where(made.redundant, left * first, first))


@pytest.mark.parametrize("at", [3, START, START + 5, START + STEPS + 7, STOP + 1])
def test_a_resumed_run_is_the_same_bit_for_bit(at: int) -> None:
    problem = overlapping(momentum=0.9, weight_decay=0.02)
    rows = gradients(problem, STOP + 6, missing=True)
    whole, first = (optimizer(problem, "sgd", dtype=torch.float32) for _ in range(2))
    for row in rows:
        take(whole, problem, row)
    for row in rows[:at]:
        take(first, problem, row)
    saved = _copied(first.state_dict())
    second = optimizer(problem, "sgd", dtype=torch.float32)
    with torch.no_grad():
        for p, q in zip(parameters(second), parameters(first), strict=True):
            p.copy_(q)
    second.load_state_dict(saved)
    for row in rows[at:]:
        take(second, problem, row)
    assert all(torch.equal(p, q) for p, q in zip(parameters(second), parameters(whole), strict=True))
    assert torch.equal(second.dead, whole.dead) and second.dead.any()


def test_each_period_is_told_how_far_to_go() -> None:
    problem = disjoint(momentum=0.9)
    asked: list[tuple[float, int]] = []

    def choose(scores: Any, *, share: float = 1.0, removed: Any = None) -> Any:
        asked.append((share, sum(int(r.sum()) for r in removed.values())))
        return {f: r | (np.arange(len(r)) == len(asked) - 1) for f, r in removed.items()}

    made = optimizer(problem, "sgd", target=choose)
    for row in gradients(problem, STOP):
        take(made, problem, row)
    assert [share for share, _ in asked] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [gone for _, gone in asked] == [0, 2, 4]


def test_a_schedule_that_is_told_ends_at_zero_whatever_its_strides() -> None:
    """In shares of a run that goes unevenly, as with a time budget; periods may be shorter than a step."""
    problem = overlapping(momentum=0.9)
    made = optimizer(problem, "sgd", start=0.2, stop=0.8, periods=7, window=0.05)
    rows = gradients(problem, 24)
    for row, time in zip(rows, np.sort(np.random.default_rng(0).uniform(0, 1, 24)), strict=True):
        made.tell(float(time))
        take(made, problem, row)
    made.finish()
    assert int(made.dead.sum()) == round(0.6 * made.table.units)
    assert torch.equal(made.table.square(made.table.x.banks) == 0, made.dead)


def test_a_run_that_ends_early_still_meets_its_target() -> None:
    problem = disjoint(momentum=0.9)
    made = optimizer(problem, "sgd")
    for row in gradients(problem, START + STEPS + 2):
        take(made, problem, row)
    made.finish()
    assert int(made.dead.sum()) == round(0.6 * made.table.units)


@pytest.mark.parametrize(("changes", "said"), [({"periods": 0}, "1 or more"), ({"stop": 2}, "not behind start")])
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        optimizer(disjoint(), "sgd", **changes)
