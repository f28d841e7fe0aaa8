"""Sequences at run time, which are Python lists, and optional values, which may be None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["construct", "erase", "has_element", "insert", "join", "length", "nothing", "split"]


def construct(*elements: Any) -> list[Any]:
    return list(elements)


def insert(sequence: list[Any], element: Any, position: int | None) -> list[Any]:
    """A new sequence with the element before a position, or at the end."""
    at = len(sequence) if position is None else position + len(sequence) * (position < 0)
    return [*sequence[:at], element, *sequence[at:]]


def erase(sequence: list[Any], position: int | None) -> list[Any]:
    """A new sequence without the element at a position, or without the last one."""
    at = len(sequence) - 1 if position is None else position + len(sequence) * (position < 0)
    return [*sequence[:at], *sequence[at + 1 :]]


def length(sequence: list[Any], device: torch.device) -> Tensor:
    return torch.tensor(len(sequence), dtype=torch.int64, device=device)


def split(x: Tensor, sizes: Sequence[int] | None, scalar: bool, axis: int, keep: bool) -> list[Tensor]:
    """Parts of an axis: of one size where that is a scalar, and without the axis where no sizes are given."""
    if sizes is None:
        return list(x.split(1, axis) if keep else x.unbind(axis))
    return list(x.split(sizes[0] if scalar else list(sizes), axis))


def join(sequence: list[Tensor], axis: int, new: bool) -> Tensor:
    return torch.stack(sequence, axis) if new else torch.cat(sequence, axis)


def nothing() -> None:
    return None


def has_element(value: Any, device: torch.device) -> Tensor:
    return torch.tensor(value is not None, device=device)
