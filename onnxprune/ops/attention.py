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
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, MirrorContext, NodeView, PatchContext, Term

__all__ = ["OPERATORS"]

_run = kernels("attention")
_fused = kernels("fused_attention")
_linear = kernels("linear_attention")


def packed_attention_axes(c: AxisContext) -> None:
    """com.microsoft.Attention: input (B, S, in), weights (in, 3 projections), bias, mask, past, bias of the scores."""
    x, w = c.axes(0), c.axes(1)
    heads = int(c.attr("num_heads"))
    sizes = c.attr("qkv_hidden_sizes") or [w[1].size // 3] * 3
    if sizes[0] != sizes[1] or sizes[2] % heads or sizes[0] % heads:
        raise GiveUp("the projections are not a whole number of heads")
    c.freeze("a softmax runs over it", x[1])
    c.freeze("a batch", x[0])
    h = c.note("heads", c.fresh(heads))
    d = c.fresh(sizes[0] // heads)
    if len(c.node.outputs) > 1 or c.has(4) or c.attr("do_rotary", 0) or not float(c.attr("scale", 0.0) or 0.0):
        c.freeze("a fused attention scales by its width", d)
    v = c.fresh(sizes[2] // heads) if c.attr("qkv_hidden_sizes") else d
    q, k, out = c.note("q", c.product(h, d)), c.product(h, d), c.note("v", c.product(h, v))
    c.contract(Kind.PRODUCT, (0, 2), (1, 0), fold=False)
    c.equal(w[1], c.sum(q, k, out))
    if c.has(2):
        c.equal(c.axes(2)[0], c.sum(q, k, out))
    if c.has(3):
        c.freeze("an attention mask", *c.axes(3))
    if c.has(4):
        past = c.axes(4)
        c.equal(past[2], h)
        c.freeze("cached keys and values", past[0], past[3], past[4])
    if c.has(5) and len(c.axes(5)) == 4 and c.axes(5)[1].size == heads:
        c.equal(c.axes(5)[1], h)
        c.freeze("a softmax runs over it", c.axes(5)[0], *c.axes(5)[2:])
    c.output(x[0], x[1], out)
    if len(c.node.outputs) > 1:
        c.output(c.frozen(2), x[0], h, c.frozen(c.output_shape(1)[3]), d, j=1)


def packed_attention_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    bias = len(node.inputs) <= 2 or not node.inputs[2] or states[2] == 0
    return 0.0 if states[1] == 0 and bias else None


def patch_packed_attention(p: PatchContext) -> None:
    p.set_attr("num_heads", p.noted("heads"))
    if p.attr("qkv_hidden_sizes"):
        p.set_attr("qkv_hidden_sizes", [p.noted("q"), p.noted("q"), p.noted("v")])


def packed_attention_macs(
    node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]
) -> list[Term]:
    batch, length, _ = inputs[0]
    return [(1.0, (batch, length, *inputs[1])), (2.0, (batch, length, length, outputs[0][2]))]


def packed_attention_shape(node, inputs):
    elem, x = inputs[0]
    sizes = node.attributes.get("qkv_hidden_sizes")
    heads = int(node.attributes["num_heads"])
    width = sizes[2] if sizes else inputs[1][1][1] // 3
    past = inputs[4][1][3] if len(inputs) > 4 and inputs[4] else 0
    total = None if past is None or x[1] is None else past + x[1]
    return [(elem, (x[0], x[1], width)), (elem, (2, x[0], heads, total, width // heads))][: len(node.outputs)]


def attended(c: AxisContext, length: int) -> tuple[tuple[Expr, ...], tuple[Expr, ...], tuple[Expr, ...]]:
    """Query, key and value: one batch, and lengths that a softmax runs over."""
    q, k, v = c.axes(0), c.axes(1), c.axes(2)
    c.equal(q[0], k[0], v[0])
    c.freeze("a softmax runs over it", q[length], k[length], v[length])
    return q, k, v


def multi_head_axes(c: AxisContext) -> None:
    """com.microsoft.MultiHeadAttention with query (B, S, h d), key (B, L, h d), value (B, L, h v)."""
    heads = int(c.attr("num_heads"))
    if not (c.has(1) and c.has(2)) or not (c.rank(0) == c.rank(1) == c.rank(2) == 3):
        raise GiveUp("packed or cached keys and values")
    q, k, v = attended(c, 1)
    h = c.note("heads", c.fresh(heads))
    d, e = c.fresh(q[2].size // heads), c.fresh(v[2].size // heads)
    if not float(c.attr("scale", 0.0) or 0.0):
        c.freeze("a fused attention scales by its width", d)
    if c.has(6) or any(c.node.outputs[1:]):  # onnxruntime takes both for of one width there
        c.freeze("cached keys and values", d, e)
    c.freeze("a batch", q[0])
    c.equal(q[2], k[2], c.product(h, d))
    c.equal(v[2], c.product(h, e))
    if d.size > 1:
        c.contract(Kind.PRODUCT, (0, 2), (1, 2), over=d)
    if c.has(3):
        c.equal(c.axes(3)[0], c.sum(q[2], k[2], v[2]))
    if c.has(5) and len(c.axes(5)) == 4 and c.axes(5)[1].size == heads:
        c.equal(c.axes(5)[1], h)
        c.freeze("a softmax runs over it", c.axes(5)[0], *c.axes(5)[2:])
    for i in (6, 7):
        if c.has(i):
            c.equal(c.axes(i)[1], h)
            c.equal(c.axes(i)[3], d if i == 6 else e)
            c.equal(c.axes(i)[0], q[0])
            c.freeze("cached keys and values", c.axes(i)[2])
    c.output(q[0], q[1], v[2])
    for j, width in ((1, d), (2, e)):
        if len(c.node.outputs) > j and c.node.outputs[j]:
            c.output(q[0], h, c.frozen(c.output_shape(j)[2]), width, j=j)


def value_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    """Attention averages values: zero where the value is."""
    return 0.0 if states[2] == 0 else None


def biased_value_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    """As `value_dead`, with a bias of the projections."""
    unbiased = len(node.inputs) <= 3 or not node.inputs[3]
    return 0.0 if states[2] == 0 and (unbiased or states[3] == 0) else None


def patch_heads(p: PatchContext) -> None:
    p.set_attr("num_heads", p.noted("heads"))


def attention_macs(
    node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]
) -> list[Term]:
    if len(inputs) < 3 or not inputs[1] or not inputs[2] or len(inputs[0]) != len(outputs[0]):
        return []
    keys = inputs[1][-2]
    return [(1.0, (*inputs[0], keys)), (1.0, (*outputs[0], keys))]


def multi_head_shape(node, inputs):
    elem, q = inputs[0]
    k, v = (inputs[i][1] if len(inputs) > i and inputs[i] else q for i in (1, 2))
    if not len(q) == len(k) == len(v) == 3:
        return [None]
    heads = int(node.attributes["num_heads"])
    past = inputs[6][1][2] if len(inputs) > 6 and inputs[6] else 0
    total = None if past is None or k[1] is None else past + k[1]
    cache = [(elem, (q[0], heads, total, None if x[2] is None else x[2] // heads)) for x in (k, v)]
    return [(elem, (q[0], q[1], v[2])), *cache][: len(node.outputs)]


def grouped_query_axes(c: AxisContext) -> None:
    """com.microsoft.GroupQueryAttention: q heads are (kv heads, repeats); cached keys and values have kv heads."""
    heads, shared = int(c.attr("num_heads")), int(c.attr("kv_num_heads"))
    if not (c.has(1) and c.has(2)):
        raise GiveUp("packed projections")
    q, k, v = attended(c, 1)
    c.freeze("a batch", q[0])
    kv, repeat = c.note("kv", c.fresh(shared)), c.fresh(heads // shared)
    d = c.frozen(q[2].size // heads, "rotated or cached head width")
    c.note("heads", c.product(kv, repeat))
    c.equal(q[2], c.product(kv, repeat, d))
    c.equal(k[2], v[2], c.product(kv, d))
    for i in (3, 4):
        if c.has(i):
            past = c.axes(i)
            c.equal(past[1], kv)
            c.freeze("cached keys and values", past[0], *past[2:])
    c.output(q[0], q[1], c.product(kv, repeat, d))
    for j in (1, 2):
        if len(c.node.outputs) > j and c.node.outputs[j]:
            c.output(q[0], kv, c.frozen(c.output_shape(j)[2]), d, j=j)


def patch_grouped(p: PatchContext) -> None:
    p.set_attr("num_heads", p.noted("heads"))
    p.set_attr("kv_num_heads", p.noted("kv"))


def grouped_query_shape(node, inputs):
    """The cache's length depends on whether the caller lets past and present share one buffer."""
    elem, q = inputs[0]
    heads, shared = int(node.attributes["num_heads"]), int(node.attributes["kv_num_heads"])
    packed = len(inputs) < 2 or not inputs[1]
    width = None if q[2] is None else q[2] // (heads + 2 * shared if packed else heads)
    cache = (elem, (q[0], shared, None, width))
    return [(elem, (q[0], q[1], None if width is None else width * heads)), cache, cache][: len(node.outputs)]


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


def embed_axes(c: AxisContext) -> None:
    """EmbedLayerNormalization: ids, segment ids, three tables, gamma, beta, mask; and the normalised sum."""
    ids, word = c.axes(0), c.axes(2)
    hidden = word[1]
    c.freeze("a position", *ids)
    for i in (2, 3, 4):
        if c.has(i):
            c.freeze("it is looked up by index", c.axes(i)[0])
            c.contract(Kind.NORM, (i, 1), over=hidden, through=True)
            c.equal(hidden, c.axes(i)[1])
    c.equal(hidden, c.axes(5)[0], c.axes(6)[0])
    c.output(ids[0], ids[1], hidden)
    if len(c.node.outputs) > 1 and c.node.outputs[1]:
        c.output(ids[0], j=1)
    if len(c.node.outputs) > 2 and c.node.outputs[2]:
        c.output(ids[0], ids[1], hidden, j=2)


def embed_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    tables = [states[i] for i in (2, 3, 4, 5, 6) if i < len(node.inputs) and node.inputs[i]]
    return 0.0 if all(s == 0 for s in tables) else None


def embed_shape(node, inputs):
    _, ids = inputs[0]
    elem, table = inputs[2]
    full = (elem, (*ids, table[1]))
    return [full, (6, (ids[0],)), full][: len(node.outputs)]


def given(m: MirrorContext, *inputs: int) -> list[Any]:
    """These inputs as tensors; None for those that are absent."""
    return [m.optional(i) for i in inputs]


def scale_of(m: MirrorContext) -> float | None:
    """The factor of the scores; None: one over the root of the width."""
    return float(m.attr("scale", 0.0) or 0.0) or None


def packed_attention_mirror(m: MirrorContext) -> Any:
    if m.attr("do_rotary", 0):
        raise m.unsupported("it rotates")
    if m.attr("past_present_share_buffer", 0):
        raise m.unsupported("past and present share a buffer")
    settings = (int(m.attr("num_heads")), m.attr("qkv_hidden_sizes"), bool(m.attr("unidirectional", 0)), scale_of(m))
    fill = float(m.attr("mask_filter_value", -10000.0))
    found = m.call(_fused.packed, *given(m, 0, 1, 2, 3, 4, 5), *settings, fill)
    return [found[j] for j in range(len(m.node.outputs))]


def multi_head_mirror(m: MirrorContext) -> Any:
    if m.has(8) or m.has(9):
        raise m.unsupported("past and present share a buffer")
    settings = (int(m.attr("num_heads")), bool(m.attr("unidirectional", 0)), scale_of(m))
    found = m.call(_fused.multi_head, *given(m, *range(8)), *settings, float(m.attr("mask_filter_value", -10000.0)))
    return [found[j] for j in range(len(m.node.outputs))]


def grouped_query_mirror(m: MirrorContext) -> Any:
    """Inputs: Q, K, V, past keys and values, last positions, the longest sequence, cosines, sines, positions, what is
    added to the scores, sinks."""
    if m.has(11) or m.attr("smooth_softmax", 0) or len(m.node.outputs) > 3:
        raise m.unsupported("an attention sink, or scores as an output")
    if m.attr("k_quant_type", "NONE") != "NONE" or m.attr("v_quant_type", "NONE") != "NONE":
        raise m.unsupported("a quantised cache")
    tables = tuple(given(m, 7, 8)) if m.attr("do_rotary", 0) else None
    found = m.call(
        _fused.grouped_query,
        *given(m, 0, 1, 2, 3, 4, 5),
        m.ints(6)[0],
        tables,
        *given(m, 9, 10),
        (int(m.attr("num_heads")), int(m.attr("kv_num_heads"))),
        scale_of(m),
        float(m.attr("softcap", 0.0)),
        int(m.attr("local_window_size", -1)),
        bool(m.attr("rotary_interleaved", 0)),
    )
    return [found[j] for j in range(len(m.node.outputs))]


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


def embed_mirror(m: MirrorContext) -> Any:
    found = m.call(_fused.embed_layer_norm, *given(m, *range(9)), float(m.attr("epsilon", 1e-12)))
    return [found[j] for j in range(len(m.node.outputs))]


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
        "com.microsoft::Attention",
        packed_attention_axes,
        packed_attention_dead,
        packed_attention_macs,
        patch_packed_attention,
        shape=packed_attention_shape,
        mirror=packed_attention_mirror,
    ),
    Operator(
        "com.microsoft::MultiHeadAttention",
        multi_head_axes,
        biased_value_dead,
        attention_macs,
        patch_heads,
        shape=multi_head_shape,
        mirror=multi_head_mirror,
    ),
    Operator(
        "com.microsoft::GroupQueryAttention",
        grouped_query_axes,
        value_dead,
        attention_macs,
        patch_grouped,
        shape=grouped_query_shape,
        mirror=grouped_query_mirror,
        fixed=frozenset({7, 8}),
    ),
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
        "Attention", onnx_attention_axes, value_dead, attention_macs, patch_onnx_attention, mirror=onnx_attention_mirror
    ),
    Operator("LinearAttention", mirror=linear_attention_mirror),
    Operator("CausalConvWithState", mirror=causal_conv_mirror),
    Operator(
        "com.microsoft::EmbedLayerNormalization",
        embed_axes,
        embed_dead,
        shape=embed_shape,
        indices=((0, 2), (1, 4)),
        mirror=embed_mirror,
    ),
)
