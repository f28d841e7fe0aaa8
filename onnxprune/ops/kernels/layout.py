"""Rearranging, where ranks or sizes are known only when the mirror runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["expand", "reshape", "reversed_axes", "squeeze", "unsqueeze"]


def reshape(x: Tensor, sizes: Sequence[int], allowzero: bool) -> Tensor:
    """Reshape: a 0 takes the input's size, unless it may be one."""
    return x.reshape(list(sizes) if allowzero else [x.size(k) if n == 0 else n for k, n in enumerate(sizes)])


def expand(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Expand: broadcasts both ways, an axis may be larger than the size that is asked for."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(sizes)))


def squeeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Squeeze along axes that are known only now."""
    return x.squeeze(tuple(axes))


def unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Unsqueeze: axes are those of the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(k % rank for k in axes):
        x = x.unsqueeze(axis)
    return x


def reversed_axes(x: Tensor) -> Tensor:
    """Transpose without a permutation."""
    return x.permute(*range(x.dim() - 1, -1, -1))
