"""CRIC: what seems redundant is tried, put back, and judged anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onnxprune.errors import UsageError
from onnxprune.train.hesso import HESSO
from tests.train.test_dhspg import _copied, parameters, take
from tests.train.unit_problems import gradients, overlapping, part

START, TRIAL, STOP = 4, 10, 60


class Deceptive:
    """Four units of one number. The first is at the bottom of a bowl: its gradient is 0, and without it the loss is
    higher by 4. The others lie on slopes."""

    def __init__(self, **how: Any) -> None:
        self.w = nn.Parameter(torch.tensor([[1.0], [1.0], [1.0], [1.0]], dtype=torch.float64))
        groups = [{"params": [self.w], "parts": [(part("a", 0, 0, 1, 2, 3),)]}]
        schedule = {"start": START, "stop": STOP, "periods": 2, "window": 2, "trial": TRIAL}
        self.optimizer = HESSO(groups, lr=1e-9, target=0.5, criterion="taylor", **(schedule | how))

    def loss(self) -> Tensor:
        slopes = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)
        return 4 * (1 - self.w[0, 0]) ** 2 + (slopes * self.w[:, 0]).sum()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def test_without_trials_the_bowl_deceives() -> None:
    problem = Deceptive()
    for _ in range(STOP + 1):
        problem.step()
    assert problem.optimizer.dead.tolist() == [True, True, False, False]


def test_trials_find_it_out() -> None:
    problem = Deceptive(trials=5)
    phases = []
    for _ in range(STOP + 1):
        problem.step()
        phases.append(problem.optimizer.phase)
    trials = problem.optimizer.trials
    assert trials is not None and trials.known is not None
    assert trials.count == 2  # {0, 1}, then {1, 2}: all that is chosen has been tried
    assert trials.tried.tolist() == [True, True, True, False]
    # 4 (1 - w)^2 falls by 8 (1 - w) on the way from 1 to 0, which was seen at w = 1, 0.9, ..., 0.1
    assert trials.known.inner[0] == pytest.approx(-8 * 0.45)
    assert trials.known.inner[1:] == pytest.approx([0.1, 0.2, 0.3])
    assert problem.optimizer.dead.tolist() == [False, True, True, False]
    assert phases.count("trial") == 2 * TRIAL and phases[-1] == "done"


def test_the_least_of_what_is_chosen_goes_first() -> None:
    problem = Deceptive(trials=5)
    while not problem.optimizer.begun:
        problem.step()
    assert problem.optimizer.redundant.tolist() == [False, True, False, False]


def test_a_trial_leaves_everything_as_it_was() -> None:
    problem, made = overlapping(momentum=0.9, weight_decay=0.02), optimizer(trial=5)
    rows = gradients(problem, START + 5)
    for row in rows[:START]:
        take(made, problem, row)
    before = [p.detach().clone() for p in parameters(made)]
    momenta = _copied(made.state_dict()["state"])
    for row in rows[START:]:
        take(made, problem, row)
        assert made.phase == "trial"
    assert not all(torch.equal(p, b) for p, b in zip(parameters(made), before, strict=True))
    made.advance()
    assert all(torch.equal(p, b) for p, b in zip(parameters(made), before, strict=True))
    for k, state in made.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momenta[k]["momentum_buffer"])


def optimizer(**changes: Any) -> HESSO:
    problem = overlapping(momentum=0.9, weight_decay=0.02)
    how = {"start": START, "stop": STOP, "periods": 3, "window": 2, "trials": 3, "trial": 5, "target": 0.5}
    return HESSO(problem.param_groups(torch.float32), **(how | changes))


@pytest.mark.parametrize("at", [START + 2, START + 5, START + 8, START + 13, STOP - 10])
def test_a_resumed_run_is_the_same_bit_for_bit(at: int) -> None:
    problem = overlapping(momentum=0.9, weight_decay=0.02)
    rows = gradients(problem, STOP + 3)
    whole, first = optimizer(), optimizer()
    for row in rows:
        take(whole, problem, row)
    for row in rows[:at]:
        take(first, problem, row)
    saved = _copied(first.state_dict())
    second = optimizer()
    with torch.no_grad():
        for p, q in zip(parameters(second), parameters(first), strict=True):
            p.copy_(q)
    second.load_state_dict(saved)
    for row in rows[at:]:
        take(second, problem, row)
    assert all(torch.equal(p, q) for p, q in zip(parameters(second), parameters(whole), strict=True))
    assert torch.equal(second.dead, whole.dead) and int(whole.dead.sum()) == round(0.5 * whole.table.units)
    assert whole.trials is not None and whole.trials.count > 1


def test_a_run_that_ends_within_a_trial_still_meets_its_target() -> None:
    problem, made = overlapping(momentum=0.9), optimizer()
    for row in gradients(problem, START + 3):
        take(made, problem, row)
    assert made.phase == "trial"
    made.finish()
    assert int(made.dead.sum()) == round(0.5 * made.table.units)
    assert torch.equal(made.table.square(made.table.x.banks) == 0, made.dead)


def test_trials_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="don't end before stop"):
        optimizer(trials=20)
