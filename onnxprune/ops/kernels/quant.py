"""Fake quantisation: whole numbers are carried as floats, and gradients pass straight through the rounding.

q = clamp(round(x / scale) + zero point), x = (q - zero point) * scale. A scale is a number, one per index of an axis,
or one per block along it. Rounding is half to even, as in onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["convolution", "dequantize", "dynamic", "product", "quantize", "round_through", "rounded"]

Scale = Tensor | float


class RoundThrough(torch.autograd.Function):
    """Rounds, with the derivative of the identity."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def round_through(x: Tensor) -> Tensor:
    return RoundThrough.apply(x)


def spread(value: Scale, x: Tensor, axis: int | None, block: int) -> Scale:
    """Scales or zero points in a shape that broadcasts to the tensor."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        return value.reshape(())
    if axis is None or (value.dim() > 1 and not block):
        return value
    if block:
        return value.repeat_interleave(block, axis).narrow(axis, 0, x.size(axis))
    shape = [1] * x.dim()
    shape[axis] = -1
    return value.reshape(shape)


def quantize(
    x: Tensor, scale: Scale, zero: Scale, low: int, high: int, axis: int | None = None, block: int = 0
) -> Tensor:
    """Whole numbers from low to high, as floats."""
    scale, zero = spread(scale, x, axis, block), spread(zero, x, axis, block)
    q = round_through((x if x.dtype == torch.float64 else x.float()) / scale)
    return (q + zero).clamp(low, high)


def dequantize(q: Tensor, scale: Scale, zero: Scale, axis: int | None = None, block: int = 0) -> Tensor:
    """What whole numbers stand for."""
    return (q - spread(zero, q, axis, block)) * spread(scale, q, axis, block)


def dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DynamicQuantizeLinear: whole numbers from 0 to 255, with a scale and a zero point after the range of x. The
    range is taken as given, so that the derivative of what the numbers stand for is 1."""
    with torch.no_grad():
        low, high = x.min().clamp(max=0).float(), x.max().clamp(min=0).float()
        scale = torch.where(high == low, torch.ones_like(low), (high - low) / 255)
        zero = (-low / scale).clamp(0, 255).round()
    return quantize(x, scale, zero, 0, 255), scale, zero


def rounded(x: Tensor) -> Tensor:
    """Reals rounded to 8 bits after their own range."""
    q, scale, zero = dynamic(x)
    return dequantize(q, scale, zero)


def product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product of whole numbers, which a half would not hold."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def convolution(
    x: Tensor,
    weight: Tensor,
    strides: Sequence[int],
    padding: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution of whole numbers, which a half would not hold."""
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = function(x.float(), weight.float(), None, strides, padding, dilations, groups)
    return found
