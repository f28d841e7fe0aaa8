"""Layers that images, sequences and rows share."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from tests.graphs.builder import EPSILON, WIDTHS, Builder, Tensor

__all__ = ["activation", "batch_norm", "channelwise", "conv", "layer_norm", "linear", "rms_norm"]


def conv(
    b: Builder,
    x: Tensor,
    out: int | None = None,
    *,
    kernel: int | None = None,
    stride: int = 1,
    groups: int = 1,
    bias: bool | None = None,
) -> Tensor:
    """A convolution over the axes from 2 on that keeps their size, divided by the stride."""
    out = b.pick(WIDTHS) if out is None else out
    kernel = b.pick([1, 3]) if kernel is None else kernel
    dims = x.rank - 2
    weight = b.weight((out, x.size(1) // groups, *[kernel] * dims))
    biased = b.chance() if bias is None else bias
    spatial = [(x.size(k) - 1) // stride + 1 for k in range(2, x.rank)]
    attributes: dict[str, Any] = {"pads": [kernel // 2] * (2 * dims)} if kernel > 1 else {}
    if stride > 1:
        attributes["strides"] = [stride] * dims
    if groups > 1:
        attributes["group"] = groups
    inputs = [x, weight, *([b.vector(out)] if biased else [])]
    return b.node("Conv", inputs, (x.shape[0], out, *spatial), **attributes)


def linear(b: Builder, x: Tensor, out: int | None = None, *, bias: bool | None = None) -> Tensor:
    """Along the last axis: Gemm, MatMul or Einsum, with or without a bias."""
    out = b.pick(WIDTHS) if out is None else out
    biased = b.chance() if bias is None else bias
    n = x.size(-1)
    way = b.pick(["matmul", "gemm", "einsum"]) if x.rank == 2 else b.pick(["matmul", "einsum"])
    if way == "gemm":
        flipped = b.chance()
        weight = b.weight((out, n) if flipped else (n, out), n)
        attributes = {"transB": 1} if flipped else {}
        return b.node(
            "Gemm",
            [x, weight, *([b.vector(out)] if biased or b.opset < 11 else [])],
            (*x.shape[:-1], out),
            **attributes,
        )
    if way == "einsum":
        letters = "abc"[: x.rank - 1]
        y = (
            b.node("Einsum", [x, b.weight((out, n), n)], (*x.shape[:-1], out), equation=f"{letters}k,jk->{letters}j")
            if b.opset >= 12
            else b.node("MatMul", [x, b.weight((n, out), n)], (*x.shape[:-1], out))
        )
    else:
        y = b.node("MatMul", [x, b.weight((n, out), n)], (*x.shape[:-1], out))
    return b.add(y, b.vector(out)) if biased else y


ACTIVATIONS = ("Relu", "Tanh", "LeakyRelu", "Sigmoid", "Elu", "Softplus", "HardSigmoid", "Softsign", "Abs")


def activation(b: Builder, x: Tensor) -> Tensor:
    way = b.pick([*ACTIVATIONS, "silu", "gelu", "relu6", "hardswish", "prelu"])
    if way == "silu":
        return b.mul(x, b.elementwise("Sigmoid", x))
    if way == "gelu":
        if b.opset >= 20 and b.chance():
            return b.elementwise("Gelu", x)
        erf = b.elementwise("Erf", b.elementwise("Div", x, b.scalar(sqrt(2))))
        return b.mul(b.mul(x, b.add(erf, b.scalar(1.0))), b.scalar(0.5))
    if way == "relu6":
        return b.clip(x, 0.0, 6.0)
    if way == "hardswish":
        gate = b.clip(b.add(x, b.scalar(3.0)), 0.0, 6.0)
        return b.elementwise("Div", b.mul(x, gate), b.scalar(6.0))
    if way == "prelu":
        if x.rank == 4:
            slope = b.initializer(b.values.uniform(0, 0.5, (x.size(1), 1, 1)).astype(np.float32))
            return b.node("PRelu", [x, slope], x.shape)
        return b.node("PRelu", [x, b.vector(x.size(-1), 0.0, 0.4)], x.shape)
    return b.elementwise(way, x)


def batch_norm(b: Builder, x: Tensor) -> Tensor:
    c = x.size(1)
    inputs = [x, b.vector(c, 0.5, 1.5), b.vector(c), b.vector(c), b.vector(c, 0.5, 1.5)]
    return b.node("BatchNormalization", inputs, x.shape)


def channelwise(b: Builder, x: Tensor) -> Tensor:
    """Layer scale, or a bias behind a Reshape, along axis 1."""
    c = x.size(1)
    shape = (c, *[1] * (x.rank - 2))
    if b.chance():
        table = b.initializer(b.values.uniform(0.5, 1.5, shape).astype(np.float32))
    elif b.chance():
        table = b.node("Reshape", [b.vector(c), b.constant([1, -1, *[1] * (x.rank - 2)])], (1, *shape))
    else:
        table = b.unsqueeze(b.vector(c), list(range(1, x.rank - 1)))
    return b.elementwise(b.pick(["Mul", "Add", "Sub"]), x, table)


def layer_norm(b: Builder, x: Tensor) -> Tensor:
    """By the operator or written out."""
    d = x.size(-1)
    if b.opset >= 17 and b.chance():
        return b.node("LayerNormalization", [x, b.vector(d, 0.5, 1.5), b.vector(d)], x.shape, axis=-1, epsilon=EPSILON)
    last = [x.rank - 1]
    centred = b.elementwise("Sub", x, b.reduce("ReduceMean", x, last))
    variance = b.reduce("ReduceMean", b.elementwise("Pow", centred, b.scalar(2.0)), last)
    root = b.elementwise("Sqrt", b.add(variance, b.scalar(EPSILON)))
    return b.add(b.mul(b.elementwise("Div", centred, root), b.vector(d, 0.5, 1.5)), b.vector(d))


def rms_norm(b: Builder, x: Tensor) -> Tensor:
    """By the operator or written out."""
    d = x.size(-1)
    if b.opset >= 23 and b.chance():
        return b.node("RMSNormalization", [x, b.vector(d, 0.5, 1.5)], x.shape, axis=-1, epsilon=EPSILON)
    square = b.elementwise("Pow", x, b.scalar(2.0)) if b.chance() else b.mul(x, x)
    root = b.elementwise("Sqrt", b.add(b.reduce("ReduceMean", square, [x.rank - 1]), b.scalar(EPSILON)))
    y = b.elementwise("Div", x, root) if b.chance() else b.mul(x, b.elementwise("Reciprocal", root))
    return b.mul(y, b.vector(d, 0.5, 1.5))
