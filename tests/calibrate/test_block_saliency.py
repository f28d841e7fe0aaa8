"""Block saliency, against least squares by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.calibrate.saliency import RIDGE, Layer, greedy_saliency
from tests.calibrate.calibrated import calibration_of, outputs
from tests.graphs import from_text


def layer(rng: np.random.Generator, *, units: int, each: int, more: int = 0) -> Layer:
    """A reader of `units` units with `each` columns, and columns of no unit."""
    columns = rng.permutation(np.concatenate([np.repeat(np.arange(units), each), np.full(more, -1)]))
    rows = rng.standard_normal((200, len(columns))) @ rng.standard_normal((len(columns), len(columns)))
    return Layer(rng.standard_normal((5, len(columns))), np.cov(rows.T, bias=True), columns)


def error(reader: Layer, gone: list[int]) -> float:
    """Of the best weights without these units, relative to the output's variance; by lstsq on a square root."""
    covariance = reader.covariance + RIDGE * np.trace(reader.covariance) / len(reader.covariance) * np.eye(
        len(reader.covariance)
    )
    root = np.linalg.cholesky(covariance)  # |W root|^2 is the output's variance
    kept = ~np.isin(reader.units, gone)
    wanted = (reader.weight @ root).T
    found, *_ = np.linalg.lstsq(root[kept].T, wanted, rcond=None)
    rest = wanted - root[kept].T @ found
    return float(np.square(rest).sum() / np.einsum("op,pq,oq->", reader.weight, reader.covariance, reader.weight))


@pytest.mark.parametrize(("each", "more"), [(1, 0), (3, 0), (2, 4)])
def test_units_go_in_greedy_order_at_what_they_cost_all_readers(each: int, more: int) -> None:
    rng = np.random.default_rng(each)
    readers = [layer(rng, units=6, each=each, more=more), layer(rng, units=6, each=1)]
    found = greedy_saliency(readers, 6)
    gone: list[int] = []
    paid = before = 0.0
    for _ in range(6):
        left = [u for u in range(6) if u not in gone]
        totals = {u: sum(error(r, [*gone, u]) for r in readers) for u in left}
        chosen = min(totals, key=lambda u: totals[u])
        paid = max(paid, totals[chosen] - before)
        assert found[chosen] == pytest.approx(paid, rel=1e-8)
        before = totals[chosen]
        gone.append(chosen)


def test_of_two_equal_units_one_is_worthless_and_the_other_is_not() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 4))
    rows[:, 3] = rows[:, 1]
    found = greedy_saliency([Layer(rng.standard_normal((3, 4)), np.cov(rows.T, bias=True), np.arange(4))], 4)
    cheap, dear = sorted(found[[1, 3]])
    assert cheap < 1e-2 < 0.1 < dear


def test_covariances_are_those_of_what_a_convolution_sees() -> None:
    model = from_text(
        """(float[N,3,4,4] x) => (float[N,2,4,4] y) {
            a = Conv(x, w1, b1)
            r = Relu(a)
            y = Conv<pads=[1,1,1,1]>(r, w2)
        }""",
        w1=(5, 3, 1, 1),
        b1=(5,),
        w2=(2, 5, 3, 3),
    )
    data = {"x": np.random.default_rng(1).standard_normal((60, 3, 4, 4)).astype(np.float32)}
    calibration = calibration_of(model, data)
    (group,) = calibration.analysis.groups
    (r,) = outputs(model, data, "r")
    padded = np.pad(r, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 45)
    weight = calibration.analysis.graph.array("w2").reshape(2, 45).astype(np.float64)
    expected = greedy_saliency([Layer(weight, np.cov(rows.T, bias=True), np.repeat(np.arange(5), 9))], 5)
    np.testing.assert_allclose(calibration.saliencies[group.id], expected, rtol=1e-4)


def test_many_passes_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_text(
        """(float[N,7] x) => (float[N,2] y) {
            a = MatMul(x, w1)
            r = Relu(a)
            b = MatMul(r, w2)
            s = Relu(b)
            y = MatMul(s, w3)
        }""",
        w1=(7, 6),
        w2=(6, 8),
        w3=(8, 2),
    )
    data = {"x": np.random.default_rng(2).standard_normal((80, 7)).astype(np.float32)}
    once = calibration_of(model, data).saliencies
    monkeypatch.setattr("onnxprune.calibrate.saliency.MEMORY", 1)
    again = calibration_of(model, data).saliencies
    assert len(once) == 2
    for gid, found in once.items():
        np.testing.assert_array_equal(again[gid], found)
