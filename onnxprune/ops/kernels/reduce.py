"""Reductions at run time, in every form: over all axes, none or computed ones, of integers, of nothing at all.

axes: the axes that go; None or, unless `noop`, none given: all of them. The result has the type of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "determinant",
    "largest",
    "log_total",
    "log_total_exp",
    "mean",
    "norm1",
    "norm2",
    "product",
    "smallest",
    "squares",
    "total",
]

Axes = Sequence[int] | None


def chosen(x: Tensor, axes: Axes, noop: bool) -> tuple[int, ...]:
    """The axes that go, not negative and ascending."""
    if axes is None or not len(axes):
        return () if noop else tuple(range(x.dim()))
    return tuple(sorted(a % x.dim() for a in axes))


def lowest(dtype: torch.dtype, sign: int) -> float:
    """The number (times a sign) that is below all others of a type."""
    if dtype.is_floating_point:
        return -sign * torch.inf
    if dtype == torch.bool:
        return int(sign < 0)
    info = torch.iinfo(dtype)
    return info.min if sign > 0 else info.max


def total(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The sum."""
    gone = chosen(x, axes, noop)
    return torch.sum(x, gone, keep, dtype=x.dtype) if gone else x


def mean(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The mean; of integers, cut off to an integer."""
    gone = chosen(x, axes, noop)
    if not gone:
        return x
    return torch.mean(x if x.is_floating_point() else x.double(), gone, keep).to(x.dtype)


def largest(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The maximum; of nothing, the lowest number of the type."""
    return extreme(x, chosen(x, axes, noop), keep, 1)


def smallest(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The minimum; of nothing, the highest number of the type."""
    return extreme(x, chosen(x, axes, noop), keep, -1)


def extreme(x: Tensor, gone: tuple[int, ...], keep: bool, sign: int) -> Tensor:
    if not gone:
        return x
    empty = [k for k in gone if x.size(k) == 0]
    if empty:
        shape = [1 if k in empty else n for k, n in enumerate(x.shape)]
        x = torch.full(shape, lowest(x.dtype, sign), dtype=x.dtype, device=x.device)
    return torch.amax(x, gone, keep) if sign > 0 else torch.amin(x, gone, keep)


def product(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The product, axis by axis."""
    for axis in reversed(chosen(x, axes, noop)):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def norm1(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The sum of absolute values."""
    return total(torch.abs(x), axes, keep, noop)


def norm2(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The root of the sum of squares."""
    gone = chosen(x, axes, noop)
    if not gone:
        return torch.abs(x)
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, gone, keep)
    return torch.sqrt(torch.sum(x.double() ** 2, gone, keep)).to(x.dtype)


def squares(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The sum of squares."""
    return total(x * x, axes, keep, noop)


def log_total(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The logarithm of the sum."""
    return torch.log(total(x, axes, keep, noop)).to(x.dtype)


def log_total_exp(x: Tensor, axes: Axes, keep: bool, noop: bool) -> Tensor:
    """The logarithm of the sum of exponentials."""
    gone = chosen(x, axes, noop)
    if not gone:
        return x
    return torch.logsumexp(x if x.is_floating_point() else x.double(), gone, keep).to(x.dtype)


def determinant(x: Tensor) -> Tensor:
    """Of the last two axes; in float32 at least."""
    return torch.linalg.det(x if x.dtype == torch.float64 else x.float()).to(x.dtype)
