"""Resizing at run time: axis by axis, each result a weighted sum of a few elements of the input.

Positions are computed in float32 as in onnxruntime, since which pixel is the nearest hangs on their rounding. Where
torch has the very same interpolation it is called; else every axis becomes a few selections and a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["resize_by", "resize_to", "to_floats"]

_SMOOTH = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear", ("cubic", 4): "bicubic"}


@dataclass(frozen=True)
class How:
    """The attributes of a Resize."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0


@dataclass(frozen=True)
class Axis:
    """One axis: its size before and after, the scale between them, and the stretch that is read (0 to 1)."""

    index: int
    size: int
    result: int
    scale: float
    begin: float = 0.0
    end: float = 1.0


def to_floats(values: Tensor) -> list[float]:
    """The elements of a tensor. Waits for the device where it is not on the CPU."""
    found = values.reshape(-1).tolist()
    return [float(v) for v in found]


def single(value: float) -> float:
    """Rounded to float32."""
    if value == 0 or not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def scaled(size: int, scale: float) -> int:
    """A size times a scale, multiplied in float32 and rounded down."""
    return size * int(scale) if float(scale).is_integer() else math.floor(single(size * scale))


def resize_by(
    x: Tensor, scales: Sequence[float], *, axes: Sequence[int] | None = None, roi: Sequence[float] = (), **how: object
) -> Tensor:
    """Resize the axes (all by default) by these factors. roi: starts of the axes, then their ends."""
    how.pop("policy", None)  # of sizes only
    places = range(x.dim()) if axes is None else axes
    found = []
    for k, axis in enumerate(places):
        begin, end = (roi[k], roi[len(roi) // 2 + k]) if roi else (0.0, 1.0)
        found.append(
            Axis(axis % x.dim(), x.size(axis), scaled(x.size(axis), scales[k] * (end - begin)), scales[k], begin, end)
        )
    return resized(x, found, How(**how))  # type: ignore[arg-type]


def resize_to(
    x: Tensor,
    sizes: Sequence[int],
    *,
    axes: Sequence[int] | None = None,
    roi: Sequence[float] = (),
    policy: str = "stretch",
    **how: object,
) -> Tensor:
    """Resize the axes (all by default) to these sizes; where `policy` is 'not_larger' or 'not_smaller', by one factor
    with which none of them gets larger or smaller than its size."""
    places = [k % x.dim() for k in (range(x.dim()) if axes is None else axes)]
    scales = [single(n / x.size(k)) for k, n in zip(places, sizes, strict=True)]
    if policy != "stretch":
        scales = [(min if policy == "not_larger" else max)(scales)] * len(scales)
        sizes = [math.floor(single(scales[0] * x.size(k)) + 0.5) for k in places]
    found = []
    for k, axis in enumerate(places):
        begin, end = (roi[k], roi[len(roi) // 2 + k]) if roi else (0.0, 1.0)
        found.append(Axis(axis, x.size(axis), sizes[k], scales[k], begin, end))
    return resized(x, found, How(**how))  # type: ignore[arg-type]


def resized(x: Tensor, axes: Sequence[Axis], how: How) -> Tensor:
    changed = [a for a in axes if a.result != a.size or a.scale != 1 or how.coordinates == "tf_crop_and_resize"]
    if not changed:
        return x
    if how.mode == "nearest":
        for a in changed:
            x = x.index_select(a.index, nearest(positions(a, how, x.device), a, how))
        return extrapolated(x, changed, how)
    y = x if x.is_floating_point() else x.to(torch.float32)
    if torchs_own(y, changed, how):
        sizes = {a.index: a.result for a in changed}
        y = F.interpolate(
            y,
            size=[sizes.get(k, y.size(k)) for k in range(2, y.dim())],
            mode=_SMOOTH[how.mode, y.dim()],
            align_corners=how.coordinates == "align_corners",
        )
    else:
        for a in changed:
            y = along(y, a, how)
    return extrapolated(y, changed, how).to(x.dtype)


def torchs_own(x: Tensor, axes: Sequence[Axis], how: How) -> bool:
    """True where `F.interpolate` to the results' sizes computes the same: it takes the scale from the sizes."""
    if how.antialias or how.exclude_outside or how.cubic != -0.75 or (how.mode, x.dim()) not in _SMOOTH:
        return False
    if any(a.index < 2 for a in axes):
        return False
    if how.coordinates == "align_corners":
        return True
    exact = all(abs(a.scale * a.size - a.result) < 1e-5 * a.result for a in axes)
    half_pixel = how.coordinates == "half_pixel" or (
        how.coordinates == "pytorch_half_pixel" and all(a.result > 1 for a in axes)
    )
    return exact and half_pixel


def positions(a: Axis, how: How, device: torch.device) -> Tensor:
    """Where each result lies on the input's axis, in elements."""
    x = torch.arange(a.result, device=device, dtype=torch.float32)
    scale = torch.full((), a.scale, device=device, dtype=torch.float32)  # a number would become its reciprocal
    kind = how.coordinates
    if kind == "asymmetric":
        return x / scale
    if kind == "align_corners":
        return x * 0.0 if a.result == 1 else x * (a.size - 1) / torch.full_like(scale, a.result - 1)
    if kind == "tf_crop_and_resize":
        if a.result == 1:
            return x + 0.5 * (a.begin + a.end) * (a.size - 1)
        return a.begin * (a.size - 1) + x * ((a.end - a.begin) * (a.size - 1) / (a.result - 1))
    if kind == "pytorch_half_pixel" and a.result == 1:
        return x * 0.0
    if kind == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    centred = (x + 0.5) / scale
    if kind == "half_pixel_symmetric":
        centred = centred + single(a.size / 2 * single(1 - single(a.result / single(a.scale * a.size))))
    return centred - 0.5


def nearest(x: Tensor, a: Axis, how: How) -> Tensor:
    """The index of the element at each position."""
    rule = how.nearest
    if rule == "simple":
        rule = "ceil" if a.scale < 1 else "floor"
    if rule == "floor":
        found = torch.floor(x)
    elif rule == "ceil":
        found = torch.ceil(x)
    elif rule == "round_prefer_ceil":
        found = torch.floor(x + 0.5)
    else:
        found = torch.ceil(x - 0.5)
    return found.clamp(0, a.size - 1).to(torch.int64)


def shape_of(distance: Tensor, how: How) -> Tensor:
    """The weight of an element at this distance: a triangle, or the cubic with parameter a."""
    d = distance.abs()
    if how.mode == "linear":
        return (1 - d).clamp(min=0)
    a = how.cubic
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def taps(a: Axis, how: How, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which elements each result reads, and with what weight: (taps, results) both. Weights add up to 1."""
    at = positions(a, how, device)
    if how.mode == "linear" and not how.antialias:
        at = at.clamp(0, a.size - 1)
    width = min(a.scale, 1.0) if how.antialias else 1.0
    reach = (1 if how.mode == "linear" else 2) / width
    first = math.floor(-reach) + 1
    steps = torch.arange(first, 2 - first, device=device, dtype=torch.float32)
    low = torch.floor(at)
    weight = shape_of((steps[:, None] - (at - low)) * width, how)
    index = low + steps[:, None]
    if how.exclude_outside:
        weight = weight * ((index >= 0) & (index <= a.size - 1))
    if how.exclude_outside or how.antialias:
        weight = weight / weight.sum(0)
    return index.clamp(0, a.size - 1).to(torch.int64), weight


def along(x: Tensor, a: Axis, how: How) -> Tensor:
    """Resize one axis: a sum over the taps, or a product with the matrix of the weights where they are many."""
    index, weight = taps(a, how, x.device)
    weight = weight.to(x.dtype)
    if index.size(0) <= 4:
        laid = [1] * (x.dim() - 1 - a.index)
        parts = [x.index_select(a.index, i) * w.reshape(-1, *laid) for i, w in zip(index, weight, strict=True)]
        return sum(parts[1:], parts[0])
    matrix = x.new_zeros(a.result, a.size).scatter_add(1, index.t(), weight.t())
    with torch.autocast(x.device.type, enabled=False):
        return (x.movedim(a.index, -1) @ matrix.t()).movedim(-1, a.index)


def extrapolated(x: Tensor, axes: Sequence[Axis], how: How) -> Tensor:
    """What lies outside of the input gets a number, in the one mode that has an outside."""
    if how.coordinates != "tf_crop_and_resize":
        return x
    for a in axes:
        at = positions(a, how, x.device)
        outside = (at < 0) | (at > a.size - 1)
        x = x.masked_fill(outside.reshape(-1, *[1] * (x.dim() - 1 - a.index)), how.extrapolation)
    return x
