"""Pooling at run time, where torch has it in another form: one-sided and wide padding, ONNX's rule for the last window,
dilated averages, positions within the whole tensor, integers.

The input is padded or cut so that windows without any further padding are just those that ONNX counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onnxprune.ops.kernels.conv import conv_transpose, sides

__all__ = [
    "average_pool",
    "col2im",
    "lp_pool",
    "max_pool",
    "max_pool_positions",
    "max_unpool",
    "root",
    "spatial",
    "windows",
]

_MAX: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def spatial(x: Tensor) -> tuple[int, ...]:
    """All axes behind batch and channel."""
    return tuple(range(2, x.dim()))


def windows(size: int, before: int, after: int, span: int, stride: int, ceil: bool) -> int:
    """How many windows of this span there are. Rounded up, the last one still starts in the input or the padding in
    front of it."""
    room = size + before + after - span
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + before else count


def fitted(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
    value: float,
) -> Tensor:
    """The input padded in front, and padded or cut at the end so that the last window ends there."""
    ends = []
    for k, size in enumerate(x.shape[2:]):
        span = dilation[k] * (kernel[k] - 1) + 1
        count = windows(size, before[k], after[k], span, stride[k], ceil)
        ends.append((count - 1) * stride[k] + span - size - before[k])
    return F.pad(x, sides(before, ends), value=value)


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> Tensor:
    """The largest element of each window; padding never wins."""
    floats = x if x.is_floating_point() else x.to(torch.float64)
    y = fitted(floats, kernel, stride, before, after, dilation, ceil, -torch.inf)
    return _MAX[len(kernel)](y, kernel, stride, 0, dilation).to(x.dtype)


def max_pool_positions(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
    column_major: bool,
) -> tuple[Tensor, Tensor]:
    """As max_pool, and where in the flattened input each element stood; column_major: the first of the spatial axes
    counts fastest."""
    floats = x if x.is_floating_point() else x.to(torch.float64)
    padded = fitted(floats, kernel, stride, before, after, dilation, ceil, -torch.inf)
    y, at = _MAX[len(kernel)](padded, kernel, stride, 0, dilation, return_indices=True)
    coordinates = []
    for k in reversed(range(len(kernel))):
        coordinates.append((at % padded.size(2 + k) - before[k], x.size(2 + k)))
        at = at // padded.size(2 + k)
    plane = torch.arange(x.size(0) * x.size(1), device=x.device).reshape(x.size(0), x.size(1), *[1] * len(kernel))
    for coordinate, size in coordinates if column_major else reversed(coordinates):
        plane = plane * size + coordinate
    return y.to(x.dtype), plane


def window_sums(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The sum over each window, without padding."""
    ones = torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device)
    planes = x.reshape(-1, 1, *x.shape[2:])
    y = _CONV[len(kernel)](planes, ones, None, tuple(stride), 0, tuple(dilation))
    return y.reshape(*x.shape[:2], *y.shape[2:])


def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
    count_padding: bool,
) -> Tensor:
    """The mean of each window over the elements of the input, or also over the padding (but never over what lies
    beyond it, into which a window may reach that counts because of `ceil`)."""
    y = fitted(x, kernel, stride, before, after, dilation, ceil, 0.0)
    total = window_sums(y, kernel, stride, dilation)
    for k, size in enumerate(x.shape[2:]):
        first, last = (-before[k], size + after[k]) if count_padding else (0, size)
        starts = torch.arange(total.size(2 + k), device=x.device) * stride[k] - before[k]
        places = starts[:, None] + torch.arange(kernel[k], device=x.device) * dilation[k]
        counted = ((places >= first) & (places < last)).sum(1).clamp(min=1)
        total = total / counted.to(total.dtype).reshape(-1, *[1] * (len(kernel) - 1 - k))
    return total


def root(total: Tensor, p: float) -> Tensor:
    """The p-th root of what isn't negative; at zero its gradient is zero and not infinite."""
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1.0).pow(1 / p), 0.0)


def lp_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
    p: float,
) -> Tensor:
    """The p-norm of each window."""
    y = fitted(x.abs().pow(p), kernel, stride, before, after, dilation, ceil, 0.0)
    return root(window_sums(y, kernel, stride, dilation), p)


def max_unpool(
    x: Tensor,
    positions: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    shape: Sequence[int] | None,
) -> Tensor:
    """Zeros with the elements where `max_pool_positions` found them. Positions count in the input that the pooling
    would have had at least; where `shape` is larger, zeros are added at the ends."""
    rank = len(kernel)
    sizes = [(n - 1) * stride[k] + kernel[k] - pads[k] - pads[rank + k] for k, n in enumerate(x.shape[2:])]
    least = [*x.shape[:2], *sizes]
    flat = x.new_zeros(prod(least)).scatter(0, positions.reshape(-1), x.reshape(-1))
    y = flat.reshape(least)
    return y if shape is None else F.pad(y, [p for k in reversed(range(2 + rank)) for p in (0, shape[k] - least[k])])


def col2im(
    x: Tensor,
    image: Sequence[int],
    block: Sequence[int],
    strides: Sequence[int] | None,
    paddings: Sequence[int] | None,
    dilations: Sequence[int] | None,
) -> Tensor:
    """Blocks (N, C * elements of a block, blocks) added up where they lie in an image, without its padding.

    Putting a block's elements in their places is a transposed convolution with the identity.
    """
    rank, taps = len(block), prod(block)
    stride, dilation, pads = strides or [1] * rank, dilations or [1] * rank, paddings or [0] * (2 * rank)
    spans = [d * (n - 1) + 1 for d, n in zip(dilation, block, strict=True)]
    counts = [windows(n, pads[k], pads[rank + k], spans[k], stride[k], False) for k, n in enumerate(image)]
    after = [(counts[k] - 1) * stride[k] + spans[k] - pads[k] - n for k, n in enumerate(image)]
    identity = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *block)
    y = conv_transpose(x.reshape(-1, taps, *counts), identity, None, stride, dilation, 1, pads[:rank], after)
    return y.reshape(x.size(0), -1, *image)
