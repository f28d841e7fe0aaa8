"""Curves per group: measured, kept, read again, and what a plan makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

import onnxprune
from onnxprune import pipeline
from onnxprune.axes.analysis import analyse
from onnxprune.calibrate import Calibration
from onnxprune.errors import UsageError
from onnxprune.metrics import METRICS, parse_metric
from onnxprune.model.load import load
from onnxprune.ranking import ranking
from onnxprune.select.choose import choose
from onnxprune.select.target import parse_target
from onnxprune.sensitivity import Curve, Sensitivity, measure
from tests.calibrate.calibrated import calibration_of, outputs

CLASSES = 4


def two_groups() -> onnx.ModelProto:
    """Two hidden layers of 16 units; of the second only the first four are read with any weight."""
    from tests.graphs import from_text

    last = np.random.default_rng(1).standard_normal((CLASSES, 16)).astype(np.float32)
    last[:, 4:] *= 1e-4
    return from_text(
        """(float[N,6] x) => (float[N,4] y) {
            a = Gemm<transB=1>(x, w1, b1)
            r = Relu(a)
            c = Gemm<transB=1>(r, w2, b2)
            s = Relu(c)
            y = Gemm<transB=1>(s, w3, b3)
        }""",
        w1=(16, 6),
        b1=(16,),
        w2=(16, 16),
        b2=(16,),
        w3=last,
        b3=(CLASSES,),
    )


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return two_groups()


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((200, 6)).astype(np.float32), "label": rng.integers(0, CLASSES, 200)}


@pytest.fixture(scope="module")
def calibration(model: onnx.ModelProto, data: dict[str, np.ndarray]) -> Calibration:
    return calibration_of(model, data)


@pytest.fixture(scope="module")
def found(calibration: Calibration) -> Sensitivity:
    return measure(calibration.analysis, calibration.analysis.groups, calibration, importance="wanda")


def second(calibration: Calibration) -> str:
    """The group whose units the last layer reads."""
    return next(g.id for g in calibration.analysis.groups if any(m.initializer == "w3" for m in g.members))


def zeroed(model: onnx.ModelProto, units: np.ndarray) -> onnx.ModelProto:
    """Without units of the second layer."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in ("w2", "b2"):
            array = numpy_helper.to_array(tensor).copy()
            array[units] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return changed


def test_a_point_is_the_metric_of_the_masked_model(
    model: onnx.ModelProto, data: dict[str, np.ndarray], calibration: Calibration
) -> None:
    groups = calibration.analysis.groups
    got = measure(calibration.analysis, groups, calibration, importance="l2", metric=METRICS["top1"])
    gid, feed = second(calibration), {"x": data["x"]}
    ranked = np.argsort(got.scores[gid], kind="stable")
    top1 = [
        (outputs(zeroed(model, ranked[:n]), feed, "y")[0].argmax(1) == data["label"]).mean()
        for n in got.curves[gid].removed
    ]
    np.testing.assert_allclose(got.curves[gid].metric, top1, atol=1e-9)
    assert got.before == top1[0] and got.samples == 200


def test_curves_start_at_nothing_and_tell_important_units_from_others(
    calibration: Calibration, found: Sensitivity
) -> None:
    assert set(found.curves) == {g.id for g in calibration.analysis.groups}
    for curve in found.curves.values():
        assert (curve.removed[0], curve.loss[0], curve.metric[0]) == (0, 0, 1)
        assert curve.removed[-1] == 16 and curve.loss[-1] > 0.1
    idle = found.curves[second(calibration)]
    other = next(c for gid, c in found.curves.items() if gid != second(calibration))
    assert idle.loss[3] < 1e-4 < other.loss[3]  # half of each


def test_what_is_left_makes_up_for_what_is_gone(calibration: Calibration, found: Sensitivity) -> None:
    groups = calibration.analysis.groups
    repaired = measure(calibration.analysis, groups, calibration, importance="wanda", repaired=True)
    first = next(gid for gid in found.curves if gid != second(calibration))
    assert all(a < b for a, b in zip(repaired.curves[first].loss[1:4], found.curves[first].loss[1:4], strict=True))


def test_few_samples_are_enough_where_that_is_asked_for(calibration: Calibration) -> None:
    seen: list[tuple[int, int]] = []
    groups = calibration.analysis.groups
    got = measure(
        calibration.analysis, groups, calibration, importance="l2", samples=30, progress=lambda *done: seen.append(done)
    )
    assert got.samples == 30 and seen[-1] == (30, 30)


def test_losses_rise_and_go_through_what_was_measured() -> None:
    curve = Curve((0, 2, 4), (0.0, 3.0, 2.0), (1.0, 0.5, 0.4))
    made = Sensitivity("", "l2", "agreement", True, 1.0, 1, 0.0, {"g0": curve}, {"g0": np.ones(4)})
    np.testing.assert_array_equal(made.losses()["g0"], [0, 1.5, 3, 3, 3])


def test_a_file_gives_the_curves_back(calibration: Calibration, found: Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    found.save(path)
    again = Sensitivity.load(path, calibration.analysis)
    assert again.curves == found.curves and replace(again, scores={}) == replace(found, scores={})
    for gid, ranked in found.scores.items():
        np.testing.assert_array_equal(again.scores[gid], ranked)


def test_a_file_of_another_model_is_refused(found: Sensitivity, tmp_path: Path, tiny_cnn: Path) -> None:
    path = tmp_path / "curves.json"
    found.save(path)
    with pytest.raises(UsageError, match="another model"):
        Sensitivity.load(path, analyse(load(tiny_cnn)))


def test_other_weights_are_another_model(model: onnx.ModelProto, found: Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    found.save(path)
    with pytest.raises(UsageError, match="another model"):
        Sensitivity.load(path, analyse(load(zeroed(model, np.arange(3)))))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"groups": [{}]}', '{"groups": [], "schema": 1}'])
def test_a_file_that_holds_no_curves_is_refused(text: str, tmp_path: Path, calibration: Calibration) -> None:
    path = tmp_path / "curves.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="holds no sensitivity"):
        Sensitivity.load(path, calibration.analysis)


def test_metrics_that_need_a_file_or_labels_are_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    bare = calibration_of(model, {"x": np.zeros((4, 6), np.float32)})
    hook = tmp_path / "hook.py"
    hook.write_text("def metric(predict):\n    return 1.0\n")
    for spec, words in ((f"{hook}:metric", "a callable"), ("top1", "needs targets")):
        with pytest.raises(UsageError, match=words):
            measure(bare.analysis, bare.analysis.groups, bare, importance="l2", metric=parse_metric(spec))


def test_a_plan_takes_from_the_group_that_loses_least(calibration: Calibration, found: Sensitivity) -> None:
    plan = choose(calibration.analysis, parse_target("params=0.7"), importance=found.scores, losses=found.losses()).plan
    first = next(gid for gid in found.curves if gid != second(calibration))
    assert first not in plan.keep and set(plan.keep[second(calibration)]) >= {0, 1, 2, 3}


def test_compress_reads_the_file(model: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path) -> None:
    path, curves = tmp_path / "model.onnx", tmp_path / "curves.json"
    onnx.save(model, path)
    analysis, measured = pipeline.sensitivity(path, data, importance="wanda")
    measured.save(curves)
    result = onnxprune.compress(path, target="params=0.7", sensitivity=curves, deploy="none")
    expected = choose(analysis, parse_target("params=0.7"), importance=measured.scores, losses=measured.losses())
    assert {k: v.tolist() for k, v in result.plan.keep.items()} == {
        k: v.tolist() for k, v in expected.plan.keep.items()
    }


class TestRanking:
    def test_without_data_only_weights_can_tell(self, model: onnx.ModelProto) -> None:
        analysis = analyse(load(model))
        groups = list(analysis.groups)
        assert ranking(analysis, groups, None, importance="l2").importance == "l2"
        with pytest.raises(UsageError, match="measured on data"):
            ranking(analysis, groups, None, importance="l2", allocate="sensitivity")
        with pytest.raises(UsageError, match="none of importance, sensitivity"):
            ranking(analysis, groups, None, importance="l2", allocate="guess")

    def test_sensitivity_is_measured_where_it_is_asked_for(self, calibration: Calibration) -> None:
        analysis = calibration.analysis
        found = ranking(
            analysis, list(analysis.groups), calibration.source, importance="wanda", allocate="sensitivity", samples=64
        )
        assert found.losses is not None and set(found.losses) == {g.id for g in analysis.groups}


def test_the_document_is_plain_json(found: Sensitivity) -> None:
    text = json.dumps(found.document())
    assert json.loads(text)["groups"][0]["removed"][0] == 0


class TestCommand:
    def test_it_prints_a_row_per_group_and_keeps_the_curves(
        self, model: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        path = self.files(model, data, tmp_path)
        told = self.run(path, "--eval", "top1", "--samples", "50")
        assert told.exit_code == 0, told.stderr
        assert "top1 of the original" in told.stdout and "on 50 samples" in told.stdout
        assert all(f"| {g.id} " in told.stdout for g in analyse(load(path)).groups)
        kept = tmp_path / "model.sensitivity.json"
        assert str(kept) in told.stdout and Sensitivity.load(kept, analyse(load(path))).metric == "top1"

    def test_json_goes_where_it_is_wanted(
        self, model: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        path = self.files(model, data, tmp_path)
        told = self.run(path, "--json", "-", "--out", str(tmp_path / "here.json"), "--importance", "l2")
        assert json.loads(told.stdout) == json.loads((tmp_path / "here.json").read_text())

    def test_the_model_is_not_overwritten(
        self, model: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        path = self.files(model, data, tmp_path)
        told = self.run(path, "--out", str(path))
        assert told.exit_code == 2 and "would overwrite a model" in told.stderr

    @staticmethod
    def files(model: onnx.ModelProto, data: dict[str, np.ndarray], folder: Path) -> Path:
        onnx.save(model, folder / "model.onnx")
        np.savez(folder / "data.npz", **data)  # type: ignore[arg-type]
        return folder / "model.onnx"

    @staticmethod
    def run(path: Path, *arguments: str) -> Result:
        from onnxprune.cli import main

        return CliRunner().invoke(main, ["sensitivity", str(path), "--data", str(path.parent / "data.npz"), *arguments])
