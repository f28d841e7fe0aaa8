"""Elementwise operators and activations in the mirror: onnxruntime's numbers, and derivatives that are right."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import pytest
import torch

from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node, run_mirror

RNG = np.random.default_rng(0)
SHAPE = (2, 3, 4)


def f(*shape: int, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    """Numbers that are not close to a bend of an activation."""
    return (RNG.permutation(np.linspace(low, high, max(int(np.prod(shape)), 1)) + 0.0123).reshape(shape)).astype("f")


def whole(*values: Any, dtype: str = "int64") -> np.ndarray:
    return np.array(values, dtype)


X, Y = f(*SHAPE), f(*SHAPE, low=0.57, high=3.1)
POSITIVE, INSIDE, ABOVE = f(*SHAPE, low=0.3), f(*SHAPE, low=-0.9, high=0.9), f(*SHAPE, low=1.1)
INTEGERS, DIVISORS = whole(-7, -6, 0, 7), whole(2, -4, 3, -4)
YES = np.array([[True, False, True, False]])
HALF = np.array(0.5, np.float32)

# name: (operator, inputs, stored inputs, attributes)
CASES: dict[str, tuple[str, list[Any], tuple[int, ...], dict[str, Any]]] = {
    **{op: (op, [X], (), {}) for op in ["Abs", "Neg", "Exp", "Floor", "Ceil", "Round", "Sign", "Erf", "Identity"]},
    **{op: (op, [X], (), {}) for op in ["Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Tanh", "Asinh"]},
    **{op: (op, [POSITIVE], (), {}) for op in ["Sqrt", "Log", "Reciprocal"]},
    **{op: (op, [INSIDE], (), {}) for op in ["Asin", "Acos", "Atanh"]},
    "Acosh": ("Acosh", [ABOVE], (), {}),
    **{op: (op, [X], (), {}) for op in ["Relu", "Sigmoid", "Softplus", "Softsign", "HardSwish"]},
    "Mish": ("Mish", [X], (), {"opset": 18}),
    "Relu 7": ("Relu", [X], (), {"opset": 7}),
    **{op: (op, [X], (), {}) for op in ["LeakyRelu", "Elu", "Celu", "Selu", "HardSigmoid", "ThresholdedRelu"]},
    **{f"{op} alpha": (op, [X], (), {"alpha": 0.7}) for op in ["LeakyRelu", "Elu", "Celu", "ThresholdedRelu"]},
    "Selu attributes": ("Selu", [X], (), {"alpha": 1.2, "gamma": 0.9}),
    "HardSigmoid of torch": ("HardSigmoid", [X], (), {"alpha": 1 / 6}),
    "HardSigmoid attributes": ("HardSigmoid", [X], (), {"alpha": 0.3, "beta": 0.4}),
    "Shrink": ("Shrink", [X], (), {"lambd": 1.1, "bias": 0.3}),
    "Gelu": ("Gelu", [X], (), {"opset": 20}),
    "Gelu tanh": ("Gelu", [X], (), {"approximate": "tanh", "opset": 20}),
    "com.microsoft Gelu": ("Gelu", [X], (), {"domain": "com.microsoft"}),
    "QuickGelu": ("QuickGelu", [X], (), {"domain": "com.microsoft"}),
    "QuickGelu alpha": ("QuickGelu", [X], (), {"domain": "com.microsoft", "alpha": 1.2}),
    "BiasGelu": ("BiasGelu", [X, f(4)], (1,), {"domain": "com.microsoft"}),
    "FastGelu": ("FastGelu", [X], (), {"domain": "com.microsoft"}),
    "FastGelu bias": ("FastGelu", [X, f(4)], (), {"domain": "com.microsoft"}),
    "PRelu per channel": ("PRelu", [X, f(3, 1)], (1,), {}),
    "PRelu one": ("PRelu", [X, f(1)], (1,), {}),
    "PRelu broadcast": ("PRelu", [X, f(2, 1, 4)], (1,), {}),
    "PRelu input": ("PRelu", [X, f(3, 1)], (), {}),
    "PRelu 7": ("PRelu", [X, f(3, 1)], (1,), {"opset": 7}),
    "Clip 6": ("Clip", [X], (), {"min": -1.0, "max": 2.0, "opset": 10}),
    "Clip 6 one side": ("Clip", [X], (), {"min": -1.0, "opset": 7}),
    "Clip 6 no side": ("Clip", [X], (), {"opset": 7}),
    "Clip stored": ("Clip", [X, HALF * -2, HALF], (1, 2), {}),
    "Clip to 0 and 6": ("Clip", [3 * X, HALF * 0, HALF * 12], (1, 2), {}),
    "Clip above": ("Clip", [X, None, HALF], (2,), {}),
    "Clip inputs": ("Clip", [X, HALF * -2, HALF], (), {}),
    "Clip one of each": ("Clip", [X, HALF * -2, HALF], (1,), {}),
    "Clip integers": ("Clip", [INTEGERS, whole(-2).reshape(()), whole(6).reshape(())], (1, 2), {}),
    "Dropout 7": ("Dropout", [X], (), {"ratio": 0.3, "opset": 7}),
    "Dropout 13": ("Dropout", [X, HALF], (1,), {"opset": 13}),
    "Dropout 13 mask": ("Dropout", [X, HALF, np.array(False)], (1, 2), {"opset": 13, "count": 2}),
    **{f"{op}": (op, [X, Y[:, :1]], (), {}) for op in ["Add", "Sub", "Mul", "Div", "Max", "Min"]},
    **{f"{op} 7": (op, [X, f(4, low=0.4)], (1,), {"opset": 7}) for op in ["Add", "Sub", "Mul", "Div"]},
    **{f"{op} number": (op, [X, HALF], (1,), {}) for op in ["Add", "Sub", "Mul", "Div", "Max", "Min"]},
    **{f"number {op}": (op, [HALF, POSITIVE], (0,), {}) for op in ["Add", "Sub", "Mul", "Div", "Max", "Min"]},
    **{f"{op} wider number": (op, [HALF.reshape(1, 1), f(4, low=1)], (0,), {}) for op in ["Add", "Div", "Max"]},
    **{f"{op} of three": (op, [X, Y[:1], f(3, 1, low=-2)], (), {}) for op in ["Max", "Min", "Sum", "Mean"]},
    **{f"{op} of one": (op, [X], (), {}) for op in ["Max", "Min", "Sum", "Mean"]},
    **{f"{op} integers": (op, [INTEGERS, DIVISORS], (1,), {}) for op in ["Add", "Sub", "Mul", "Div", "Max", "Mod"]},
    "Div integers by a number": ("Div", [INTEGERS, whole(4)], (1,), {}),
    "Div number by integers": ("Div", [whole(-9), DIVISORS], (0,), {}),
    "Mod fmod": ("Mod", [X, Y], (), {"fmod": 1}),
    "Mod integers fmod": ("Mod", [INTEGERS, DIVISORS], (), {"fmod": 1}),
    "Pow": ("Pow", [POSITIVE, Y], (), {}),
    "Pow 7": ("Pow", [POSITIVE, Y], (), {"opset": 7}),
    "Pow 2": ("Pow", [X, HALF * 4], (1,), {}),
    "Pow integer exponent": ("Pow", [X, whole(3)], (1,), {}),
    "Pow integer exponents": ("Pow", [X, whole(3, 2, 1, 4)], (), {}),
    "Pow integers": ("Pow", [INTEGERS, whole(2)], (1,), {}),
    "Pow integer to float": ("Pow", [np.abs(INTEGERS), HALF], (), {}),
    "Pow double exponent": ("Pow", [POSITIVE, Y.astype(np.float64)], (), {}),
    **{op: (op, [YES, ~YES.T], (), {}) for op in ["And", "Or", "Xor"]},
    "Not": ("Not", [YES], (), {}),
    **{op: (op, [X, Y], (), {}) for op in ["Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"]},
    **{f"number {op}": (op, [HALF, X], (0,), {}) for op in ["Less", "Greater", "LessOrEqual"]},
    "Equal integers": ("Equal", [INTEGERS, whole(7)], (1,), {}),
    "Equal bools": ("Equal", [YES, np.array([True])], (1,), {}),
    "IsNaN": ("IsNaN", [np.where(X > 0, np.nan, X)], (), {}),
    **{
        f"IsInf {p}{n}": (
            "IsInf",
            [whole(-np.inf, 1, np.inf, dtype="f")],
            (),
            {"detect_positive": p, "detect_negative": n},
        )
        for p in (0, 1)
        for n in (0, 1)
    },
    "Where": ("Where", [YES, X, Y[:, :1]], (), {}),
    "Where numbers": ("Where", [YES, X, np.array(-np.inf, np.float32)], (2,), {}),
    "Where number first": ("Where", [YES, HALF, X], (1,), {}),
    "Where integers": ("Where", [YES, INTEGERS, whole(3)], (2,), {}),
    "BitwiseAnd": ("BitwiseAnd", [INTEGERS, DIVISORS], (), {"opset": 18}),
    "BitwiseOr": ("BitwiseOr", [INTEGERS, DIVISORS], (), {"opset": 18}),
    "BitwiseXor": ("BitwiseXor", [INTEGERS, DIVISORS], (), {"opset": 18}),
    "BitwiseNot": ("BitwiseNot", [INTEGERS], (), {"opset": 18}),
    "BitShift left": ("BitShift", [whole(1, 200, dtype="u1"), whole(3, 1, dtype="u1")], (), {"direction": "LEFT"}),
    "BitShift right": ("BitShift", [whole(9, 200, dtype="u8"), whole(1, 3, dtype="u8")], (), {"direction": "RIGHT"}),
    "Cast to integers": ("Cast", [X], (), {"to": 7}),
    "Cast to double": ("Cast", [X], (), {"to": 11}),
    "Cast to bool": ("Cast", [np.array([0.5, 0, -1, np.nan], np.float32)], (), {"to": 9}),
    "Cast from bool": ("Cast", [YES], (), {"to": 1}),
    "Cast to float16": ("Cast", [np.array([0.1, 7e4, -1], np.float32)], (), {"to": 10}),
    "Cast to uint32": ("Cast", [np.array([0.5, 7.9, 300], np.float32)], (), {"to": 12}),
    "CastLike": ("CastLike", [X, INTEGERS], (), {}),
}

# not in onnxruntime (ONNX's node tests have the numbers), or with a mask that says nothing there
ONLY_DERIVATIVES: dict[str, tuple[str, list[Any], tuple[int, ...], dict[str, Any]]] = {
    "Dropout 10 mask": ("Dropout", [X], (), {"ratio": 0.3, "opset": 10, "count": 2}),
    "Swish": ("Swish", [X], (), {"opset": 24}),
    "Swish alpha": ("Swish", [X], (), {"opset": 24, "alpha": 0.6}),
    "SwiGLU": ("SwiGLU", [X, Y], (), {"opset": 28}),
    "SwiGLU alpha": ("SwiGLU", [X, Y], (), {"opset": 28, "alpha": 0.6}),
}
WITHOUT = {"Cast", "CastLike", "IsNaN", "IsInf", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"}
HAVE_DERIVATIVES = {
    **{
        name: case
        for name, case in CASES.items()
        if any(x is not None and x.dtype == np.float32 and k not in case[2] for k, x in enumerate(case[1]))
        and case[0] not in WITHOUT
        and name not in {"Pow integer to float", "Where numbers"}  # integers; infinite
    },
    **ONLY_DERIVATIVES,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_computes_what_onnxruntime_does(case: tuple[str, list[Any], tuple[int, ...], dict[str, Any]]) -> None:
    op, inputs, stored, attributes = case
    agree(*one_node(op, inputs, stored=stored, **attributes))


@pytest.mark.parametrize("case", HAVE_DERIVATIVES.values(), ids=HAVE_DERIVATIVES)
def test_its_derivatives_are_the_numerical_ones(case: tuple[str, list[Any], tuple[int, ...], dict[str, Any]]) -> None:
    op, inputs, stored, attributes = case
    differentiable(op, inputs, stored=stored, **attributes)


@pytest.mark.parametrize("op", ["Mul", "Add", "Max", "Div", "Clip"])
def test_a_stored_number_is_a_number_in_the_code(op: str) -> None:
    model, _ = one_node(op, [X, HALF], stored=(1,))
    module = mirror(model)
    assert not list(module.buffers()) and not list(module.parameters())
    numbers = [n.value for n in ast.walk(ast.parse(module.code)) if isinstance(n, ast.Constant)]
    assert 0.5 in numbers


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8"])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Mod", "Max", "Min"])
def test_unsigned_integers_wrap_at_their_own_width(op: str, dtype: str) -> None:
    x, y = whole(3, 250, 7, dtype=dtype), whole(5, 250, 2, dtype=dtype)
    functions = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.floor_divide, "Mod": np.mod}
    wanted = {**functions, "Max": np.maximum, "Min": np.minimum}[op](x, y)
    (found,) = run_mirror(*one_node(op, [x, y]))
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("opset", [7, 13])
def test_dropout_drops_in_training_only_and_keeps_the_mean(opset: int) -> None:
    stored, attributes = ([np.array(0.4, np.float32)], {}) if opset == 13 else ([], {"ratio": 0.4})
    ones = np.ones((100, 100), np.float32)
    model, _ = one_node("Dropout", [ones, *stored], stored=(1,) * len(stored), opset=opset, **attributes)
    module = mirror(model)
    assert torch.equal(module(torch.from_numpy(ones)), torch.from_numpy(ones))
    torch.manual_seed(0)
    dropped = module.train()(torch.from_numpy(ones))
    assert 0.35 < (dropped == 0).float().mean() < 0.45
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / 0.6]))


def test_the_mask_of_dropout_says_what_was_kept() -> None:
    ones = np.ones((50, 50), np.float32)
    model, _ = one_node("Dropout", [ones, HALF, np.array(True)], stored=(1, 2), opset=13, count=2)
    module = mirror(model)
    y, mask = module(torch.from_numpy(ones))
    assert mask.dtype == torch.bool and torch.equal(y != 0, mask) and 0.4 < mask.float().mean() < 0.6


def test_bounds_and_exponents_are_no_weights() -> None:
    for op in ("Clip", "Pow", "Less"):
        model, _ = one_node(op, [X, f(4)] if op != "Clip" else [X, HALF], stored=(1,))
        assert not list(mirror(model).parameters()), op
    model, _ = one_node("PRelu", [X, f(3, 1)], stored=(1,))
    assert [n for n, _ in mirror(model).named_parameters()] == ["x1"]
