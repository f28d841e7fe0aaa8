"""Models that select: the proof is taken in front of what a rounding error may tip over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.errors import VerificationFailed
from onnxprune.model.load import load
from onnxprune.model.save import write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import prove
from onnxprune.verify.probes import find_probes
from tests.graphs import from_text

SELECTING = """(float[N,5] x) => (int64[N,1] best, float[N,4] scores) {
    a = MatMul(x, w1)
    r = Relu(a)
    s = MatMul(r, w2)
    scores = Softmax(s)
    best = ArgMax<axis=1>(s)
}"""
SHAPES = {"w1": (5, 8), "w2": (8, 4)}


def planned(model: onnx.ModelProto) -> tuple[Analysis, Plan]:
    analysis = analyse(load(model))
    return analysis, Plan({g.id: np.arange(g.size // 2) for g in analysis.groups})


def test_probes_lie_in_front_of_the_selection_and_other_outputs_are_compared_as_they_are() -> None:
    probes = find_probes(*planned(from_text(SELECTING, **SHAPES)))
    assert probes is not None
    assert probes.tensors == ("s",) and probes.outputs == ("scores",)


def test_a_model_that_selects_nothing_has_none() -> None:
    text = "(float[N,5] x) => (float[N,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }"
    assert find_probes(*planned(from_text(text, **SHAPES))) is None


def test_surgery_behind_a_selection_can_not_be_probed() -> None:
    text = """(float[N,9] x) => (float[N,4] y) {
        v, i = TopK(x, k)
        a = MatMul(v, w1)
        y = MatMul(a, w2)
    }"""
    assert find_probes(*planned(from_text(text, k=np.array([5]), **SHAPES))) is None


def test_a_tie_that_rounding_decides_is_no_failure(tmp_path: Path) -> None:
    """Two classes whose scores are equal but for rounding: ArgMax may differ, the scores may not."""
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((5, 64)).astype(np.float32)
    w2 = rng.standard_normal((64, 4)).astype(np.float32)
    w2[:, 1] = w2[:, 0] + rng.standard_normal(64).astype(np.float32) * 1e-8
    analysis, plan = planned(from_text(SELECTING, w1=w1, w2=w2))
    write(rewrite(analysis, plan), tmp_path / "small.onnx")
    assert prove(analysis, plan, tmp_path / "small.onnx").passed


@pytest.mark.parametrize("name", ["w1", "w2"])
def test_a_mistake_in_front_of_a_selection_is_detected(tmp_path: Path, name: str) -> None:
    analysis, plan = planned(from_text(SELECTING.replace(", float[N,4] scores", ""), **SHAPES))
    path = tmp_path / "small.onnx"
    write(rewrite(analysis, plan), path)
    assert prove(analysis, plan, path).passed
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), name))
    onnx.save(model, path)
    with pytest.raises(VerificationFailed):
        prove(analysis, plan, path)


def test_detections_are_compared_before_they_are_suppressed(tmp_path: Path) -> None:
    model = from_text(
        """(float[1,20,6] x) => (int64[m,3] picked, float[1,20,4] boxes) {
        h = MatMul(x, w1)
        r = Relu(h)
        boxes = MatMul(r, wb)
        raw = MatMul(r, ws)
        probable = Sigmoid(raw)
        scores = Transpose<perm=[0,2,1]>(probable)
        picked = NonMaxSuppression(boxes, scores, most, overlap, least)
    }""",
        w1=(6, 16),
        wb=(16, 4),
        ws=(16, 2),
        most=np.array([5]),
        overlap=np.array([0.5], np.float32),
        least=np.array([0.1], np.float32),
    )
    analysis, plan = planned(model)
    assert plan.keep
    write(rewrite(analysis, plan), tmp_path / "small.onnx")
    assert prove(analysis, plan, tmp_path / "small.onnx").passed
    probes = find_probes(analysis, plan)
    assert probes is not None and set(probes.tensors) == {"boxes", "scores"}
