"""Branches of one run against the masked original in onnxruntime, on random models; and predictions of what is gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onnxprune.axes.analysis import analyse
from onnxprune.axes.dead import INEXACT
from onnxprune.calibrate.masked import Branches
from onnxprune.calibrate.watched import Watched, as_tensor
from onnxprune.model.load import load
from onnxprune.model.save import write
from onnxprune.select.plan import Plan
from onnxprune.verify.compare import difference
from onnxprune.verify.inputs import draw
from onnxprune.verify.reference import masked
from onnxprune.verify.runs import run, session
from tests.calibrate.calibrated import calibration_of
from tests.graphs import from_text, random_model


@pytest.mark.parametrize("seed", range(16))
def test_every_branch_is_the_masked_original(seed: int, tmp_path: Path) -> None:
    analysis = analyse(load(random_model(seed)))
    watched = Watched(analysis)
    rng = np.random.default_rng(seed)
    groups = [g for g in analysis.groups if g.kind != INEXACT and g.size > 1]
    gone = {g.id: [rng.permutation(g.size)[: g.size // 2], np.array([0])] for g in groups}
    feed = draw(analysis.graph, analysis.graph.pins, rng)
    inputs = [as_tensor(feed[n]) for n in watched.inputs]
    seen = set()
    for gid, k, outputs in Branches(watched, gone).batch(inputs):
        seen.add((gid, k))
        size = next(g.size for g in groups if g.id == gid)
        path = tmp_path / f"{gid}{k}.onnx"
        write(masked(analysis, Plan({gid: np.setdiff1d(np.arange(size), gone[gid][k])})), path)
        wanted, reason = run(session(path), feed)
        assert wanted is not None, reason
        for name, expected in zip(watched.outputs, wanted, strict=True):
            assert difference(expected, outputs[name].numpy())[1] < 1e-4, (gid, k, name)
    assert seen == {(g.id, k) for g in groups for k in range(2)}


def test_what_the_others_know_of_a_unit_stands_in_for_it() -> None:
    """A unit that repeats another one is missed without repair, and with it not."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((5, 6)).astype(np.float32)
    first[:, 4] = 2 * first[:, 1]
    model = from_text(
        """(float[N,5] x) => (float[N,3] y) {
            a = MatMul(x, w1)
            b = Add(a, b1)
            r = Relu(b)
            y = MatMul(r, w2)
        }""",
        w1=first,
        b1=np.zeros(6, np.float32),
        w2=(6, 3),
    )
    calibration = calibration_of(model, {"x": rng.standard_normal((400, 5)).astype(np.float32)})
    watched, (group,) = calibration.watched, calibration.analysis.groups
    x = torch.from_numpy(rng.standard_normal((50, 5)).astype(np.float32))
    whole = watched.outputs_of((x,))["y"]
    gone = {group.id: [np.array([4])]}
    ((_, _, plain),) = Branches(watched, gone).batch([x])
    ((_, _, predicted),) = Branches(watched, gone, calibration.predictor).batch([x])
    lost, left = ((o["y"] - whole).square().mean() / whole.var() for o in (plain, predicted))
    assert left < 1e-3 < 0.05 < lost


def test_a_prediction_is_the_least_squares_one() -> None:
    rng = np.random.default_rng(3)
    model = from_text(
        "(float[N,5] x) => (float[N,3] y) { a = MatMul(x, w1)\n r = Relu(a)\n y = MatMul(r, w2) }", w1=(5, 6), w2=(6, 3)
    )
    x = rng.standard_normal((300, 5)).astype(np.float32)
    calibration = calibration_of(model, {"x": x})
    (group,) = calibration.analysis.groups
    gone, kept = np.array([0, 3]), np.array([1, 2, 4, 5])
    ((predictions),) = calibration.predictor.of(group.id, gone).values()
    _, at, others, linear, constant = predictions[0]
    hidden = np.maximum(x.astype(np.float64) @ calibration.analysis.graph.array("w1"), 0)
    centred = hidden - hidden.mean(0)
    covariance = centred.T @ centred / len(x)
    covariance += 1e-3 * np.trace(covariance) / 6 * np.eye(6)
    expected = covariance[np.ix_(gone, kept)] @ np.linalg.inv(covariance[np.ix_(kept, kept)])
    assert (at.tolist(), others.tolist()) == (gone.tolist(), kept.tolist())
    np.testing.assert_allclose(linear.numpy().T, expected, rtol=1e-4)
    np.testing.assert_allclose(
        constant.numpy(), hidden.mean(0)[gone] - expected @ hidden.mean(0)[kept], rtol=1e-3, atol=1e-5
    )
