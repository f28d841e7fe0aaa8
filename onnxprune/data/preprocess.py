"""`--preprocess`: what is done to images, and to arrays, before the model sees them.

size=224 | size=256x320   resize. With crop, one number is the length of the shorter side; without, both sides.
                          Two numbers are height x width. Default: the model's own size, where that is fixed
crop=224 | crop=224x320   cut out the centre
scale=1/255               multiply. Default: 1/255 for images, unless the model takes uint8; nothing for arrays
mean=0.485/0.456/0.406    subtract, after scaling, per channel or one number for all
std=0.229/0.224/0.225     divide by
layout=nchw | nhwc        the layout of the *data* (arrays); the model's own is seen from its input
channels=rgb | bgr        the order of colours that the model wants (images)
imagenet                  size=256,crop=224 and the usual mean, std and scale; each may be overridden
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxprune.data.signature import Port
from onnxprune.errors import UsageError

__all__ = ["Preprocess", "channel_axis"]

_KEYS = ("size", "crop", "mean", "std", "scale", "layout", "channels", "imagenet")
_CHOICES = {"layout": ("nchw", "nhwc"), "channels": ("rgb", "bgr")}
_HINT = "for example size=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225 or layout=nhwc,scale=1/255"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Size = int | tuple[int, int]


def channel_axis(port: Port) -> int | None:
    """The axis of an image input's channels: 1 or 3, whichever has an image's channel count, 1 in doubt; None where
    the input is no image (its rank is not 4)."""
    if port.shape is None or len(port.shape) != 4:
        return None
    return next((axis for counts in ((1, 3), (4,)) for axis in (1, 3) if port.shape[axis] in counts), 1)


@dataclass(frozen=True, slots=True)
class Preprocess:
    """The parsed option; None is 'not given'. Sizes are (height, width), or one number."""

    size: Size | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: str | None = None
    channels: str | None = None
    imagenet: bool = False

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """From comma separated KEY=VALUE. Raises UsageError."""
        values: dict[str, Any] = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = (part.strip().lower() for part in entry.partition("="))
            if key not in _KEYS or (key == "imagenet") == bool(equals):
                raise UsageError(f"--preprocess has no '{entry}'; it knows {', '.join(_KEYS)}", _HINT)
            if key in values:
                raise UsageError(f"--preprocess gives '{key}' twice", _HINT)
            values[key] = True if key == "imagenet" else _value(key, value, entry)
        if values.pop("imagenet", False):
            values = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, **values, "imagenet": True}
        return cls(**values)

    @property
    def numeric(self) -> bool:
        """Whether values are changed, so that they end as floats."""
        return not (self.scale is None and self.mean is None and self.std is None)

    def for_arrays(self) -> Preprocess:
        """What of it applies to arrays. Raises UsageError where something asked for does not."""
        for key in ("size", "crop", "channels"):
            if getattr(self, key) is not None:
                raise UsageError(
                    f"--preprocess {key}=... works on image files, and the data is arrays",
                    "arrays take layout, scale, mean and std; do the rest before you save them",
                )
        return self

    def for_images(self, port: Port) -> Preprocess:
        """With the defaults for image files filled in from the model's input."""
        if self.layout is not None:
            raise UsageError("--preprocess layout=... is for arrays; image files have none", "leave it out")
        axis = channel_axis(port) or 3
        sides = [d for k, d in enumerate(port.shape or ()) if k not in (0, axis)]
        fixed = (sides[0], sides[1]) if len(sides) == 2 and sides[0] and sides[1] else None
        size, crop, scale = self.size, self.crop, self.scale
        if self.imagenet and size is None and crop is None:
            crop = fixed or (224, 224)
            size = round(min(crop) * 256 / 224)
        elif size is None and crop is None:
            size = fixed
        if scale is None and port.dtype.kind not in "iu":
            scale = 1 / 255
        return replace(self, size=size, crop=crop, scale=scale)

    def applies(self, port: Port, *, image_inputs: bool) -> bool:
        """Whether values of this input are changed: those of image inputs where the model has any, else of all that
        take floats."""
        floating = port.dtype.kind == "f" or port.dtype.name == "bfloat16"
        return self.numeric and (channel_axis(port) is not None if image_inputs else floating)

    def oriented(self, port: Port, array: np.ndarray) -> np.ndarray:
        """A view of an array of images (any number of leading axes) in the model's layout."""
        axis = channel_axis(port)
        if self.layout is None or axis is None or array.ndim < 3:
            return array
        if self.layout == "nhwc" and axis == 1:
            return np.moveaxis(array, -1, -3)
        if self.layout == "nchw" and axis == 3:
            return np.moveaxis(array, -3, -1)
        return array

    def values(self, port: Port, rows: np.ndarray) -> np.ndarray:
        """`(rows * scale - mean) / std` in float32. rows: in the model's layout, leading axis = samples."""
        scale = self.scale
        if scale is None and self.imagenet and rows.dtype == np.uint8:
            scale = 1 / 255
        out = rows.astype(np.float64 if rows.dtype == np.float64 else np.float32)
        if scale is not None:
            np.multiply(out, scale, out=out)
        if self.mean is not None:
            np.subtract(out, self._per_channel("mean", self.mean, port, rows), out=out)
        if self.std is not None:
            np.divide(out, self._per_channel("std", self.std, port, rows), out=out)
        return out

    def _per_channel(self, key: str, numbers: tuple[float, ...], port: Port, rows: np.ndarray) -> np.ndarray:
        array = np.asarray(numbers, np.float32)
        if len(numbers) == 1:
            return array.reshape(())
        axis = channel_axis(port)
        count = rows.shape[axis] if axis is not None else None
        if axis is None or count != len(numbers):
            has = f"has {count} channel{'s' if count != 1 else ''}" if axis is not None else "is no image"
            raise UsageError(
                f"--preprocess {key} has {len(numbers)} values, and input '{port.name}' {has}",
                f"give one value for all channels, such as {key}=0.5" + (", or one each" if axis is not None else ""),
            )
        return array.reshape([len(numbers) if k == axis else 1 for k in range(rows.ndim)])


def _value(key: str, text: str, entry: str) -> Any:
    """The value of one entry. Raises UsageError."""
    try:
        if key in _CHOICES:
            if text not in _CHOICES[key]:
                raise ValueError
            return text
        if key in ("size", "crop"):
            sides = [int(part) for part in text.split("x")]
            if len(sides) > 2 or min(sides) < 1:
                raise ValueError
            if len(sides) == 2:
                return (sides[0], sides[1])
            return sides[0] if key == "size" else (sides[0], sides[0])
        if key == "scale":
            above, slash, below = text.partition("/")
            numbers = [float(above) / (float(below) if slash else 1)]
        else:
            numbers = [float(part) for part in text.split("/")]
        if not np.isfinite(numbers).all() or (key in ("std", "scale") and 0 in numbers):
            raise ValueError
        return numbers[0] if key == "scale" else tuple(numbers)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"--preprocess can't read '{entry}'", _HINT) from None
