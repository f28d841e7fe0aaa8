"""onnxruntime's attention operators (com.microsoft) at run time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from onnxprune.ops.kernels.attention import attend, band, both, heads, merged, rotate, scores, shared

__all__ = ["embed_layer_norm", "grouped_query", "multi_head", "packed"]


def packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    past: Tensor | None,
    score_bias: Tensor | None,
    count: int,
    sizes: Sequence[int] | None,
    causal: bool,
    scale: float | None,
    fill: float,
) -> tuple[Tensor, Tensor]:
    """Attention: one product gives queries, keys and values. past, and the second result: (2, batch, heads, length,
    width)."""
    y = x @ weight if bias is None else x @ weight + bias
    q, k, v = (heads(part, count) for part in (y.chunk(3, -1) if sizes is None else y.split(list(sizes), -1)))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    found = limited(q, k, v, padding(mask, q, k, fill), score_bias, causal, scale)
    present = torch.stack([k, v]) if k.shape == v.shape else k
    return merged(found), present


def limited(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Attention in which the queries are the last ones of as many as there are keys."""
    mask = both(mask, bias)
    before = k.size(2) - q.size(2)
    if causal and before:
        mask = both(mask, band(q.size(2), k.size(2), before, q.device, None, 0))
    return attend(q, k, v, mask, scale, causal and not before)


def padding(mask: Tensor | None, q: Tensor, k: Tensor, fill: float) -> Tensor | None:
    """onnxruntime's forms of a mask as what is added to the scores: lengths per batch; ends and starts per batch; 0
    and 1 per key, per query and key, or in a square over all positions."""
    if mask is None:
        return None
    batch, keys = q.size(0), k.size(2)
    if mask.dim() == 1:
        place = torch.arange(keys, device=q.device)
        seen = place < mask[:batch].unsqueeze(1)
        if mask.size(0) == 2 * batch:
            seen = seen & (place >= mask[batch:].unsqueeze(1))
        seen = seen[:, None, None]
    elif mask.dim() == 4:
        before = keys - q.size(2)
        seen = mask[:, :, before : before + q.size(2), :keys] != 0
    else:
        seen = (mask != 0).unsqueeze(1) if mask.dim() == 3 else (mask != 0)[:, None, None]
    least = torch.finfo(q.dtype).min  # of halves it is larger than some exporters' fill
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, max(fill, least))


def multi_head(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    score_bias: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    count: int,
    causal: bool,
    scale: float | None,
    fill: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """MultiHeadAttention: the result, and keys and values with the past ones. Queries, keys and values may be packed
    as (batch, length, heads, 3, width), keys and values as (.., 2, width), or lie as (batch, heads, length, width)."""
    if q.dim() == 5:
        q, k, v = (part.flatten(2) for part in q.unbind(3))
    elif k is not None and k.dim() == 5:
        k, v = (part.flatten(2) for part in k.unbind(3))
    assert k is not None and v is not None
    if bias is not None:
        flat = k.dim() == 3
        rest = bias.size(0) - q.size(-1)
        widths = [k.size(-1), v.size(-1)] if flat else [rest // 2, rest - rest // 2]
        of_q, of_k, of_v = bias.split([q.size(-1), *widths])
        q = q + of_q
        k, v = (k + of_k, v + of_v) if flat else (k, v)
    q = heads(q, count)
    k, v = (x if x.dim() == 4 else heads(x, count) for x in (k, v))
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    found = limited(q, k, v, padding(mask, q, k, fill), score_bias, causal, scale)
    return merged(found), k, v


def grouped_query(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    last: Tensor,
    total: int,
    tables: tuple[Tensor, Tensor] | None,
    positions: Tensor | None,
    score_bias: Tensor | None,
    counts: tuple[int, int],
    scale: float | None,
    softcap: float,
    window: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupQueryAttention: the result, and the keys and values seen so far. last: per batch, the position of its last
    key. total: the longest sequence; where that is the number of queries, they are the first ones. window: how many
    keys a query looks back at, itself included; -1: all."""
    if k is None or v is None:
        width = q.size(-1) // (counts[0] + 2 * counts[1])
        q, k, v = q.split([counts[0] * width, counts[1] * width, counts[1] * width], -1)
    q, k, v = heads(q, counts[0]), heads(k, counts[1]), heads(v, counts[1])
    batch, length = q.size(0), q.size(2)
    last = last.reshape(-1).long()
    before = torch.zeros_like(last) if length == total else last + 1 - length
    place = before.unsqueeze(1) + torch.arange(length, device=q.device)
    if tables is not None:
        at = (place if positions is None else positions.long()).expand(batch, length).clamp(min=0)
        cos, sin = (t[at].unsqueeze(1) for t in tables)
        q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    k, v = cached(past_k, k, place, total), cached(past_v, v, place, total)
    near = band(length, k.size(2), before, q.device, window - 1 if window > 0 else None, 0)
    mask = both(near, None if score_bias is None else F.pad(score_bias, (0, k.size(2) - score_bias.size(-1))))
    if softcap:
        found = scores(q, k, mask, scale, softcap)[3] @ shared(v, q.size(1))
    else:
        found = attend(q, k, v, mask, scale)
    return merged(found), k, v


def cached(past: Tensor | None, new: Tensor, place: Tensor, total: int) -> Tensor:
    """Past keys or values with the new ones written at their places, per batch, and nothing behind them."""
    held = 0 if past is None else past.size(2)
    if held == 0 and new.size(2) == total:
        return new
    longer = new.new_zeros(new.size(0), new.size(1), max(held, total) - held, new.size(3))
    whole = longer if past is None else torch.cat([past.to(new.dtype), longer], 2)
    unused = torch.arange(whole.size(2), device=new.device) >= place[:, :1]
    whole = whole.masked_fill(unused[:, None, :, None], 0.0)
    return whole.scatter(2, place[:, None, :, None].expand(new.shape), new)


def embed_layer_norm(
    ids: Tensor,
    segments: Tensor | None,
    word: Tensor,
    position: Tensor,
    segment: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    places: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """EmbedLayerNormalization: the normalised sum of the looked-up rows, the number of unmasked places, the sum."""
    if places is None:
        places = torch.arange(ids.size(1), device=ids.device).unsqueeze(0)
    total = F.embedding(ids.long(), word) + F.embedding(places.long(), position)
    if segments is not None and segment is not None:
        total = total + F.embedding(segments.long(), segment)
    normal = F.layer_norm(total, (total.size(-1),), gamma, beta, eps)
    count = ids.new_zeros(ids.size(0)) if mask is None else mask.sum(1, dtype=mask.dtype)
    return normal, count.to(torch.int32), total
