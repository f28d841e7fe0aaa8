"""Tensors made out of sizes and indices at run time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["counted", "eye_like", "one_hot", "shape_of", "size_of", "stepped", "unique"]


def shape_of(x: Tensor, start: int | None, end: int | None) -> Tensor:
    """The sizes of axes `start` to `end`."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


def size_of(x: Tensor) -> Tensor:
    """The number of elements."""
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


def counted(start: int, limit: int, delta: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Integers from `start` to below `limit` (above, where delta is negative)."""
    count = max(-((start - limit) // delta), 0)
    return torch.arange(start, start + count * delta, delta, dtype=dtype, device=device)


def stepped(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Numbers from `start` to below `limit`. Waits for the device: how many there are depends on the data."""
    if not start.is_floating_point():
        return counted(int(start), int(limit), int(delta), start.dtype, start.device)
    wide = torch.promote_types(start.dtype, torch.float32)
    first, step = start.reshape(()).to(wide), delta.reshape(()).to(wide)
    count = int(torch.ceil((limit.reshape(()).to(wide) - first) / step).clamp(min=0))
    return (first + torch.arange(count, dtype=wide, device=start.device) * step).to(start.dtype)


def eye_like(x: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Ones at (i, i + k), in the shape of x."""
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return (columns - rows[:, None] == k).to(dtype)


def one_hot(indices: Tensor, depth: int, values: Tensor, axis: int) -> Tensor:
    """values[1] where an index says, and values[0] elsewhere, along a new axis. Indices from -depth on count."""
    indices = indices.to(torch.int64).unsqueeze(axis)
    classes = torch.arange(depth, device=indices.device)
    classes = classes.reshape([-1 if k == axis % indices.dim() else 1 for k in range(indices.dim())])
    return torch.where((indices == classes) | (indices == classes - depth), values[1], values[0])


def unique(x: Tensor, axis: int | None, ordered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The different elements (slices along an axis), where each is first, which one every element is, and counts.

    ordered: ascending; else as they come first.
    """
    x = x.reshape(-1) if axis is None else x
    axis = axis or 0
    _, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    places = torch.arange(x.size(axis), device=x.device)
    first = torch.full_like(counts, x.size(axis)).scatter_reduce(0, inverse, places, "amin")
    if not ordered:
        order = torch.argsort(first)
        first, counts, inverse = first[order], counts[order], torch.argsort(order)[inverse]
    return x.index_select(axis, first), first, inverse, counts
