"""onnxruntime's attention operators (com.microsoft), which take projections, biases, masks and caches in many forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxprune.axes.expr import Expr
from onnxprune.ops.attention import attended, attention_macs, by_heads, given, scale_of, value_dead
from onnxprune.ops.lazy import kernels
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, Linear, MirrorContext, NodeView, PatchContext, Shape, Term

__all__ = ["OPERATORS"]

_fused = kernels("fused_attention")


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


def biased_value_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    """As `value_dead`, with a bias of the projections."""
    unbiased = len(node.inputs) <= 3 or not node.inputs[3]
    return 0.0 if states[2] == 0 and (unbiased or states[3] == 0) else None


def patch_heads(p: PatchContext) -> None:
    p.set_attr("num_heads", p.noted("heads"))


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


def embed_mirror(m: MirrorContext) -> Any:
    found = m.call(_fused.embed_layer_norm, *given(m, *range(9)), float(m.attr("epsilon", 1e-12)))
    return [found[j] for j in range(len(m.node.outputs))]


def packed_attention_linear(node: NodeView, w: int, shapes: Sequence[Shape]) -> Linear | None:
    """What x gives to queries, keys and values, before anything is done with them."""
    weight = shapes[w]
    if w != 1 or weight is None or None in weight:
        return None
    inputs, outputs = (int(n or 0) for n in weight)
    bias = 2 if len(node.inputs) > 2 and node.inputs[2] else None
    return Linear(0, 1, (("b", "s", "k"), ("k", "o"), ("b", "s", "o")), (inputs, outputs), bias=bias, inside=True)


def multi_head_linear(node: NodeView, w: int, shapes: Sequence[Shape]) -> Linear | None:
    """Queries times keys, where neither a bias nor past keys are added inside."""
    if w != 1 or any(node.inputs[i] for i in (3, 6) if i < len(node.inputs)):
        return None
    if any(s is None or len(s) != 3 for s in shapes[:2]):
        return None
    heads = int(node.attributes["num_heads"])
    return by_heads(heads, heads)


OPERATORS = (
    Operator(
        "com.microsoft::Attention",
        packed_attention_axes,
        packed_attention_dead,
        packed_attention_macs,
        patch_packed_attention,
        shape=packed_attention_shape,
        mirror=packed_attention_mirror,
        linear=packed_attention_linear,
    ),
    Operator(
        "com.microsoft::MultiHeadAttention",
        multi_head_axes,
        biased_value_dead,
        attention_macs,
        patch_heads,
        shape=multi_head_shape,
        mirror=multi_head_mirror,
        linear=multi_head_linear,
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
        "com.microsoft::EmbedLayerNormalization",
        embed_axes,
        embed_dead,
        shape=embed_shape,
        indices=((0, 2), (1, 4)),
        mirror=embed_mirror,
    ),
)
