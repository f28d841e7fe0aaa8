"""DHSPG: as the paper has it, unit by unit; what it leaves at zero; its options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onnxprune.errors import UsageError
from onnxprune.train.dhspg import DHSPG
from onnxprune.train.unit_optimizer import UnitOptimizer
from tests.train.unit_problems import disjoint, gradients, overlapping, part
from tests.train.unit_reference import Problem, ReferenceDHSPG

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"momentum": 0.9, "weight_decay": 0.02}),
    "sgd without momentum": ("sgd", {"momentum": 0.0, "weight_decay": 0.02}),
    "nesterov": ("sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    "adam": ("adam", {"lr": 0.02, "weight_decay": 0.02, "betas": (0.8, 0.95)}),
    "adamw": ("adamw", {"lr": 0.02, "weight_decay": 0.1}),
}
SCHEDULE = {"start": 6, "stop": 40, "taper": 8, "window": 4}
RULE = {"lmbda": 1.0, "amplify": 2.0, "hat": 10.0, "epsilon": 0.8}


def optimizer(problem: Problem, variant: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> DHSPG:
    named = {"amplify": "lambda_amplify", "hat": "hat_lambda_coeff"}
    rule = {named.get(name, name): value for name, value in RULE.items()}
    how: dict[str, Any] = {"variant": variant, "target": 0.5, **SCHEDULE, **rule} | changes
    return DHSPG(problem.param_groups(dtype), **how)


def parameters(made: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for g in made.param_groups for p in g["params"]]


def take(made: torch.optim.Optimizer, problem: Problem, row: list[Tensor | None]) -> None:
    """A step with these gradients, which are in the problem's order."""
    for p, k in zip(parameters(made), problem.order(), strict=True):
        g = row[k]
        p.grad = None if g is None else g.to(p)
    made.step()


def largest_difference(made: torch.optim.Optimizer, problem: Problem, expected: list[Tensor]) -> float:
    pairs = zip(parameters(made), problem.order(), strict=True)
    return max(float((p.detach().double() - expected[k]).abs().max()) for p, k in pairs)


@pytest.mark.parametrize("missing", [False, True], ids=["all gradients", "some missing"])
@pytest.mark.parametrize("make", [disjoint, overlapping])
@pytest.mark.parametrize("base", BASES)
def test_it_is_the_paper_unit_by_unit(base: str, make: Any, missing: bool) -> None:
    variant, options = BASES[base]
    problem = make(**options)
    made = optimizer(problem, variant)
    reference = ReferenceDHSPG(problem, variant, target=0.5, **SCHEDULE, **RULE)
    seen: set[str] = set()
    for t, row in enumerate(gradients(problem, 46, missing=missing)):
        take(made, problem, row)
        reference.step(t, row)
        assert largest_difference(made, problem, reference.x) < 1e-12, t
        assert set(np.flatnonzero(made.redundant)) == reference.redundant
        moving = int((made.redundant & ~made.dead).sum())
        seen.add(made.phase + (" some" if made.dead.any() and moving else ""))
    assert set(np.flatnonzero(made.dead)) == reference.redundant and made.redundant.any()
    assert {"warm-up", "projecting", "done"} <= seen
    assert "projecting some" in seen  # some units were taken by the half-space before the end


@pytest.mark.parametrize(
    ("d", "strength"),
    [
        ((1.0, 0.0), 0.1),  # descending shrinks x: lambda
        ((-0.01, 1.0), 0.1),  # 2 * l_min = 0.02 is below lambda
        ((-0.1, 1.0), 0.2),  # 2 * l_min
        ((-0.9, 2.0), 0.3),  # 2 * l_min = 1.8 is above hat * lambda
        ((-0.2, 0.1), 0.225),  # reaches l_max = 0.05 / 0.2; l_min = 0.2
        ((-0.05, 0.0), 0.05),  # l_min = l_max
    ],
)
def test_lambda_by_hand(d: tuple[float, float], strength: float) -> None:
    """x = (1, 0), so that l_min is -d[0] and l_max is |d|^2 / -d[0]."""
    p = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [5.0, 5.0]], dtype=torch.float64))
    how: dict[str, Any] = {"lmbda": 0.1, "lambda_amplify": 2.0, "hat_lambda_coeff": 3.0, "epsilon": 0.0}
    made = DHSPG([{"params": [p], "parts": [(part("a", 0, 0, 1),)]}], lr=0.01, target=0.5, start=1, **how)
    p.grad = torch.zeros_like(p)
    made.step()
    assert p[0].tolist() == [1.0, 0.0]
    p.grad[0] = torch.tensor(d)
    made.step()
    assert made.redundant.tolist() == [True, False]
    assert float(made.strength[0]) == pytest.approx(strength)
    assert p[0].tolist() == pytest.approx([1 - 0.01 * (d[0] + strength), -0.01 * d[1]])
    assert p[1].tolist() == [5.0, 5.0]


@pytest.mark.parametrize(("epsilon", "zero"), [(0.84, False), (0.86, True)])
def test_the_half_space_by_hand(epsilon: float, zero: bool) -> None:
    """x = (2, 0) goes to y = (2 - 0.1 * (1 + 2), ...): <y, x> / |x|^2 = 0.85."""
    p = torch.nn.Parameter(torch.tensor([[2.0, 0.0], [5.0, 5.0]], dtype=torch.float64))
    made = DHSPG([{"params": [p], "parts": [(part("a", 0, 0, 1),)]}], lr=0.1, start=1, lmbda=2.0, epsilon=epsilon)
    p.grad = torch.zeros_like(p)
    made.step()
    p.grad[0] = torch.tensor([1.0, 3.0])
    made.step()
    assert p[0].tolist() == ([0.0, 0.0] if zero else pytest.approx([1.7, -0.3]))
    assert made.dead.tolist() == [zero, False] == made.projected.tolist()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_slices_of_a_unit_may_have_different_rates(as_tensor: bool) -> None:
    problem = disjoint(momentum=0.9, weight_decay=0.02, second={"lr": 0.01})
    reference = ReferenceDHSPG(problem, "sgd", target=0.5, **SCHEDULE, **RULE)
    made = optimizer(problem, "sgd")
    rows = gradients(problem, 44)
    for t, row in enumerate(rows):
        factor = 1 / (1 + 0.05 * t)
        reference.rates = [0.05 * factor, (0.01 if t < 20 else 0.02) * factor]
        for group, rate in zip(made.param_groups, reference.rates, strict=True):
            group["lr"] = torch.tensor(rate, dtype=torch.float64) if as_tensor else rate
        take(made, problem, row)
        reference.step(t, row)
        assert largest_difference(made, problem, reference.x) < 1e-12, t
    assert made.dead.any()


def test_in_float32_it_is_the_same_to_rounding() -> None:
    """One step at a time from the same weights: over many, a unit may meet its half-space a step earlier or later."""
    problem = overlapping(momentum=0.9, weight_decay=0.02)
    exact, made = optimizer(problem, "sgd"), optimizer(problem, "sgd", dtype=torch.float32)
    for row in gradients(problem, 46):
        take(exact, problem, row)
        take(made, problem, row)
        assert torch.equal(exact.dead, made.dead)
        assert largest_difference(made, problem, [p.detach() for p in _in_order(exact, problem)]) < 3e-6


def _in_order(made: torch.optim.Optimizer, problem: Problem) -> list[Tensor]:
    by_tensor = dict(zip(problem.order(), parameters(made), strict=True))
    return [by_tensor[k] for k in range(len(problem.tensors))]


def test_a_unit_far_smaller_than_a_step_is_judged_by_its_own_size() -> None:
    """|x| is 1e-7 of the step: what the step is to x must not drown in rounding."""
    problem = disjoint(momentum=0.9)
    for t in problem.tensors[:3]:
        t[0] *= 1e-7
    made = optimizer(problem, "sgd", dtype=torch.float32, start=1, epsilon=0.0, stop=None, target=0.15)
    exact = optimizer(problem, "sgd", start=1, epsilon=0.0, stop=None, target=0.15)
    for row in gradients(problem, 1):
        take(made, problem, row)
        take(exact, problem, row)
    assert float(made.cosine[0]) == pytest.approx(float(exact.cosine[0]), rel=1e-4)


# what is exact


@pytest.mark.parametrize("base", BASES)
def test_redundant_units_end_at_zero_and_stay_there(base: str) -> None:
    variant, options = BASES[base]
    problem = overlapping(**options)
    made = optimizer(problem, variant, dtype=torch.float32, lmbda=1e-6, epsilon=0.0, target=0.4)
    rows = gradients(problem, 60, seed=1)
    for t, row in enumerate(rows):
        take(made, problem, row)
        if t >= SCHEDULE["stop"] - 1:
            squares = made.table.square(made.table.x.banks)
            assert torch.equal(squares == 0, made.redundant)
    assert int(made.redundant.sum()) == round(0.4 * made.table.units)


def test_what_is_zero_when_it_is_chosen_stays_zero() -> None:
    problem = disjoint(momentum=0.9)
    for k in range(3):
        problem.tensors[k][0] = 0.0
    made = optimizer(problem, "sgd", start=2, window=1, epsilon=0.0, stop=None, target=0.2)
    rows = gradients(problem, 10)
    for p, k in zip(parameters(made), problem.order(), strict=True):
        p.grad = torch.zeros_like(p) if k < 3 else rows[0][k]
    made.step()
    made.step()
    for row in rows:
        take(made, problem, row)
        assert float(made.table.square(made.table.x.banks)[0]) == 0.0
    assert bool(made.dead[0])


def test_an_end_without_a_choice_makes_one() -> None:
    problem = disjoint(momentum=0.9)
    made = optimizer(problem, "sgd")
    take(made, problem, gradients(problem, 1)[0])
    made.finish()
    assert int(made.dead.sum()) == round(0.5 * made.table.units)
    assert torch.equal(made.table.square(made.table.x.banks) == 0, made.dead)


# the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", BASES)
def test_before_the_choice_it_is_torchs_optimizer(base: str, dtype: torch.dtype) -> None:
    variant, options = BASES[base]
    problem = disjoint(**options)
    made = optimizer(problem, variant, dtype=dtype, start=15, window=5, stop=None)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[variant]
    groups = [{k: v for k, v in g.items() if k != "parts"} for g in problem.param_groups(dtype)]
    theirs = kind(groups)
    for row in gradients(problem, 15, missing=True):
        take(made, problem, row)
        take(theirs, problem, row)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-13
    assert largest_difference(made, problem, [p.detach().double() for p in _in_order(theirs, problem)]) < tolerance


def test_a_closure_gives_gradients_and_its_loss() -> None:
    problem = disjoint(momentum=0.0)
    made = optimizer(problem, "sgd")

    def closure() -> Tensor:
        made.zero_grad()
        loss = sum((p.square().sum() for p in parameters(made)), torch.zeros(()))
        loss.backward()
        return loss

    losses = [made.step(closure).item() for _ in range(8)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("at", [4, 7, 35, 42])
def test_a_resumed_run_is_the_same_bit_for_bit(base: str, at: int) -> None:
    variant, options = BASES[base]
    problem = overlapping(**options)
    rows = gradients(problem, 50, missing=True)
    whole, first = (optimizer(problem, variant, dtype=torch.float32) for _ in range(2))
    for row in rows:
        take(whole, problem, row)
    for row in rows[:at]:
        take(first, problem, row)
    saved = _copied(first.state_dict())
    second = optimizer(problem, variant, dtype=torch.float32)
    with torch.no_grad():
        for p, q in zip(parameters(second), parameters(first), strict=True):
            p.copy_(q)
    second.load_state_dict(saved)
    for row in rows[at:]:
        take(second, problem, row)
    for p, q in zip(parameters(second), parameters(whole), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(second.dead, whole.dead) and second.dead.any()
    assert torch.equal(second.projected, whole.projected)


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {k: _copied(v) for k, v in state.items()}
    return [_copied(v) for v in state] if isinstance(state, list) else state


# what is asked of it


def test_a_callable_chooses() -> None:
    problem = disjoint(momentum=0.9)
    asked: list[Any] = []

    def choose(scores: Any, *, share: float = 1.0, removed: Any = None) -> Any:
        asked.append((share, {f: len(s) for f, s in scores.items()}, {f: int(r.sum()) for f, r in removed.items()}))
        return {f: np.arange(len(s)) == 1 for f, s in scores.items()}

    made = optimizer(problem, "sgd", target=choose)
    for row in gradients(problem, 8):
        take(made, problem, row)
    assert asked == [(1.0, {"a": 4, "b": 4}, {"a": 0, "b": 0})]
    assert np.flatnonzero(made.redundant).tolist() == [1, 5]


def test_no_family_goes_as_a_whole() -> None:
    problem = disjoint(momentum=0.9)
    for t in problem.tensors[:3]:
        t *= 1e-3
    made = optimizer(problem, "sgd", target=0.75)
    for row in gradients(problem, 8):
        take(made, problem, row)
    assert [int(r.sum()) for r in made.table.by_family(made.redundant).values()] == [3, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": "rmsprop"}, "none of sgd, adam, adamw"),
        ({"betas": (0.9, 0.99)}, "no option betas"),
        ({"target": 1.0}, "outside 0 to 1"),
        ({"epsilon": 1.0}, "outside 0 to 1"),
        ({"stop": 3}, "not behind start"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        optimizer(disjoint(), changes.pop("variant", "sgd"), **changes)


def test_a_group_that_comes_later_is_refused() -> None:
    made = optimizer(disjoint(), "sgd")
    with pytest.raises(UsageError, match="laid out"):
        made.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})


def test_parts_that_are_missing_are_named() -> None:
    groups = disjoint().param_groups()
    groups[0]["parts"].pop()
    with pytest.raises(UsageError, match="3 params and 2 parts"):
        DHSPG(groups, start=1)


def test_another_optimizers_state_is_refused() -> None:
    made = optimizer(disjoint(momentum=0.9), "sgd")
    for state in (torch.optim.SGD(parameters(made), lr=0.1).state_dict(), optimizer(overlapping(), "sgd").state_dict()):
        with pytest.raises(UsageError, match="another optimizer"):
            made.load_state_dict(state)


def test_storage_that_was_exchanged_is_taken_up() -> None:
    problem = disjoint(momentum=0.9)
    made, other = optimizer(problem, "sgd"), optimizer(problem, "sgd")
    for t, row in enumerate(gradients(problem, 42)):
        if t == 20:
            for p in parameters(other):
                p.data = p.data.clone()
        take(made, problem, row)
        take(other, problem, row)
    assert all(torch.equal(p, q) for p, q in zip(parameters(made), parameters(other), strict=True))


def test_without_units_it_is_its_base() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    made: UnitOptimizer = DHSPG([{"params": [p]}], lr=0.1, momentum=0.9, start=1, stop=3)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for _ in range(5):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        made.step()
        theirs.step()
    torch.testing.assert_close(p, q)
