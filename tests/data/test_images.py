"""Folders of image files: labels, sizes, colours, and what is said of folders that don't fit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from onnxprune import DataError, UsageError
from onnxprune.data import Port, Signature, open_data
from tests.data.ports import FLOAT, one

Image = pytest.importorskip("PIL.Image")

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, colour: object = RED, *, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> None:
    """An image of one colour; size: (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], colour).save(path)


def test_subfolders_are_classes_sorted_by_name(tmp_path: Path) -> None:
    for name, colour in (("dog", GREEN), ("cat", RED), ("eel", BLUE)):
        for k in (10, 9):
            save(tmp_path / name / f"{k}.png", colour)
    (tmp_path / "cat" / "readme.txt").write_text("no image")
    (tmp_path / ".git").mkdir()
    source = open_data(tmp_path, one(None, 3, 8, 6))
    assert (source.size, source.targets) == (6, ("label",))
    assert source.description == f"{tmp_path.name} (6 images in 3 classes)"
    (batch,) = source.batches(6)
    assert batch.targets["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.targets["label"].dtype == np.int64
    assert batch.inputs["x"].dtype == np.float32
    np.testing.assert_array_equal(batch.inputs["x"][:, :, 0, 0], np.repeat(np.eye(3), 2, axis=0))
    for shuffled in source.batches(2, shuffle=True):
        np.testing.assert_array_equal(shuffled.inputs["x"][:, :, 3, 3].argmax(1), shuffled.targets["label"])


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for k, name in enumerate(("a2", "a9", "a10")):
        save(tmp_path / f"{name}.bmp", (k, k, k))
    source = open_data(str(tmp_path), one(None, 3, None, None))
    assert (source.size, source.targets) == (3, ())
    (batch,) = source.batches(3)
    np.testing.assert_allclose(batch.inputs["x"][:, 0, 0, 0] * 255, [0, 1, 2], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "dtype", "preprocess", "pixel"),
    [
        ((None, 3, 8, 6), np.float32, None, [1, 0.2, 0]),
        ((None, 8, 6, 3), np.float32, None, [1, 0.2, 0]),
        ((None, 3, 8, 6), np.float32, "channels=bgr", [0, 0.2, 1]),
        ((None, 3, 8, 6), np.float32, "scale=1", [255, 51, 0]),
        ((None, 3, 8, 6), np.float32, "mean=0.5,std=0.5", [1, -0.6, -1]),
        ((None, 3, 8, 6), np.uint8, None, [255, 51, 0]),
        ((None, 8, 6, 3), np.uint8, "channels=bgr", [0, 51, 255]),
        ((None, 3, 8, 6), np.float16, None, [1, 0.2, 0]),
        ((None, 4, 8, 6), np.float32, None, [1, 0.2, 0, 1]),
        ((None, 1, 8, 6), np.uint8, None, [106]),  # 0.299 * 255 + 0.587 * 51
        ((None, 3, 4, 4), np.float32, None, [1, 0.2, 0]),  # resized to the model's size
    ],
)
def test_colours_come_as_the_model_takes_them(
    tmp_path: Path, model: tuple, dtype: type, preprocess: str | None, pixel: list[float]
) -> None:
    save(tmp_path / "a.png", (255, 51, 0))
    (batch,) = open_data(tmp_path, one(*model, dtype=dtype), preprocess=preprocess).batches(1)
    x = batch.inputs["x"]
    assert (x.shape[1:], x.dtype) == (model[1:], dtype)
    pixels = x[0] if model[1] not in (1, 3, 4) else np.moveaxis(x[0], 0, -1)
    for corner in (pixels[0, 0], pixels[-1, -1]):
        np.testing.assert_allclose(corner, pixel, atol=1e-3)


def test_rows_of_pixels_need_no_channel_axis(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 51, mode="L")
    (batch,) = open_data(tmp_path, one(None, 8, 6)).batches(1)
    assert batch.inputs["x"].shape == (1, 8, 6)
    np.testing.assert_allclose(batch.inputs["x"], 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("preprocess", "size"),
    [
        ("size=4", (4, 4)),
        ("size=4x5", (4, 5)),
        ("crop=4", (4, 4)),
        ("crop=2x6", (2, 6)),
        ("size=4,crop=3", (3, 3)),
        ("size=10x12,crop=10", (10, 10)),
        ("imagenet", (224, 224)),
        ("imagenet,size=6,crop=5", (5, 5)),
        (None, (8, 16)),
    ],
)
def test_sizes_are_height_by_width(tmp_path: Path, preprocess: str | None, size: tuple[int, int]) -> None:
    save(tmp_path / "a.png", size=(8, 16))
    (batch,) = open_data(tmp_path, one(None, 3, None, None), preprocess=preprocess).batches(1)
    assert batch.inputs["x"].shape[2:] == size


def test_the_crop_is_the_centre_of_an_image_whose_shorter_side_was_resized(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255  # the middle third
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for preprocess in ("crop=4", "size=4,crop=4"):
        (batch,) = open_data(tmp_path, one(None, 3, 4, 4), preprocess=preprocess).batches(1)
        assert batch.inputs["x"].min() == 1
    (batch,) = open_data(tmp_path, one(None, 3, 4, 4)).batches(1)
    assert batch.inputs["x"].min() < 0.1


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        (one(None, 10), r"holds images, and input 'x' wants \(N,10\)"),
        (one(None, 7, 8, 8), "wants 7 channels"),
        (Signature((Port("a", FLOAT, (None, 3, 8, 6)), Port("b", FLOAT, (None, 1))), ()), "the model has 2"),
    ],
)
def test_models_that_take_no_images_are_refused(tmp_path: Path, signature: Signature, message: str) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        open_data(tmp_path, signature)


def test_folders_that_are_arranged_otherwise_are_refused(tmp_path: Path) -> None:
    signature = one(None, 3, 8, 6)
    save(tmp_path / "splits" / "train" / "cat" / "a.png")
    save(tmp_path / "splits" / "val" / "cat" / "a.png")
    with pytest.raises(DataError, match=r"\(train, val\) are no classes") as caught:
        open_data(tmp_path / "splits", signature)
    assert caught.value.hint.endswith("train")
    save(tmp_path / "mixed" / "a.png")
    save(tmp_path / "mixed" / "cat" / "a.png")
    with pytest.raises(DataError, match="images beside subfolders with images"):
        open_data(tmp_path / "mixed", signature)
    with pytest.raises(UsageError, match="image files have none"):
        open_data(tmp_path / "splits" / "train", signature, preprocess="layout=nhwc")
    with pytest.raises(DataError, match=r"a.png is one image"):
        open_data(tmp_path / "mixed" / "a.png", signature)


def test_images_that_differ_in_size_need_one(tmp_path: Path) -> None:
    save(tmp_path / "a.png", size=(8, 6))
    save(tmp_path / "b.png", size=(6, 6))
    source = open_data(tmp_path, one(None, 3, None, None))
    assert [b.inputs["x"].shape for b in source.batches(1)] == [(1, 3, 8, 6), (1, 3, 6, 6)]
    with pytest.raises(DataError, match=r"'x' is \(3,8,6\) in .*a.png and \(3,6,6\) in .*b.png"):
        list(source.batches(2))
    with pytest.raises(DataError, match=r"a.png is 8x6 pixels, too small for crop=8x8"):
        open_data(tmp_path, one(None, 3, None, None), preprocess="crop=8")


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:100])
    (tmp_path / "c.jpg").write_text("no image")
    source = open_data(tmp_path, one(None, 3, 8, 6))
    for start, name in ((1, "b.png"), (2, "c.jpg")):
        with pytest.raises(DataError, match=f"{name} can't be read as an image"):
            next(source.batches(1, start=start))


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="Pillow") as caught:
        open_data(tmp_path, one(None, 3, 8, 6))
    assert caught.value.hint == "pip install 'onnxprune[images]'"
