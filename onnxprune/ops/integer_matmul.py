"""Matrix products with integers: scales, zero points and biases follow the columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from onnxprune.axes.expr import Expr
from onnxprune.ops.lazy import F, kernels
from onnxprune.ops.matmul import matmul, matmul_macs, product_dead, product_shape
from onnxprune.ops.quantised import centred, real, rounded, scaled
from onnxprune.ops.registry import Operator, Role
from onnxprune.ops.rules import AxisContext, GiveUp, Kind, MirrorContext, NodeView, PatchContext

__all__ = ["OPERATORS"]

_exact = kernels("quant")


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


def nbits_shape(node, inputs):
    elem, x = inputs[0]
    return [(elem, (*x[:-1], int(node.attributes["N"])))]


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
        "MatMulInteger",
        matmul_integer_axes,
        product_dead(0, 1),
        matmul_macs(0, 1),
        rounds=True,
        keeps=frozenset({2, 3}),
        quantised=((1, 3),),
        mirror=matmul_integer_mirror,
        role=Role.PRODUCT,
    ),
    Operator(
        "QLinearMatMul",
        qlinear_matmul_axes,
        product_dead(0, 3),
        matmul_macs(0, 3),
        rounds=True,
        keeps=frozenset({1, 2, 4, 5, 6, 7}),
        quantised=((3, 5),),
        mirror=qlinear_matmul_mirror,
        fixed=frozenset({1, 4, 6}),
        role=Role.PRODUCT,
    ),
    Operator(
        "com.microsoft::MatMulIntegerToFloat",
        matmul_integer_to_float_axes,
        product_dead(0, 1, 6),
        matmul_macs(0, 1),
        rounds=True,
        keeps=frozenset({2, 3, 4, 5}),
        quantised=((1, 5),),
        shape=lambda n, i: product_shape(n, i, elem=i[2][0] if i[2] else None),
        mirror=matmul_integer_to_float_mirror,
        fixed=frozenset({2, 3}),
    ),
    Operator(
        "com.microsoft::DynamicQuantizeMatMul",
        dynamic_quantize_matmul_axes,
        product_dead(0, 1, 4),
        matmul_macs(0, 1),
        rounds=True,
        keeps=frozenset({2, 3}),
        quantised=((1, 3),),
        shape=product_shape,
        mirror=dynamic_quantize_matmul_mirror,
        fixed=frozenset({2}),
    ),
    Operator(
        "com.microsoft::QGemm",
        qgemm_axes,
        product_dead(0, 3, 6),
        matmul_macs(0, 3),
        rounds=True,
        keeps=frozenset({1, 2, 4, 5, 7, 8}),
        quantised=((3, 5),),
        shape=lambda n, i: product_shape(n, [i[0], i[3]]),
        mirror=qgemm_mirror,
        fixed=frozenset({1, 4, 7}),
        role=Role.PRODUCT,
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
        role=Role.PRODUCT,
    ),
)
