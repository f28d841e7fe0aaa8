"""Blocks for sequences (N, T, D)."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.graphs.attention import attention, latents, linear_attention, merged_heads
from tests.graphs.builder import Builder, From, Tensor
from tests.graphs.layers import activation, conv, layer_norm, linear, rms_norm

__all__ = ["SEQUENCE", "sequence_to_rows", "tied"]


def feed_forward(b: Builder, x: Tensor) -> Tensor:
    y = linear(b, activation(b, linear(b, x)), x.size(-1))
    return b.add(x, y) if b.chance() else y


def swiglu(b: Builder, x: Tensor) -> Tensor:
    width = b.pick([2, 3, 4, 6])
    if b.chance():
        a, gate = b.split(linear(b, x, 2 * width), 2, [width, width])
    else:
        a, gate = linear(b, x, width), linear(b, x, width)
    return linear(b, b.mul(a, b.mul(gate, b.elementwise("Sigmoid", gate))))


def projection(b: Builder, x: Tensor) -> Tensor:
    return linear(b, x)


def flattened_gemm(b: Builder, x: Tensor) -> Tensor:
    """(N T) rows through a Gemm and back: how tf2onnx writes a Dense layer."""
    if isinstance(x.shape[0], str):
        return linear(b, x)
    n, t, d = (x.size(k) for k in range(3))
    y = b.node("Reshape", [x, b.constant([-1, d])], (n * t, d))
    y = linear(b, y)
    return b.reshape(y, [n, t, y.size(1)])


def pre_norm(b: Builder, x: Tensor) -> Tensor:
    """x + f(norm(x)): the block of a transformer."""
    y = rms_norm(b, x) if b.chance() else layer_norm(b, x)
    y = attention(b, y) if b.chance() else activation(b, linear(b, y))
    return b.add(x, linear(b, y, x.size(-1)))


def recurrent(b: Builder, x: Tensor) -> Tensor:
    """LSTM, GRU or RNN over (T, N, D), in one or both directions."""
    op = b.pick(["LSTM", "GRU", "RNN"])
    gates, both = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], b.chance()
    directions, hidden = 1 + both, b.pick([2, 3, 5])
    n, t, d = x.shape[0], x.size(1), x.size(2)
    w = b.weight((directions, gates * hidden, d), d)
    r = b.weight((directions, gates * hidden, hidden), hidden)
    inputs: list[Tensor | None] = [b.transpose(x, 1, 0, 2), w, r]
    if b.chance():
        inputs.append(b.weight((directions, 2 * gates * hidden), 4))
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if both else "forward"}
    if op == "GRU":
        attributes["linear_before_reset"] = b.pick([0, 1])
    if len(inputs) == 4 and b.chance(3):
        learned = isinstance(n, int) and b.chance()
        inputs += [None, b.weight((directions, n, hidden), 4) if learned else zero_state(b, x, directions, hidden)]
    y = b.node(op, inputs, (t, directions, n, hidden), **attributes)
    if not both and b.chance():
        y = b.squeeze(y, [1])
    else:
        y = b.transpose(y, 0, 2, 1, 3)
        y = b.reshape(y, [t, From(1), directions * hidden])
    return b.transpose(y, 1, 0, 2)


def zero_state(b: Builder, x: Tensor, directions: int, hidden: int) -> Tensor:
    """An initial state as torch exports it: zeros of a computed size."""
    size = b.sizes(x, [directions, From(0), hidden])
    return b.node(
        "ConstantOfShape",
        [size],
        (directions, x.shape[0], hidden),
        value=helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0]),
    )


def temporal_conv(b: Builder, x: Tensor) -> Tensor:
    y = b.transpose(x, 0, 2, 1)
    y = activation(b, conv(b, y, kernel=3))
    return b.transpose(y, 0, 2, 1)


def tied(b: Builder, x: Tensor) -> Tensor:
    """One square matrix, twice."""
    d = x.size(-1)
    w = b.weight((d, d), d)
    y = activation(b, b.node("MatMul", [x, w], x.shape))
    return b.node("MatMul", [y, w], x.shape)


def last_state(b: Builder, x: Tensor) -> Tensor:
    """The final states of both directions, beside every step."""
    n, t, hidden = x.shape[0], x.size(1), b.pick([2, 3])
    w, r = b.weight((2, 4 * hidden, x.size(2)), x.size(2)), b.weight((2, 4 * hidden, hidden), hidden)
    _, h, _ = b.many(
        "LSTM",
        [b.transpose(x, 1, 0, 2), w, r],
        [(t, 2, n, hidden), (2, n, hidden), (2, n, hidden)],
        hidden_size=hidden,
        direction="bidirectional",
    )
    flat = b.reshape(b.transpose(h, 1, 0, 2), [From(0), 2 * hidden])
    target = b.sizes(x, [From(0), t, 2 * hidden]) if isinstance(n, str) else b.constant([n, t, 2 * hidden])
    return b.concat([x, b.node("Expand", [b.unsqueeze(flat, [1]), target], (n, t, 2 * hidden))], 2)


def running_sum(b: Builder, x: Tensor) -> Tensor:
    if b.opset < 11:
        return x
    return b.node("CumSum", [x, b.constant(1)], x.shape)


def positions(b: Builder, x: Tensor) -> Tensor:
    """Learned position embeddings, cut to the length or looked up."""
    t, d = x.size(1), x.size(2)
    if b.chance():
        places = b.constant((np.arange(t)[None] + b.pick([0, 1])) * b.pick([1, 2]))
        return b.add(x, b.node("Gather", [b.weight((2 * t + 2, d), 1), places], (1, t, d), axis=0))
    table = b.weight((1, t + 2, d), 1)
    return b.add(x, b.slice(table, 1, 0, t))


def class_token(b: Builder, x: Tensor) -> Tensor:
    """A learned token in front, repeated over the batch."""
    d = x.size(2)
    token = b.weight((1, 1, d), 1)
    shape = b.sizes(x, [From(0), 1, d]) if isinstance(x.shape[0], str) else b.constant([x.size(0), 1, d])
    wide = b.node("Expand", [token, shape], (x.shape[0], 1, d))
    return b.concat([wide, x], 1)


def sequence_to_rows(b: Builder, x: Tensor) -> Tensor:
    way = b.pick(["mean", "first", "last", "flatten"])
    if way == "mean":
        return b.reduce("ReduceMean", x, [1], keep=False)
    if way == "first":
        return b.node("Gather", [x, b.constant(0)], (x.shape[0], x.shape[2]), axis=1)
    if way == "last":
        return b.squeeze(b.slice(x, 1, x.size(1) - 1, x.size(1)), [1])
    return b.reshape(x, [From(0), x.size(1) * x.size(2)])


SEQUENCE = (
    projection,
    feed_forward,
    attention,
    pre_norm,
    swiglu,
    rms_norm,
    layer_norm,
    recurrent,
    temporal_conv,
    tied,
    flattened_gemm,
    running_sum,
    positions,
    class_token,
    activation,
    last_state,
    merged_heads,
    linear_attention,
    latents,
)
