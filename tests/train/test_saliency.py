"""Saliency: numbers by hand, and which way they point."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.train.saliency import SALIENCY, Statistics, per_family, per_network, saliency

FAMILIES = {"a": slice(0, 2), "b": slice(2, 5)}


def statistics(**changes: object) -> Statistics:
    values: dict[str, object] = {
        "norm": [3.0, 4.0, 1.0, 2.0, 2.0],
        "cosine": [0.5, -0.5, 0.0, 0.1, 0.0],
        "inner": [1.5, -2.0, 0.0, 0.2, 0.0],
        "inner_square": [4.0, 4.0, 1.0, 0.04, 0.0],
        "counts": [9.0, 16.0, 10.0, 10.0, 10.0],
    }
    values |= changes
    return Statistics(**{k: np.array(v, np.float64) for k, v in values.items()}, families=FAMILIES)  # type: ignore[arg-type]


def flat(found: dict[str, np.ndarray]) -> list[float]:
    assert list(found) == ["a", "b"] and [len(v) for v in found.values()] == [2, 3]
    return np.concatenate(list(found.values())).tolist()


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("norm", [3.0, 4.0, 1.0, 2.0, 2.0]),
        ("average", [1 / 3, 1 / 4, 0.1, 0.2, 0.2]),
        ("cosine", [0.5, 1.5, 1.0, 0.9, 1.0]),
        ("taylor", [1.5, 2.0, 0.0, 0.2, 0.0]),
        ("taylor2", [2.0, 2.0, 0.5, 0.02, 0.0]),
    ],
)
def test_criteria_by_hand(criterion: str, expected: list[float]) -> None:
    assert flat(saliency(statistics(), criterion)) == pytest.approx(expected)


def test_the_mixture_by_hand() -> None:
    s = statistics()
    parts = [[3, 4, 1, 2, 2], [1 / 3, 1 / 4, 0.1, 0.2, 0.2], [1.5, 0.5, 1.0, 1.1, 1.0], [1.5, 2, 0, 0.2, 0]]
    parts.append([2, 2, 0.5, 0.02, 0])
    network = sum(0.2 * np.array(p) / np.linalg.norm(p) for p in parts)
    assert flat(saliency(s, "mixture")) == pytest.approx(network.tolist())
    family = sum(
        0.2 * np.concatenate([np.array(p[:2]) / np.mean(p[:2]), np.array(p[2:]) / np.mean(p[2:])]) for p in parts
    )
    assert flat(saliency(s, "mixture", normalise=per_family)) == pytest.approx(family.tolist())


def test_dhspgs_score_turned_round_has_its_order() -> None:
    rng = np.random.default_rng(0)
    cosine, norm = rng.uniform(-0.3, 0.3, 5), rng.uniform(0.1, 2, 5)
    s = statistics(cosine=cosine, norm=norm)
    inverse = np.array([9.0, 16.0, 10.0, 10.0, 10.0]) / norm
    score = 0.5 * cosine / np.linalg.norm(cosine) + 0.5 * inverse / np.linalg.norm(inverse)
    found = np.array(flat(saliency(s, "dhspg")))
    assert np.argsort(found).tolist() == np.argsort(-score).tolist()
    assert (found > 0).all()


@pytest.mark.parametrize("criterion", [c for c in SALIENCY if c not in ("cosine",)])
@pytest.mark.parametrize("normalise", [per_network, per_family])
def test_a_unit_that_is_zero_matters_least(criterion: str, normalise: object) -> None:
    gone = {"norm": [3.0, 4.0, 0.0, 2.0, 2.0], "cosine": [0.5, -0.5, 0.0, 0.1, 0.2], "inner": [1.5, -2, 0, 0.2, 0.4]}
    gone["inner_square"] = [4.0, 4.0, 0.0, 0.04, 0.16]
    found = saliency(statistics(**gone), criterion, normalise=normalise)["b"]  # type: ignore[arg-type]
    assert np.isfinite(found).all() and found.argmin() == 0


@pytest.mark.parametrize("criterion", SALIENCY)
def test_of_two_units_that_differ_in_size_the_smaller_matters_less(criterion: str) -> None:
    """All statistics of a unit of twice the weights, with the same gradient."""
    s = statistics(
        norm=[2.0, 4.0, 1, 1, 1],
        cosine=[0.3, 0.3, 0, 0, 0],
        inner=[0.6, 1.2, 0, 0, 0],
        inner_square=[0.36, 1.44, 0, 0, 0],
        counts=[4.0] * 5,
    )
    small, large = saliency(s, criterion)["a"]
    assert small < large or criterion == "cosine"


@pytest.mark.parametrize("criterion", SALIENCY)
@pytest.mark.parametrize("normalise", [per_network, per_family])
def test_nothing_at_all_is_finite(criterion: str, normalise: object) -> None:
    nothing = {name: [0.0] * 5 for name in ("norm", "cosine", "inner", "inner_square", "counts")}
    assert np.isfinite(flat(saliency(statistics(**nothing), criterion, normalise=normalise))).all()  # type: ignore[arg-type]


def test_layers_of_another_scale_rank_alike_within_families() -> None:
    s = statistics()
    scaled = statistics(
        norm=[300.0, 400.0, 1, 2, 2], inner=[150.0, -200.0, 0, 0.2, 0], inner_square=[4e4, 4e4, 1, 0.04, 0]
    )
    before = flat(saliency(s, "mixture", normalise=per_family))
    assert flat(saliency(scaled, "mixture", normalise=per_family)) == pytest.approx(before)
    assert flat(saliency(scaled, "mixture")) != pytest.approx(flat(saliency(s, "mixture")), rel=0.01)


def test_a_function_may_be_given_and_an_unknown_name_is_refused() -> None:
    assert flat(saliency(statistics(), lambda s, normalise: s.counts)) == [9, 16, 10, 10, 10]
    with pytest.raises(UsageError, match="none of mixture, norm"):
        saliency(statistics(), "luck")
