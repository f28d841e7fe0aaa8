"""Recurrences that stand in for attention: linear attention, and the causal convolution in front of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from onnxprune.ops.kernels.attention import heads, merged, shared

__all__ = ["causal_conv", "linear_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor | None,
    decay: Tensor | None,
    beta: Tensor | None,
    counts: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A state (batch, heads, key width, value width) that decays and is written at every step, and read by the query.

    With beta, only what the state does not yet say of the value is written (the delta rule). counts: heads of queries
    and of keys. Computed in float32, or in float64 where the inputs are.
    """
    kind, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = heads(q, counts[0]).to(wide), heads(k, counts[1]).to(wide), heads(v, counts[1]).to(wide)
    kept = None if decay is None else heads(decay, counts[1]).to(wide).exp()
    share = None if beta is None else beta.transpose(1, 2).unsqueeze(-1).to(wide)
    state = q.new_zeros(q.size(0), counts[1], k.size(-1), v.size(-1)) if past is None else past.to(wide)
    read = []
    for t in range(q.size(2)):
        if kept is not None:
            state = state * kept[:, :, t].unsqueeze(-1)
        value = v[:, :, t]
        if share is not None:
            value = share[:, :, t] * (value - (state * k[:, :, t].unsqueeze(-1)).sum(2))
        state = state + k[:, :, t].unsqueeze(-1) * value.unsqueeze(2)
        read.append((shared(state, counts[0]) * q[:, :, t].unsqueeze(-1)).sum(2))
    y = torch.stack(read, 2) * (scale or 1 / math.sqrt(k.size(-1)))
    return merged(y).to(kind), state.to(kind if past is None else past.dtype)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """A depthwise convolution over the last k places, and the last k - 1 inputs, with which it goes on."""
    before = weight.size(2) - 1
    whole = F.pad(x, (before, 0)) if past is None else torch.cat([past, x], 2)
    y = F.conv1d(whole, weight, bias, groups=x.size(1))
    return F.silu(y) if activation in ("silu", "swish") else y, whole[:, :, whole.size(2) - before :]
