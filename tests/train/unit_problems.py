"""Small problems for the optimizers over units: tensors with their parts, and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxprune.train.units import Part
from tests.train.unit_reference import Problem


def part(family: str, axis: int, *units: int) -> Part:
    return Part(family, axis, np.array(units))


def disjoint(**options: Any) -> Problem:
    """Two families: one of a convolution with its normalisation (one unit of three channels is frozen), one of a linear
    layer of which every unit owns two rows; and a tensor that has no units."""
    torch.manual_seed(1)
    tensors = [torch.randn(5, 2, 3, 3), torch.rand(5) + 0.5, torch.randn(5), torch.randn(8, 6), torch.randn(3, 4)]
    tensors = [0.3 * t for t in tensors]
    rows = (part("a", 0, 0, 1, -1, 2, 3),)
    twice = (part("b", 0, 0, 1, 2, 3, 0, 1, 2, 3),)
    return Problem(tensors, [rows, rows, rows, twice, ()], [0, 1, 1, 0, 0], _two(options))


def overlapping(**options: Any) -> Problem:
    """Heads and their dimensions: rows of one axis that belong to a unit of each; and a tensor of two free axes."""
    torch.manual_seed(2)
    tensors = [0.3 * torch.randn(12, 5), 0.3 * torch.randn(12), 0.3 * torch.randn(4, 3, 2), 0.3 * torch.randn(4, 7)]
    heads, dims = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)
    both = (Part("head", 0, heads), Part("dim", 0, dims))
    two_axes = (part("dim", 0, 0, 1, 2, 3), part("head", 1, 0, 1, 2))
    return Problem(tensors, [both, both, two_axes, (part("other", 0, 0, 1, 2, 3),)], [0, 1, 0, 0], _two(options))


def _two(options: dict[str, Any]) -> list[dict[str, Any]]:
    second = options.pop("second", {})
    return [{"lr": 0.05, **options}, {"lr": 0.05, **options, "weight_decay": 0.0, **second}]


def gradients(problem: Problem, steps: int, *, missing: bool = False, seed: int = 0) -> list[list[Tensor | None]]:
    """Noise, and a drift that descends towards zero. missing: some tensors have none in some steps."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    found: list[list[Tensor | None]] = []
    for step in range(steps):
        row: list[Tensor | None] = [0.2 * noise(t) + 0.05 * t.double() for t in problem.tensors]
        if missing:
            row[step % len(row)] = None
        found.append(row)
    return found
