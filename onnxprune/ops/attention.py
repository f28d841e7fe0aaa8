"""Fused attention: heads and head widths are factors of the projections' axes.

A head is dead when its values are; a query-key channel when its query is, since it only adds to the scores. Where
several query heads share a key-value head, one query head alone does not vanish, and the analysis says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxprune.axes.expr import Expr
from onnxprune.ops.lazy import kernels
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, Linear, MirrorContext, NodeView, PatchContext, Shape, Term

__all__ = ["OPERATORS", "attended", "attention_macs", "by_heads", "given", "scale_of", "value_dead"]

_run = kernels("attention")
_linear = kernels("linear_attention")


def attended(c: AxisContext, length: int) -> tuple[tuple[Expr, ...], tuple[Expr, ...], tuple[Expr, ...]]:
    """Query, key and value: one batch, and lengths that a softmax runs over."""
    q, k, v = c.axes(0), c.axes(1), c.axes(2)
    c.equal(q[0], k[0], v[0])
    c.freeze("a softmax runs over it", q[length], k[length], v[length])
    return q, k, v


def value_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    """Attention averages values: zero where the value is."""
    return 0.0 if states[2] == 0 else None


def attention_macs(
    node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]
) -> list[Term]:
    if len(inputs) < 3 or not inputs[1] or not inputs[2] or len(inputs[0]) != len(outputs[0]):
        return []
    keys = inputs[1][-2]
    return [(1.0, (*inputs[0], keys)), (1.0, (*outputs[0], keys))]


def rotary_axes(c: AxisContext) -> None:
    """RotaryEmbedding: pairs inside a head are rotated, heads pass. X is (B, h, S, d) or (B, S, h d)."""
    x = c.axes(0)
    if len(x) == 4:
        c.freeze("a rotary embedding turns its pairs", x[0], x[2], x[3])
        c.output(*x)
        return
    heads = int(c.attr("num_heads", 0))
    cos = c.axes(1 if c.node.op == "RotaryEmbedding" else 2)
    c.freeze("a position", x[0], x[1], *cos)
    width = x[2].size // heads if heads else 2 * cos[-1].size
    if width <= 0 or x[2].size % width:
        raise GiveUp("the width of a rotary embedding's heads is unknown")
    h, d = c.split(x[2], x[2].size // width)
    c.note("heads", h)
    c.freeze("a rotary embedding turns its pairs", d)
    c.output(*x)


def rotary_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 else None


def patch_rotary(p: PatchContext) -> None:
    if int(p.attr("num_heads", 0)) and len(p.before(0)) == 3:
        p.set_attr("num_heads", p.noted("heads"))


def onnx_attention_axes(c: AxisContext) -> None:
    """ai.onnx Attention: Q, K, V as (B, h, S, d), or (B, S, h d) with the head counts in attributes."""
    flat = c.rank(0) == 3
    q, k, v = attended(c, 1 if flat else 2)
    heads = int(c.attr("q_num_heads")) if flat else q[1].size
    shared = int(c.attr("kv_num_heads")) if flat else k[1].size
    kv, repeat = c.note("kv", c.fresh(shared)), c.fresh(heads // shared)
    d = c.fresh((q[2].size // heads) if flat else q[3].size)
    e = c.fresh((v[2].size // shared) if flat else v[3].size)
    if not float(c.attr("scale", 0.0) or 0.0):
        c.freeze("a fused attention scales by its width", d)
    qh = c.note("heads", c.product(kv, repeat))
    if flat:
        c.equal(q[2], c.product(kv, repeat, d))
        c.equal(k[2], c.product(kv, d))
        c.equal(v[2], c.product(kv, e))
    else:
        for axes, count, width in ((q, qh, d), (k, kv, d), (v, kv, e)):
            c.equal(axes[1], count)
            c.equal(axes[3], width)
    if d.size > 1:
        c.contract(Kind.PRODUCT, (0, len(q) - 1), (1, len(k) - 1), over=d)
    if c.has(3):
        mask = c.axes(3)  # broadcast to (batch, heads, query length, key length)
        if len(mask) > 2 and mask[-3].size > 1:
            c.equal(mask[-3], qh)
        if len(mask) > 3 and mask[-4].size > 1:
            c.equal(mask[-4], q[0])
        c.freeze("a softmax runs over it", *mask[-2:])
    if c.has(6):
        c.equal(c.axes(6)[0], q[0])
    for i in (4, 5):
        if c.has(i):
            c.equal(c.axes(i)[1], kv)
            c.equal(c.axes(i)[3], d if i == 4 else e)
            c.equal(c.axes(i)[0], q[0])
            c.freeze("cached keys and values", c.axes(i)[2])
    c.output(*((q[0], q[1], c.product(qh, e)) if flat else (q[0], qh, q[2], e)))
    for j, width in ((1, d), (2, e)):
        if len(c.node.outputs) > j and c.node.outputs[j]:
            c.output(q[0], kv, c.frozen(c.output_shape(j)[2]), width, j=j)


def patch_onnx_attention(p: PatchContext) -> None:
    if len(p.before(0)) == 3:
        p.set_attr("q_num_heads", p.noted("heads"))
        p.set_attr("kv_num_heads", p.noted("kv"))


def by_heads(heads: int, shared: int) -> Linear:
    """The product of queries (b, s, heads d) and keys (b, l, shared d), before it is scaled and masked."""
    return Linear(
        0,
        1,
        (("b", "s", "h", "r", "d"), ("b", "l", "h", "d"), ("b", "h", "r", "s", "l")),
        (),
        unfold=lambda q: q.unflatten(-1, (shared, heads // shared, -1)),
        unfold_weight=lambda k: k.unflatten(-1, (shared, -1)),
        inside=True,
    )


def onnx_attention_linear(node: NodeView, w: int, shapes: Sequence[Shape]) -> Linear | None:
    q, k = shapes[0], shapes[1]
    if w != 1 or q is None or k is None or any(node.inputs[4:6]):  # past keys are of another layer
        return None
    if len(q) == 3:
        return by_heads(int(node.attributes["q_num_heads"]), int(node.attributes["kv_num_heads"]))
    heads, shared = q[1], k[1]
    if heads is None or shared is None:
        return None
    terms = (("b", "h", "r", "s", "d"), ("b", "h", "l", "d"), ("b", "h", "r", "s", "l"))
    return Linear(0, 1, terms, (), unfold=lambda x: x.unflatten(1, (shared, heads // shared)), inside=True)


def given(m: MirrorContext, *inputs: int) -> list[Any]:
    """These inputs as tensors; None for those that are absent."""
    return [m.optional(i) for i in inputs]


def scale_of(m: MirrorContext) -> float | None:
    """The factor of the scores; None: one over the root of the width."""
    return float(m.attr("scale", 0.0) or 0.0) or None


def rotary_mirror(m: MirrorContext) -> Any:
    """X, cosines, sines, positions; com.microsoft has the positions second."""
    order = (0, 2, 3, 1) if m.node.op.startswith("com.") else (0, 1, 2, 3)
    if m.attr("is_packed_batching", 0) or float(m.attr("scale", 1.0)) != 1:
        raise m.unsupported("packed batches, or a scale")
    width = int(m.attr("rotary_embedding_dim", 0))
    return m.call(_run.rotary, *given(m, *order), int(m.attr("num_heads", 0)), bool(m.attr("interleaved", 0)), width)


def onnx_attention_mirror(m: MirrorContext) -> Any:
    """Q, K, V, mask, past keys and values, lengths; the result, keys, values, scores."""
    flat = m.attr("q_num_heads") is not None and m.rank(0) != 4
    counts = (int(m.attr("q_num_heads")), int(m.attr("kv_num_heads"))) if flat else None
    window = (bool(m.attr("is_causal", 0)), int(m.attr("left_window_size", -1)), int(m.attr("right_window_size", -1)))
    mode = int(m.attr("qk_matmul_output_mode", 0)) if len(m.node.outputs) > 3 and m.node.outputs[3] else None
    softcap = float(m.attr("softcap", 0.0))
    if plain_attention(m, flat, window, mode, softcap):
        return m.call(_run.attend, *given(m, 0, 1, 2, 3), scale_of(m), window[0])
    found = m.call(_run.attention, *given(m, *range(7)), counts, scale_of(m), softcap, window, mode)
    return [found[j] for j in range(len(m.node.outputs))]


def plain_attention(m: MirrorContext, flat: bool, window: tuple[bool, int, int], mode: int | None, cap: float) -> bool:
    """By heads, without a cache or a mask that may end early."""
    extras = any(m.has(i) for i in (3, 4, 5, 6)) or any(m.node.outputs[1:])
    return not (flat or extras or cap or mode is not None or max(window[1:]) >= 0)


def linear_attention_mirror(m: MirrorContext) -> Any:
    """Q, K, V, the state so far, decays, and how much is written; the result and the state."""
    counts = (int(m.attr("q_num_heads")), int(m.attr("kv_num_heads")))
    found = m.call(_linear.linear_attention, *given(m, *range(6)), counts, float(m.attr("scale", 0.0) or 0.0))
    return [found[j] for j in range(len(m.node.outputs))]


def causal_conv_mirror(m: MirrorContext) -> Any:
    found = m.call(_linear.causal_conv, *given(m, *range(4)), m.attr("activation", "none"))
    return [found[j] for j in range(len(m.node.outputs))]


OPERATORS = (
    Operator(
        "com.microsoft::RotaryEmbedding",
        rotary_axes,
        rotary_dead,
        patch=patch_rotary,
        shape=lambda n, i: [i[0]],
        mirror=rotary_mirror,
        fixed=frozenset({2, 3}),
    ),
    Operator(
        "RotaryEmbedding", rotary_axes, rotary_dead, patch=patch_rotary, mirror=rotary_mirror, fixed=frozenset({1, 2})
    ),
    Operator(
        "Attention",
        onnx_attention_axes,
        value_dead,
        attention_macs,
        patch_onnx_attention,
        mirror=onnx_attention_mirror,
        linear=onnx_attention_linear,
    ),
    Operator("LinearAttention", mirror=linear_attention_mirror),
    Operator("CausalConvWithState", mirror=causal_conv_mirror),
)
