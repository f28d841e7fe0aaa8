"""Criteria on data, against the formulas written out on activations from onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune.axes.analysis import analyse
from onnxprune.calibrate import Calibration
from onnxprune.data import open_data, signature_of
from onnxprune.errors import UsageError
from onnxprune.model.load import load
from onnxprune.select.importance import CALIBRATED, scores
from tests.calibrate.calibrated import calibration_of, outputs
from tests.graphs import from_text

UNITS = 6


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}


def of(model: onnx.ModelProto, data: dict[str, np.ndarray], name: str, **more: object) -> np.ndarray:
    calibration = calibration_of(model, data, **more)  # type: ignore[arg-type]
    groups = list(calibration.analysis.groups)
    assert len(groups) == 1
    return scores(calibration.analysis, groups, name, calibration=calibration)[groups[0].id]


def mean_one(x: np.ndarray) -> np.ndarray:
    return x / x.mean()


@pytest.fixture
def images() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((37, 3, 5, 5)).astype(np.float32)}


@pytest.fixture
def twice_read() -> onnx.ModelProto:
    """A group of 6 that a convolution and, through it, another one read."""
    return from_text(
        """(float[N,3,5,5] x) => (float[N,4,5,5] y) {
            a = Conv(x, w1, b1)
            r = Relu(a)
            c = Conv<pads=[1,1,1,1]>(r, w2)
            s = Add(r, c)
            y = Conv(s, w3)
        }""",
        w1=(UNITS, 3, 1, 1),
        b1=(UNITS,),
        w2=(UNITS, UNITS, 3, 3),
        w3=(4, UNITS, 1, 1),
    )


def test_wanda_is_weight_times_what_it_multiplies_summed_over_readers(
    twice_read: onnx.ModelProto, images: dict[str, np.ndarray]
) -> None:
    w = weights(twice_read)
    total = np.zeros(UNITS)
    for tensor, weight in zip(outputs(twice_read, images, "r", "s"), (w["w2"], w["w3"]), strict=True):
        share = np.abs(weight).sum((0, 2, 3)) * np.sqrt(np.square(tensor).mean((0, 2, 3)))
        total += share / share.sum()
    np.testing.assert_allclose(of(twice_read, images, "wanda"), mean_one(total), rtol=1e-5)


def test_variance_is_that_of_the_activations_where_they_are_read(
    twice_read: onnx.ModelProto, images: dict[str, np.ndarray]
) -> None:
    total = np.zeros(UNITS)
    for tensor in outputs(twice_read, images, "r", "s"):
        found = tensor.var((0, 2, 3))
        total += found / found.sum()
    np.testing.assert_allclose(of(twice_read, images, "variance"), mean_one(total), rtol=1e-4)


def test_wanda_of_a_grouped_convolution_takes_each_units_own_channels(images: dict[str, np.ndarray]) -> None:
    model = from_text(
        """(float[N,3,5,5] x) => (float[N,4,5,5] y) {
            a = Conv(x, w1)
            y = Conv<group=2>(a, w2)
        }""",
        w1=(2 * UNITS, 3, 1, 1),
        w2=(4, UNITS, 1, 1),
    )
    (a,) = outputs(model, images, "a")
    energy = np.square(a).mean((0, 2, 3)).reshape(2, UNITS).sum(0)
    expected = np.abs(weights(model)["w2"]).sum((0, 2, 3)) * np.sqrt(energy)
    calibration = calibration_of(model, images)
    inside = next(g for g in calibration.analysis.groups if g.size == UNITS)
    found = scores(calibration.analysis, [inside], "wanda", calibration=calibration)[inside.id]
    np.testing.assert_allclose(found, mean_one(expected), rtol=1e-5)


def test_attention_is_the_product_of_both_factors() -> None:
    model = from_text(
        """(float[N,5,7] x) => (float[N,5,5] y) {
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            t = Transpose<perm=[0,2,1]>(k)
            y = MatMul(q, t)
        }""",
        wq=(7, UNITS),
        wk=(7, UNITS),
    )
    data = {"x": np.random.default_rng(0).standard_normal((16, 5, 7)).astype(np.float32)}
    q, k = outputs(model, data, "q", "k")
    expected = np.sqrt(np.square(q).mean((0, 1)) * np.square(k).mean((0, 1)))
    np.testing.assert_allclose(of(model, data, "wanda"), mean_one(expected), rtol=1e-5)


@pytest.fixture
def classifier() -> onnx.ModelProto:
    return from_text(
        """(float[N,5] x) => (float[N,4] y) {
            a = Gemm<transB=1>(x, w1, b1)
            r = Relu(a)
            z = Gemm<transB=1>(r, w2, b2)
            y = Softmax(z)
        }""",
        w1=(UNITS, 5),
        b1=(UNITS,),
        w2=(4, UNITS),
        b2=(4,),
    )


def test_taylor_without_labels_is_the_fisher_information_of_the_models_own_output(classifier: onnx.ModelProto) -> None:
    data = {"x": np.random.default_rng(2).standard_normal((6000, 5)).astype(np.float32)}
    h, p = outputs(classifier, data, "r", "y")
    moved = h[:, None, :] * weights(classifier)["w2"]  # what a unit's gate does to every logit
    expected = np.einsum("nc,ncu->u", p, moved**2) - np.square(np.einsum("nc,ncu->nu", p, moved)).sum(0)
    np.testing.assert_allclose(of(classifier, data, "taylor"), mean_one(expected), rtol=0.1, atol=0.02)  # drawn


def test_taylor_of_numbers_is_the_squared_error_that_removal_causes() -> None:
    """A linear layer's squared error is exactly quadratic in the gates."""
    model = from_text(
        """(float[N,5] x) => (float[N,1] y) {
            a = Gemm<transB=1>(x, w1, b1)
            r = Relu(a)
            y = Gemm<transB=1>(r, w2)
        }""",
        w1=(UNITS, 5),
        b1=np.ones(UNITS, np.float32),
        w2=(1, UNITS),
    )
    data = {"x": np.random.default_rng(3).standard_normal((6000, 5)).astype(np.float32)}
    (h,) = outputs(model, data, "r")
    expected = np.square(h * weights(model)["w2"]).mean(0)
    np.testing.assert_allclose(of(model, data, "taylor"), mean_one(expected), rtol=0.1, atol=0.02)  # drawn


def test_taylor_with_labels_is_the_squared_first_order_change_of_the_loss(classifier: onnx.ModelProto) -> None:
    rng = np.random.default_rng(4)
    x, label = rng.standard_normal((50, 5)).astype(np.float32), rng.integers(0, 4, 50)
    h, p = outputs(classifier, {"x": x}, "r", "y")
    slope = (p - np.eye(4)[label]) @ weights(classifier)["w2"]
    expected = np.square(h * slope).sum(0)
    found = of(classifier, {"x": x, "label": label}, "taylor", loss="ce")
    np.testing.assert_allclose(found, mean_one(expected), rtol=1e-4)


def test_a_file_that_is_fixed_to_one_sample_gives_what_one_of_any_number_gives() -> None:
    text = """(float[{n},4,3] x) => (float[{n},4,2] y) {{
        a = MatMul(x, w1)
        r = Relu(a)
        y = MatMul(r, w2)
    }}"""
    data = {"x": np.random.default_rng(5).standard_normal((40, 4, 3)).astype(np.float32)}
    free, fixed = (from_text(text.format(n=n), w1=(3, UNITS), w2=(UNITS, 2)) for n in ("N", 1))
    for name in CALIBRATED:
        np.testing.assert_allclose(of(fixed, data, name), of(free, data, name), rtol=1e-5)


def test_a_unit_that_nothing_reads_is_worth_nothing(classifier: onnx.ModelProto) -> None:
    dead = from_text(
        """(float[N,5] x) => (float[N,4] z) {
            a = Gemm<transB=1>(x, w1, b1)
            r = Relu(a)
            z = Gemm<transB=1>(r, w2, b2)
        }""",
        **{
            n: (w * np.array(n != "w2" or [1, 1, 0, 1, 1, 1])).astype(np.float32)
            for n, w in weights(classifier).items()
        },
    )
    data = {"x": np.random.default_rng(6).standard_normal((64, 5)).astype(np.float32)}
    for name in ("wanda", "taylor", "distill", "obs"):
        found = of(dead, data, name)
        assert found[2] == pytest.approx(0, abs=1e-9) and np.count_nonzero(found > 1e-6) >= UNITS // 2, name


@pytest.mark.parametrize("name", CALIBRATED)
def test_the_same_seed_gives_the_same_scores(
    twice_read: onnx.ModelProto, images: dict[str, np.ndarray], name: str
) -> None:
    np.testing.assert_array_equal(of(twice_read, images, name), of(twice_read, images, name))


@pytest.mark.parametrize("name", CALIBRATED)
def test_data_is_asked_for(twice_read: onnx.ModelProto, images: dict[str, np.ndarray], name: str) -> None:
    analysis = calibration_of(twice_read, images).analysis
    with pytest.raises(UsageError, match=f"'{name}' is taken on data"):
        scores(analysis, list(analysis.groups), name)


def test_a_recurrent_layer_of_which_only_the_last_state_is_read() -> None:
    model = from_text(
        """(float[5,N,4] x) => (float[1,N,3] y) {
            s, h = GRU<hidden_size=6>(x, w, r)
            y = MatMul(h, v)
        }""",
        w=(1, 3 * UNITS, 4),
        r=(1, 3 * UNITS, UNITS),
        v=(UNITS, 3),
    )
    feeds = [{"x": np.random.default_rng(k).standard_normal((5, 8, 4)).astype(np.float32)} for k in range(3)]
    analysis = analyse(load(model))
    calibration = Calibration(analysis, open_data(feeds, signature_of(analysis.graph)), 3)
    for name in CALIBRATED:
        (found,) = scores(analysis, list(analysis.groups), name, calibration=calibration).values()
        assert found.min() >= 0 and np.ptp(found) > 0, name
