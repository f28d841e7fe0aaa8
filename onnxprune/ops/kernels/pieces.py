"""Parts of tensors at run time: what slices, splits and pads in ways that one call of torch doesn't."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["center_crop_pad", "even_parts", "pad", "pad_with", "slice_backwards", "slices"]


def even_parts(x: Tensor, count: int, axis: int) -> list[Tensor]:
    """`count` parts of one size, of which the last ones are shorter or empty."""
    total = x.size(axis)
    each = -(-total // count)
    return list(x.split([max(min(each, total - each * k), 0) for k in range(count)], axis))


def center_crop_pad(x: Tensor, sizes: Sequence[int], axes: Sequence[int] | None) -> Tensor:
    """Cut or fill with zeros so that these axes get these sizes, as much on both sides; the odd one is at the end."""
    for k, size in enumerate(sizes):
        axis = k if axes is None else axes[k] % x.dim()
        spare = x.size(axis) - size
        if spare > 0:
            x = x.narrow(axis, spare // 2, size)
        elif spare < 0:
            low = -spare // 2
            x = F.pad(x, (*[0] * (2 * (x.dim() - 1 - axis)), low, -spare - low))
    return x


def slice_backwards(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    """x[start:end:step] along an axis, for a negative step; an `end` below -size lies before the first element."""
    n = x.size(axis)
    chosen = range(n)[start : end if end >= -n else None : step]
    if not chosen:
        return x.narrow(axis, 0, 0)
    part = x.narrow(axis, chosen[-1], chosen[0] - chosen[-1] + 1).flip(axis)
    return part if step == -1 else part[(slice(None),) * (axis % x.dim()) + (slice(None, None, -step),)]


def slices(
    x: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None, steps: Sequence[int] | None
) -> Tensor:
    """Slice with bounds that are computed from data."""
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = (axes[k] if axes is not None else k) % x.dim()
        step = steps[k] if steps is not None else 1
        if step < 0:
            x = slice_backwards(x, axis, start, end, step)
        else:
            x = x[(slice(None),) * axis + (slice(start, end, step),)]
    return x


def pad(
    x: Tensor, pads: Sequence[int], axes: Sequence[int] | None, mode: str, value: Tensor | float | None = None
) -> Tensor:
    """Pad in ONNX's terms: first the low side of every listed axis, then the high sides; negative ones cut off."""
    chosen = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    amounts = [(0, 0)] * x.dim()
    for k, axis in enumerate(chosen):
        amounts[axis] = (pads[k], pads[len(chosen) + k])
    if mode == "constant":
        return pad_with(x, [side for pair in reversed(amounts) for side in pair], 0.0 if value is None else value)
    for axis, (low, high) in enumerate(amounts):
        if (low, high) != (0, 0):
            x = x.index_select(axis, reflected(x.size(axis), low, high, mode, x.device))
    return x


def pad_with(x: Tensor, sides: Sequence[int], value: Tensor | float) -> Tensor:
    """torch's pad with a value that may be a tensor of one element."""
    if not isinstance(value, Tensor):
        return F.pad(x, list(sides), value=value)
    inside = F.pad(torch.ones_like(x, dtype=torch.bool), list(sides))
    return torch.where(inside, F.pad(x, list(sides)), value.to(x.dtype).reshape(()))


def reflected(n: int, low: int, high: int, mode: str, device: torch.device) -> Tensor:
    """Which of n positions stands at each position of the padded axis."""
    at = torch.arange(-low, n + high, device=device)
    first, last = max(-low, 0), n - max(-high, 0)  # what negative amounts leave
    n, at = last - first, at - first
    if mode == "edge":
        at = at.clamp(0, n - 1)
    elif mode == "wrap":
        at = at.remainder(n)
    else:
        at = at.remainder(max(2 * (n - 1), 1))
        at = torch.minimum(at, 2 * (n - 1) - at)
    return at + first
