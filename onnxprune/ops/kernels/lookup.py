"""Reading and writing by index at run time. Negative indices count from the end; they are int32 or int64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "compress",
    "cumprod",
    "cumsum",
    "embedding",
    "gather",
    "gather_elements",
    "gather_nd",
    "reverse_sequence",
    "scatter_elements",
    "scatter_nd",
    "tensor_scatter",
    "top_k",
]

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}  # ONNX's names and torch's


def from_start(indices: Tensor, size: int) -> Tensor:
    """Indices of which none is negative, as int64."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def embedding(indices: Tensor, table: Tensor) -> Tensor:
    """Rows of a table."""
    return F.embedding(from_start(indices, table.size(0)), table)


def gather(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """The indices' axes take the place of an axis."""
    axis %= x.dim()
    found = x.index_select(axis, from_start(indices.reshape(-1), x.size(axis)))
    if indices.dim() == 1:
        return found
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    return torch.gather(x, axis, from_start(indices, x.size(axis)))


def gather_nd(x: Tensor, indices: Tensor, batch: int) -> Tensor:
    """x[b.., i_1, .., i_k] with the i in the last axis of the indices."""
    return x[positions(x, indices, batch)] if batch + indices.size(-1) else x.expand(*indices.shape[:-1], *x.shape)


def positions(x: Tensor, indices: Tensor, batch: int = 0) -> tuple[Tensor, ...]:
    found = list(indices.long().unbind(-1))
    rank = indices.dim() - 1
    for k in reversed(range(batch)):
        own = torch.arange(x.size(k), device=x.device)
        found.insert(0, own.reshape([-1 if j == k else 1 for j in range(rank)]))
    return tuple(found)


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, axis: int, reduction: str) -> Tensor:
    indices = from_start(indices, x.size(axis))
    updates = updates.to(x.dtype)
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    if reduction == "add":
        return x.scatter_add(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, REDUCTIONS[reduction])


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, reduction: str) -> Tensor:
    updates = updates.to(x.dtype)
    if reduction in ("none", "add") and indices.size(-1):
        return x.index_put(positions(x, indices), updates, accumulate=reduction == "add")
    depth = indices.size(-1)
    rows = x.reshape(-1, *x.shape[depth:])  # every index is one of a row now
    row = torch.zeros(indices.shape[:-1], dtype=torch.long, device=x.device)
    for k, index in enumerate(indices.unbind(-1)):
        row = row * x.size(k) + from_start(index, x.size(k))
    updates = updates.reshape(-1, *rows.shape[1:])
    spread = row.reshape(-1, *[1] * (rows.dim() - 1)).expand_as(updates)
    return scatter_elements(rows, spread, updates, 0, reduction).reshape(x.shape)


def compress(x: Tensor, condition: Tensor, axis: int | None) -> Tensor:
    """The positions along an axis, or of the flattened tensor, at which the condition holds."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, condition.reshape(-1).nonzero().squeeze(1))


def reverse_sequence(x: Tensor, lengths: Tensor, batch_axis: int, time_axis: int) -> Tensor:
    """The first lengths[b] steps of every sequence in reverse order."""
    size = x.size(time_axis)
    step = torch.arange(size, device=x.device)
    lengths = lengths.long().unsqueeze(1)
    source = torch.where(step < lengths, lengths - 1 - step, step)  # (batch, time)
    source = source if batch_axis < time_axis else source.t()
    source = source.reshape(*source.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    return torch.gather(x, time_axis, source)


def tensor_scatter(cache: Tensor, update: Tensor, start: Tensor | None, axis: int, mode: str) -> Tensor:
    """Write a stretch along an axis, in every batch from its own start."""
    axis %= cache.dim()
    at = torch.arange(update.size(axis), device=cache.device)
    if start is not None:
        at = start.long().unsqueeze(1) + at
    else:
        at = at.expand(cache.size(0), -1)
    if mode == "circular":
        at = at.remainder(cache.size(axis))
    shape = [1] * cache.dim()
    shape[0], shape[axis] = at.shape
    return cache.scatter(axis, at.reshape(shape).expand(update.shape), update)


def cumsum(x: Tensor, axis: int, exclusive: int, reverse: int) -> Tensor:
    """Sums of everything up to each element, in the type of the tensor."""
    x = shifted(x.flip(axis) if reverse else x, axis, 0.0, exclusive)
    found = torch.cumsum(x, axis, dtype=x.dtype)
    return found.flip(axis) if reverse else found


def cumprod(x: Tensor, axis: int, exclusive: int, reverse: int) -> Tensor:
    """Products of everything up to each element, in the type of the tensor."""
    x = shifted(x.flip(axis) if reverse else x, axis, 1.0, exclusive)
    found = torch.cumprod(x, axis, dtype=x.dtype)
    return found.flip(axis) if reverse else found


def shifted(x: Tensor, axis: int, start: float, exclusive: int) -> Tensor:
    """The elements one place further, where those at a place don't count there."""
    if not exclusive or not x.size(axis):
        return x
    first = torch.full_like(x.narrow(axis, 0, 1), start)
    return torch.cat([first, x.narrow(axis, 0, x.size(axis) - 1)], axis)


def top_k(x: Tensor, k: int, axis: int, largest: int) -> tuple[Tensor, Tensor]:
    """Of equal elements those that come first, as ONNX says and torch.topk does not."""
    values, indices = x.sort(dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)
