"""From tensors to sizes and back, where sizes are computed from data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["to_ints", "to_tensor"]


def to_ints(values: Tensor) -> list[int]:
    """The elements of an integer tensor of rank 0 or 1. Waits for the device where the tensor is not on the CPU."""
    found = values.tolist()
    return [int(v) for v in found] if isinstance(found, list) else [int(found)]


def to_tensor(values: Sequence[Any], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of sizes, of the given shape."""
    return torch.tensor(list(values), dtype=dtype, device=device).reshape(list(shape))
