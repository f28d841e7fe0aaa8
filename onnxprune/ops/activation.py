"""Activations: elementwise functions between a network's layers, and Dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxprune.ops.elementwise import elementwise_axes, evaluated, first_input_axes, first_shape, pointwise
from onnxprune.ops.lazy import F, kernels, torch
from onnxprune.ops.registry import Operator, Role
from onnxprune.ops.rules import AxisContext, Flat, GiveUp, MirrorContext, NodeView
from onnxprune.ops.unsigned import widened

__all__ = ["OPERATORS"]

_run = kernels("elementwise")

LARGEST = 3.4e38  # what stands for no bound in the Clip of old opsets
SELU = (1.6732632423543772, 1.0507009873554805)


def dropout_axes(c: AxisContext) -> None:
    if c.has(2) and (c.value(2) is None or np.any(c.value(2))):
        raise GiveUp("a Dropout that is training is random")
    first_input_axes(c)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _softplus(x: Any) -> Any:
    return np.logaddexp(0, x)


def _gelu(n: NodeView, x: Any) -> Any:
    if n.attributes.get("approximate", "none") == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _a(n: NodeView, name: str, default: float) -> float:
    return float(n.attributes.get(name, default))


def _clip(n: NodeView, x: Any, low: Any = None, high: Any = None) -> Any:
    low = n.attributes.get("min") if low is None else low
    high = n.attributes.get("max") if high is None else high
    x = np.asarray(x)
    x = x if low is None else np.maximum(x, np.asarray(low).astype(x.dtype))
    return x if high is None else np.minimum(x, np.asarray(high).astype(x.dtype))


def clip_flat(node: NodeView, stored: Sequence[np.ndarray | None]) -> Flat:
    """Bounds that are computed from the data are none."""
    given = [None if x is None else float(x.reshape(-1)[0]) for x in stored[1:3]]
    low, high = (
        node.attributes.get(name) if value is None else value
        for name, value in zip(("min", "max"), (*given, None, None), strict=False)
    )
    return Flat(-math.inf if low is None else low, math.inf if high is None else high)


def hard_sigmoid_flat(node: NodeView, stored: Sequence[np.ndarray | None]) -> Flat | None:
    alpha, beta = _a(node, "alpha", 0.2), _a(node, "beta", 0.5)
    return Flat(-beta / alpha, (1 - beta) / alpha) if alpha > 0 else None


def bias_axes(c: AxisContext) -> None:
    """BiasGelu, FastGelu: a bias along the last axis."""
    if c.has(1):
        c.equal(c.axes(0)[-1], c.axes(1)[0])
    c.output(*c.axes(0))


def biased(node: NodeView, states: Sequence[float | None]) -> float | None:
    """An activation that is zero at zero, after a bias."""
    return 0.0 if all(s == 0 for s in states) else None


def number(m: MirrorContext, name: str, default: float) -> float:
    """A float attribute."""
    return float(m.attr(name, default))


def selu_mirror(m: MirrorContext) -> Any:
    alpha, gamma = number(m, "alpha", SELU[0]), number(m, "gamma", SELU[1])
    x = m.tensor(0)
    usual = math.isclose(alpha, SELU[0], rel_tol=1e-6) and math.isclose(gamma, SELU[1], rel_tol=1e-6)
    return F.selu(x) if usual else gamma * F.elu(x, alpha)


def hard_sigmoid_mirror(m: MirrorContext) -> Any:
    alpha, beta = number(m, "alpha", 0.2), number(m, "beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(m.tensor(0))
    return torch.clamp(alpha * m.tensor(0) + beta, 0, 1)


def swish(x: Any, alpha: float) -> Any:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def shrink_mirror(m: MirrorContext) -> Any:
    return m.call(_run.shrink, m.tensor(0), number(m, "lambd", 0.5), number(m, "bias", 0.0))


def gelu(m: MirrorContext, x: Any) -> Any:
    return F.gelu(x, approximate=m.attr("approximate", "none"))


def bias_gelu(approximate: str) -> Any:
    def mirror(m: MirrorContext) -> Any:
        return F.gelu(m.tensor(0) + m.tensor(1) if m.has(1) else m.tensor(0), approximate=approximate)

    return mirror


def prelu_mirror(m: MirrorContext) -> Any:
    """torch has one slope, or one per index of axis 1; ONNX any that broadcasts."""
    x, slope, shape, rank = m.tensor(0), m.tensor(1), m.shape(1), m.rank(0)
    dtype = m.dtype(0)
    floats = dtype is not None and dtype.is_floating_point
    per_channel = shape is not None and rank is not None and len(shape) == rank - 1 and all(n == 1 for n in shape[1:])
    if floats and shape is not None and (per_channel or all(n == 1 for n in shape)):
        return F.prelu(x, slope if len(shape) == 1 else slope.reshape(-1))
    return m.call(_run.prelu, x, slope)


def clip_mirror(m: MirrorContext) -> Any:
    x = m.tensor(0)
    if m.node.opset < 11:
        low, high = (None if b is None or abs(b) >= LARGEST else b for b in (m.attr("min"), m.attr("max")))
    else:
        low, high = (m.operand(i) if m.has(i) else None for i in (1, 2))
        numbers = all(b is None or isinstance(b, (int, float)) for b in (low, high))
        if not numbers:
            low, high = m.optional(1), m.optional(2)
    if isinstance(low, float) and low == 0 and isinstance(high, float) and high == 6:
        return F.relu6(x)
    return x if low is None and high is None else torch.clamp(x, low, high)


def dropout_mirror(m: MirrorContext) -> Any:
    """What the exporter left in drops in training; in a node that says that it is training, always."""
    x, ratio, mode = m.tensor(0), m.attr("ratio", 0.5), m.training
    if m.node.opset >= 12:
        value = m.constant(1)
        ratio = value.item() if value is not None else m.tensor(1) if m.has(1) else 0.5
        training = m.constant(2)
        if m.has(2) and (training is None or training.item()):
            mode = True if training is not None else m.tensor(2)
    masked = len(m.node.outputs) > 1 and bool(m.node.outputs[1])
    if not masked and isinstance(ratio, float) and (mode is True or m.constant(2) is not None or not m.has(2)):
        return F.dropout(x, ratio, mode)
    found = m.call(_run.dropout, x, ratio, mode)
    dtype = m.output_dtype(1)
    return [found[0], found[1] if dtype in (None, torch.bool) else found[1].to(dtype)]


OPERATORS = (
    pointwise(
        "Relu",
        lambda n, x: np.maximum(x, 0),
        lambda m: torch.relu(m.tensor(0)),
        carries=True,
        flat=lambda n, stored: Flat(0.0),
    ),
    pointwise("Sigmoid", lambda n, x: _sigmoid(x), lambda m: torch.sigmoid(m.tensor(0)), role=Role.SIGMOID),
    pointwise("Softplus", lambda n, x: _softplus(x), lambda m: F.softplus(m.tensor(0))),
    pointwise("Softsign", lambda n, x: x / (1 + np.abs(x)), lambda m: F.softsign(m.tensor(0))),
    pointwise("Mish", lambda n, x: x * np.tanh(_softplus(x)), lambda m: F.mish(m.tensor(0))),
    pointwise(
        "HardSwish",
        lambda n, x: x * np.clip(x / 6 + 0.5, 0, 1),
        lambda m: F.hardswish(m.tensor(0)),
        flat=lambda n, stored: Flat(-3.0),
    ),
    pointwise(
        "LeakyRelu",
        lambda n, x: np.where(x < 0, _a(n, "alpha", 0.01) * x, x),
        lambda m: F.leaky_relu(m.tensor(0), number(m, "alpha", 0.01)),
        flat=lambda n, stored: Flat(0.0, leak=_a(n, "alpha", 0.01)),
    ),
    pointwise(
        "Elu",
        lambda n, x: np.where(x < 0, _a(n, "alpha", 1) * np.expm1(x), x),
        lambda m: F.elu(m.tensor(0), number(m, "alpha", 1.0)),
    ),
    pointwise(
        "Celu",
        lambda n, x: np.where(x < 0, _a(n, "alpha", 1) * np.expm1(x / _a(n, "alpha", 1)), x),
        lambda m: F.celu(m.tensor(0), number(m, "alpha", 1.0)),
    ),
    pointwise(
        "Selu",
        lambda n, x: _a(n, "gamma", 1.05070098) * np.where(x < 0, _a(n, "alpha", 1.67326324) * np.expm1(x), x),
        selu_mirror,
    ),
    pointwise(
        "HardSigmoid",
        lambda n, x: np.clip(_a(n, "alpha", 0.2) * x + _a(n, "beta", 0.5), 0, 1),
        hard_sigmoid_mirror,
        flat=hard_sigmoid_flat,
    ),
    pointwise(
        "ThresholdedRelu",
        lambda n, x: np.where(x > _a(n, "alpha", 1), x, 0),
        lambda m: F.threshold(m.tensor(0), number(m, "alpha", 1.0), 0.0),
        flat=lambda n, stored: Flat(_a(n, "alpha", 1)),
    ),
    pointwise(
        "Shrink",
        lambda n, x: np.where(np.abs(x) <= _a(n, "lambd", 0.5), 0, x - np.sign(x) * _a(n, "bias", 0)),
        shrink_mirror,
    ),
    pointwise(
        "Swish",
        lambda n, x: x * _sigmoid(_a(n, "alpha", 1) * x),
        lambda m: swish(m.tensor(0), number(m, "alpha", 1.0)),
    ),
    Operator("SwiGLU", mirror=lambda m: swish(m.tensor(0), number(m, "alpha", 1.0)) * m.tensor(1)),
    pointwise("Gelu", _gelu, lambda m: gelu(m, m.tensor(0))),
    pointwise("Clip", _clip, clip_mirror, fixed=frozenset({1, 2}), carries=True, flat=clip_flat),
    pointwise(
        "Dropout", lambda n, x, *_: x, dropout_mirror, dropout_axes, fixed=frozenset({1, 2}), role=Role.REARRANGES
    ),
    Operator(
        "PRelu",
        elementwise_axes,
        lambda n, s: 0.0 if s[0] == 0 else None,
        keeps=frozenset({1}),
        evaluate=lambda n, x, s: np.where(x < 0, s * x, x),
        broadcasts=True,
        mirror=widened(prelu_mirror),
        flat=lambda n, stored: None if stored[1] is None else Flat(0.0, leak=stored[1]),
    ),
    Operator(
        "com.microsoft::Gelu",
        first_input_axes,
        evaluated(_gelu),
        shape=first_shape,
        mirror=lambda m: gelu(m, m.tensor(0)),
    ),
    Operator(
        "com.microsoft::QuickGelu",
        first_input_axes,
        evaluated(lambda n, x: x * _sigmoid(1.702 * x)),
        shape=first_shape,
        mirror=lambda m: swish(m.tensor(0), number(m, "alpha", 1.702)),
    ),
    Operator("com.microsoft::BiasGelu", bias_axes, biased, shape=first_shape, mirror=bias_gelu("none")),
    Operator("com.microsoft::FastGelu", bias_axes, biased, shape=first_shape, mirror=bias_gelu("tanh")),
)
