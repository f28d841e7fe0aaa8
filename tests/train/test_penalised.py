"""TPP, GReg and FixReg in a training run: how far units shrink and when, and that a run can be continued."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnxprune import UsageError
from onnxprune.train.hooks import Step
from onnxprune.train.penalised import (
    FixReg,
    FixRegOptions,
    GReg,
    GRegOptions,
    Penalised,
    PenaltyOptions,
    TPPOptions,
    TPPTraining,
)
from tests.train.method_runs import macs_left, trained
from tests.train.runs import same

METHODS: list[type[Penalised]] = [TPPTraining, GReg, FixReg]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_redundant_units_are_zero_and_the_target_is_met(method: type[Penalised], optimizer: str) -> None:
    module, hooks, _ = trained(method, optimizer=optimizer, ema=0.9)
    norms = hooks.tpp.norms()
    assert torch.equal(norms == 0, hooks.dead) and torch.equal(hooks.dead, hooks.redundant)
    removed = hooks.table.by_family(hooks.dead)
    assert all(np.array_equal(gone, removed[f]) for f, gone in hooks.removed.items())
    assert 0.495 <= macs_left(hooks) <= 0.53
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_gram_penalty_is_no_part_of_what_an_adaptive_optimizer_sees(optimizer: str) -> None:
    changed, moved = [], []

    class Spying(TPPTraining):
        def after_backward(self, step: Step) -> None:
            before = [None if p.grad is None else p.grad.clone() for p in self.table.tensors]
            super().after_backward(step)
            changed.append(
                any(
                    b is not None and not torch.equal(b, p.grad)
                    for b, p in zip(before, self.table.tensors, strict=True)
                )
            )

        def after_step(self, step: Step) -> None:
            before = [p.detach().clone() for p in self.table.tensors]
            self.tpp.shrink = lambda *_: None  # type: ignore[method-assign]
            super().after_step(step)
            moved.append(any(not torch.equal(b, p) for b, p in zip(before, self.table.tensors, strict=True)))

    trained(Spying, optimizer=optimizer, steps=4)
    assert changed[1] == (optimizer == "sgd") and moved[1] == (optimizer == "adamw")


@pytest.mark.parametrize("lr", [1e-5, 0.05])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_in_efolds_whatever_the_rate(method: type[Penalised], lr: float) -> None:
    """Half way to `until`, a penalty that grows has spent a quarter of it, a constant one a half."""
    seen: dict[float, float] = {}
    hooks: Any = None

    class Spying(method):  # type: ignore[misc, valid-type]
        def after_step(self, step: Step) -> None:
            super().after_step(step)
            seen[step.share] = self.spent

    _, hooks, _ = trained(Spying, method.options(efolds=10, until=0.8), lr=lr)
    halfway = min(seen, key=lambda s: abs(s - 0.4))
    done = halfway / 0.8
    assert seen[halfway] == pytest.approx(10 * (done if method is FixReg else done**2), rel=1e-9)
    assert hooks.spent <= 10 * (1 + 1e-9)


def test_units_that_nothing_pulls_up_shrink_by_the_budget() -> None:
    class Watched(GReg):
        def after_backward(self, step: Step) -> None:
            self.tpp.add_gradients(0.0)
            for p in self.table.tensors:
                p.grad = None

        def after_step(self, step: Step) -> None:
            super().after_step(step)
            if step.index == 0:
                self.begun = self._first_norms.clone()
            if step.index == 19:
                self.shrunk = (self.tpp.norms() / self.begun)[self.redundant]
                self.stood = (self.tpp.norms() / self.begun)[~self.redundant]

    _, hooks, _ = trained(Watched, GRegOptions(efolds=4, until=1.0), on="plain")
    share = 19.5 / 40
    torch.testing.assert_close(hooks.shrunk, torch.full_like(hooks.shrunk, math.exp(-4 * share**2)), rtol=1e-4, atol=0)
    assert torch.equal(hooks.stood, torch.ones_like(hooks.stood))


def test_units_that_are_as_good_as_gone_are_zeroed_before_the_ramp_is_over() -> None:
    _, hooks, _ = trained(GReg, GRegOptions(efolds=100, until=1.0), lr=1e-6)
    assert hooks.over and hooks.spent < 60


@pytest.mark.parametrize("method", [TPPTraining, GReg])
def test_from_until_on_everything_is_zero(method: type[Penalised]) -> None:
    found: list[tuple[float, bool]] = []

    class Spying(method):  # type: ignore[misc, valid-type]
        def after_step(self, step: Step) -> None:
            super().after_step(step)
            found.append((step.share, not bool(self.tpp.norms()[self.redundant].any())))

    trained(Spying, method.options(efolds=3, until=0.5))
    assert all(gone == (share >= 0.5) for share, gone in found)


def test_fixreg_shrinks_weights_alone_by_its_constant() -> None:
    class Watched(FixReg):
        def after_backward(self, step: Step) -> None:
            for p in self.table.tensors:
                p.grad = None

        def after_step(self, step: Step) -> None:
            before = [x.clone() for x in self.table.x.banks]
            super().after_step(step)
            if step.index == 3:
                self.factors = {
                    (x.numel() == f.numel()): (x / b)[(f > 0).expand_as(x) & (b != 0)]
                    for x, b, f in zip(
                        self.table.x.banks,
                        before,
                        self.table.spread(self.redundant.float(), combine="sum"),
                        strict=True,
                    )
                }

    _, hooks, _ = trained(Watched, FixRegOptions(lmbda=2.0), lr=0.1, schedule="constant", warmup=0.0)
    weights, vectors = hooks.factors[False], hooks.factors[True]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / (1 + 0.1 / 0.1 * 2)), rtol=1e-5, atol=0)
    assert torch.equal(vectors, torch.ones_like(vectors))


def test_the_ramp_of_the_paper_is_followed_and_then_units_go_in_turn() -> None:
    zero: list[int] = []

    class Spying(TPPTraining):
        def after_step(self, step: Step) -> None:
            super().after_step(step)
            gone = self.table.by_family(self.tpp.norms() == 0)
            redundant = self.table.by_family(self.redundant)
            zero.append(sum(bool(gone[f][r].all()) for f, r in redundant.items() if r.any()))
            strengths.append(self._efolds)

    strengths: list[float] = []
    how = TPPOptions(ramp="paper", by=0.05, limit=0.2, every=3, hold=4, zero="in turn", apart=2, scale="code")
    _, hooks, _ = trained(Spying, how, on="plain", lr=0.01, schedule="constant", warmup=0.0)
    wanted = [math.log1p(0.01 / 0.1 * lmbda) for lmbda in [0.05] * 3 + [0.1] * 3 + [0.15] * 3 + [0.2] * 4]
    assert strengths[:13] == pytest.approx(wanted)
    families = sum(bool(gone.any()) for gone in hooks.removed.values())
    assert families >= 2 and zero[:13] == [0] * 13 and zero[-1] == families
    assert all(b - a <= 1 for a, b in zip(zero, zero[1:], strict=False))


def test_choosing_again_compares_units_as_if_they_had_not_shrunk() -> None:
    """One redundant unit is made large by training, as it were: it is let off at the next choice."""

    class Helped(GReg):
        def after_step(self, step: Step) -> None:
            super().after_step(step)
            if step.index == 2:
                self.chosen_first = self.redundant.clone()
                helped = torch.zeros_like(self.redundant)
                helped[int(self.redundant.nonzero()[0])] = True
                self.helped = helped
                self.table.scale_(torch.where(helped, 10.0, 1.0))

    _, hooks, _ = trained(Helped, GRegOptions(reselect=1, efolds=8), lr=1e-6)
    assert hooks.chosen_times == 2
    assert bool(hooks.chosen_first[hooks.helped].all()) and not bool(hooks.dead[hooks.helped].any())
    assert bool((hooks.tpp.norms()[hooks.helped] > 0).all())
    assert int(hooks.dead.sum()) > 0


@pytest.mark.parametrize("on", ["grouped", "plain"])
@pytest.mark.parametrize("method", [GReg, FixReg])
def test_the_shrinking_is_undone_exactly_before_that(method: type[Penalised], on: str) -> None:
    """Also where units share rows, and where not all of a unit shrinks."""

    class Spying(method):  # type: ignore[misc, valid-type]
        def after_backward(self, step: Step) -> None:
            if step.index == 0:
                self.begun = [x.clone() for x in self.table.x.banks]
            for p in self.table.tensors:
                p.grad = None

        def _restore(self) -> None:
            self.smaller = [x.clone() for x in self.table.x.banks]
            super()._restore()
            self.restored = [x.clone() for x in self.table.x.banks]

    _, hooks, _ = trained(Spying, method.options(reselect=1, efolds=8), on=on)
    assert any(not torch.equal(a, b) for a, b in zip(hooks.begun, hooks.smaller, strict=True))
    torch.testing.assert_close(hooks.restored, hooks.begun, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("importance", ["l1", "fpgm"])
def test_units_may_be_chosen_by_other_measures(importance: str) -> None:
    _, plain, _ = trained(GReg, steps=4, on="plain")
    _, other, _ = trained(GReg, GRegOptions(importance=importance), steps=4, on="plain")
    assert not torch.equal(plain.redundant, other.redundant)


@pytest.mark.parametrize("at", [9, 30])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_broken_off_ends_with_the_same_weights(tmp_path: Path, method: type[Penalised], at: int) -> None:
    how: dict[str, Any] = {"ema": 0.9, "optimizer": "adamw", "checkpoint_every_steps": 4, "clip": 1.0}
    options = method.options(reselect=1)
    whole, one, _ = trained(method, options, **how)
    with pytest.raises(ZeroDivisionError):
        trained(method, options, run_dir=tmp_path, fail_at=at, **how)
    rest, other, _ = trained(method, options, run_dir=tmp_path, resume=True, **how)
    assert same(whole, rest)
    assert one.spent == other.spent and all(np.array_equal(one.removed[f], other.removed[f]) for f in one.removed)


def test_what_the_log_shows() -> None:
    _, hooks, _ = trained(TPPTraining)
    values = hooks.values()
    assert values["redundant_norm"] == 0 and values["kept_norm"] > 0 and values["gram"] == 0
    assert 0 < values["sparsity"] < 1 and 19 < values["efolds"] <= 20.001
    assert {f.family for f in hooks.families()} == set(hooks.table.slices)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PenaltyOptions, {"efolds": 0}, "efolds must be above 0"),
        (PenaltyOptions, {"until": 1.5}, "until must be above 0 and at most 1"),
        (PenaltyOptions, {"reselect": -1}, "reselect can't be negative"),
        (PenaltyOptions, {"importance": "luck"}, "is none of magnitude"),
        (TPPOptions, {"scale": "big"}, "scale must be one of"),
        (TPPOptions, {"ramp": "steep"}, "ramp must be one of"),
        (TPPOptions, {"zero": "never"}, "zero must be one of"),
        (TPPOptions, {"rho": math.nan}, "rho must be above 0"),
        (TPPOptions, {"every": 0}, "every must be above 0"),
        (TPPOptions, {"apart": 0}, "apart at least 1"),
        (FixRegOptions, {"lmbda": -1.0}, "lmbda must be above 0"),
    ],
)
def test_options_that_make_no_sense(kind: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind(**options)
