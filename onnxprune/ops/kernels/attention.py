"""Attention at run time. Queries, keys and values are (batch, heads, length, width) inside; what must not be attended
to is False in a mask of bools, or far below zero in one that is added to the scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attend", "attention", "heads", "merged", "rotary", "rotate"]


def heads(x: Tensor, count: int) -> Tensor:
    """(batch, length, heads width) as (batch, heads, length, width)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """(batch, heads, length, width) as (batch, length, heads width)."""
    return x.transpose(1, 2).flatten(2)


def shared(x: Tensor, count: int) -> Tensor:
    """Every head of keys or values as often as query heads share it."""
    return x if x.size(1) == count else x.repeat_interleave(count // x.size(1), 1)


def both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """What two masks allow; None allows everything."""
    if mask is None or other is None:
        return other if mask is None else mask
    if other.dtype != torch.bool and mask.dtype != torch.bool:
        return mask + other
    if mask.dtype != torch.bool:
        mask, other = other, mask
    if other.dtype == torch.bool:
        return mask & other
    return torch.where(mask, other, torch.full_like(other, float("-inf")))


def band(
    length: int, keys: int, offset: Tensor | int, device: torch.device, left: int | None, right: int | None
) -> Tensor:
    """Which keys each query may look at: from `left` before to `right` after its own position, which is its place
    plus an offset (a number, or one per batch). None: without a limit. Shape (.., length, keys)."""
    if isinstance(offset, Tensor):
        offset = offset.reshape(-1, 1, 1, 1)
    ahead = torch.arange(keys, device=device) - (torch.arange(length, device=device).unsqueeze(1) + offset)
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if right is not None:
        allowed = allowed & (ahead <= right)
    return allowed if left is None else allowed & (ahead >= -left)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, causal: bool = False
) -> Tensor:
    """softmax(q k' scale + mask) v. causal: a query looks at keys up to its own place only."""
    k, v = shared(k, q.size(1)), shared(v, q.size(1))
    if causal and mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if causal:
        mask = both(mask, band(q.size(2), k.size(2), 0, q.device, None, 0))
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):  # autocast: what was finite stays finite
        mask = mask.clamp_min(max(torch.finfo(t.dtype).min for t in (q, mask))).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products, capped ones, masked ones, and their softmax, in which rows that are masked throughout are zero."""
    raw = (q @ shared(k, q.size(1)).mT) * (scale or 1 / math.sqrt(q.size(-1)))
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    if mask is None:
        return raw, capped, capped, torch.softmax(capped, -1)
    bias = torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask
    masked = capped + bias.to(capped.dtype)
    empty = bias.amax(-1, keepdim=True) == float("-inf")
    weights = torch.softmax(masked.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return raw, capped, masked, weights


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    lengths: Tensor | None,
    counts: tuple[int, int] | None,
    scale: float | None,
    softcap: float,
    window: tuple[bool, int, int],
    mode: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """ONNX's Attention: the result, keys and values with the past ones, and scores if a mode asks for them.

    counts: heads of queries and of keys, where heads and widths lie in one axis. lengths: per batch, how many keys are
    no padding. window: whether it is causal, and the limits on both sides (-1: none).
    """
    if counts is not None:
        q, k, v = heads(q, counts[0]), heads(k, counts[1]), heads(v, counts[1])
    offset: Tensor | int = 0
    if past_k is not None and past_v is not None:
        offset = past_k.size(2)
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    elif lengths is not None:
        offset = lengths - q.size(2)
    mask = padded(mask, k.size(2))
    causal, left, right = window
    plain = causal and left < 0 and right < 0 and mask is None and isinstance(offset, int) and offset == 0
    if not plain and (causal or left >= 0 or right >= 0):
        ends = [e for e in (0 if causal else None, right if right >= 0 else None) if e is not None]
        near = band(q.size(2), k.size(2), offset, q.device, left if left >= 0 else None, min(ends) if ends else None)
        mask = both(mask, near)
    if lengths is not None:
        real = torch.arange(k.size(2), device=q.device) < lengths.reshape(-1, 1, 1, 1)
        mask = both(mask, real)
    if mode is None and not softcap:
        y, shown = attend(q, k, v, mask, scale, plain), None
    else:
        mask = band(q.size(2), k.size(2), 0, q.device, None, 0) if plain else mask
        found = scores(q, k, mask, scale, softcap)
        y, shown = found[3] @ shared(v, q.size(1)), None if mode is None else found[mode]
    return merged(y) if counts is not None else y, k, v, shown


def padded(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask that ends early allows none of the keys behind its end."""
    if mask is None or mask.size(-1) == keys:
        return mask
    return F.pad(mask, (0, keys - mask.size(-1)), value=False if mask.dtype == torch.bool else float("-inf"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs in the first 2n of the last axis by angles (.., length, n); the rest stays."""
    n = cos.size(-1)
    turned, rest = x[..., : 2 * n], x[..., 2 * n :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :n], turned[..., n:])
    pair = (a * cos - b * sin, a * sin + b * cos)
    found = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([found, rest], -1) if rest.size(-1) else found


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, count: int, interleaved: bool, width: int
) -> Tensor:
    """RotaryEmbedding of (batch, heads, length, width) or (batch, length, heads width).

    positions: rows of the tables per batch and place, or the row of the first place; None: the tables have an axis of
    batches, and a row per place. count: heads, 0 where the table gives their width. width: how much of a head is
    turned, 0 for all of it.
    """
    flat = x.dim() == 3
    if flat:
        x = heads(x, count or x.size(-1) // (2 * cos.size(-1)))
    if positions is not None:
        if positions.numel() == 1 and x.size(2) * x.size(0) > 1:
            positions = positions.reshape(1, 1) + torch.arange(x.size(2), device=x.device)
        positions = positions.long().reshape(-1, x.size(2))
        cos, sin = cos[positions], sin[positions]
    n = width // 2 or cos.size(-1)
    y = rotate(x, cos[..., :n].unsqueeze(1), sin[..., :n].unsqueeze(1), interleaved)
    return merged(y) if flat else y
