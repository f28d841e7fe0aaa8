"""What --preprocess says, what it refuses, and what it computes."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune import UsageError
from onnxprune.data import Port, Preprocess, Signature, open_data
from tests.data.ports import one


def test_every_key_is_read() -> None:
    read = Preprocess.parse("size=224x320, crop=200,mean=0.5/0.25/1,std=2,scale=1/255,layout=NHWC,channels=bgr")
    assert read == Preprocess((224, 320), (200, 200), (0.5, 0.25, 1.0), (2.0,), 1 / 255, "nhwc", "bgr")
    assert Preprocess.parse("size=224").size == 224
    assert Preprocess.parse("") == Preprocess()


def test_imagenet_is_a_shorthand_that_single_keys_override() -> None:
    read = Preprocess.parse("imagenet,std=1")
    assert (read.mean, read.std, read.imagenet) == ((0.485, 0.456, 0.406), (1.0,), True)


@pytest.mark.parametrize(
    "text",
    [
        "resize=3",
        "size",
        "size=",
        "size=0",
        "size=-3",
        "size=1x2x3",
        "size=big",
        "mean=a",
        "mean=nan",
        "std=0",
        "std=1/0/1",
        "scale=1/0",
        "scale=0",
        "scale=1/2/3",
        "layout=hwc",
        "channels=grey",
        "imagenet=1",
        "size=2,size=3",
    ],
)
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Preprocess.parse(text)
    assert "size=224" in caught.value.hint


@pytest.mark.parametrize(
    ("model", "data", "layout"),
    [
        ((None, 3, 4, 5), (2, 4, 5, 3), "nhwc"),
        ((None, 4, 5, 3), (2, 3, 4, 5), "nchw"),
        ((None, 3, 4, 5), (2, 3, 4, 5), "nchw"),
        ((None, 4, 5, 3), (2, 4, 5, 3), "nhwc"),
        ((None, 3, 4, 4), (2, 4, 4, 3), "nhwc"),
    ],
)
def test_layout_is_that_of_the_data(model: tuple, data: tuple, layout: str) -> None:
    x = np.random.default_rng(0).random(data, np.float32)
    (batch,) = open_data({"x": x}, one(*model), preprocess=f"layout={layout}").batches(2)
    channels_first = np.moveaxis(x, 3, 1) if layout == "nhwc" else x
    wanted = channels_first if model[1] == 3 else np.moveaxis(channels_first, 1, 3)
    np.testing.assert_array_equal(batch.inputs["x"], wanted)


def test_layout_holds_for_single_samples_too() -> None:
    samples = [np.random.default_rng(k).random((4, 5, 3), np.float32) for k in range(3)]
    (batch,) = open_data(samples, one(None, 3, 4, 5), preprocess="layout=nhwc").batches(3)
    np.testing.assert_array_equal(batch.inputs["x"], np.stack(samples).transpose(0, 3, 1, 2))


def test_values_are_scaled_then_normalised_per_channel() -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)
    text = "scale=1/255,mean=0.1/0.2/0.3,std=0.5/0.25/0.125"
    (batch,) = open_data({"x": x}, one(None, 3, 4, 5), preprocess=text).batches(2)
    by_hand = np.empty(x.shape)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 0.125)]):
        by_hand[:, channel] = (x[:, channel] / 255 - mean) / std
    assert batch.inputs["x"].dtype == np.float32
    np.testing.assert_allclose(batch.inputs["x"], by_hand, rtol=1e-5, atol=1e-6)


def test_imagenet_takes_bytes_for_pixels_and_floats_for_zero_to_one() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 5), np.uint8)
    given = [pixels, (pixels / 255).astype(np.float32)]
    results = [
        next(open_data({"x": x}, one(None, 3, 4, 5), preprocess="imagenet").batches(1)).inputs["x"] for x in given
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert results[0].min() < -1


def test_only_image_inputs_are_normalised_where_there_are_any() -> None:
    signature = Signature((*one(None, 3, 2, 2).inputs, Port("weight", np.dtype(np.float32), (None, 1))), ())
    data = {"x": np.ones((1, 3, 2, 2), np.float32), "weight": np.ones((1, 1), np.float32)}
    (batch,) = open_data(data, signature, preprocess="scale=4").batches(1)
    assert (batch.inputs["x"].max(), batch.inputs["weight"].max()) == (4, 1)
    (batch,) = open_data(np.ones((1, 5)), one(None, 5), preprocess="scale=4,mean=1").batches(1)
    assert batch.inputs["x"].tolist() == [[3] * 5]


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("size=4", (None, 3, 4, 4), "works on image files"),
        ("crop=4", (None, 3, 4, 4), "works on image files"),
        ("channels=bgr", (None, 3, 4, 4), "works on image files"),
        ("layout=nhwc", (None, 4), "rank 4"),
        ("mean=1/2/3", (None, 1, 4, 4), "3 values, and input 'x' has 1 channel"),
        ("mean=1/2/3", (None, 3), "3 values, and input 'x' is no image"),
    ],
)
def test_what_does_not_apply_to_arrays_is_said(text: str, shape: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_data({"x": np.ones((2, *shape[1:]), np.float32)}, one(*shape), preprocess=text)
