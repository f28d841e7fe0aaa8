"""Operators that draw numbers. Their seeds are left aside: torch's own generator decides."""

from __future__ import annotations

from typing import Any

from onnxprune.ops.elementwise import first_input_axes
from onnxprune.ops.generator import frozen_axes
from onnxprune.ops.lazy import torch
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MirrorContext

__all__ = ["OPERATORS"]


def normal(m: MirrorContext, x: Any) -> Any:
    """Standard normal numbers, with the node's mean and scale."""
    mean, scale = float(m.attr("mean", 0.0)), float(m.attr("scale", 1.0))
    return x if (mean, scale) == (0, 1) else x * scale + mean


def uniform(m: MirrorContext, x: Any) -> Any:
    """Numbers from 0 to 1, between the node's bounds."""
    low, high = float(m.attr("low", 0.0)), float(m.attr("high", 1.0))
    return x if (low, high) == (0, 1) else x * (high - low) + low


def shaped(m: MirrorContext, function: Any) -> Any:
    return m.call(function, list(m.attr("shape")), dtype=m.torch_type(int(m.attr("dtype", 1))), device=m.device)


def alike(m: MirrorContext, function: Any) -> Any:
    return function(m.tensor(0), dtype=m.output_dtype() or m.dtype(0))


def bernoulli_mirror(m: MirrorContext) -> Any:
    drawn = torch.bernoulli(m.tensor(0))
    return drawn if m.output_dtype() in (None, m.dtype(0)) else drawn.to(m.output_dtype())


def multinomial_mirror(m: MirrorContext) -> Any:
    """From unnormalised log probabilities."""
    drawn = torch.multinomial(torch.softmax(m.tensor(0), 1), int(m.attr("sample_size", 1)), True)
    return drawn.to(m.torch_type(int(m.attr("dtype", 6))))


OPERATORS = (
    Operator("RandomNormal", frozen_axes, mirror=lambda m: normal(m, shaped(m, torch.randn))),
    Operator("RandomUniform", frozen_axes, mirror=lambda m: uniform(m, shaped(m, torch.rand))),
    Operator("RandomNormalLike", first_input_axes, mirror=lambda m: normal(m, alike(m, torch.randn_like))),
    Operator("RandomUniformLike", first_input_axes, mirror=lambda m: uniform(m, alike(m, torch.rand_like))),
    Operator("Bernoulli", first_input_axes, mirror=bernoulli_mirror),
    Operator("Multinomial", mirror=multinomial_mirror),
)
