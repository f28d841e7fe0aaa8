"""Fused attention: heads and head widths are factors of the projections' axes.

A head is dead when its values are; a query-key channel when its query is, since it only adds to the scores. Where
several query heads share a key-value head, one query head alone does not vanish, and the analysis says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxprune.axes.expr import Expr
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, NodeView, PatchContext, Term

__all__ = ["OPERATORS"]


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


OPERATORS = (
    Operator(
        "com.microsoft::Attention",
        packed_attention_axes,
        packed_attention_dead,
        packed_attention_macs,
        patch_packed_attention,
        shape=packed_attention_shape,
    ),
    Operator(
        "com.microsoft::MultiHeadAttention",
        multi_head_axes,
        biased_value_dead,
        attention_macs,
        patch_heads,
        shape=multi_head_shape,
    ),
    Operator(
        "com.microsoft::GroupQueryAttention",
        grouped_query_axes,
        value_dead,
        attention_macs,
        patch_grouped,
        shape=grouped_query_shape,
    ),
    Operator("com.microsoft::RotaryEmbedding", rotary_axes, rotary_dead, patch=patch_rotary, shape=lambda n, i: [i[0]]),
    Operator("RotaryEmbedding", rotary_axes, rotary_dead, patch=patch_rotary),
    Operator("Attention", onnx_attention_axes, value_dead, attention_macs, patch_onnx_attention),
    Operator(
        "com.microsoft::EmbedLayerNormalization", embed_axes, embed_dead, shape=embed_shape, indices=((0, 2), (1, 4))
    ),
)
