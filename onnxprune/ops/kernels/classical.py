"""Classical machine learning at run time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["encoded", "imputed", "mapped", "normalized", "picked"]


def normalized(x: Tensor, norm: str) -> Tensor:
    """Every row over its largest element, or its sum of absolute values, or the root of its sum of squares."""
    if norm == "MAX":
        size = torch.amax(x, -1, True)
    else:
        size = torch.linalg.vector_norm(x, 1 if norm == "L1" else 2, -1, True)
    return x / torch.where(size == 0, 1.0, size)


def imputed(x: Tensor, values: Tensor, replaced: float) -> Tensor:
    """A value per feature in place of what is missing: not a number, or a number that stands for that."""
    return torch.where(torch.isnan(x) if replaced != replaced else x == replaced, values, x)


def picked(x: Tensor, places: Tensor) -> Tensor:
    """Elements of the last axis; of a vector, as one row."""
    found = x.index_select(-1, places.reshape(-1))
    return found[None] if x.dim() == 1 else found


def mapped(x: Tensor, keys: Tensor, values: Tensor, default: float) -> Tensor:
    """The value that belongs to each element, or the default."""
    hit = x[..., None] == keys
    found = values[hit.to(torch.uint8).argmax(-1)]
    return torch.where(hit.any(-1), found, torch.full_like(found, default))


def encoded(x: Tensor, categories: Tensor) -> Tensor:
    """Ones and zeros along a new last axis: which category each element is."""
    return (x[..., None].to(categories.dtype) == categories).to(torch.float32)
