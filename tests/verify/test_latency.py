"""Latency: models take turns, spreads decide what counts, and the sessions see inputs that fit."""

from __future__ import annotations

import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import ModelRejected, UsageError
from onnxprune.verify import latency


class Recorder:
    """A session that only notes that it ran."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def run(self, outputs: None, feed: object) -> None:
        self.log.append(self.name)


class Sleeper:
    """A session that leaves the processor to others for a while."""

    def run(self, outputs: None, feed: object) -> None:
        time.sleep(0.02)


def dense(path: Path, width: int) -> Path:
    """x (N,width) times a matrix, 4 times over."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", [f"x{k}", f"w{k}"], [f"x{k + 1}"]) for k in range(4)]
    weights = [
        numpy_helper.from_array(rng.standard_normal((width, width)).astype(np.float32), f"w{k}") for k in range(4)
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "dense",
        [value("x0", TensorProto.FLOAT, ["N", width])],
        [value("x4", TensorProto.FLOAT, ["N", width])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_models_take_turns_and_warm_up_rounds_do_not_count() -> None:
    log: list[str] = []
    sessions = [Recorder("a", log), Recorder("b", log)]
    times = latency._in_turns(sessions, [{}, {}], warmup=2, runs=3, seconds=1.0)
    assert "".join(log) == "ab" * 5
    assert [len(t) for t in times] == [3, 3]


def test_a_time_budget_still_gives_enough_rounds_for_a_spread() -> None:
    log: list[str] = []
    [times] = latency._in_turns([Recorder("a", log)], [{}], warmup=0, runs=None, seconds=1e-9)
    assert len(times) == latency.LEAST_ROUNDS


def test_a_time_budget_has_an_end_for_models_that_take_no_time() -> None:
    log: list[str] = []
    [times] = latency._in_turns([Recorder("a", log)], [{}], warmup=0, runs=None, seconds=600)
    assert len(times) == latency.MOST_ROUNDS


def taken(*runs: tuple[float, int]) -> latency.Taken:
    """Runs as (milliseconds, interruptions)."""
    return latency.Taken(np.array([ms for ms, _ in runs]), np.array([n for _, n in runs]))


def test_runs_that_were_interrupted_do_not_count_where_enough_were_not() -> None:
    many = [(1.0, 0)] * latency.LEAST_ROUNDS + [(9.0, 1), (9.0, 3)]
    [kept] = latency._undisturbed([taken(*many)])
    assert kept.tolist() == [1.0] * latency.LEAST_ROUNDS


def test_models_are_compared_on_runs_that_were_interrupted_as_seldom() -> None:
    rounds = latency.LEAST_ROUNDS
    quiet = taken(*[(1.0, 0)] * rounds, *[(2.0, 1)] * rounds, *[(3.0, 2)] * rounds)
    loud = taken(*[(5.0, 1)] * 2 * rounds, *[(6.0, 2)] * rounds)
    found = latency._undisturbed([quiet, loud])
    assert [sorted(set(t.tolist())) for t in found] == [[1.0, 2.0], [5.0]]


def test_where_every_run_was_interrupted_those_that_were_least_count() -> None:
    rounds = latency.LEAST_ROUNDS
    [kept] = latency._undisturbed([taken(*[(7.0, 4)] * rounds, (8.0, 5))])
    assert kept.tolist() == [7.0] * rounds


def test_a_few_runs_all_count() -> None:
    assert len(latency._undisturbed([taken((1.0, 0), (2.0, 9))])[0]) == 2


def test_the_row_tells_how_many_runs_do_not_count(tiny_cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = iter(range(1, 10_000))
    monkeypatch.setattr(latency, "_interruptions", lambda: next(stops) // 30)  # every fifteenth run
    [row] = latency.measure([tiny_cnn], runs=45)
    assert (row.runs, row.disturbed) == (45, 3)


def test_another_program_on_the_processor_does_not_lengthen_the_time_of_one_thread() -> None:
    """Time is that of the processor: sleeping while a session runs costs none."""
    [times] = latency._in_turns([Sleeper()], [{}], warmup=0, runs=3, seconds=1.0, clock=time.thread_time_ns)
    assert times.milliseconds.max() < 15
    [times] = latency._in_turns([Sleeper()], [{}], warmup=0, runs=3, seconds=1.0)
    assert times.milliseconds.min() > 15


@pytest.mark.parametrize(("shift", "apart"), [(0.0, False), (5.0, False), (11.0, True), (-11.0, True)])
def test_a_difference_counts_only_where_the_spreads_do_not_overlap(shift: float, apart: bool) -> None:
    spread = np.linspace(100, 112, 101)  # 10th to 90th percentile: 9.6 wide
    assert latency._apart(spread, spread + shift) is apart


def test_an_outlier_does_not_make_spreads_overlap() -> None:
    fast, slow = np.full(100, 1.0), np.full(100, 2.0)
    fast[0] = 50.0
    assert latency._apart(fast, slow)


def test_the_figures_are_ordered_and_in_milliseconds(tiny_cnn: Path) -> None:
    [row] = latency.measure([tiny_cnn], runs=20)
    assert 0 < row.min_ms <= row.median_ms <= row.p90_ms < 1000
    assert row.runs == 20


def test_a_hundred_times_the_work_is_significantly_slower(tmp_path: Path) -> None:
    small, large = dense(tmp_path / "small.onnx", 32), dense(tmp_path / "large.onnx", 1024)
    result = latency.compare(large, small, runs=30, threads=1)
    assert result.significant
    assert result.speedup > 5
    assert (result.threads, result.optimisation) == (1, "all")


def test_a_model_is_not_significantly_faster_than_itself(tiny_cnn: Path) -> None:
    assert not latency.compare(tiny_cnn, tiny_cnn, runs=50).significant


def test_every_model_is_compared_with_the_first(tmp_path: Path) -> None:
    small, large = dense(tmp_path / "small.onnx", 32), dense(tmp_path / "large.onnx", 1024)
    found = latency.bench([large, small, large], runs=30)
    assert found.significant == (False, True, False)
    assert found.against_first(1).before is found.rows[0]


@pytest.mark.parametrize("optimisation", ["none", "basic", "extended"])
def test_below_level_all_there_are_no_blocked_kernels(tiny_cnn: Path, optimisation: str) -> None:
    [row] = latency.measure([tiny_cnn], runs=1, optimisation=optimisation)
    assert row.nchwc_kernels == 0


def test_blocked_kernels_are_counted(tiny_cnn: Path) -> None:
    [row] = latency.measure([tiny_cnn], runs=1)
    expected = (2, 3, 4) if platform.machine() in ("x86_64", "AMD64") else (0,)  # both Convs, perhaps pool and reorder
    assert row.nchwc_kernels in expected


def test_nothing_is_left_in_the_temporary_folder(
    tiny_cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    latency.measure([tiny_cnn], runs=1)
    assert list(folder.iterdir()) == []


def test_without_room_for_the_optimised_graph_the_count_is_unknown(
    tiny_cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "load", full)
    [row] = latency.measure([tiny_cnn], runs=1)
    assert row.nchwc_kernels == latency.UNKNOWN


def test_a_serialised_model_is_measured_like_a_file(tiny_cnn: Path) -> None:
    [row] = latency.measure([tiny_cnn.read_bytes()], runs=2)
    assert row.runs == 2


def test_a_free_batch_is_one_sample(tiny_cnn: Path) -> None:
    session, _ = latency._open(tiny_cnn, threads=1, optimisation="none")
    [feed] = latency._feeds([tiny_cnn], [session], {}, seed=0)
    assert feed["image"].shape == (1, 3, 16, 16)


def test_sizes_can_be_given(tiny_cnn: Path) -> None:
    session, _ = latency._open(tiny_cnn, threads=1, optimisation="none")
    [feed] = latency._feeds([tiny_cnn], [session], {"image": (5, 3, 16, 16)}, seed=0)
    assert feed["image"].shape == (5, 3, 16, 16)


def test_models_with_the_same_inputs_see_the_same_values(tiny_cnn: Path) -> None:
    sessions = [latency._open(tiny_cnn, threads=1, optimisation="none")[0] for _ in range(2)]
    first, second = latency._feeds([tiny_cnn, tiny_cnn], sessions, {}, seed=0)
    assert first is second


@pytest.mark.parametrize("shapes", [{"picture": (1, 3, 16, 16)}, {"image": (3, 16, 16)}])
def test_sizes_of_an_unknown_input_or_of_another_rank_are_usage_errors(
    tiny_cnn: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(UsageError):
        latency.measure([tiny_cnn], runs=1, shapes=shapes)


def test_sizes_that_the_model_refuses_are_named(tiny_cnn: Path) -> None:
    with pytest.raises(ModelRejected, match="Got: 4 Expected: 3") as caught:
        latency.measure([tiny_cnn], runs=1, shapes={"image": (1, 4, 16, 16)})
    assert "--input-shapes" in caught.value.hint


@pytest.mark.parametrize("settings", [{"runs": 0}, {"threads": 0}, {"warmup": -1}, {"optimisation": "most"}])
def test_settings_that_make_no_sense_are_usage_errors(tiny_cnn: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        latency.measure([tiny_cnn], **settings)


def test_no_model_at_all_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        latency.measure([])


def test_an_operator_that_onnxruntime_does_not_know_is_a_rejection_that_names_it(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Frobnicate", ["x"], ["y"], domain="example.org")],
        "g",
        [value("x", TensorProto.FLOAT, [1, 4])],
        [value("y", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("example.org", 1)], ir_version=8
    )
    path = tmp_path / "custom.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelRejected, match="Frobnicate"):
        latency.measure([path], runs=1)
