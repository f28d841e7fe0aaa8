"""Operators that act on every element by itself: broadcast-aligned axes are equal.

Their effect on a dead unit is their value at the dead unit's constant: relu(0) = 0, sigmoid(0) = 1/2.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx

from onnxprune.axes.expr import Expr
from onnxprune.ops.lazy import torch
from onnxprune.ops.registry import Evaluate, Operator
from onnxprune.ops.rules import AxisContext, GiveUp, MirrorContext, NodeView

__all__ = ["OPERATORS", "broadcast", "evaluated", "multiplied"]


def broadcast(c: AxisContext, *operands: int) -> tuple[Expr, ...]:
    """Align the inputs as numpy does: axes of equal size are equal, an axis of size 1 takes the other's size."""
    present = [c.axes(i) for i in operands if c.has(i)]
    rank = max(len(a) for a in present)
    result: list[Expr] = []
    for k in range(rank):
        aligned = [a[k - rank + len(a)] for a in present if k - rank + len(a) >= 0]
        wide = [e for e in aligned if e.size != 1] or aligned[:1]
        c.equal(*wide)
        result.append(wide[0])
    return tuple(result)


def elementwise_axes(c: AxisContext) -> None:
    c.output(*broadcast(c, *range(len(c.node.inputs))))


def first_input_axes(c: AxisContext) -> None:
    """One tensor in, the other inputs are scalars; further outputs (a Dropout mask) have the same axes."""
    for j in range(len(c.node.outputs)):
        c.output(*c.axes(0), j=j)


def dropout_axes(c: AxisContext) -> None:
    if c.has(2) and (c.value(2) is None or np.any(c.value(2))):
        raise GiveUp("a Dropout that is training is random")
    first_input_axes(c)


def evaluated(evaluate: Evaluate) -> Callable[[NodeView, Sequence[float | None]], float | None]:
    """The dead rule of an operator that has a numpy form: apply it to the units' constants."""

    def dead(node: NodeView, states: Sequence[float | None]) -> float | None:
        if any(s is None for s in states):
            return None
        with np.errstate(all="ignore"):
            value = float(evaluate(node, *(np.float64(s) for s in states)))
            return value if math.isfinite(value) else math.inf

    return dead


def multiplied(node: NodeView, states: Sequence[float | None]) -> float | None:
    """Zero times anything is zero, as long as that is no infinity."""
    if any(s is not None and math.isinf(s) for s in states):
        return None
    if any(s == 0 for s in states):
        return 0.0
    return None if any(s is None for s in states) else math.prod(s for s in states if s is not None)


def divided(node: NodeView, states: Sequence[float | None]) -> float | None:
    """Zero by anything is zero, as far as the divisor isn't zero itself."""
    x, y = states
    if x == 0 and y != 0:
        return 0.0
    return math.inf if y == 0 else None if x is None or y is None else x / y


def chosen(node: NodeView, states: Sequence[float | None]) -> float | None:
    """Where: either branch, so both must be the same."""
    return states[1] if states[1] == states[2] else None


def powered(node: NodeView, states: Sequence[float | None]) -> float | None:
    """0 ** y is 0 for a known positive y."""
    x, y = states
    if x is None or y is None or (x <= 0 and y <= 0) or (x < 0 and y != int(y)):
        return None
    return float(x**y)


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


def _cast(n: NodeView, x: Any, *rest: Any) -> Any:
    if rest:  # CastLike
        return np.asarray(x).astype(np.asarray(rest[0]).dtype)
    return np.asarray(x).astype(onnx.helper.tensor_dtype_to_np_dtype(int(n.attributes["to"])))


def _dead_cast(n: NodeView, x: Any, *rest: Any) -> Any:
    return np.float64(x)


def _clip(n: NodeView, x: Any, low: Any = None, high: Any = None) -> Any:
    low = n.attributes.get("min") if low is None else low
    high = n.attributes.get("max") if high is None else high
    x = np.asarray(x)
    x = x if low is None else np.maximum(x, np.asarray(low).astype(x.dtype))
    return x if high is None else np.minimum(x, np.asarray(high).astype(x.dtype))


def _divide(n: NodeView, x: Any, y: Any) -> Any:
    if np.issubdtype(np.asarray(x).dtype, np.integer):  # ONNX divides integers towards zero
        quotient = np.abs(x) // np.maximum(np.abs(y), 1)
        return (quotient * np.sign(x) * np.sign(y)).astype(np.asarray(x).dtype)
    return x / y


def _unary(name: str, f: Callable[[Any], Any]) -> Operator:
    method = TORCH_UNARY.get(name)
    mirror: Any = None if method is None else lambda m: method(m.tensor(0))
    return _with(name, lambda n, x, *_: f(x), mirror=mirror)


def _with(name: str, evaluate: Evaluate, axes: Any = first_input_axes, **more: Any) -> Operator:
    return Operator(name, axes, evaluated(evaluate), evaluate=evaluate, shape=_first_shape, broadcasts=True, **more)


def _binary(name: str, f: Callable[..., Any], dead: Any = None, **more: Any) -> Operator:
    evaluate: Evaluate = lambda n, *xs: f(*xs)  # noqa: E731
    return Operator(name, elementwise_axes, dead or evaluated(evaluate), evaluate=evaluate, broadcasts=True, **more)


def _variadic(f: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(first: Any, *rest: Any) -> Any:
        for other in rest:
            first = f(first, other)
        return first

    return apply


def bias_axes(c: AxisContext) -> None:
    """BiasGelu, FastGelu: a bias along the last axis."""
    if c.has(1):
        c.equal(c.axes(0)[-1], c.axes(1)[0])
    c.output(*c.axes(0))


def biased(node: NodeView, states: Sequence[float | None]) -> float | None:
    """An activation that is zero at zero, after a bias."""
    return 0.0 if all(s == 0 for s in states) else None


def _first_shape(node: NodeView, inputs: Any) -> Any:
    return [inputs[0]] * len(node.outputs)


def random_axes(c: AxisContext) -> None:
    c.output(*c.axes(0))


UNARY: dict[str, Callable[[Any], Any]] = {
    "Abs": np.abs,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Exp": np.exp,
    "Log": np.log,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": np.round,
    "Sign": np.sign,
    "Sin": np.sin,
    "Cos": np.cos,
    "Tan": np.tan,
    "Asin": np.arcsin,
    "Acos": np.arccos,
    "Atan": np.arctan,
    "Sinh": np.sinh,
    "Cosh": np.cosh,
    "Tanh": np.tanh,
    "Asinh": np.arcsinh,
    "Acosh": np.arccosh,
    "Atanh": np.arctanh,
    "Reciprocal": lambda x: 1 / x,
    "Not": np.logical_not,
    "IsNaN": np.isnan,
    "IsInf": np.isinf,
    "BitwiseNot": np.invert,
    "Erf": _erf,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
}

TORCH_UNARY: dict[str, Callable[[Any], Any]] = {
    "Relu": lambda x: torch.relu(x),
}


def arithmetic(operation: Callable[[Any, Any], Any]) -> Callable[[MirrorContext], Any]:
    """The mirror rule of a binary or variadic operator: constant scalars stand as numbers."""

    def mirror(m: MirrorContext) -> Any:
        result = m.operand(0)
        for i in range(1, len(m.node.inputs)):
            result = operation(result, m.operand(i))
        return result

    return mirror


OPERATORS = (
    *(_unary(name, f) for name, f in UNARY.items()),
    _unary("Identity", lambda x: x),
    _with("Dropout", lambda n, x, *_: x, dropout_axes),
    Operator("Cast", first_input_axes, evaluated(_dead_cast), evaluate=_cast, broadcasts=True),
    Operator("CastLike", lambda c: c.output(*c.axes(0)), lambda n, s: s[0], evaluate=_cast),
    _with("LeakyRelu", lambda n, x: np.where(x < 0, _a(n, "alpha", 0.01) * x, x)),
    _with("Elu", lambda n, x: np.where(x < 0, _a(n, "alpha", 1) * np.expm1(x), x)),
    _with("Celu", lambda n, x: np.where(x < 0, _a(n, "alpha", 1) * np.expm1(x / _a(n, "alpha", 1)), x)),
    _with(
        "Selu", lambda n, x: _a(n, "gamma", 1.05070098) * np.where(x < 0, _a(n, "alpha", 1.67326324) * np.expm1(x), x)
    ),
    _with("HardSigmoid", lambda n, x: np.clip(_a(n, "alpha", 0.2) * x + _a(n, "beta", 0.5), 0, 1)),
    _with("ThresholdedRelu", lambda n, x: np.where(x > _a(n, "alpha", 1), x, 0)),
    _with("Shrink", lambda n, x: np.where(np.abs(x) <= _a(n, "lambd", 0.5), 0, x - np.sign(x) * _a(n, "bias", 0))),
    _with("Swish", lambda n, x: x * _sigmoid(_a(n, "alpha", 1) * x)),
    _with("Gelu", _gelu),
    _with("Clip", _clip),
    _with("Erfc", lambda n, x: 1 - _erf(x)),
    Operator("com.microsoft::Gelu", first_input_axes, evaluated(_gelu), shape=_first_shape),
    Operator(
        "com.microsoft::QuickGelu",
        first_input_axes,
        evaluated(lambda n, x: x * _sigmoid(1.702 * x)),
        shape=_first_shape,
    ),
    Operator("com.microsoft::BiasGelu", bias_axes, biased, shape=_first_shape),
    Operator("com.microsoft::FastGelu", bias_axes, biased, shape=_first_shape),
    *(Operator(name, random_axes) for name in ("RandomNormalLike", "RandomUniformLike", "Bernoulli")),
    _binary("Add", np.add, mirror=arithmetic(operator.add)),
    _binary("Sub", np.subtract),
    _binary("Mul", np.multiply, multiplied),
    Operator("Div", elementwise_axes, divided, evaluate=_divide, broadcasts=True, keeps=frozenset({1})),
    _binary("Pow", lambda x, y: np.power(x, np.asarray(y).astype(np.asarray(x).dtype)), powered, keeps=frozenset({1})),
    Operator(
        "Mod",
        elementwise_axes,
        divided,
        keeps=frozenset({1}),
        evaluate=lambda n, x, y: np.fmod(x, y) if n.attributes.get("fmod") else np.mod(x, y),
    ),
    _binary(
        "PRelu", lambda x, s: np.where(x < 0, s * x, x), lambda n, s: 0.0 if s[0] == 0 else None, keeps=frozenset({1})
    ),
    _binary("And", np.logical_and, multiplied),
    _binary("Or", np.logical_or),
    _binary("Xor", np.logical_xor),
    _binary("Equal", np.equal, discrete=True),
    _binary("Less", np.less, discrete=True),
    _binary("Greater", np.greater, discrete=True),
    _binary("LessOrEqual", np.less_equal, discrete=True),
    _binary("GreaterOrEqual", np.greater_equal, discrete=True),
    *(Operator(name, elementwise_axes) for name in ("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    _binary("Max", _variadic(np.maximum)),
    _binary("Min", _variadic(np.minimum)),
    _binary("Sum", _variadic(np.add)),
    _binary("Mean", lambda *xs: _variadic(np.add)(*xs) / len(xs)),
    _binary("Where", np.where, chosen),
)
