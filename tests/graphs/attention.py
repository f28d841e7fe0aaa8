"""Attention over sequences (N, T, D): separate, packed, grouped-query and rotary."""

from __future__ import annotations

from math import sqrt

import numpy as np
from onnx import TensorProto

from tests.graphs.builder import Builder, Dim, From, Size, Tensor
from tests.graphs.layers import linear

__all__ = ["attention", "latents", "linear_attention", "merged_heads"]


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


def position_bias(b: Builder, heads: int, t: int) -> Tensor:
    """A learned number per head and distance: as it is, or looked up in a table by constant indices (Swin)."""
    if b.chance():
        return b.weight((1, heads, t, t), 1)
    distances = np.arange(t)[:, None] - np.arange(t)[None, :] + t - 1
    bias = b.node("Gather", [b.weight((2 * t - 1, heads), 1), b.constant(distances)], (t, t, heads), axis=0)
    return b.unsqueeze(b.transpose(bias, 2, 0, 1), [0])


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
    scores = b.add(scores, position_bias(b, heads, t)) if b.chance(4) else scores
    if b.chance(4):
        mask = np.triu(np.full((t, t), -1e4, np.float32), 1)
        scores = b.add(scores, b.constant(mask))
    weights = b.node("Softmax", [scores], scores.shape, axis=3)
    y = b.node("MatMul", [weights, v], (n, heads, t, v.shape[3]))
    return b.reshape(b.transpose(y, 0, 2, 1, 3), [From(0), t, heads * v.size(3)])


def merged_heads(b: Builder, x: Tensor) -> Tensor:
    """torch's MultiheadAttention: heads become part of the batch."""
    n, t = x.shape[0], x.size(1)
    heads, width = b.pick([2, 3]), b.pick([2, 4])
    if isinstance(n, str):
        return attention(b, x)
    turned = b.transpose(x, 1, 0, 2)

    def apart(y: Tensor) -> Tensor:
        return b.transpose(b.reshape(y, [t, n * heads, width]), 1, 0, 2)

    q, k, v = (apart(linear(b, turned, heads * width)) for _ in range(3))
    scores = scaled(b, b.node("MatMul", [q, b.transpose(k, 0, 2, 1)], (n * heads, t, t)), q)
    y = b.node("MatMul", [b.node("Softmax", [scores], scores.shape, axis=2), v], v.shape)
    y = b.reshape(b.transpose(y, 1, 0, 2), [t, n, heads * width])
    return b.transpose(y, 1, 0, 2)


def linear_attention(b: Builder, x: Tensor) -> Tensor:
    """Without a softmax: keys times values first."""
    n, t = x.shape[0], x.size(1)
    heads, width, values = b.pick([2, 3]), b.pick([2, 4]), b.pick([2, 3])
    q = heads_of(b, b.elementwise("Relu", linear(b, x, heads * width)), heads)
    k = heads_of(b, b.elementwise("Relu", linear(b, x, heads * width)), heads)
    v = heads_of(b, linear(b, x, heads * values), heads)
    kv = b.node("MatMul", [b.transpose(k, 0, 1, 3, 2), v], (n, heads, width, values))
    y = b.node("MatMul", [q, kv], (n, heads, t, values))
    return b.reshape(b.transpose(y, 0, 2, 1, 3), [From(0), t, heads * values])


def latents(b: Builder, x: Tensor) -> Tensor:
    """Learned queries look at the sequence (Perceiver, DETR)."""
    n, t = x.shape[0], x.size(1)
    count, width = 3, b.pick([4, 6])
    learned = b.weight((1, count, b.pick([4, 6])), 1)
    q = linear(b, learned, width)
    if b.chance():
        target = b.sizes(x, [From(0), count, width]) if isinstance(n, str) else b.constant([n, count, width])
        q = b.node("Expand", [q, target], (n, count, width))
    k, v = linear(b, x, width), linear(b, x)
    q = scaled(b, q, k) if b.chance(3) else q
    scores = b.node("MatMul", [q, b.transpose(k, 0, 2, 1)], (n, count, t))
    weights = b.node("Softmax", [scaled(b, scores, q)], scores.shape, axis=2)
    return b.node("MatMul", [weights, v], (n, count, v.size(2)))
