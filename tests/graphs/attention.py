"""Attention over sequences (N, T, D): separate, packed, grouped-query and rotary."""

from __future__ import annotations

from math import sqrt

import numpy as np
from onnx import TensorProto

from tests.graphs.builder import Builder, Dim, From, Size, Tensor
from tests.graphs.layers import linear

__all__ = ["attention"]


def heads_of(b: Builder, x: Tensor, heads: int) -> Tensor:
    """(N, T, h d) to (N, h, T, d)."""
    width = x.size(2) // heads
    dims: list[Dim] = [From(0), From(1), heads, width]
    if b.chance(3):
        dims[3] = From(2, over=heads)
    return b.transpose(b.reshape(x, dims), 0, 2, 1, 3)


def packed_heads(b: Builder, x: Tensor, heads: int, width: int) -> list[Tensor]:
    """Query, key and value from one projection, taken apart in one of the usual ways."""
    y = linear(b, x, 3 * heads * width)
    way = b.pick(["split", "five", "per head"])
    if way == "split":
        return [heads_of(b, p, heads) for p in b.split(y, 2, [heads * width] * 3)]
    t = x.size(1)
    if way == "per head":  # (h 3 d), as in GPT-NeoX
        y = b.transpose(b.reshape(y, [From(0), t, heads, 3 * width]), 0, 2, 1, 3)
        return b.split(y, 3, [width] * 3)
    y = b.transpose(b.reshape(y, [From(0), t, 3, heads, width]), 2, 0, 3, 1, 4)
    return [b.node("Gather", [y, b.constant(k)], y.shape[1:], axis=0) for k in range(3)]


def rotary(b: Builder, x: Tensor) -> Tensor:
    """Rotate the two halves of every head of (N, h, T, d)."""
    t, d = x.size(2), x.size(3)
    angles = np.outer(np.arange(t), 1 / 10.0 ** np.arange(d // 2))
    cos, sin = (np.concatenate([f(angles)] * 2, 1).astype(np.float32) for f in (np.cos, np.sin))
    low, high = b.slice(x, 3, 0, d // 2), b.slice(x, 3, d // 2, d)
    turned = b.concat([b.elementwise("Neg", high), low], 3)
    return b.add(b.mul(x, b.constant(cos)), b.mul(turned, b.constant(sin)))


def repeated(b: Builder, x: Tensor, times: int) -> Tensor:
    """Key-value heads for several query heads each: Unsqueeze, Expand, Reshape."""
    n, kv, t, d = x.shape
    if isinstance(n, str):
        ones = b.constant([1, 1, times, 1, 1])
    else:
        ones = b.constant([n, kv, times, t, d])
    wide = b.node("Expand", [b.unsqueeze(x, [2]), ones], (n, kv, times, t, d))
    return b.reshape(wide, [From(0), kv * times, t, d])


def scaled(b: Builder, scores: Tensor, query: Tensor) -> Tensor:
    """Divide by the root of the head width: as a constant or computed from a shape."""
    way = b.pick(["constant", "computed", "none"])
    if way == "constant":
        return b.mul(scores, b.scalar(1 / sqrt(query.size(-1))))
    if way == "computed":
        width = b.shape_entry(b.node("Shape", [query], (query.rank,)), query.rank - 1)
        root = b.node("Sqrt", [b.node("Cast", [width], (), to=TensorProto.FLOAT)], ())
        return b.elementwise("Div", scores, root)
    return scores


def attention(b: Builder, x: Tensor) -> Tensor:
    """(N, T, D) to (N, T, heads * width): separate, packed, grouped-query and rotary attention."""
    t = x.size(1)
    heads, width = b.pick([2, 3, 4]), b.pick([2, 4, 6])
    way = b.pick(["separate", "packed", "grouped"])
    if way == "packed":
        q, k, v = packed_heads(b, x, heads, width)
    else:
        shared = b.pick([1, 2]) if heads == 4 and way == "grouped" else 1 if way == "grouped" else heads
        values = b.pick([width, 3]) if way == "separate" else width
        q = heads_of(b, linear(b, x, heads * width), heads)
        k = heads_of(b, linear(b, x, shared * width), shared)
        v = heads_of(b, linear(b, x, shared * values), shared)
        if b.chance(3):
            q, k = rotary(b, q), rotary(b, k)
        if (way == "grouped" and shared > 1) or b.chance():
            k, v = (repeated(b, p, heads // shared) if shared < heads else p for p in (k, v))
    return attend(b, q, k, v, (x.shape[0], heads, t))


def attend(b: Builder, q: Tensor, k: Tensor, v: Tensor, rows: tuple[Size, int, int]) -> Tensor:
    """Softmax of the scores times the values, heads merged."""
    n, heads, t = rows
    if b.opset >= 12 and b.chance(4) and k.shape[1] == heads:
        scores = b.node("Einsum", [q, k], (n, heads, t, t), equation="bhqd,bhkd->bhqk")
    else:
        scores = b.node("MatMul", [q, b.transpose(k, 0, 1, 3, 2)], (n, heads, t, t))
    scores = scaled(b, scores, q)
    if b.chance(4):
        mask = np.triu(np.full((t, t), -1e4, np.float32), 1)
        scores = b.add(scores, b.constant(mask))
    weights = b.node("Softmax", [scores], scores.shape, axis=3)
    y = b.node("MatMul", [weights, v], (n, heads, t, v.shape[3]))
    return b.reshape(b.transpose(y, 0, 2, 1, 3), [From(0), t, heads * v.size(3)])
