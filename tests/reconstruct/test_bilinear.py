"""A matrix between two factors of a product: from moments per sample, as a solve over all products would give it."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.reconstruct.bilinear import Grams, bilinear, solve_bilinear

r = np.random.default_rng(5).standard_normal


def grams(samples: int, heads: int, width: int, whole: int, rows: int = 9) -> tuple[Grams, list[np.ndarray]]:
    """Of independent columns, of which the first `width` are kept."""
    wholes = [r((samples, heads, rows + n, whole)) for n in (0, 2)]
    given = [*(x[..., :width] for x in wholes), *wholes]
    found = Grams.zeros(heads, width)
    found.add(*(x[: samples // 2] for x in given))
    found.add(*(x[samples // 2 :] for x in given))
    return found, given


@pytest.mark.parametrize("size", [1e-3, 1e-1, 1.0])
def test_ridge_pulls_towards_the_identity(size):
    """As rows of their own: the penalty is r |A - I|^2, with r in units of the matrix's mean diagonal."""
    held, (q, k, whole_q, whole_k) = grams(6, 2, 3, 5)
    ((found, _),) = bilinear(held, [size])
    for h in range(2):
        matrix = np.einsum("bic,bjd->bijcd", q[:, h], k[:, h]).reshape(-1, 9)
        root = np.sqrt(size * np.square(matrix).sum() / 9)
        wanted = np.einsum("bic,bjc->bij", whole_q[:, h], whole_k[:, h]).reshape(-1)
        matrix, wanted = np.vstack([matrix, root * np.eye(9)]), np.concatenate([wanted, root * np.eye(3).reshape(-1)])
        best = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
        np.testing.assert_allclose(found[h].reshape(-1), best, rtol=0, atol=1e-8)


def test_conjugate_gradients_give_the_same(monkeypatch):
    held, _ = grams(7, 3, 6, 9)
    ridges = (1e-6, 1e-2, 1.0)
    dense = bilinear(held, ridges)
    monkeypatch.setattr("onnxprune.reconstruct.bilinear.DENSE", 1)
    for (a, _), (b, _) in zip(dense, bilinear(held, ridges), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)


def test_error_is_the_sum_of_squares():
    held, (q, k, whole_q, whole_k) = grams(5, 2, 3, 4)
    mixed = r((2, 3, 3))
    wanted = np.square(whole_q @ whole_k.swapaxes(2, 3) - q @ mixed @ k.swapaxes(2, 3)).sum()
    assert held.error(mixed) == pytest.approx(wanted, rel=1e-10)
    products = whole_q @ whole_k.swapaxes(2, 3)
    around = np.square(products - products.mean((0, 2, 3), keepdims=True)).sum()
    assert held.spread() == pytest.approx(around, rel=1e-10)


def test_what_is_no_better_on_samples_that_were_held_out_is_dropped():
    """One short sample and no ridge: exact there, and far off elsewhere."""
    fit, _ = grams(1, 1, 6, 8, rows=3)
    held, _ = grams(8, 1, 6, 8)
    found = solve_bilinear(fit, held, ridges=(0.0,))
    assert found.mode == "none" and found.after == found.before
    np.testing.assert_array_equal(found.mixed[0], np.eye(6))
