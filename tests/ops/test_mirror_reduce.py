"""Reductions in the mirror: axes as attributes and as inputs, of all, some and none, known and computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node, run_mirror

RNG = np.random.default_rng(0)
X = (RNG.permutation(np.linspace(0.3, 3, 24)).reshape(2, 3, 4)).astype(np.float32)
SIGNED = X * RNG.choice([-1, 1], X.shape).astype(np.float32)
INTEGERS = RNG.integers(-9, 9, (2, 3, 4))

REDUCTIONS = [
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceLogSum",
    "ReduceLogSumExp",
]


def axes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def data(op: str) -> np.ndarray:
    return X if op == "ReduceLogSum" else SIGNED


FORMS: dict[str, tuple[list[Any], tuple[int, ...], dict[str, Any]]] = {
    "attribute": ([], (), {"axes": [-1, 0], "opset": 11}),
    "attribute 7": ([], (), {"axes": [1], "keepdims": 0, "opset": 7}),
    "all": ([], (), {"opset": 18}),
    "all 7": ([], (), {"keepdims": 0, "opset": 7}),
    "input": ([axes(0, -1)], (1,), {"opset": 18}),
    "input without keepdims": ([axes(-2)], (1,), {"keepdims": 0, "opset": 18}),
    "computed": ([axes(1, 0)], (), {"keepdims": 0, "opset": 18}),
    "none by an empty input": ([axes()], (1,), {"noop_with_empty_axes": 1, "opset": 18}),
    "all by an empty input": ([axes()], (1,), {"opset": 18}),
    "all by a computed empty input": ([axes()], (), {"opset": 18}),
    "none by a computed empty input": ([axes()], (), {"noop_with_empty_axes": 1, "opset": 18}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions_are_those_of_onnxruntime(op: str, form: str) -> None:
    inputs, stored, attributes = FORMS[form]
    agree(*one_node(op, [data(op), *inputs], stored=stored, **attributes))


@pytest.mark.parametrize("form", ["attribute", "all", "input without keepdims", "computed"])
@pytest.mark.parametrize("op", REDUCTIONS)
def test_derivatives_are_the_numerical_ones(op: str, form: str) -> None:
    inputs, stored, attributes = FORMS[form]
    differentiable(op, [data(op), *inputs], stored=stored, **attributes)


def test_the_derivative_of_a_product_with_zeros_is_right() -> None:
    differentiable("ReduceProd", [np.array([[0, 2, 3], [0, 0, 5], [1, 2, 3]], np.float32)], axes=[1], opset=13)


def test_the_derivative_of_a_norm_at_zero_is_zero() -> None:
    for op in ("ReduceL1", "ReduceL2"):
        model, _ = one_node(op, [X], axes=[1], opset=13)
        x = torch.zeros(2, 3, 4, requires_grad=True)
        mirror(model)(x).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x)), op


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceSumSquare"])
def test_integers_stay_integers(op: str) -> None:
    for dtype in (np.int32, np.int64):
        agree(*one_node(op, [INTEGERS.astype(dtype), axes(1)], stored=(1,), opset=18))


def test_the_mean_of_integers_is_cut_off() -> None:
    agree(*one_node("ReduceMean", [np.abs(INTEGERS).astype(np.int32), axes(1)], stored=(1,), opset=18))


@pytest.mark.parametrize(("op", "function"), [("ReduceMax", np.max), ("ReduceMin", np.min)])
def test_extremes_of_unsigned_integers_and_bools(op: str, function: Any) -> None:
    for dtype in (np.uint8, np.uint32, np.bool_):
        x = INTEGERS.astype(dtype)
        (found,) = run_mirror(*one_node(op, [x, axes(1)], stored=(1,), keepdims=0, opset=20))
        np.testing.assert_array_equal(found, function(x, 1), strict=True)


def test_extremes_and_sums_of_nothing() -> None:
    nothing = np.zeros((2, 0, 3), np.float32)
    for op, wanted in {"ReduceMax": -np.inf, "ReduceMin": np.inf, "ReduceSum": 0, "ReduceProd": 1}.items():
        (found,) = run_mirror(*one_node(op, [nothing, axes(1)], stored=(1,), keepdims=0, opset=20))
        np.testing.assert_array_equal(found, np.full((2, 3), wanted, np.float32), strict=True)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_indices_of_extremes_are_the_first_or_the_last_of_equals(op: str, axis: int, keepdims: int) -> None:
    repeated = RNG.integers(0, 3, (4, 3, 5)).astype(np.float32)
    agree(*one_node(op, [repeated], axis=axis, keepdims=keepdims, opset=11))
    agree(*one_node(op, [repeated], axis=axis, keepdims=keepdims, select_last_index=1, opset=13))
    agree(*one_node(op, [repeated], keepdims=keepdims, opset=7))


def test_of_an_unknown_rank() -> None:
    """As inside a body whose inputs declare no shape."""
    for op in REDUCTIONS:
        model, fed = one_node(op, [data(op)], keepdims=0, opset=13)
        model.graph.input[0].type.tensor_type.ClearField("shape")
        agree(model, fed)


def test_determinants() -> None:
    square = np.random.default_rng(1).standard_normal((2, 3, 3)).astype(np.float32)
    agree(*one_node("Det", [square], opset=11))
    differentiable("Det", [square], opset=11)
