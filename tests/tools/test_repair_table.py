"""The table of repairs: inputs made from images and speech, scores, and what is read out of rows."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import pytest
from _agreement import bilinear, doubled, mel, stacked, windows
from _repair_report import report
from onnx import TensorProto, helper, numpy_helper
from repair_table import Judge, read

ROW = {"model": "m", "ranking": "l2", "inputs": "data", "macs": 0.7, "repair": "affine", "samples": 512}
SCORES = {"kind": "top1", "original": 0.9, "lost": 0.2, "lost_noise": 0.01, "reached": 0.7, "tests": 100}
REPAIRED = {"score": 0.85, "gain": 0.15, "gain_noise": 0.01, "fidelity": 0.9, "seconds": 1.0, "ranking_s": 0.0}
JUDGED = {"judged_before": 1.0, "judged_after": 0.5}


def test_resizing_keeps_constants_and_ramps() -> None:
    weights = bilinear(8, 13)
    assert np.allclose(weights.sum(1), 1)
    centres = (np.arange(13) + 0.5) * 8 / 13 - 0.5
    assert np.allclose(weights @ np.arange(8), centres.clip(0, 7), atol=1e-6)
    assert np.allclose(bilinear(5, 5), np.eye(5))


def test_a_tone_at_twice_the_rate_is_the_same_tone() -> None:
    time = np.arange(800) / 8000
    found = doubled(np.sin(2 * np.pi * 500 * time))
    assert np.allclose(found, np.sin(2 * np.pi * 500 * np.arange(1600) / 16000), atol=1e-6)


def test_frames_are_stacked_behind_those_before() -> None:
    found = stacked(np.arange(10.0).reshape(5, 2))
    assert found.shape == (3, 3, 2)
    assert found[1].tolist() == [[2, 3], [4, 5], [6, 7]]
    assert windows(np.arange(10), 4, 3)[1].tolist() == [3, 4, 5, 6]


def test_the_pitch_of_a_tone_is_found_and_that_of_noise_is_none() -> None:
    tone = np.sin(2 * np.pi * 200 * np.arange(16000) / 16000)
    assert np.allclose(mel(tone)[:, 40], 200, rtol=0.02)
    assert (mel(np.random.default_rng(0).standard_normal(16000))[:, 40] == 0).mean() > 0.9


def running(path: Path, factor: float) -> Path:
    """y = factor * (x + state), which is the next state."""
    ports = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in ("x", "h", "y", "g")}
    nodes = [
        helper.make_node("Add", ["x", "h"], ["s"]),
        helper.make_node("Mul", ["s", "f"], ["y"]),
        helper.make_node("Identity", ["y"], ["g"]),
    ]
    scale = numpy_helper.from_array(np.array(factor, np.float32), "f")
    graph = helper.make_graph(nodes, "g", [ports["x"], ports["h"]], [ports["y"], ports["g"]], [scale])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    import repair_table
    from _agreement import Feed, Other

    class Walk(Other):
        def tests(self, model: Path, folder: Path, count: int) -> list[list[Feed]]:
            steps = np.random.default_rng(0).standard_normal((2, count, 1, 2)).astype(np.float32)
            return [[{"x": x, "h": np.zeros((1, 2), np.float32)} for x in stream] for stream in steps]

    monkeypatch.setitem(repair_table.OTHERS, "walk", Walk("above", {"h": "g"}))
    options = argparse.Namespace(data=tmp_path, test=30, test_others=30, threads=1)
    return Judge(running(tmp_path / "walk.onnx", 0.5), options)


def test_states_go_on_within_a_stream_and_not_beyond(judge: Judge) -> None:
    found = judge.original[0]
    x = np.concatenate([f["x"] for s in judge.streams for f in s])
    assert np.allclose(found[1], 0.5 * (x[1] + found[0]), atol=1e-6)
    assert np.allclose(found[30], 0.5 * x[30], atol=1e-6)


def test_the_original_is_perfect_and_a_constant_explains_nothing(judge: Judge, tmp_path: Path) -> None:
    same = judge.scores(tmp_path / "walk.onnx")
    assert same.agreement.all()
    assert np.allclose(same.fidelity, 1)
    assert not same.top1.size
    silent = judge.scores(running(tmp_path / "silent.onnx", 0.0))
    expected = 1 - np.square(judge.original[0]).mean(0).sum() / judge.original[0].var(0).sum()
    assert np.isclose(silent.fidelity.mean(), expected)
    assert np.isclose(silent.agreement.mean(), (judge.original[0][:, 0] <= 0.5).mean())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "75%  met"),
        ({"gain": 0.05}, "25%  MISSED"),
        ({"lost": 0.01}, "nothing lost"),
        ({"gain": -0.05}, "worse than none: 1 of 1 cells, 1 by more than the noise: MISSED"),
    ],
)
def test_verdicts(change: dict[str, float], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    report([ROW | SCORES | REPAIRED | JUDGED | change])
    assert says in capsys.readouterr().out


def test_the_last_row_of_a_cell_counts_and_half_a_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"model": "m", "why": "no"}\n{"model": "m", "why": "still no"}\n{"model": "m", "wh')
    assert read(path) == [{"model": "m", "why": "still no"}]
