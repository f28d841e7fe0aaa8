"""Concat, Split, Slice, Pad, Gather, Scatter and their relatives in the mirror."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node

RNG = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: Any) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 and isinstance(values[0], list) else values, np.int64)


X = f(3, 4, 5)
IMAGE = f(2, 3, 5, 6)
BIG = np.iinfo(np.int64).max
ZERO = np.array(0.5, np.float32)

# name: (operator, inputs, stored inputs, attributes)
CASES: dict[str, tuple[str, list[Any], tuple[int, ...], dict[str, Any]]] = {
    "concat": ("Concat", [f(2, 3), f(2, 4), f(2, 1)], (1,), {"axis": -1}),
    "concat 7": ("Concat", [f(2, 3), f(4, 3)], (), {"axis": 0, "opset": 7}),
    "split even 7": ("Split", [f(2, 6)], (), {"axis": 1, "count": 3, "opset": 7}),
    "split sizes 11": ("Split", [f(2, 6)], (), {"axis": -1, "count": 2, "split": [1, 5], "opset": 11}),
    "split sizes 13": ("Split", [f(2, 6), i64(2, 4)], (1,), {"axis": 1, "count": 2, "opset": 13}),
    "split computed sizes": ("Split", [f(2, 6), i64(2, 4)], (), {"axis": 1, "count": 2, "opset": 13}),
    "split even 13": ("Split", [f(6, 2)], (), {"count": 2, "opset": 13}),
    "split uneven 18": ("Split", [f(2, 7)], (), {"axis": 1, "count": 3, "num_outputs": 3, "opset": 18}),
    "slice 9": ("Slice", [X], (), {"starts": [1, 0], "ends": [3, 2**31 - 1], "axes": [1, -1], "opset": 9}),
    "slice 9 without axes": ("Slice", [X], (), {"starts": [1, -3], "ends": [3, -1], "opset": 9}),
    "slice": ("Slice", [X, i64(1, -2), i64(BIG, BIG), i64(0, 2)], (1, 2, 3), {}),
    "slice with steps": ("Slice", [X, i64(0, 1), i64(BIG, 4), i64(1, 2), i64(3, 2)], (1, 2, 3, 4), {}),
    "slice backwards": ("Slice", [X, i64(-1), i64(-BIG), i64(1), i64(-1)], (1, 2, 3, 4), {}),
    "slice backwards in steps": ("Slice", [X, i64(BIG, 3), i64(-BIG, 0), i64(2, 1), i64(-2, -2)], (1, 2, 3, 4), {}),
    "slice to nothing": ("Slice", [X, i64(3), i64(1), i64(1)], (1, 2, 3), {}),
    "slice backwards to nothing": ("Slice", [X, i64(1), i64(3), i64(1), i64(-1)], (1, 2, 3, 4), {}),
    "slice by data": ("Slice", [X, i64(1, 4), i64(3, -6), i64(0, 2), i64(1, -1)], (), {}),
    "pad 2": ("Pad", [X], (), {"pads": [0, 1, 2, 0, 0, 1], "value": 0.5, "opset": 7}),
    "pad cuts": ("Pad", [X, i64(0, -1, 2, 0, -1, -1)], (1,), {"opset": 13}),
    "pad value": ("Pad", [X, i64(1, 0, 2, 0, 1, 1), ZERO], (1, 2), {"opset": 13}),
    "pad by data": ("Pad", [X, i64(1, 0, 2, 0, 1, 1), ZERO], (), {"opset": 13}),
    "pad axes": ("Pad", [X, i64(1, 2), ZERO, i64(-2)], (1, 2, 3), {"opset": 18}),
    "pad reflect": ("Pad", [IMAGE, i64(0, 0, 1, 2, 0, 0, 3, 4)], (1,), {"mode": "reflect", "opset": 13}),
    "pad reflect channels": ("Pad", [IMAGE, i64(0, 2, 0, 0, 0, 1, 0, 0)], (1,), {"mode": "reflect", "opset": 13}),
    "pad edge": ("Pad", [IMAGE, i64(0, 0, 1, 7, 0, 0, 3, 0)], (1,), {"mode": "edge", "opset": 11}),
    "pad edge 7": ("Pad", [IMAGE], (), {"pads": [1, 0, 0, 2, 0, 1, 3, 0], "mode": "edge", "opset": 7}),
    "pad wrap": ("Pad", [X, i64(1, 0, 2, 0, 1, 4)], (1,), {"mode": "wrap", "opset": 19}),
    "gather one": ("Gather", [X, np.array(-1)], (1,), {"axis": 1}),
    "gather a stretch": ("Gather", [X, i64(1, 2, 3)], (1,), {"axis": 2}),
    "gather the last ones": ("Gather", [X, i64(-2, -1)], (1,), {"axis": 2}),
    "gather": ("Gather", [X, i64([[0, -1], [2, 0]])], (), {"axis": 1}),
    "gather one by data": ("Gather", [X, np.array(-2)], (), {"axis": -1}),
    "gather rows": ("Gather", [f(7, 3), i64([[0, -1], [6, 3]])], (0,), {}),
    "gather constant rows": ("Gather", [f(7, 3), i64([[0, 1], [6, 3]])], (1,), {}),
    "gather rows by int32": ("Gather", [f(7, 3), np.array([5, 0], np.int32)], (), {"axis": -2}),
    "gather elements": ("GatherElements", [X, RNG.integers(-4, 4, (3, 2, 5))], (), {"axis": 1, "opset": 13}),
    "gather nd": ("GatherND", [X, i64([[0, 1], [-1, -2]])], (), {}),
    "gather nd in batches": ("GatherND", [X, RNG.integers(-4, 4, (3, 2, 1))], (), {"batch_dims": 1}),
    "scatter 9": ("Scatter", [f(4, 3), i64([[1, 0, 2]]), f(1, 3)], (), {"opset": 9}),
    "scatter elements": ("ScatterElements", [f(4, 3), i64([[-1], [0]]), f(2, 1)], (), {"axis": 1, "opset": 11}),
    **{
        f"scatter elements {r}": (
            "ScatterElements",
            [f(4, 3), i64([[1, 1], [0, 0]]), f(2, 2)],
            (),
            {"axis": 1, "reduction": r, "opset": 18},
        )
        for r in ("add", "mul", "max", "min")
    },
    "scatter nd": ("ScatterND", [f(4, 3), i64([[1], [-1]]), f(2, 3)], (1,), {"opset": 11}),
    **{
        f"scatter nd {r}": (
            "ScatterND",
            [f(4, 3, 2), i64([[1, 0], [1, 0], [-1, 2]]), f(3, 2)],
            (),
            {"reduction": r, "opset": 18},
        )
        for r in ("add", "mul", "max", "min")
    },
    "compress": ("Compress", [X, np.array([True, False, True])], (1,), {"axis": 1, "opset": 11}),
    "compress all": ("Compress", [X, np.array([True, False, True, True])], (), {"opset": 9}),
    "cumsum": ("CumSum", [X, np.array(1)], (1,), {}),
    "cumsum backwards": ("CumSum", [X, i64(-1)], (), {"exclusive": 1, "reverse": 1}),
    "top k 9": ("TopK", [X], (), {"k": 2, "count": 2, "opset": 9}),
    "top k": ("TopK", [X, i64(3)], (1,), {"axis": 1, "largest": 0, "count": 2}),
    "trilu": ("Trilu", [f(2, 4, 4), np.array(-1)], (1,), {"upper": 0}),
    "reverse sequence": ("ReverseSequence", [X, i64(1, 2, 3, 3)], (), {"opset": 10}),
    "reverse sequence, batch first": (
        "ReverseSequence",
        [X, i64(4, 2, 1)],
        (),
        {"batch_axis": 0, "time_axis": 1, "opset": 10},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mirror_computes_what_onnxruntime_does(name: str) -> None:
    op, inputs, stored, attributes = CASES[name]
    agree(*one_node(op, inputs, stored=stored, **attributes))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_the_numerical_ones(name: str) -> None:
    op, inputs, stored, attributes = CASES[name]
    differentiable(op, inputs, stored=[k for k in stored if inputs[k].dtype != np.float32], **attributes)


BY_SIZES = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N, T, 8] x) => (float[N, S, 8] y, float[N, S, 8] q, float[N, 8] last, float[M, P, 8] p)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] end = {9223372036854775807}>
{
    shape = Shape(x)
    t = Gather(shape, one)
    half = Div(t, two)
    y = Slice(x, half, end, one)
    rest = Sub(t, half)
    sizes = Concat <axis = 0> (half, rest)
    a, q = Split <axis = 1> (x, sizes)
    place = Sub(t, one)
    scalar = Squeeze(place)
    last = Gather <axis = 1> (x, scalar)
    pads = Concat <axis = 0> (zero, half, zero, zero, one, zero)
    p = Pad(x, pads)
}
"""


def test_bounds_follow_the_sizes_of_the_input() -> None:
    model = onnx.parser.parse_model(BY_SIZES)
    for n, t in ((2, 4), (3, 9), (1, 2)):
        agree(model, {"x": f(n, t, 8)})
    assert "to_tensor" not in mirror(model).code  # they stay integers


def test_of_equal_elements_the_first_ones_are_the_top() -> None:
    x = np.array([[1, 3, 3, 2, 3, 1]], np.float32)
    agree(*one_node("TopK", [x, i64(2)], stored=(1,), count=2))


def test_integers_are_moved_as_they_are() -> None:
    x = np.arange(24).reshape(2, 3, 4)
    agree(*one_node("Pad", [x, i64(0, 1, 1, 0, 0, 2), np.array(2**40)], stored=(1, 2), opset=13))
    agree(*one_node("CumSum", [x.astype(np.int32), i64(1)], stored=(1,)))
    agree(*one_node("Gather", [x, i64(0, 2)], axis=1))
