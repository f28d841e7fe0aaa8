"""The search for a latency: what it plans next, when it ends, and what it says where it fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.errors import TargetNotReached, UsageError
from onnxprune.latency import search
from onnxprune.latency.search import Tried, outcome_of, reach
from onnxprune.latency.table import Table
from onnxprune.model.load import load
from onnxprune.result import Latency, LatencyStats, TargetOutcome
from onnxprune.select.choose import Choice, choose
from onnxprune.select.plan import Plan
from onnxprune.select.target import parse_target

TARGET = parse_target("latency=0.6")
BEFORE = 20.0
LEAST, UNITS = 0.2, 64


def latency(share: float, before: float = BEFORE) -> Latency:
    after = share * before
    stats = [LatencyStats(t, t, t, 10) for t in (before, after)]
    return Latency(stats[0], stats[1], True, 1, "all")


def planner(blocks: int = UNITS) -> Callable[[float], Choice]:
    """A model of one group that comes in so many blocks; the table takes time to be in proportion to it."""

    def plan(share: float) -> Choice:
        kept = max(int(np.ceil(share * blocks)), int(LEAST * blocks))
        if kept == blocks:
            raise TargetNotReached("no block fits")
        reached = kept / blocks
        outcome = TargetOutcome("latency", TARGET.text, share, reached, True)
        return Choice(Plan({"g0": np.arange(kept)}), outcome, 16, LEAST)

    return plan


class Clock:
    """Measures a model whose true share of the original's time is a function of the planned one."""

    def __init__(self, truth: Callable[[float], float], noise: float = 0.0) -> None:
        self.truth, self.noise = truth, noise
        self.asked: list[tuple[float, float]] = []
        self.random = np.random.default_rng(0)

    def __call__(self, choice: Choice, seconds: float) -> Latency:
        share = self.truth(choice.outcome.reached) * (1 + self.noise * self.random.standard_normal())
        self.asked.append((share, seconds))
        return latency(share)


def found(clock: Clock, *, blocks: int = UNITS, wanted: float = 0.6) -> list[Tried]:
    return search._search(planner(blocks), clock, TARGET, wanted, lambda text: None)


def test_a_table_that_is_right_needs_one_candidate_which_is_measured_twice() -> None:
    clock = Clock(lambda share: share)
    [one] = found(clock)
    assert one.sure and 0.57 <= one.measured <= 0.606
    assert [seconds for _, seconds in clock.asked] == [search.SECONDS, search.SURE_SECONDS]


@pytest.mark.parametrize(
    "truth",
    [
        lambda share: 0.3 + 0.7 * share,
        lambda share: share**1.7,
        lambda share: share**0.5,
        lambda share: 1.2 * share if share < 0.99 else 1.0,
    ],
    ids=["a constant that the table lacks", "faster than planned", "slower than planned", "a step at first"],
)
def test_a_table_that_is_wrong_is_corrected_by_the_clock(truth: Callable[[float], float]) -> None:
    tried = found(Clock(truth))
    assert len(tried) <= 4
    assert tried[-1].sure and 0.57 <= tried[-1].measured <= 0.606


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_two_percent_does_not_keep_it_from_its_end(seed: int) -> None:
    clock = Clock(lambda share: 0.2 + 0.8 * share, noise=0.02)
    clock.random = np.random.default_rng(seed)
    best = search._pick(found(clock), TARGET)
    assert best.sure and outcome_of(TARGET, best.latency).met
    assert 0.55 <= clock.truth(best.planned) <= 0.65


def test_no_plan_is_measured_as_two_candidates() -> None:
    tried = found(Clock(lambda share: 0.65 + 0.35 * share))
    plans = [len(t.choice.plan.keep["g0"]) for t in tried]
    assert len(plans) == len(set(plans))


def test_between_coarse_blocks_the_faster_neighbour_is_taken() -> None:
    tried = found(Clock(lambda share: share), blocks=4)  # 0.75 or 0.5
    best = search._pick(tried, TARGET)
    assert (best.measured, best.sure) == (0.5, True)
    assert len(tried) <= 2


def test_where_the_first_block_is_too_large_more_is_planned() -> None:
    tried = search._search(planner(4), Clock(lambda share: share), parse_target("latency=0.9"), 0.9, lambda text: None)
    assert [t.measured for t in tried] == [0.75]


def test_what_can_not_be_reached_ends_at_the_floor() -> None:
    clock = Clock(lambda share: 0.7 + 0.3 * share)
    tried = found(clock)
    assert len(tried) <= search.MOST_TRIES
    assert search._pick(tried, TARGET).planned == pytest.approx(LEAST, abs=0.02)


def test_the_failure_says_what_was_reached_and_where_the_rest_goes(cost_of: Cost) -> None:
    tried = found(Clock(lambda share: 0.7 + 0.3 * share))
    with pytest.raises(TargetNotReached) as caught:
        search._best(tried, TARGET, cost_of(0.25), best_effort=False)  # type: ignore[arg-type]
    said = str(caught.value)
    assert "75.6%" in said and "not 60.0%" in said and "25.0% of that time" in said and "expects 20.0%" in said
    assert caught.value.exit_code == 4 and "--best-effort" in caught.value.hint


def test_best_effort_gives_the_fastest_and_says_that_it_is_not_met(cost_of: Cost) -> None:
    tried = found(Clock(lambda share: 0.7 + 0.3 * share))
    best = search._best(tried, TARGET, cost_of(0.25), best_effort=True)  # type: ignore[arg-type]
    assert not best.choice.outcome.met
    assert best.choice.outcome.reached == min(t.measured for t in tried)


class Total:
    """A cost of which a share is constant."""

    def __init__(self, share: float) -> None:
        self.constant = share

    def total(self, counts: object) -> float:
        return 1.0


Cost = Callable[[float], Total]


@pytest.fixture
def cost_of() -> Cost:
    return Total


def test_milliseconds_are_compared_with_milliseconds() -> None:
    target = parse_target("latency=9ms")
    met = outcome_of(target, latency(0.44))
    assert (met.wanted, met.met) == (0.45, True) and met.reached == pytest.approx(0.44)
    assert not outcome_of(target, latency(0.44, before=25.0)).met


@pytest.mark.parametrize(("share", "met"), [(0.5, True), (0.6, True), (0.611, True), (0.613, False), (1.1, False)])
def test_what_no_measurement_can_tell_apart_counts_as_met(share: float, met: bool) -> None:
    assert outcome_of(TARGET, latency(share)).met is met


def test_times_that_spread_wider_than_the_models_differ_are_warned_of(cost_of: Cost) -> None:
    [one] = found(Clock(lambda share: share))
    surely = search._best([one], TARGET, cost_of(0.1), best_effort=False)  # type: ignore[arg-type]
    assert surely.warnings == ()
    hardly = replace(surely, latency=replace(surely.latency, significant=False))
    assert "20 to 20 ms before" in hardly.warnings[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SECONDS", 0.1)
    monkeypatch.setattr(search, "SURE_SECONDS", 0.2)


def searched(analysis: Analysis, target: str, **options: object) -> search.Reached:
    plan = partial(choose, analysis, align=16)
    return reach(analysis, parse_target(target), plan, align=16, table=Table(1, None), **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_a_network_is_brought_down_to_its_target(tiny_cnn: Path) -> None:
    said: list[str] = []
    analysis = analyse(load(tiny_cnn))
    reached = searched(analysis, "latency=0.5", progress=said.append, best_effort=True)
    assert said[:2] == ["latency table", "candidate 1"]
    assert reached.choice.outcome.reached == reached.latency.after.median_ms / reached.latency.before.median_ms
    assert 0.1 < reached.choice.outcome.reached < 0.75
    assert all(len(kept) % 16 == 0 for kept in reached.choice.plan.keep.values())


@pytest.mark.parametrize("halve", [True, False])
def test_whole_blocks_stay_whole_where_they_can_reach_the_target(tiny_cnn: Path, halve: bool) -> None:
    """At 0.53 of its parameters two steps of 16 are too few and three too many."""
    choice = choose(analyse(load(tiny_cnn)), parse_target("params=0.53"), align=16, halve=halve)
    assert (choice.align < 16) is halve


@pytest.mark.usefixtures("quick")
def test_a_model_from_memory_is_searched_as_well(tiny_cnn_model: onnx.ModelProto) -> None:
    reached = searched(analyse(load(tiny_cnn_model)), "latency=0.5", best_effort=True)
    assert reached.latency.speedup > 1


def test_more_time_than_the_model_takes_is_a_usage_error(tiny_cnn: Path) -> None:
    with pytest.raises(UsageError, match="and the model takes"):
        searched(analyse(load(tiny_cnn)), "latency=60s")
