"""Elementwise operators at run time, where torch differs from ONNX: division and powers of integers, dropout."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["divide", "dropout", "integer_power", "prelu", "shift_right", "shrink"]


def divide(x: Tensor, y: Tensor) -> Tensor:
    """The quotient; of integers, towards zero."""
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def integer_power(x: Tensor, y: Tensor | float) -> Tensor:
    """Integers to the power of numbers of any type, cut off to integers."""
    whole = not y.is_floating_point() if isinstance(y, Tensor) else isinstance(y, int) and y >= 0
    return torch.pow(x if whole else x.double(), y).to(x.dtype)


def shift_right(x: Tensor, y: Tensor) -> Tensor:
    """int64 shifted to the right as if it were unsigned."""
    return torch.where(y == 0, x, ((x >> 1) & (2**63 - 1)) >> (y - 1).clamp(min=0))


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x, times the slope where x is negative; the slope broadcasts to x."""
    return torch.where(x < 0, slope * x, x)


def shrink(x: Tensor, lambd: float, bias: float) -> Tensor:
    """0 from -lambd to lambd; beyond, `bias` nearer to 0."""
    result = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))
    return result.to(x.dtype)


def dropout(x: Tensor, ratio: Tensor | float, training: Tensor | bool) -> tuple[Tensor, Tensor]:
    """Zeros at random and the rest enlarged, where training; and where elements are kept."""
    training = torch.as_tensor(training, device=x.device)
    kept = (torch.rand_like(x) >= ratio) | ~training
    share = torch.where(training, 1 - torch.as_tensor(ratio, dtype=x.dtype, device=x.device), 1)
    return torch.where(kept, x / share.clamp(min=torch.finfo(x.dtype).tiny), 0).to(x.dtype), kept
