"""A plan that the clock decided outlives the run that made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.errors import UsageError
from onnxprune.latency.keep import NAME, reached_once
from onnxprune.latency.search import Reached
from onnxprune.model.load import load
from onnxprune.result import Latency, LatencyStats, TargetOutcome
from onnxprune.select.choose import Choice
from onnxprune.select.plan import Plan
from onnxprune.select.target import parse_target

TARGET = parse_target("latency=0.5")


@pytest.fixture
def analysis(tiny_cnn: Path) -> Analysis:
    return analyse(load(tiny_cnn))


class Search:
    """Gives another plan every time, as a clock does."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis, self.calls = analysis, 0

    def __call__(self) -> Reached:
        self.calls += 1
        outcome = TargetOutcome("latency", TARGET.text, 0.5, 0.49, True)
        plan = Plan({self.analysis.groups[0].id: np.arange(16 * self.calls)})
        stats = LatencyStats(1.0, 2.0, 3.0, 40, 2, 5)
        return Reached(Choice(plan, outcome, 16, 0.1), Latency(stats, stats, True, 1, "all"), ())


def kept(found: Reached) -> list[int]:
    return [len(k) for k in found.choice.plan.keep.values()]


def test_a_run_that_goes_on_has_the_plan_that_it_began_with(analysis: Analysis, tmp_path: Path) -> None:
    search = Search(analysis)
    first = reached_once(search, analysis, TARGET, run_dir=tmp_path / "run")
    again = reached_once(search, analysis, TARGET, run_dir=tmp_path / "run", resume=True)
    assert search.calls == 1 and kept(first) == kept(again) == [16]
    assert (again.latency, again.choice.outcome, again.choice.align) == (first.latency, first.choice.outcome, 16)


def test_a_run_that_begins_plans_anew(analysis: Analysis, tmp_path: Path) -> None:
    search = Search(analysis)
    for _ in range(2):
        last = reached_once(search, analysis, TARGET, run_dir=tmp_path)
    assert kept(last) == [32] == kept(reached_once(search, analysis, TARGET, run_dir=tmp_path, resume=True))


def test_without_a_run_directory_nothing_is_kept(analysis: Analysis) -> None:
    search = Search(analysis)
    assert kept(reached_once(search, analysis, TARGET)) == [16]
    assert kept(reached_once(search, analysis, TARGET, resume=True)) == [32]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"target": {"metric": "latency"}}'])
def test_a_file_that_can_not_be_read_is_planned_anew(analysis: Analysis, tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    search = Search(analysis)
    assert kept(reached_once(search, analysis, TARGET, run_dir=tmp_path, resume=True)) == [16]


def test_another_target_is_another_plan(analysis: Analysis, tmp_path: Path) -> None:
    search = Search(analysis)
    reached_once(search, analysis, TARGET, run_dir=tmp_path)
    reached_once(search, analysis, parse_target("latency=0.7"), run_dir=tmp_path, resume=True)
    assert search.calls == 2


def test_of_several_processes_none_may_plan_by_its_own_clock(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    search = Search(analysis)
    with pytest.raises(UsageError, match="one of several"):
        reached_once(search, analysis, TARGET)
    assert search.calls == 0
