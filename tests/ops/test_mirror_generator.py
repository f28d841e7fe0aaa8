"""Tensors made out of sizes, indices and chance, signal processing and losses, in the mirror."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import helper, numpy_helper

from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, differentiable, one_node, run_mirror

RNG = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: Any) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: float, dtype: Any = np.int64) -> np.ndarray:
    return np.array(value, dtype)


X, SIGNAL = f(2, 3, 4), f(2, 16, 1)
COMPLEX, WINDOW = f(2, 9, 3, 2), np.hanning(8).astype(np.float32)
SEVEN = numpy_helper.from_array(np.array([7], np.int32))
SCORES, LABELS, WEIGHTS = f(4, 5), i64(0, 4, 2, 2), np.linspace(0.5, 2, 5).astype(np.float32)
MAPS, MAP_LABELS = f(2, 3, 4), RNG.integers(0, 3, (2, 4))
LOSS = {"opset": 13}

# name: (operator, inputs, stored inputs, attributes)
CASES: dict[str, tuple[str, list[Any], tuple[int, ...], dict[str, Any]]] = {
    "Shape": ("Shape", [X], (), {}),
    "Shape 15": ("Shape", [X], (), {"start": 1, "end": -1, "opset": 15}),
    "Size": ("Size", [X], (), {}),
    "ConstantOfShape": ("ConstantOfShape", [i64(2, 3)], (), {}),
    "ConstantOfShape of integers": ("ConstantOfShape", [i64(2, 3)], (), {"value": SEVEN}),
    "ConstantOfShape of rank 0": ("ConstantOfShape", [i64()], (), {"value": SEVEN}),
    "Range": ("Range", [scalar(0), scalar(5), scalar(1)], (0, 2), {}),
    "Range of steps": ("Range", [scalar(3), scalar(10), scalar(3)], (), {}),
    "Range backwards": ("Range", [scalar(10, np.int32), scalar(3, np.int32), scalar(-2, np.int32)], (), {}),
    "Range of nothing": ("Range", [scalar(3), scalar(1), scalar(1)], (), {}),
    "Range of floats": ("Range", [scalar(1, "f"), scalar(2, "f"), scalar(0.3, "f")], (), {}),
    "NonZero": ("NonZero", [np.round(X)], (), {}),
    "NonZero of bools": ("NonZero", [X > 0], (), {}),
    "OneHot": ("OneHot", [i64(0, 3, -1, 9), scalar(4), f(2)], (1, 2), {}),
    "OneHot axis": ("OneHot", [np.array([[0, 2], [-3, 1]]), i64(3), i64(5, 2)], (), {"axis": 1}),
    "OneHot of floats": ("OneHot", [np.array([0, 2], np.float32), scalar(3, "f"), f(2)], (), {"axis": 0}),
    "EyeLike": ("EyeLike", [f(3, 4)], (), {"k": 1}),
    "EyeLike of integers": ("EyeLike", [f(4, 3)], (), {"k": -1, "dtype": 7}),
    "Unique": ("Unique", [np.array([2, 1, 1, 3, 4, 3], np.float32)], (), {"count": 4}),
    "Unique in order": ("Unique", [np.array([2, 1, 1, 3, 4, 3])], (), {"sorted": 0, "count": 4}),
    "Unique rows": ("Unique", [np.array([[1, 0], [1, 0], [0, 3]], "f")], (), {"axis": 0, "count": 4}),
    "Unique columns": ("Unique", [np.array([[1, 0, 1], [2, 0, 2]], "f")], (), {"axis": -1, "sorted": 0, "count": 4}),
    "DFT": ("DFT", [COMPLEX], (), {}),
    "DFT of reals": ("DFT", [f(2, 9, 1)], (), {"onesided": 1}),
    "DFT cut": ("DFT", [COMPLEX, scalar(6)], (1,), {"axis": -2}),
    "DFT padded": ("DFT", [COMPLEX, scalar(16)], (), {"axis": 1, "inverse": 1}),
    "DFT 20": ("DFT", [COMPLEX, None, scalar(1)], (2,), {"opset": 20}),
    "DFT 20 by default": ("DFT", [COMPLEX], (), {"opset": 20}),
    "STFT": ("STFT", [SIGNAL, scalar(3), WINDOW, scalar(8)], (1, 2, 3), {}),
    "STFT two-sided": ("STFT", [SIGNAL, scalar(4), WINDOW], (1,), {"onesided": 0}),
    "STFT without a window": ("STFT", [SIGNAL, scalar(4), None, scalar(8)], (1, 3), {}),
    **{
        f"{op} {periodic}": (op, [scalar(10)], (), {"periodic": periodic, "output_datatype": 1})
        for op in ("HannWindow", "HammingWindow", "BlackmanWindow")
        for periodic in (0, 1)
    },
    "MelWeightMatrix": (
        "MelWeightMatrix",
        [scalar(8), scalar(64), scalar(8000), scalar(20, "f"), scalar(4000, "f")],
        (),
        {},
    ),
    **{
        f"NegativeLogLikelihoodLoss {r}": ("NegativeLogLikelihoodLoss", [SCORES, LABELS], (), {"reduction": r, **LOSS})
        for r in ("none", "sum", "mean")
    },
    "NegativeLogLikelihoodLoss weights": ("NegativeLogLikelihoodLoss", [SCORES, LABELS, WEIGHTS], (2,), LOSS),
    "NegativeLogLikelihoodLoss maps": (
        "NegativeLogLikelihoodLoss",
        [MAPS, MAP_LABELS],
        (),
        {"ignore_index": 1, **LOSS},
    ),
    **{
        f"SoftmaxCrossEntropyLoss {r}": ("SoftmaxCrossEntropyLoss", [SCORES, LABELS], (), {"reduction": r, **LOSS})
        for r in ("none", "sum", "mean")
    },
    "SoftmaxCrossEntropyLoss int32": ("SoftmaxCrossEntropyLoss", [SCORES, LABELS.astype(np.int32)], (), LOSS),
    "SoftmaxCrossEntropyLoss weights": (
        "SoftmaxCrossEntropyLoss",
        [MAPS, MAP_LABELS, WEIGHTS[:3]],
        (2,),
        {"ignore_index": 2, "count": 2, **LOSS},
    ),
}
HAVE_DERIVATIVES = {
    name: case
    for name, case in CASES.items()
    if case[0] in {"DFT", "STFT", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss", "OneHot", "Unique"}
    and any(x is not None and x.dtype == np.float32 for x in case[1])
    and name not in {"Unique rows", "Unique columns", "Unique", "OneHot of floats", "OneHot"}  # equal values, integers
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_computes_what_onnxruntime_does(case: tuple[str, list[Any], tuple[int, ...], dict[str, Any]]) -> None:
    op, inputs, stored, attributes = case
    agree(*one_node(op, inputs, stored=stored, **attributes))


@pytest.mark.parametrize("case", HAVE_DERIVATIVES.values(), ids=HAVE_DERIVATIVES)
def test_its_derivatives_are_the_numerical_ones(case: tuple[str, list[Any], tuple[int, ...], dict[str, Any]]) -> None:
    op, inputs, stored, attributes = case
    differentiable(op, inputs, stored=stored, **attributes)


def test_the_derivatives_of_an_inverse_transform_to_reals() -> None:
    differentiable("DFT", [f(2, 5, 2)], opset=20, inverse=1, onesided=1)
    differentiable("Unique", [np.array([3, 1, 2], np.float32)], opset=11)
    differentiable("OneHot", [i64(0, 2), scalar(3), f(2)], opset=11)


def test_sizes_that_depend_on_the_data() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N] x) => (int64[K] places, float[M] zeros, int64 size)'
        "<int64 zero = {0}, int64 one = {1}, int64[1] first = {1}> {"
        " where = NonZero(x)  shape = Shape(where)  size = Size(where)  count = Gather(shape, one)"
        " places = Range(zero, count, one)  zeros = ConstantOfShape(shape) }"
    )
    model.graph.output[1].type.tensor_type.shape.dim.add()
    agree(model, {"x": np.array([1, 0, 2, 3, 0], np.float32)})


def test_a_tensor_of_one_number_follows_the_size_of_the_input() -> None:
    """It is known, and the same for all sizes but for its shape."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N, 3] x) => (float[M, 3] y)'
        "<int64[2] wanted = {-1, 3}, int64[1] minus = {-1}> {"
        " shape = Shape(x)  given = Equal(wanted, minus)  sizes = Where(given, shape, wanted)"
        " zeros = ConstantOfShape(sizes)  y = Sub(zeros, x) }"
    )
    for n in (2, 11):
        agree(model, {"x": f(n, 3)})
    assert "to_ints" not in mirror(model).code  # sizes stay sizes: nothing waits for a tensor


def test_windows_with_a_stored_size_are_computed_once() -> None:
    module = mirror(one_node("HannWindow", [scalar(400)], output_datatype=1)[0])
    assert "window" in module.code
    nodes = [
        helper.make_node("Constant", [], ["size"], value=numpy_helper.from_array(scalar(6))),
        helper.make_node("HannWindow", ["size"], ["window"]),
        helper.make_node("Mul", ["x", "window"], ["y"]),
    ]
    x = [helper.make_tensor_value_info("x", 1, ["N", 6])]
    graph = helper.make_graph(nodes, "g", x, [onnx.ValueInfoProto(name="y")])
    module = mirror(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert "cos" not in module.code and len(list(module.buffers())) == 1 and not list(module.parameters())
    torch.testing.assert_close(module(torch.ones(1, 6))[0], torch.hann_window(6))


@pytest.mark.parametrize("shape", [(200, 300)])
def test_random_numbers_have_their_distribution(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    like = np.zeros(shape, np.float32)
    for op, inputs, more in (("RandomNormal", [], {"shape": shape}), ("RandomNormalLike", [like], {})):
        (x,) = run_mirror(*one_node(op, inputs, mean=2.0, scale=3.0, **more))
        assert x.shape == shape and x.dtype == np.float32
        assert abs(x.mean() - 2) < 0.1 and abs(x.std() - 3) < 0.1
    for op, inputs, more in (("RandomUniform", [], {"shape": shape}), ("RandomUniformLike", [like], {"dtype": 11})):
        (x,) = run_mirror(*one_node(op, inputs, low=-1.0, high=3.0, **more))
        assert x.shape == shape and x.dtype == (np.float64 if "dtype" in more else np.float32)
        assert x.min() >= -1 and x.max() <= 3 and abs(x.mean() - 1) < 0.1
    (x,) = run_mirror(*one_node("Bernoulli", [np.full(shape, 0.3, np.float32)], dtype=9))
    assert x.dtype == np.bool_ and abs(x.mean() - 0.3) < 0.02
    (x,) = run_mirror(*one_node("Multinomial", [np.log([[1, 3, 0.001]]).astype("f")], sample_size=4000, dtype=7))
    assert x.shape == (1, 4000) and x.dtype == np.int64 and abs((x == 1).mean() - 0.75) < 0.05
