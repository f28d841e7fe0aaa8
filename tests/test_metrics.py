"""Metrics of small arrays whose values are plain to see."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxprune.errors import DataError, UsageError
from onnxprune.metrics import METRICS, Drop, Metric, parse_max_drop, parse_metric
from onnxprune.model.outputs import OutputKind

LOGITS = OutputKind("y", "logits", (1,))
VALUES = OutputKind("y", "values")
SIGMOID = OutputKind("y", "sigmoid")
LABELS = OutputKind("y", "discrete")
SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.0, 0.1, 0.9], [0.4, 0.4, 0.2]], np.float32)  # 1, 0, 2, 0


def measure(name: str, kind: OutputKind, *batches: tuple[object, object]) -> float:
    metric = METRICS[name]
    assert metric.meter is not None
    meter = metric.meter(kind, "t")
    for output, reference in batches:
        meter.add(np.asarray(output), np.asarray(reference))
    return meter.result()


# classes


def test_top1_is_the_share_of_right_classes() -> None:
    assert measure("top1", LOGITS, (SCORES, [1, 0, 2, 0])) == 1.0
    assert measure("top1", LOGITS, (SCORES, [1, 2, 2, 1])) == 0.5
    assert measure("top1", VALUES, (SCORES, [[1], [2], [2], [1]])) == 0.5


def test_targets_may_be_scores_and_labels_may_be_missing() -> None:
    assert measure("top1", LOGITS, (SCORES, [[0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]])) == 0.75
    assert measure("top1", LOGITS, (SCORES, [1, 2, -1, -100])) == 0.5
    with pytest.raises(DataError, match="no target names a class"):
        measure("top1", LOGITS, (SCORES, [-1, -1, -1, -1]))


def test_top5_counts_the_first_five() -> None:
    scores = np.array([[6, 5, 4, 3, 2, 1, 0]] * 4, np.float32)
    assert measure("top5", LOGITS, (scores, [0, 4, 5, 6])) == 0.5
    assert measure("top1", LOGITS, (scores, [0, 4, 5, 6])) == 0.25


def test_equal_scores_rank_by_their_index() -> None:
    """A network that gives the same score to all classes is right by accident only."""
    flat = np.zeros((10, 10), np.float32)
    assert measure("top1", LOGITS, (flat, np.arange(10))) == 0.1
    assert measure("top5", LOGITS, (flat, np.arange(10))) == 0.5


def test_nan_is_never_right() -> None:
    scores = SCORES.copy()
    scores[0, 1] = np.nan  # where argmax would look
    scores[1, 2] = np.nan
    assert measure("top1", LOGITS, (scores, [1, 0, 2, 0])) == 0.5
    assert measure("agreement", LOGITS, (scores, SCORES)) == 0.5


def test_pixels_have_a_class_each() -> None:
    image = np.array([[[[0.9, 0.2]], [[0.1, 0.8]]]])  # (1, 2 classes, 1, 2): classes 0, 1
    assert measure("top1", VALUES, (image, [[[0, 0]]])) == 0.5
    assert measure("top1", OutputKind("y", "values", (3,)), (image.transpose(0, 2, 3, 1), [[[0, 0]]])) == 0.5
    assert measure("agreement", OutputKind("y", "probabilities", (1,)), (image, image[..., ::-1])) == 0.0


def test_one_score_is_two_classes() -> None:
    assert measure("top1", SIGMOID, ([[0.4], [0.6]], [0, 1])) == 1.0
    assert measure("top1", VALUES, ([[0.4], [-0.6]], [[0], [0]])) == 0.5
    assert measure("top1", SIGMOID, ([[np.nan]], [0])) == 0.0


def test_a_model_may_name_the_class_itself() -> None:
    assert measure("top1", LABELS, ([3, 1], [3, 2])) == 0.5
    assert measure("top1", LABELS, ([[3], [1]], [3, 1])) == 1.0
    assert measure("agreement", LABELS, (["cat", "dog"], ["cat", "cow"])) == 0.5


def test_an_old_softmax_over_several_axes_is_one_choice() -> None:
    kind = OutputKind("y", "probabilities", (1, 2))
    assert measure("top1", kind, ([[[0.1, 0.2], [0.6, 0.1]]], [2])) == 1.0
    assert measure("agreement", kind, ([[[0.1, 0.2], [0.6, 0.1]]], [[[0.1, 0.6], [0.2, 0.1]]])) == 0.0


@pytest.mark.parametrize(
    "name, target, error, message",
    [
        ("top1", [1.0, 0.0, 2.0, 0.0], DataError, r"'t' should hold integer class indices for output 'y' \(4,3\)"),
        ("top1", [1, 0], DataError, r"found int64 \(2\)"),
        ("top1", [1, 0, 3, 0], DataError, "'t' holds class 3, output 'y' has classes 0 to 2"),
        ("top5", [1, 0, 2, 0], UsageError, "has 3 classes, of which the first 5 are always right"),
        ("mse", [1, 0, 2, 0], DataError, r"'t' should be \(4,3\) as output 'y', found \(4\)"),
        ("agreement", [[1.0, 0.0]], DataError, r"'y' is \(4,3\), the original's is \(1,2\)"),
    ],
)
def test_what_does_not_fit_is_named(name: str, target: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure(name, LOGITS, (SCORES, target))


# numbers


def test_mse_is_the_mean_over_all_numbers() -> None:
    assert measure("mse", VALUES, ([[1.0, 2.0]], [[1.0, 4.0]]), ([[0.0, 0.0]] * 3, [[2.0, 0.0]] * 3)) == 2.0
    assert measure("mse", VALUES, ([[1.0], [2.0]], [1, 0])) == 2.0


def test_psnr_is_the_mean_over_images() -> None:
    white = np.ones((1, 1, 2, 2))
    assert measure("psnr", VALUES, (white * 0.9, white)) == pytest.approx(20.0)  # 10 log10(1 / 0.01)
    assert measure("psnr", VALUES, (white * 0.9, white), (white * 0.99, white)) == pytest.approx(30.0)
    assert measure("psnr", VALUES, (white * 229.5, (white * 255).astype(np.uint8))) == pytest.approx(20.0)
    assert measure("psnr", VALUES, (white * -0.8, white * -1)) == pytest.approx(20.0)  # -1..1 is 2 wide
    assert measure("psnr", VALUES, (white, white), (white * 0.9, white)) == pytest.approx(60.0)  # 100 dB and 20
    with pytest.raises(DataError, match="it runs from 0 to 700"):
        measure("psnr", VALUES, (white, white * 0), (white, white * 700))


def test_agreement_of_numbers_is_one_minus_the_relative_error() -> None:
    original = np.array([[0.0, 8.0]])  # 4 from its mean each: norm sqrt(32)
    assert measure("agreement", VALUES, (original, original)) == 1.0
    # |(1, 1)| = sqrt(2), a quarter of that
    assert measure("agreement", VALUES, (original + 1, original)) == pytest.approx(0.75)
    assert measure("agreement", VALUES, (original * -9, original)) == 0.0
    # over two batches: sqrt(2 / (2 * 25 + 2 * 9)) about the mean 5 of 0, 8, 2, 10
    assert measure("agreement", VALUES, (original + 1, original), (original + 2, original + 2)) == pytest.approx(
        1 - math.sqrt(2 / 68)
    )
    five = np.full((1, 4), 5.0)  # constant, so relative to itself
    assert measure("agreement", VALUES, (five * 1.1, five)) == pytest.approx(0.9)
    assert measure("agreement", VALUES, (five, five * 0)) == 0.0


@pytest.mark.parametrize("name", ["top1", "top5", "mse", "psnr", "agreement"])
def test_batches_of_any_size_give_the_same_number(name: str) -> None:
    rng = np.random.default_rng(0)
    kind = VALUES if name in ("mse", "psnr") else LOGITS
    output = rng.random((12, 8))
    target = rng.integers(0, 8, 12) if name in ("top1", "top5") else rng.random((12, 8))
    whole = measure(name, kind, (output, target))
    parts = [(output[a:b], target[a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert measure(name, kind, *parts) == pytest.approx(whole, rel=1e-12)
    assert measure(name, kind, parts[0]) != pytest.approx(whole, rel=1e-3)


# names


def test_metrics_go_by_name() -> None:
    assert parse_metric("psnr") is METRICS["psnr"]
    assert not METRICS["mse"].higher_is_better and METRICS["mse"].needs_targets
    assert METRICS["agreement"].needs_original and METRICS["agreement"].is_fraction
    with pytest.raises(UsageError, match="'accuracy' is no metric"):
        parse_metric("accuracy")


# drops


def test_fractions_drop_by_points() -> None:
    drop = Drop(0.99, 0.98, METRICS["top1"])
    assert drop.amount == pytest.approx(0.01)
    assert drop.within(0.01) and not drop.within(0.0099)  # 0.99 - 0.98 is a little more than 0.01 in floating point
    assert Drop(0.5, 0.6, METRICS["top1"]).within(0.0)


def test_other_metrics_drop_relative_to_before() -> None:
    assert Drop(40.0, 39.0, METRICS["psnr"]).amount == pytest.approx(0.025)
    assert Drop(0.2, 0.3, METRICS["mse"]).amount == pytest.approx(0.5)
    assert Drop(0.2, 0.1, METRICS["mse"]).amount == pytest.approx(-0.5)
    negative = Metric("log", True, False, False, False)
    assert Drop(-2.0, -3.0, negative).amount == pytest.approx(0.5)


def test_a_drop_from_nothing_or_to_nan_is_never_within() -> None:
    assert Drop(0.0, 0.0, METRICS["mse"]).within(0.0)
    assert not Drop(0.0, 1e-9, METRICS["mse"]).within(10.0)
    assert not Drop(0.9, math.nan, METRICS["top1"]).within(1.0)
    assert not Drop(30.0, math.nan, METRICS["psnr"]).within(1.0)


@pytest.mark.parametrize(
    "text, value",
    [("1%", 0.01), ("0.5 %", 0.005), ("1pp", 0.01), ("0.02", 0.02), ("0", 0.0), (".5", 0.5), ("1e-3", 0.001)],
)
def test_a_limit_is_a_percentage_or_a_fraction(text: str, value: float) -> None:
    assert parse_max_drop(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "one", "-1%", "1.5.2", "5 dB", "nan", "%"])
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no amount"):
        parse_max_drop(text)


def test_a_limit_of_one_is_taken_for_a_slip() -> None:
    with pytest.raises(UsageError, match="would be 100%") as caught:
        parse_max_drop("1")
    assert caught.value.hint == "write 1% if that is meant"
