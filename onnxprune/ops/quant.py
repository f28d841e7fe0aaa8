"""Quantisation: scales and zero points per channel follow their axis, and values are taken as the reals they stand
for, so that a dead unit is 'zero' where its integers are the zero point."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxprune.axes.expr import Expr
from onnxprune.ops.elementwise import broadcast
from onnxprune.ops.lazy import F, kernels, torch
from onnxprune.ops.pieces import joined_dead
from onnxprune.ops.quantised import declared, real, rounded
from onnxprune.ops.registry import Operator, Role
from onnxprune.ops.rules import AxisContext, Flat, Kind, MirrorContext, NodeView

__all__ = ["OPERATORS"]

_run = kernels("quant")


def linear_axes(c: AxisContext) -> None:
    """QuantizeLinear, DequantizeLinear: one scale, one per index of `axis`, or one per block along it."""
    x = c.axes(0)
    for i in (1, 2):
        if c.has(i):
            follow(c, x, c.axes(i))
    c.output(*x)


def follow(c: AxisContext, x: Sequence[Expr], scale: Sequence[Expr]) -> None:
    axis = int(c.attr("axis", 1)) % max(len(x), 1)
    if len(scale) == 1 and len(x) and scale[0].size == x[axis].size:
        c.equal(scale[0], x[axis])
    elif len(scale) == len(x) and len(x):
        for k, (s, e) in enumerate(zip(scale, x, strict=True)):
            if s.size == e.size:
                c.equal(s, e)
            elif e.size % s.size == 0 and k == axis:
                outer, inner = c.split(e, s.size)
                c.freeze("inside a quantisation block", inner)
                c.equal(outer, s)
            else:
                c.freeze("inside a quantisation block", s, e)


def dynamic_axes(c: AxisContext) -> None:
    """The range is over everything and always holds zero, so dead units don't change it."""
    x = c.axes(0)
    for k in range(len(x)):
        c.contract(Kind.SUM, (0, k), through=True)
    c.output(*x)
    for j in (1, 2):
        c.output(j=j)


def zero_stays(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 else None


def qlinear_binary_axes(c: AxisContext) -> None:
    """A, its scale and zero point, B, its scale and zero point, C's scale and zero point."""
    c.output(*broadcast(c, 0, 3))


def qlinear_add_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 and states[3] == 0 else None


def qlinear_mul_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    return 0.0 if states[0] == 0 or states[3] == 0 else None


def qlinear_unary_axes(c: AxisContext) -> None:
    c.output(*c.axes(0))


def qlinear_pool_axes(c: AxisContext) -> None:
    x, sizes = c.axes(0), c.output_shape()
    channel = len(x) - 1 if c.attr("channels_last", 0) else 1
    c.freeze("a spatial axis", *(e for k, e in enumerate(x) if k not in (0, channel)))
    c.output(*(e if k in (0, channel) else c.frozen(sizes[k], "a spatial axis") for k, e in enumerate(x)))


def qlinear_concat_axes(c: AxisContext) -> None:
    """Y's scale and zero point, then (X, scale, zero point) for every part."""
    parts = [c.axes(i) for i in range(2, len(c.node.inputs), 3)]
    axis = int(c.attr("axis")) % len(parts[0])
    for k in range(len(parts[0])):
        if k != axis:
            c.equal(*(p[k] for p in parts))
    c.output(*parts[0][:axis], c.sum(*(p[axis] for p in parts)), *parts[0][axis + 1 :])


def qlinear_concat_dead(node: NodeView, states: Sequence[float | None]) -> float | None:
    joined = joined_dead(node, states[2::3])
    return 0.0 if joined == 0 else None


def qlinear_softmax_axes(c: AxisContext) -> None:
    x = c.axes(0)
    axis = int(c.attr("axis", -1)) % len(x)
    c.freeze("a softmax runs over it", *(x[axis:] if int(c.attr("opset", 13)) < 13 else x[axis : axis + 1]))
    c.output(*x)


def _sizes(known):
    return known[1]


def _like(k: int):
    return lambda node, inputs: [inputs[k]]


def _broadcast_shape(node, inputs):
    (elem, a), (_, b) = inputs[0], inputs[3]
    n = max(len(a), len(b))
    pairs = zip((1,) * (n - len(a)) + tuple(a), (1,) * (n - len(b)) + tuple(b), strict=True)
    return [(elem, tuple(q if p == 1 else p for p, q in pairs))]


def _global_pool_shape(node, inputs):
    elem, x = inputs[0]
    last = bool(node.attributes.get("channels_last", 0))
    return [(elem, (x[0], *[1] * (len(x) - 2), x[-1]) if last else (*x[:2], *[1] * (len(x) - 2)))]


def _concat_shape(node, inputs):
    parts = [i[1] for i in inputs[2::3]]
    axis = int(node.attributes["axis"]) % len(parts[0])
    sizes = [p[axis] for p in parts]
    total = None if any(s is None for s in sizes) else sum(sizes)
    return [(inputs[1][0], (*parts[0][:axis], total, *parts[0][axis + 1 :]))]


def quantize_mirror(m: MirrorContext) -> Any:
    return rounded(m, m.tensor(0), 1, 2, axis=int(m.attr("axis", 1)), block=int(m.attr("block_size", 0)))


def quantize_flat(node: NodeView, stored: Sequence[np.ndarray | None]) -> Flat | None:
    """Outside of what its integers reach. Exporters of int8 networks leave activations out where that does the same."""
    scale, zero = stored[1], stored[2] if len(stored) > 2 else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size > 1 or zero.dtype.kind not in "iu":
        return None
    bounds = np.iinfo(zero.dtype)
    low, high = ((k - float(zero.item())) * float(scale.item()) for k in (bounds.min, bounds.max))
    return Flat(low, high)


def dequantize_mirror(m: MirrorContext) -> Any:
    return declared(m, real(m, 0, 1, 2, axis=int(m.attr("axis", 1)), block=int(m.attr("block_size", 0))))


def dynamic_mirror(m: MirrorContext) -> Any:
    found = m.call(_run.dynamic, m.tensor(0))
    return [m.carry(found[0], TensorProto.UINT8), found[1], m.carry(found[2], TensorProto.UINT8, 2)]


def qlinear_binary_mirror(operation: Callable[[Any, Any], Any]) -> Callable[[MirrorContext], Any]:
    def mirror(m: MirrorContext) -> Any:
        return rounded(m, operation(real(m, 0, 1, 2), real(m, 3, 4, 5)), 6, 7)

    return mirror


def qlinear_unary_mirror(function: Callable[[MirrorContext, Any], Any]) -> Callable[[MirrorContext], Any]:
    """X, its scale and zero point, and those of the result."""
    return lambda m: rounded(m, function(m, real(m, 0, 1, 2)), 3, 4)


def spatial_mean(m: MirrorContext, x: Any) -> Any:
    rank = m.rank(0)
    if rank is None:
        raise m.unsupported("the rank of its input is unknown")
    first = 1 if m.attr("channels_last", 0) else 2
    return x.mean(tuple(range(first, first + rank - 2)), keepdim=True)


def qlinear_softmax(m: MirrorContext, x: Any) -> Any:
    """Up to opset 12 over all axes from `axis` on."""
    axis, rank = int(m.attr("axis", -1)), m.rank(0)
    if int(m.attr("opset", 13)) >= 13:
        return torch.softmax(x, axis)
    if rank is None:
        raise m.unsupported("the rank of its input is unknown")
    return torch.softmax(x.flatten(axis % rank), -1).reshape(x.shape)


def qlinear_concat_mirror(m: MirrorContext) -> Any:
    parts = [real(m, i, i + 1, i + 2) for i in range(2, len(m.node.inputs), 3)]
    return rounded(m, torch.cat(parts, int(m.attr("axis"))), 0, 1)


_SCALES = frozenset({1, 2, 4, 5, 6, 7})

OPERATORS = (
    Operator(
        "QuantizeLinear",
        linear_axes,
        zero_stays,
        rounds=True,
        keeps=frozenset({1, 2}),
        mirror=quantize_mirror,
        fixed=frozenset({1}),
        flat=quantize_flat,
        role=Role.REARRANGES,
    ),
    Operator(
        "DequantizeLinear",
        linear_axes,
        zero_stays,
        keeps=frozenset({1, 2}),
        quantised=((0, 2),),
        dequantises=True,
        mirror=dequantize_mirror,
        fixed=frozenset({1}),
        role=Role.REARRANGES,
    ),
    Operator(
        "com.microsoft::QuantizeLinear",
        linear_axes,
        zero_stays,
        rounds=True,
        keeps=frozenset({1, 2}),
        shape=lambda n, i: [(i[2][0] if len(i) > 2 and i[2] else 2, _sizes(i[0]))],
        mirror=quantize_mirror,
        fixed=frozenset({1}),
    ),
    Operator(
        "com.microsoft::DequantizeLinear",
        linear_axes,
        zero_stays,
        keeps=frozenset({1, 2}),
        quantised=((0, 2),),
        shape=lambda n, i: [(i[1][0] if i[1] else 1, _sizes(i[0]))],
        dequantises=True,
        mirror=dequantize_mirror,
        fixed=frozenset({1}),
    ),
    Operator("DynamicQuantizeLinear", dynamic_axes, zero_stays, rounds=True, mirror=dynamic_mirror),
    Operator(
        "com.microsoft::QLinearAdd",
        qlinear_binary_axes,
        qlinear_add_dead,
        shape=_broadcast_shape,
        quantised=((0, 2), (3, 5)),
        rounds=True,
        keeps=_SCALES,
        mirror=qlinear_binary_mirror(operator.add),
        fixed=frozenset({1, 4, 6}),
    ),
    Operator(
        "com.microsoft::QLinearMul",
        qlinear_binary_axes,
        qlinear_mul_dead,
        shape=_broadcast_shape,
        quantised=((0, 2), (3, 5)),
        rounds=True,
        keeps=_SCALES,
        mirror=qlinear_binary_mirror(operator.mul),
        fixed=frozenset({1, 4, 6}),
    ),
    *(
        Operator(
            f"com.microsoft::QLinear{name}",
            qlinear_unary_axes,
            dead,
            shape=_like(0),
            rounds=True,
            keeps=frozenset({1, 2, 3, 4}),
            mirror=qlinear_unary_mirror(function),
            fixed=frozenset({1, 3}),
            role=role,
        )
        for name, dead, function, role in (
            ("LeakyRelu", zero_stays, lambda m, x: F.leaky_relu(x, float(m.attr("alpha", 0.01))), None),
            ("Sigmoid", None, lambda m, x: torch.sigmoid(x), Role.SIGMOID),
        )
    ),
    Operator(
        "com.microsoft::QLinearGlobalAveragePool",
        qlinear_pool_axes,
        zero_stays,
        shape=_global_pool_shape,
        rounds=True,
        keeps=frozenset({1, 2, 3, 4}),
        mirror=qlinear_unary_mirror(spatial_mean),
        fixed=frozenset({1, 3}),
    ),
    Operator(
        "com.microsoft::QLinearConcat",
        qlinear_concat_axes,
        qlinear_concat_dead,
        shape=_concat_shape,
        joins=True,
        rounds=True,
        mirror=qlinear_concat_mirror,
        fixed=frozenset(range(0, 999, 3)),  # the scales of all parts
    ),
    Operator(
        "com.microsoft::QLinearSoftmax",
        qlinear_softmax_axes,
        shape=_like(0),
        rounds=True,
        keeps=frozenset({1, 2, 3, 4}),
        mirror=qlinear_unary_mirror(qlinear_softmax),
        fixed=frozenset({1, 3}),
        role=Role.SOFTMAX,
    ),
)
