"""Convolutions at run time: transposed ones with paddings that torch does not have, and deformable ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["conv_transpose", "conv_transpose_to", "deform_conv", "same_padding", "sides"]

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def same_padding(size: int, span: int, stride: int) -> int:
    """Zeros to add along an axis so that windows of this span give size / stride results, rounded up."""
    return max((-(-size // stride) - 1) * stride + span - size, 0)


def sides(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Paddings of the last axes in the order in which F.pad takes them."""
    return [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    before: Sequence[int],
    after: Sequence[int],
) -> Tensor:
    """The full transposed convolution, cut by `before` and `after` at the ends of each axis; negative: zeros added."""
    full = _TRANSPOSED[len(stride)](x, weight, None, tuple(stride), 0, 0, groups, tuple(dilation))
    y = F.pad(full, sides([-p for p in before], [-p for p in after]))
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * len(stride))


def conv_transpose_to(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int],
    sizes: Sequence[int],
    upper: bool,
) -> Tensor:
    """A transposed convolution whose result has these spatial sizes. What must be cut off is halved; of an odd number
    the end loses one more where `upper`, the beginning otherwise."""
    before, after = [], []
    for k, wanted in enumerate(sizes):
        length = (x.size(2 + k) - 1) * stride[k] + (weight.size(2 + k) - 1) * dilation[k] + 1
        total = max(length + output_padding[k] - wanted, 0)
        before.append(total // 2 if upper else total - total // 2)
        after.append(length - wanted - before[-1])
    return conv_transpose(x, weight, bias, stride, dilation, groups, before, after)


def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    before: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_groups: int,
) -> Tensor:
    """A deformable convolution over two axes.

    x: N, C, H, W. offset: N, (offset group, kernel position, y and x), H', W'. mask: the same without 'y and x'.
    Each kernel position reads its pixel at a place of its own, interpolated bilinearly, zero outside.
    """
    n, channels, height, width = x.shape
    (_, _, kh, kw), (rows, columns) = weight.shape, offset.shape[-2:]
    taps = kh * kw
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))  # half a float is too coarse for a position
    moved = offset.reshape(n * offset_groups, taps, 2, rows, columns)

    def place(k: int, count: int, kernel: int) -> Tensor:
        """Where kernel positions along axis k read, in pixels, by (kernel position, output position)."""
        start = torch.arange(count, device=x.device, dtype=offset.dtype) * stride[k] - before[k]
        return start + torch.arange(kernel, device=x.device, dtype=offset.dtype)[:, None] * dilation[k]

    y = moved[:, :, 0] + place(0, rows, kh).repeat_interleave(kw, 0)[:, :, None]
    z = moved[:, :, 1] + place(1, columns, kw).repeat(kh, 1)[:, None, :]
    image = x.reshape(n * offset_groups, channels // offset_groups, height, width)
    read = bilinear(image, y, z).reshape(n, offset_groups, channels // offset_groups, taps, rows, columns)
    if mask is not None:
        read = read * mask.reshape(n, offset_groups, 1, taps, rows, columns)
    read = read.reshape(n, groups, channels // groups * taps, rows * columns)
    result = (weight.reshape(groups, -1, channels // groups * taps) @ read).reshape(n, -1, rows, columns)
    return result if bias is None else result + bias.view(-1, 1, 1)


def bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The image (N, C, H, W) at positions y and x (N, ...) in pixels, zero outside of it; N, C, ....

    Unlike grid_sample it takes pixels as they are: whole positions give exactly the pixel.
    """
    n, channels, height, width = image.shape
    flat = image.reshape(n, channels, height * width)
    top, left = y.floor(), x.floor()
    result = None
    for row, by_row in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, by_column in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = row.clamp(0, height - 1).to(torch.int64) * width + column.clamp(0, width - 1).to(torch.int64)
            at = at.reshape(n, 1, -1).expand(n, channels, -1)
            share = (by_row * by_column * inside).to(image.dtype)
            part = flat.gather(2, at).reshape(n, channels, *y.shape[1:]) * share.unsqueeze(1)
            result = part if result is None else result + part
    assert result is not None
    return result
