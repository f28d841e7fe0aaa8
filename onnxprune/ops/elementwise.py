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
from onnxprune.ops.lazy import kernels, torch
from onnxprune.ops.registry import Evaluate, Operator, Role
from onnxprune.ops.rules import AxisContext, MirrorContext, MirrorRule, NodeView
from onnxprune.ops.unsigned import widened

__all__ = ["OPERATORS", "broadcast", "elementwise_axes", "evaluated", "first_input_axes", "multiplied", "pointwise"]

_run = kernels("elementwise")


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


def _cast(n: NodeView, x: Any, *rest: Any) -> Any:
    dtype = np.asarray(rest[0]).dtype if rest else onnx.helper.tensor_dtype_to_np_dtype(int(n.attributes["to"]))
    x = np.asarray(x)
    return x if x.dtype == object and dtype.kind == "i" else x.astype(dtype)  # sizes that vary are integers


def _dead_cast(n: NodeView, x: Any, *rest: Any) -> Any:
    return np.float64(x)


def _divide(n: NodeView, x: Any, y: Any) -> Any:
    if object in (np.asarray(x).dtype, np.asarray(y).dtype):  # sizes that vary are not negative
        return x // y
    if np.issubdtype(np.asarray(x).dtype, np.integer):  # ONNX divides integers towards zero
        quotient = np.abs(x) // np.maximum(np.abs(y), 1)
        return (quotient * np.sign(x) * np.sign(y)).astype(np.asarray(x).dtype)
    return x / y


def pointwise(name: str, evaluate: Evaluate, mirror: MirrorRule, axes: Any = first_input_axes, **more: Any) -> Operator:
    """One tensor in, one of the same shape out."""
    dead = evaluated(evaluate)
    return Operator(
        name, axes, dead, evaluate=evaluate, shape=first_shape, broadcasts=True, mirror=widened(mirror), **more
    )


def first_shape(node: NodeView, inputs: Any) -> Any:
    return [inputs[0]] * len(node.outputs)


def _unary(name: str, f: Callable[[Any], Any], function: str) -> Operator:
    """function: its name in torch."""
    return pointwise(name, lambda n, x, *_: f(x), lambda m: getattr(torch, function)(m.tensor(0)))


def _binary(name: str, f: Callable[..., Any], mirror: MirrorRule, dead: Any = None, **more: Any) -> Operator:
    evaluate: Evaluate = lambda n, *xs: f(*xs)  # noqa: E731
    dead = dead or evaluated(evaluate)
    return Operator(name, elementwise_axes, dead, evaluate=evaluate, broadcasts=True, mirror=widened(mirror), **more)


def _variadic(f: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(first: Any, *rest: Any) -> Any:
        for other in rest:
            first = f(first, other)
        return first

    return apply


UNARY: dict[str, tuple[Callable[[Any], Any], str]] = {  # in numpy, and the name in torch
    "Abs": (np.abs, "abs"),
    "Neg": (np.negative, "neg"),
    "Sqrt": (np.sqrt, "sqrt"),
    "Log": (np.log, "log"),
    "Floor": (np.floor, "floor"),
    "Ceil": (np.ceil, "ceil"),
    "Round": (np.round, "round"),
    "Sign": (np.sign, "sign"),
    "Sin": (np.sin, "sin"),
    "Cos": (np.cos, "cos"),
    "Tan": (np.tan, "tan"),
    "Asin": (np.arcsin, "asin"),
    "Acos": (np.arccos, "acos"),
    "Atan": (np.arctan, "atan"),
    "Sinh": (np.sinh, "sinh"),
    "Cosh": (np.cosh, "cosh"),
    "Tanh": (np.tanh, "tanh"),
    "Asinh": (np.arcsinh, "asinh"),
    "Acosh": (np.arccosh, "acosh"),
    "Atanh": (np.arctanh, "atanh"),
    "Reciprocal": (lambda x: 1 / x, "reciprocal"),
    "Not": (np.logical_not, "logical_not"),
    "IsNaN": (np.isnan, "isnan"),
    "BitwiseNot": (np.invert, "bitwise_not"),
    "Erf": (_erf, "erf"),
    "Erfc": (lambda x: 1 - _erf(x), "erfc"),
}


def arithmetic(operation: Callable[[Any, Any], Any]) -> MirrorRule:
    """The mirror rule of a binary or variadic operator: constant scalars stand as numbers."""

    def mirror(m: MirrorContext) -> Any:
        result = m.operand(0)
        for i in range(1, len(m.node.inputs)):
            result = operation(result, m.operand(i))
        return result

    return mirror


def between(function: str) -> MirrorRule:
    """The mirror rule of a binary operator that is a function of two tensors in torch."""
    return lambda m: getattr(torch, function)(m.tensor(0), m.tensor(1))


def divide_mirror(m: MirrorContext) -> Any:
    dtype = m.dtype(0)
    if dtype is None:
        return m.call(_run.divide, m.tensor(0), m.tensor(1))
    if dtype.is_floating_point or dtype.is_complex:
        return m.operand(0) / m.operand(1)
    return torch.div(m.tensor(0), m.operand(1), rounding_mode="trunc")


def mod_mirror(m: MirrorContext) -> Any:
    function = torch.fmod if m.attr("fmod", 0) else torch.remainder
    return function(m.tensor(0), m.operand(1))


def power_mirror(m: MirrorContext) -> Any:
    """The result has the type of the base, whatever that of the exponent is."""
    x, y, base = m.tensor(0), m.tensor(1), m.dtype(0)
    value = m.constant(1)
    if value is not None and value.size == 1 and value.dtype.kind in "fiu" and value.ndim <= (m.rank(0) or 0):
        y = value.reshape(()).item()
    if base is not None and not base.is_floating_point and not base.is_complex:
        return m.call(_run.integer_power, x, y)
    result = torch.pow(x, y)
    return result.type_as(x) if m.dtype(1) == torch.float64 != base else result


def shift_mirror(m: MirrorContext) -> Any:
    if m.attr("direction") == "LEFT":
        return torch.bitwise_left_shift(m.tensor(0), m.tensor(1))
    if m.dtype(0) == torch.int64:  # unsigned, but widened
        return m.call(_run.shift_right, m.tensor(0), m.tensor(1))
    return torch.bitwise_right_shift(m.tensor(0), m.tensor(1))


def extreme(function: str, bound: str) -> MirrorRule:
    """Max, Min: constant scalars are bounds."""

    def mirror(m: MirrorContext) -> Any:
        operands = [m.operand(i) for i in range(len(m.node.inputs))]
        numbers = [x for x in operands if isinstance(x, (bool, int, float))]
        tensors = [x for x in operands if not isinstance(x, (bool, int, float))]
        result = tensors[0]
        for x in tensors[1:]:
            result = getattr(torch, function)(result, x)
        for number in numbers:
            result = torch.clamp(result, **{bound: number})
        return result

    return mirror


def is_inf_mirror(m: MirrorContext) -> Any:
    positive, negative = m.attr("detect_positive", 1), m.attr("detect_negative", 1)
    if not positive and not negative:
        return torch.zeros_like(m.tensor(0), dtype=torch.bool)
    function = torch.isinf if positive and negative else torch.isposinf if positive else torch.isneginf
    return function(m.tensor(0))


def cast_mirror(m: MirrorContext) -> Any:
    dtype = m.torch_type(int(m.attr("to")))
    if dtype is None:
        raise m.unsupported(f"torch has no {onnx.TensorProto.DataType.Name(m.attr('to'))}")
    return m.tensor(0).to(dtype)


def cast_like_mirror(m: MirrorContext) -> Any:
    dtype = m.dtype(1)
    return m.tensor(0).type_as(m.tensor(1)) if dtype is None else m.tensor(0).to(dtype)


def bit_cast_mirror(m: MirrorContext) -> Any:
    dtype = m.torch_type(int(m.attr("to")))
    if dtype is None:
        raise m.unsupported(f"torch has no {onnx.TensorProto.DataType.Name(m.attr('to'))}")
    x, declared = m.tensor(0), m.dtype(0)
    return (x if declared is None else x.to(declared)).view(dtype)  # autocast may have made it shorter


BOTH = frozenset({0, 1})

OPERATORS = (
    *(_unary(name, f, function) for name, (f, function) in UNARY.items()),
    pointwise("Exp", lambda n, x: np.exp(x), lambda m: torch.exp(m.tensor(0)), role=Role.EXPONENTIAL),
    pointwise("IsInf", lambda n, x: np.isinf(x), is_inf_mirror),
    Operator(
        "Identity",
        first_input_axes,
        evaluated(lambda n, x: x),
        evaluate=lambda n, x: x,
        shape=first_shape,
        broadcasts=True,
        mirror=lambda m: m.tensor(0),
        carries=True,
        role=Role.REARRANGES,
    ),
    Operator(
        "Cast",
        first_input_axes,
        evaluated(_dead_cast),
        evaluate=_cast,
        broadcasts=True,
        mirror=cast_mirror,
        carries=True,
        role=Role.REARRANGES,
    ),
    Operator("CastLike", lambda c: c.output(*c.axes(0)), lambda n, s: s[0], evaluate=_cast, mirror=cast_like_mirror),
    Operator("BitCast", mirror=bit_cast_mirror),
    _binary(
        "Add",
        np.add,
        arithmetic(operator.add),
        role=Role.AFFINE,
        shift=lambda n, i: (1 - i, 1, None),
        slope=lambda n, i, stored, rank: np.ones(()),
    ),
    _binary(
        "Sub",
        np.subtract,
        arithmetic(operator.sub),
        role=Role.AFFINE,
        shift=lambda n, i: (1 - i, -1, None),
        slope=lambda n, i, stored, rank: np.array(-1.0 if i else 1.0),
    ),
    _binary(
        "Mul",
        np.multiply,
        arithmetic(operator.mul),
        multiplied,
        role=Role.AFFINE,
        slope=lambda n, i, stored, rank: stored[1 - i],
    ),
    Operator(
        "Div",
        elementwise_axes,
        divided,
        evaluate=_divide,
        broadcasts=True,
        keeps=frozenset({1}),
        mirror=widened(divide_mirror),
        role=Role.QUOTIENT,
    ),
    _binary(
        "Pow",
        lambda x, y: np.power(x, np.asarray(y).astype(np.asarray(x).dtype)),
        power_mirror,
        powered,
        keeps=frozenset({1}),
        fixed=frozenset({1}),
    ),
    Operator(
        "Mod",
        elementwise_axes,
        divided,
        keeps=frozenset({1}),
        evaluate=lambda n, x, y: np.fmod(x, y) if n.attributes.get("fmod") else np.mod(x, y),
        mirror=widened(mod_mirror),
        fixed=BOTH,
    ),
    _binary("And", np.logical_and, between("logical_and"), multiplied),
    _binary("Or", np.logical_or, between("logical_or")),
    _binary("Xor", np.logical_xor, between("logical_xor")),
    _binary("Equal", np.equal, arithmetic(operator.eq), discrete=True, fixed=BOTH),
    _binary("Less", np.less, arithmetic(operator.lt), discrete=True, fixed=BOTH),
    _binary("Greater", np.greater, arithmetic(operator.gt), discrete=True, fixed=BOTH),
    _binary("LessOrEqual", np.less_equal, arithmetic(operator.le), discrete=True, fixed=BOTH),
    _binary("GreaterOrEqual", np.greater_equal, arithmetic(operator.ge), discrete=True, fixed=BOTH),
    Operator("BitShift", elementwise_axes, mirror=widened(shift_mirror)),
    *(
        Operator(f"Bitwise{name}", elementwise_axes, mirror=widened(between(f"bitwise_{name.lower()}")))
        for name in ("And", "Or", "Xor")
    ),
    _binary("Max", _variadic(np.maximum), extreme("maximum", "min"), carries=True),
    _binary("Min", _variadic(np.minimum), extreme("minimum", "max"), carries=True),
    _binary("Sum", _variadic(np.add), arithmetic(operator.add), slope=lambda n, i, stored, rank: np.ones(())),
    _binary(
        "Mean",
        lambda *xs: _variadic(np.add)(*xs) / len(xs),
        lambda m: arithmetic(operator.add)(m) / len(m.node.inputs),
    ),
    _binary("Where", np.where, lambda m: torch.where(m.tensor(0), m.operand(1), m.operand(2)), chosen, carries=True),
)
