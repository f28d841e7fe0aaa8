"""Importance of units, against the formulas written out with numpy on the whole weights."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune.axes.analysis import analyse
from onnxprune.axes.expr import Atom, product, sum_of
from onnxprune.errors import UsageError
from onnxprune.model.load import load
from onnxprune.select.importance import CALIBRATED, IMPORTANCE, Slices, scores, unit_of
from tests.graphs import from_text

UNITS = 8


@pytest.fixture
def model() -> onnx.ModelProto:
    """Two convolutions with a BatchNormalization between: one group of 8."""
    return from_text(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) {
            a = Conv(x, w1, b1)
            n = BatchNormalization(a, gamma, beta, mean, var)
            y = Conv(n, w2)
        }""",
        w1=(UNITS, 3, 1, 1),
        b1=(UNITS,),
        gamma=(UNITS,),
        beta=(UNITS,),
        mean=(UNITS,),
        var=np.full(UNITS, 100, np.float32),
        w2=(4, UNITS, 1, 1),
    )


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}


def found(model: onnx.ModelProto, importance: str, *, seed: int = 0) -> np.ndarray:
    analysis = analyse(load(model))
    assert len(analysis.groups) == 1
    return scores(analysis, list(analysis.groups), importance, seed=seed)[analysis.groups[0].id]


def per_unit(model: onnx.ModelProto, *, consumers: bool) -> list[np.ndarray]:
    """The numbers of every unit, as rows, one array per parameter; statistics (mean, variance) do not count."""
    w = weights(model)
    rows = [w["w1"].reshape(UNITS, -1), w["b1"][:, None], w["gamma"][:, None], w["beta"][:, None]]
    return [*rows, np.moveaxis(w["w2"], 1, 0).reshape(UNITS, -1)] if consumers else rows


def mean_one(x: np.ndarray) -> np.ndarray:
    return x / x.mean()


def test_l1_is_the_sum_of_magnitudes_of_everything_that_goes(model: onnx.ModelProto) -> None:
    expected = sum(np.abs(rows).sum(1) for rows in per_unit(model, consumers=True))
    np.testing.assert_allclose(found(model, "l1"), mean_one(expected), rtol=1e-6)


def test_l2_is_the_euclidean_norm_of_everything_that_goes(model: onnx.ModelProto) -> None:
    expected = np.sqrt(sum((rows**2).sum(1) for rows in per_unit(model, consumers=True)))
    np.testing.assert_allclose(found(model, "l2"), mean_one(expected), rtol=1e-6)


def test_bn_is_the_magnitude_of_gamma_and_l2_where_there_is_none(model: onnx.ModelProto) -> None:
    np.testing.assert_allclose(found(model, "bn"), mean_one(np.abs(weights(model)["gamma"])), rtol=1e-6)
    plain = from_text(
        "(float[N,5] x) => (float[N,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }", w1=(5, 8), w2=(8, 4)
    )
    np.testing.assert_array_equal(found(plain, "bn"), found(plain, "l2"))


def test_fpgm_is_the_sum_of_distances_to_the_other_units(model: onnx.ModelProto) -> None:
    """Pair by pair, of what produces the units (He et al. 2019, eq. 4)."""
    points = np.concatenate(per_unit(model, consumers=False), 1)
    expected = np.array([sum(np.linalg.norm(p - q) for q in points) for p in points])
    np.testing.assert_allclose(found(model, "fpgm"), mean_one(expected), rtol=1e-5)


def test_fpgm_of_equal_units_is_zero_apart_from_rounding(model: onnx.ModelProto) -> None:
    for t in model.graph.initializer:
        if t.name in ("w1", "b1", "gamma", "beta"):
            a = numpy_helper.to_array(t)
            t.CopyFrom(numpy_helper.from_array(np.repeat(a[:1], UNITS, 0), t.name))
    assert np.all(np.isfinite(found(model, "fpgm")))


def test_random_is_reproducible_by_its_seed(model: onnx.ModelProto) -> None:
    assert np.array_equal(found(model, "random", seed=1), found(model, "random", seed=1))
    assert not np.array_equal(found(model, "random", seed=1), found(model, "random", seed=2))


@pytest.mark.parametrize("name", [n for n in IMPORTANCE if n not in CALIBRATED])
def test_scores_have_mean_one_and_are_not_negative(model: onnx.ModelProto, name: str) -> None:
    values = found(model, name)
    assert values.shape == (UNITS,) and values.mean() == pytest.approx(1) and values.min() >= 0


@pytest.mark.parametrize("name", ["l1", "l2", "bn", "fpgm"])
def test_scores_do_not_depend_on_the_scale_of_a_layer(name: str) -> None:
    text = "(float[N,5] x) => (float[N,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }"
    rng = np.random.default_rng(0)
    w1, w2 = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal((8, 4)).astype(np.float32)
    small, large = from_text(text, w1=w1, w2=w2), from_text(text, w1=w1 * 64, w2=w2 * 64)
    np.testing.assert_allclose(found(small, name), found(large, name), rtol=1e-6)


def test_a_criterion_of_the_user(model: onnx.ModelProto) -> None:
    analysis = analyse(load(model))

    def last_is_best(slices: Slices, rng: np.random.Generator) -> np.ndarray:
        return np.arange(slices.units, dtype=float)

    values = scores(analysis, list(analysis.groups), last_is_best)["g0"]
    np.testing.assert_allclose(values, np.arange(UNITS) / np.arange(UNITS).mean())


def test_a_group_without_any_signal_and_one_with_nan_stay_usable(model: onnx.ModelProto) -> None:
    analysis = analyse(load(model))
    zeros = scores(analysis, list(analysis.groups), lambda s, r: np.zeros(s.units))["g0"]
    assert np.array_equal(zeros, np.ones(UNITS))
    broken = scores(analysis, list(analysis.groups), lambda s, r: np.where(np.arange(s.units) == 3, np.nan, 1.0))["g0"]
    assert np.all(np.isfinite(broken)) and broken[3] == 0


def test_an_unknown_name_is_refused_with_those_that_exist(model: onnx.ModelProto) -> None:
    with pytest.raises(UsageError, match="l1, l2"):
        found(model, "magic")


class TestUnits:
    """Units whose numbers lie scattered over an axis."""

    def test_every_index_knows_its_unit(self) -> None:
        a, b = Atom(3), Atom(2)
        assert unit_of(product(a, b), a).tolist() == [0, 0, 1, 1, 2, 2]
        assert unit_of(product(a, b), b).tolist() == [0, 1, 0, 1, 0, 1]
        assert unit_of(sum_of(b, a, b), b).tolist() == [0, 1, -1, -1, -1, 0, 1]
        assert unit_of(sum_of(product(b, a), a), a).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]

    def test_heads_and_gates_are_gathered_over_all_their_places(self) -> None:
        """An LSTM's unit k is row k of every gate of W and R, and column k of R."""
        model = from_text(
            """(float[7,N,5] x) => (float[7,N,4] y) {
                h = LSTM<hidden_size=6>(x, w, r)
                s = Squeeze(h, one)
                y = MatMul(s, w2)
            }""",
            w=(1, 24, 5),
            r=(1, 24, 6),
            w2=(6, 4),
            one=np.array([1]),
        )
        w = weights(model)
        expected = (
            np.abs(w["w"][0]).reshape(4, 6, 5).sum((0, 2))
            + np.abs(w["r"][0]).reshape(4, 6, 6).sum((0, 2))
            + np.abs(w["r"][0]).sum(0)
            + np.abs(w["w2"]).sum(1)
        )
        np.testing.assert_allclose(found(model, "l1"), mean_one(expected), rtol=1e-6)

    def test_a_shared_parameter_counts_once(self) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
                a = MatMul(x, w1)
                p = Add(a, b)
                q = Add(p, b)
                y = MatMul(q, w2)
            }""",
            w1=(5, 8),
            b=(8,),
            w2=(8, 4),
        )
        w = weights(model)
        expected = np.abs(w["w1"]).sum(0) + np.abs(w["b"]) + np.abs(w["w2"]).sum(1)
        np.testing.assert_allclose(found(model, "l1"), mean_one(expected), rtol=1e-6)


def test_weights_larger_than_a_reading_block_are_summed_whole() -> None:
    """Rows are read in blocks of about four million numbers."""
    model = from_text(
        "(float[N,3000] x) => (float[N,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }", w1=(3000, 3000), w2=(3000, 4)
    )
    w = weights(model)
    expected = np.sqrt((w["w1"] ** 2).sum(0) + (w["w2"] ** 2).sum(1))
    np.testing.assert_allclose(found(model, "l2"), mean_one(expected), rtol=1e-6)
