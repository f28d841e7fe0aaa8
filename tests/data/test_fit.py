"""What is said of data that does not fit the model, in words that a newcomer understands."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnxprune import DataError
from onnxprune.data import Port, Signature, open_data
from tests.data.ports import FLOAT, INT, marked, one


@pytest.mark.parametrize(
    ("model", "data", "gives", "hint"),
    [
        ((None, 3, 640, 640), (2, 640, 640, 3), "(2,640,640,3)", "NHWC data? try --preprocess layout=nhwc"),
        ((None, 640, 640, 3), (2, 3, 640, 640), "(2,3,640,640)", "NCHW data? try --preprocess layout=nchw"),
        ((None, 1, 28, 28), (60, 28, 28), "(60,28,28)", "the channel axis is missing: give np.expand_dims(x, -3)"),
        ((None, 28, 28, 1), (60, 28, 28), "(60,28,28)", "the channel axis is missing: give np.expand_dims(x, -1)"),
        ((None, 784), (60, 28, 28), "(60,28,28)", "the same number of values: x.reshape(-1, 784)"),
        ((None, 3, 224, 224), (2, 3, 32, 32), "(2,3,32,32)", "takes 224x224 pixels only"),
        ((None, 16), (2, 17), "(2,17)", "batches of shape (N,16), or samples of shape (16)"),
        ((None, None, 16), (4, 5, 15), "(4,5,15)", "batches of shape (N,?,16), or samples of shape (?,16)"),
    ],
)
def test_wrong_shapes_show_expected_and_found(model: tuple, data: tuple, gives: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        open_data({"x": np.broadcast_to(np.float32(0), data)}, one(*model))
    wants = str(model).replace("None", "N", 1).replace("None", "?").replace(" ", "")
    assert str(caught.value) == f"input 'x' wants {wants}, the dict given as data gives {gives}"
    assert hint in caught.value.hint


def test_a_sample_in_the_wrong_layout_is_shown_as_it_is() -> None:
    with pytest.raises(DataError, match=r"wants \(N,3,8,8\), .*\[0\] gives \(8,8,3\)") as caught:
        open_data([np.zeros((8, 8, 3), np.float32)], one(None, 3, 8, 8))
    assert caught.value.hint == "NHWC data? try --preprocess layout=nhwc"


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (np.float32, np.float64),
        (np.float32, np.float16),
        (np.float64, np.float32),
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (np.int64, np.int32),
        (np.int64, np.uint8),
        (np.int32, np.int16),
        (np.float32, np.dtype(">f4")),
        (object, np.dtype("U3")),
        (bool, bool),
    ],
)
def test_casts_that_lose_nothing_are_silent(wanted: object, found: object) -> None:
    x = np.array([[0, 1], [1, 0]]).astype(found)
    (batch,) = open_data(x, one(None, 2, dtype=wanted)).batches(2)
    assert batch.inputs["x"].dtype == np.dtype(wanted)
    assert batch.inputs["x"].tolist() == x.tolist()


@pytest.mark.parametrize(
    ("wanted", "found", "hint"),
    [
        (np.float32, np.uint8, "try --preprocess scale=1/255"),
        (np.float32, np.int64, "x.astype(np.float32)"),
        (np.int64, np.float32, "x.astype(np.int64)"),
        (np.int32, np.int64, "x.astype(np.int32)"),
        (np.uint8, np.float32, "whole numbers 0 to 255"),
        (np.int64, bool, "x.astype(np.int64)"),
        (bool, np.int64, "x.astype(np.bool)"),
    ],
)
def test_other_casts_are_left_to_the_user(wanted: type, found: type, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        open_data(np.zeros((2, 2), found), one(None, 2, dtype=wanted))
    message = f"input 'x' wants {np.dtype(wanted)}, the ndarray given as data gives {np.dtype(found)}"
    assert str(caught.value) == message
    assert hint in caught.value.hint


def test_scaling_is_refused_where_the_model_takes_bytes() -> None:
    with pytest.raises(DataError, match="wants uint8, and --preprocess scale, mean and std make floats"):
        open_data(np.zeros((2, 3, 4, 4), np.uint8), one(None, 3, 4, 4, dtype=np.uint8), preprocess="scale=1/255")


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        (["pixel_value", "label"], "the model's input is 'pixel_values'; .* gives 'pixel_value', 'label'", "rename 'pixel_value' to 'pixel_values'"),
        (["a"], "gives 'a'", "rename 'a' to 'pixel_values'"),
        (["a", "b"], "gives 'a', 'b'", "'pixel_values' is missing"),
        ([], "gives nothing", "'pixel_values' is missing"),
    ],
)  # fmt: skip
def test_wrong_names_are_listed_with_the_closest(names: list[str], message: str, hint: str) -> None:
    signature = Signature((Port("pixel_values", FLOAT, (None, 2)),), ())
    with pytest.raises(DataError, match=message) as caught:
        open_data({n: marked(2, 2) for n in names}, signature)
    assert hint in caught.value.hint


def test_inputs_of_different_lengths_are_named() -> None:
    signature = Signature((Port("a", FLOAT, (None, 2)), Port("b", INT, (None,))), ())
    with pytest.raises(DataError, match="3 for 'a', 4 for 'b'"):
        open_data({"a": marked(3, 2), "b": np.arange(4)}, signature)
    with pytest.raises(DataError, match="gives 3 samples, but 4 rows for the target 'label'"):
        open_data({"a": marked(3, 2), "b": np.arange(3), "label": np.arange(4)}, signature)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "an infinite value"), (-np.inf, "an infinite")])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_sample_that_is_not_finite_is_numbered(value: float, word: str, dtype: type) -> None:
    x = marked(10, 3, dtype=dtype)
    x[7, 1] = value
    source = open_data(x, one(None, 3, dtype=dtype))
    with pytest.raises(DataError, match=f"sample 7: input 'x' holds {word}"):
        list(source.batches(4, shuffle=True))
    assert len(list(source.batches(7, drop_last=True))) == 1


def test_numbers_whose_sum_overflows_are_finite() -> None:
    x = np.full((4, 8), np.finfo(np.float32).min)
    assert len(list(open_data(x, one(None, 8)).batches(4))) == 1


def test_what_float32_cannot_hold_is_told() -> None:
    with pytest.raises(DataError, match="holds an infinite value"):
        list(open_data(np.array([[1e300]]), one(None, 1)).batches(1))


def test_a_stack_of_feeds_is_merged_where_batches_are_free_and_else_kept() -> None:
    stack = marked(6, 1, 2)
    assert [b.size for b in open_data(stack, one(None, 2)).batches(4)] == [4, 2]
    source = open_data(marked(6, 4, 2), one(4, 2))
    shapes = {b.inputs["x"].shape for b in source.batches(1, shuffle=True)}
    assert (source.size, shapes) == (6, {(4, 2)})


def test_models_without_inputs_take_no_data() -> None:
    with pytest.raises(DataError, match="no inputs"):
        open_data({}, Signature((), ()))


def test_an_input_of_unknown_rank_takes_any_batch() -> None:
    signature = Signature((Port("x", FLOAT, None),), ())
    assert [b.inputs["x"].shape for b in open_data(marked(3, 2, 2), signature).batches(2)] == [(2, 2, 2), (1, 2, 2)]
