"""Matrix products: the contracted axes are equal, the others pass through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxprune.axes.expr import Expr
from onnxprune.ops.lazy import F, kernels, torch
from onnxprune.ops.quantised import centred, real, rounded, scaled
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, MirrorContext, NodeView, PatchContext, Term

__all__ = ["OPERATORS", "product_dead"]

_exact = kernels("quant")


def product_dead(a: int, b: int, *added: int):
    """A product is zero where a factor is, and what is added to it as well."""

    def dead(node: NodeView, states: Sequence[float | None]) -> float | None:
        terms = (states[k] for k in added if k < len(states) and node.inputs[k])
        finite = math.inf not in (states[a], states[b])
        return 0.0 if finite and 0 in (states[a], states[b]) and all(t == 0 for t in terms) else None

    return dead


def matmul(c: AxisContext, a: int, b: int, *, last_a: int = -1, row_b: int = -2) -> tuple[Expr, ...]:
    """numpy's matmul, with the contracted axes at `last_a` and `row_b`; returns the output's axes."""
    x, y = c.axes(a), c.axes(b)
    if not x or not y:
        raise GiveUp("a matrix product of scalars")
    ka = len(x) - 1 if len(x) == 1 else last_a % len(x)
    kb = 0 if len(y) == 1 else row_b % len(y)
    c.contract(Kind.PRODUCT, (a, ka), (b, kb), fold=len(y) == 2)
    batch: list[Expr] = []
    left, right = x[:-2], y[:-2]
    for k in range(-max(len(left), len(right)), 0):
        aligned = [s[k] for s in (left, right) if len(s) >= -k]
        wide = [e for e in aligned if e.size != 1] or aligned[:1]
        c.equal(*wide)
        batch.append(wide[0])
    rows = [] if len(x) == 1 else [x[-2 if ka == len(x) - 1 else -1]]
    columns = [] if len(y) == 1 else [y[-1 if kb == len(y) - 2 else -2]]
    return (*batch, *rows, *columns)


def matmul_axes(c: AxisContext) -> None:
    c.output(*matmul(c, 0, 1))


def fused_matmul_axes(c: AxisContext) -> None:
    if c.attr("transBatchA", 0) or c.attr("transBatchB", 0):
        raise GiveUp("a matrix product with transposed batch axes")
    c.output(*matmul(c, 0, 1, last_a=-2 if c.attr("transA", 0) else -1, row_b=-1 if c.attr("transB", 0) else -2))


def gemm_axes(c: AxisContext) -> None:
    x, kb = c.axes(0), (1 if c.attr("transB", 0) else 0)
    ka = 0 if c.attr("transA", 0) else len(x) - 1  # some exporters leave leading axes in place
    c.contract(Kind.PRODUCT, (0, ka), (1, kb), fold=len(x) == 2)
    out = (*(e for k, e in enumerate(x) if k != ka), c.axes(1)[1 - kb])
    if c.has(2):
        bias = c.axes(2)
        for axis, target in zip(reversed(bias), reversed(out), strict=False):
            if axis.size != 1:
                c.equal(axis, target)
    c.output(*out)


def columnwise(c: AxisContext, out: Expr, *inputs: int) -> None:
    """Scales, zero points and biases that follow the columns."""
    for i in inputs:
        if c.has(i) and c.axes(i) and c.axes(i)[-1].size == out.size and out.size > 1:
            c.equal(c.axes(i)[-1], out)


def matmul_integer_axes(c: AxisContext) -> None:
    out = matmul(c, 0, 1)
    columnwise(c, out[-1], 3)
    c.output(*out)


def qlinear_matmul_axes(c: AxisContext) -> None:
    out = matmul(c, 0, 3)
    columnwise(c, out[-1], 4, 5)
    c.output(*out)


def matmul_integer_to_float_axes(c: AxisContext) -> None:
    """A, B, A's scale, B's scale, A's zero point, B's zero point, bias."""
    out = matmul(c, 0, 1)
    columnwise(c, out[-1], 3, 5, 6)
    c.output(*out)


def dynamic_quantize_matmul_axes(c: AxisContext) -> None:
    """A, B, B's scale, B's zero point, bias."""
    out = matmul(c, 0, 1)
    columnwise(c, out[-1], 2, 3, 4)
    c.output(*out)


def qgemm_axes(c: AxisContext) -> None:
    """A, A's scale and zero point, B, B's scale and zero point, C, y's scale and zero point."""
    ka, kb = (0 if c.attr("transA", 0) else 1), (1 if c.attr("transB", 0) else 0)
    c.contract(Kind.PRODUCT, (0, ka), (3, kb))
    out = (c.axes(0)[1 - ka], c.axes(3)[1 - kb])
    columnwise(c, out[1], 4, 5, 6)
    c.output(*out)


def matmul_nbits_axes(c: AxisContext) -> None:
    """B is N x blocks x bytes, and K = (blocks block_size): whole blocks go, and the bytes inside a block stay."""
    block = int(c.attr("block_size"))
    x, b = c.axes(0), c.axes(1)
    n_axis, blocks = b[0], b[1]
    if x[-1].size % block:
        raise GiveUp("the contracted axis is not a whole number of blocks")
    outer, inner = c.split(x[-1], blocks.size)
    c.equal(outer, blocks)
    c.freeze("inside a quantisation block", inner, b[2])
    c.contract(Kind.PRODUCT, (0, len(x) - 1), (1, 1), over=outer)
    for i in (2, 3):
        if c.has(i):
            follow_blocks(c, i, n_axis, blocks)
    if c.has(4):
        c.freeze("a group index of quantised columns", *c.axes(4), outer)
    columnwise(c, n_axis, 5)
    c.output(*x[:-1], n_axis)


def follow_blocks(c: AxisContext, i: int, rows: Expr, blocks: Expr) -> None:
    """Scales and zero points: rows x blocks, flat or not; packed zero points freeze the blocks."""
    axes = c.axes(i)
    if len(axes) == 2 and axes[0].size == rows.size and axes[1].size == blocks.size:
        c.equal(axes[0], rows)
        c.equal(axes[1], blocks)
    elif len(axes) == 1 and axes[0].size == rows.size * blocks.size:
        c.equal(axes[0], c.product(rows, blocks))
    elif len(axes) == 1 and axes[0].size % rows.size == 0:
        c.freeze("zero points packed over blocks", blocks)
        c.equal(axes[0], c.product(rows, c.frozen(axes[0].size // rows.size)))
    elif len(axes) == 2 and axes[0].size == rows.size:
        c.freeze("zero points packed over blocks", blocks, axes[1])
        c.equal(axes[0], rows)
    else:
        raise GiveUp("the layout of the quantisation parameters is unknown")


def patch_nbits(p: PatchContext) -> None:
    p.set_attr("N", p.after(1)[0])
    p.set_attr("K", p.after(0)[-1])


def einsum_terms(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Labels of every input axis and of the output; an ellipsis becomes labels of its own."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    widest = max((r - len(t.replace("...", "")) for t, r in zip(left.split(","), ranks, strict=True)), default=0)
    hidden = [f"...{k}" for k in range(widest)]

    def expand(term: str, rank: int | None = None) -> list[str]:
        if "..." not in term:
            return list(term)
        before, after = term.split("...")
        count = widest if rank is None else rank - len(before) - len(after)
        return [*before, *hidden[widest - count :], *after]

    terms = [expand(t, r) for t, r in zip(left.split(","), ranks, strict=True)]
    if arrow:
        return terms, expand(right)
    flat = [label for t in terms for label in t]
    return terms, [*hidden, *sorted({x for x in flat if flat.count(x) == 1 and x not in hidden})]


def einsum_axes(c: AxisContext) -> None:
    count = len(c.node.inputs)
    terms, result = einsum_terms(c.attr("equation"), [c.rank(i) for i in range(count)])
    positions: dict[str, list[tuple[int, int]]] = {}
    for i, term in enumerate(terms):
        for k, label in enumerate(term):
            positions.setdefault(label, []).append((i, k))
    named: dict[str, Expr] = {}
    for label, where in positions.items():
        axes = [c.axes(i)[k] for i, k in where]
        wide = [e for e in axes if e.size != 1] or axes[:1]
        c.equal(*wide)
        named[label] = wide[0]
        if label not in result:
            spots = tuple((i, k) for i, k in where if c.axes(i)[k].size == wide[0].size)
            c.contract(Kind.PRODUCT if count > 1 and len(spots) > 1 else Kind.SUM, *spots)
    c.output(*(named[label] for label in result))


def einsum_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if 0 in states and math.inf not in states else None


def _matmul_macs(a: int, b: int):
    def macs(node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]) -> list[Term]:
        k = 1 if node.attributes.get("transA") and len(inputs[a]) == 2 else len(inputs[a]) - 1
        if node.attributes.get("transA"):
            k = len(inputs[a]) - 2
        return [(1.0, (*outputs[0], inputs[a][k]))]

    return macs


def einsum_macs(node: NodeView, inputs: Sequence[tuple[Expr, ...]], outputs: Sequence[tuple[Expr, ...]]) -> list[Term]:
    """The product of all labels' sizes: the cost of two operands, an upper bound for more."""
    terms, _ = einsum_terms(node.attributes["equation"], [len(a) for a in inputs])
    sizes: dict[str, Expr] = {}
    for term, axes in zip(terms, inputs, strict=True):
        for label, axis in zip(term, axes, strict=True):
            if label not in sizes or sizes[label].size == 1:
                sizes[label] = axis
    return [(1.0, tuple(sizes.values()))] if len(inputs) > 1 else []


def _broadcast_matmul(node: NodeView, inputs, *, elem: int | None = None):
    """Shape of a (Fused)MatMul."""
    (kind, x), (_, y) = inputs[0], inputs[1]
    x = (*x[:-2], x[-1], x[-2]) if node.attributes.get("transA") else x
    y = (*y[:-2], y[-1], y[-2]) if node.attributes.get("transB") else y
    batch = [max((s for s in pair if s is not None), default=None) for pair in _aligned(x[:-2], y[:-2])]
    tail = [*(x[-2:-1] if len(x) > 1 else ()), *(y[-1:] if len(y) > 1 else ())]
    return [(elem or kind, (*batch, *tail))]


def _aligned(a, b):
    n = max(len(a), len(b))
    return list(zip((1,) * (n - len(a)) + tuple(a), (1,) * (n - len(b)) + tuple(b), strict=True))


def nbits_shape(node, inputs):
    elem, x = inputs[0]
    return [(elem, (*x[:-1], int(node.attributes["N"])))]


def matmul_mirror(m: MirrorContext) -> Any:
    return m.tensor(0) @ m.tensor(1)


def gemm_mirror(m: MirrorContext) -> Any:
    """alpha * A * B + beta * C; as `linear` where it is one, so that torch sees what the exporter saw."""
    a, b, c = m.tensor(0), m.tensor(1), m.optional(2)
    alpha, beta = scalar(m, "alpha"), scalar(m, "beta")
    a = a.t() if m.attr("transA", 0) else a
    plain = alpha == 1 and (c is None or (beta == 1 and m.rank(2) == 1))
    if plain:
        return F.linear(a, b if m.attr("transB", 0) else b.t(), c)
    b = b.t() if m.attr("transB", 0) else b
    if c is None:
        return alpha * (a @ b)
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


def scalar(m: MirrorContext, name: str) -> float | int:
    """A factor of Gemm, which torch wants as an integer where it is one."""
    value = float(m.attr(name, 1.0))
    return int(value) if value.is_integer() else value


def fused_matmul_mirror(m: MirrorContext) -> Any:
    """alpha * A * B. transBatch moves the first axis behind the batch axes; trans swaps the last two before that."""
    x, y = (turned(m, i, letter) for i, letter in enumerate("AB"))
    alpha = float(m.attr("alpha", 1.0))
    return x @ y if alpha == 1 else alpha * (x @ y)


def turned(m: MirrorContext, i: int, letter: str) -> Any:
    x, rank = m.tensor(i), m.rank(i)
    if m.attr(f"transBatch{letter}", 0) and rank != 2:
        x = x.movedim(0, -2)
    return x.mT if m.attr(f"trans{letter}", 0) and rank != 1 else x


def einsum_mirror(m: MirrorContext) -> Any:
    return torch.einsum(m.attr("equation").replace(" ", ""), *(m.tensor(i) for i in range(len(m.node.inputs))))


def matmul_integer_mirror(m: MirrorContext) -> Any:
    """A, B and their zero points, of which there may be one per row of A and one per column of B."""
    a, b = centred(m, 0, 2, axis=per(m, 2, -2)), centred(m, 1, 3, axis=per(m, 3, -1))
    return m.carry(m.call(_exact.product, a, b), TensorProto.INT32)


def per(m: MirrorContext, i: int, axis: int) -> int | None:
    """The axis that a vector of scales or zero points follows; None where they broadcast by themselves."""
    return axis if m.rank(i) in (None, 0, 1) else None


def qlinear_matmul_mirror(m: MirrorContext) -> Any:
    """A, its scale and zero point; B, its scale and zero point; those of the result."""
    a, b = real(m, 0, 1, 2, axis=per(m, 1, -2)), real(m, 3, 4, 5, axis=per(m, 4, -1))
    return rounded(m, a @ b, 6, 7, axis=per(m, 6, -2))


def matmul_integer_to_float_mirror(m: MirrorContext) -> Any:
    """A, B, A's scale, B's scale, A's zero point, B's zero point, bias."""
    y = real(m, 0, 2, 4, axis=per(m, 2, -2)) @ real(m, 1, 3, 5, axis=per(m, 3, -1))
    return y + m.tensor(6) if m.has(6) else y


def dynamic_quantize_matmul_mirror(m: MirrorContext) -> Any:
    """A, which is rounded after its range; B, B's scale, B's zero point, bias."""
    y = m.call(_exact.rounded, m.tensor(0)) @ real(m, 1, 2, 3, axis=per(m, 2, -1))
    return y + m.tensor(4) if m.has(4) else y


def qgemm_mirror(m: MirrorContext) -> Any:
    """A, its scale and zero point; B, its scale and zero point; C in units of both; y's scale and zero point, without
    which the result is real."""
    a = real(m, 0, 1, 2)
    b = real(m, 3, 4, 5, axis=0 if m.attr("transB", 0) else 1)
    y = (a.mT if m.attr("transA", 0) else a) @ (b.mT if m.attr("transB", 0) else b)
    y = y + scaled(m, 6, 1, 4) if m.has(6) else y
    alpha = float(m.attr("alpha", 1.0))
    y = y if alpha == 1 else alpha * y
    return rounded(m, y, 7, 8) if m.has(7) else y


def nbits_mirror(m: MirrorContext) -> Any:
    """The weight is unpacked once, and stays as it is."""
    packed, scales, zero_points, groups = (m.stored(i) for i in range(1, 5))
    if packed is None or scales is None or any(m.has(i) and m.stored(i) is None for i in (3, 4)):
        raise m.unsupported("its weight is computed from the data")
    weight = unpacked(m.node, packed, scales, zero_points, groups)
    return F.linear(m.tensor(0), m.buffer(weight.astype(scales.dtype)), m.optional(5))


def unpacked(node: NodeView, packed: Any, scales: Any, zero_points: Any, groups: Any) -> np.ndarray:
    """The N x K weight of a MatMulNBits: (q - zero point) * scale per block of K; the low bits come first."""
    n, k, block = (int(node.attributes[a]) for a in ("N", "K", "block_size"))
    bits = int(node.attributes.get("bits", 4))
    blocks = -(-k // block)
    numbers = low_bits_first(packed.reshape(n, -1), bits)[:, : blocks * block].astype(np.float32)
    scale = scales.reshape(n, blocks).astype(np.float32)
    if zero_points is None:
        zero: Any = np.full((n, blocks), 2.0 ** (bits - 1), np.float32)
    elif zero_points.dtype == np.uint8:
        zero = low_bits_first(zero_points.reshape(n, -1), bits)[:, :blocks].astype(np.float32)
    else:
        zero = zero_points.reshape(n, blocks).astype(np.float32)
    of = np.repeat(np.arange(blocks), block)[: numbers.shape[1]]
    if groups is not None:
        of = np.pad(groups.reshape(-1), (0, len(of) - groups.size))
    return ((numbers - zero[:, of]) * scale[:, of])[:, :k]


def low_bits_first(packed: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(len(packed), -1)


OPERATORS = (
    Operator(
        "MatMul",
        matmul_axes,
        product_dead(0, 1),
        _matmul_macs(0, 1),
        evaluate=lambda n, a, b: np.matmul(a, b),
        bias=2,
        mirror=matmul_mirror,
    ),
    Operator("Gemm", gemm_axes, product_dead(0, 1, 2), _matmul_macs(0, 1), bias=2, mirror=gemm_mirror),
    Operator(
        "MatMulInteger",
        matmul_integer_axes,
        product_dead(0, 1),
        _matmul_macs(0, 1),
        rounds=True,
        keeps=frozenset({2, 3}),
        quantised=((1, 3),),
        mirror=matmul_integer_mirror,
    ),
    Operator(
        "QLinearMatMul",
        qlinear_matmul_axes,
        product_dead(0, 3),
        _matmul_macs(0, 3),
        rounds=True,
        keeps=frozenset({1, 2, 4, 5, 6, 7}),
        quantised=((3, 5),),
        mirror=qlinear_matmul_mirror,
        fixed=frozenset({1, 4, 6}),
    ),
    Operator("Einsum", einsum_axes, einsum_dead, einsum_macs, mirror=einsum_mirror),
    Operator(
        "com.microsoft::FusedMatMul",
        fused_matmul_axes,
        product_dead(0, 1),
        _matmul_macs(0, 1),
        shape=_broadcast_matmul,
        mirror=fused_matmul_mirror,
    ),
    Operator(
        "com.microsoft::MatMulIntegerToFloat",
        matmul_integer_to_float_axes,
        product_dead(0, 1, 6),
        _matmul_macs(0, 1),
        rounds=True,
        keeps=frozenset({2, 3, 4, 5}),
        quantised=((1, 5),),
        shape=lambda n, i: _broadcast_matmul(n, i, elem=i[2][0] if i[2] else None),
        mirror=matmul_integer_to_float_mirror,
        fixed=frozenset({2, 3}),
    ),
    Operator(
        "com.microsoft::DynamicQuantizeMatMul",
        dynamic_quantize_matmul_axes,
        product_dead(0, 1, 4),
        _matmul_macs(0, 1),
        rounds=True,
        keeps=frozenset({2, 3}),
        quantised=((1, 3),),
        shape=_broadcast_matmul,
        mirror=dynamic_quantize_matmul_mirror,
        fixed=frozenset({2}),
    ),
    Operator(
        "com.microsoft::QGemm",
        qgemm_axes,
        product_dead(0, 3, 6),
        _matmul_macs(0, 3),
        rounds=True,
        keeps=frozenset({1, 2, 4, 5, 7, 8}),
        quantised=((3, 5),),
        shape=lambda n, i: _broadcast_matmul(n, [i[0], i[3]]),
        mirror=qgemm_mirror,
        fixed=frozenset({1, 4, 7}),
    ),
    Operator(
        "com.microsoft::MatMulNBits",
        matmul_nbits_axes,
        product_dead(0, 2, 5),
        lambda n, i, o: [(1.0, (*o[0], i[0][-1]))],
        patch_nbits,
        rounds=True,
        keeps=frozenset({1, 3}),
        shape=nbits_shape,
        mirror=nbits_mirror,
        fixed=frozenset({2, 3}),
    ),
)
