"""A folder of image files as records: decoded as they are asked for, in a few threads.

Subfolders are classes: sorted by name, they give the int64 target `label`. A folder without any gives none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.data.files import natural
from onnxprune.data.fit import Fit, Rows
from onnxprune.data.preprocess import Preprocess, channel_axis
from onnxprune.data.records import counted
from onnxprune.errors import DataError

__all__ = ["SUFFIXES", "ImageRecords", "images_in"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def images_in(folder: Path, *, deep: bool) -> list[Path]:
    """Image files of a folder, those of its subfolders too where `deep`, in the order of their names."""
    found = folder.rglob("*") if deep else folder.iterdir()
    files = (f for f in found if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file())
    return sorted(files, key=lambda f: (str(f.parent), natural(f)))


class ImageRecords:
    """One sample a file; see the module. Raises DataError where Pillow is not installed."""

    block = 1

    def __init__(self, folder: Path, fit: Fit) -> None:
        self._pillow = _pillow()
        if len(fit.names) > 1:
            raise DataError(
                f"{folder} holds images, which are one input, and the model has {len(fit.names)}",
                "write a function that yields dicts, and give it as FILE.py:NAME",
            )
        self._fit = fit
        self._port = fit.signature.inputs[0]
        shape = self._port.shape
        if shape is None or len(shape) not in (3, 4):
            raise DataError(
                f"{folder} holds images, and input '{self._port.name}' wants {self._port}",
                "images are for inputs of shape (N,C,H,W), (N,H,W,C) or (N,H,W)",
            )
        self._axis = channel_axis(self._port)
        channels = 1 if self._axis is None else shape[self._axis] or 3
        if channels not in (1, 3, 4):
            raise DataError(
                f"{folder} holds images, and input '{self._port.name}' wants {channels} channels", "they give 1, 3 or 4"
            )
        self._mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        self._preprocess: Preprocess = fit.preprocess
        self._list(folder)

    def _list(self, folder: Path) -> None:
        flat = images_in(folder, deep=False)
        folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
        each = [images_in(f, deep=True) for f in folders]
        classes = folders if any(each) else []
        if flat and classes:
            raise DataError(
                f"{folder} holds images beside subfolders with images ('{classes[0].name}')",
                "put every image into a subfolder named as its class, or give a folder without subfolders",
            )
        if classes and {f.name.lower() for f in classes} <= _SPLITS:
            raise DataError(
                f"the subfolders of {folder} ({', '.join(f.name for f in classes)}) are no classes",
                f"give one of them, such as {classes[0]}",
            )
        self.classes = tuple(f.name for f in classes)
        self.files = flat or [file for files in each for file in files]
        self._labels = np.repeat(np.arange(len(each), dtype=np.int64), [len(f) for f in each]) if classes else None
        self.count = len(self.files)
        within = f" in {len(classes)} class{'es' if len(classes) > 1 else ''}" if classes else ""
        self.description = f"{folder.name} ({counted(self.count, 'image')}{within})"

    def rows(self, index: np.ndarray, key: tuple[int, int]) -> Iterator[Rows]:
        """See Records."""
        if len(index) < 2:
            yield from (self._row(int(i)) for i in index)
            return
        with ThreadPoolExecutor(min(8, len(index), os.cpu_count() or 1)) as pool:
            yield from pool.map(self._row, (int(i) for i in index))

    def _row(self, i: int) -> Rows:
        where = str(self.files[i])
        pixels = self._pixels(self.files[i])
        targets = {} if self._labels is None else {"label": self._labels[i]}
        return self._fit.admit({self._port.name: pixels}, targets, where)

    def _pixels(self, path: Path) -> np.ndarray:
        """A decoded, resized and cropped image: uint8 in the model's layout."""
        try:
            with self._pillow.open(path) as image:
                array = np.asarray(self._resized(image.convert(self._mode), path))
        except (OSError, ValueError, SyntaxError, self._pillow.DecompressionBombError) as error:
            raise DataError(
                f"{path} can't be read as an image: {str(error).replace(str(path), 'it')}", "repair it or take it out"
            ) from None
        if self._axis is None:
            return array
        array = array.reshape(*array.shape[:2], -1)
        if self._preprocess.channels == "bgr":
            array = array[..., [2, 1, 0, *range(3, array.shape[2])]]
        return np.moveaxis(array, -1, 0) if self._axis == 1 else array

    def _resized(self, image: Any, path: Path) -> Any:
        size, crop = self._preprocess.size, self._preprocess.crop
        bilinear = self._pillow.Resampling.BILINEAR
        if isinstance(size, int):
            short = min(image.size)
            sides = (size, size) if crop is None else tuple(max(size, round(s * size / short)) for s in image.size)
            image = image.resize(sides, bilinear)
        elif size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], bilinear)
        if crop is None:
            return image
        height, width = crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        if left < 0 or top < 0:
            raise DataError(
                f"{path} is {image.height}x{image.width} pixels, too small for crop={height}x{width}",
                "resize first: --preprocess size=...,crop=...",
            )
        return image.crop((left, top, left + width, top + height))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("image files need Pillow, which is not installed", "pip install 'onnxprune[images]'") from None
    return Image
