"""Kinds of outputs, read from small graphs in the forms that exporters write."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxprune.model.load import load
from onnxprune.model.outputs import OutputKind, output_kinds
from tests.graphs import from_text


def kinds(text: str, **options: object) -> tuple[OutputKind, ...]:
    return output_kinds(load(from_text(text, **options)))  # type: ignore[arg-type]


def kind(text: str, **options: object) -> OutputKind:
    found = kinds(text, **options)
    assert len(found) == 1
    return found[0]


def test_a_matrix_product_of_rank_two_gives_logits(tiny_cnn_model: onnx.ModelProto) -> None:
    assert output_kinds(load(tiny_cnn_model)) == (OutputKind("logits", "logits", (1,)),)


@pytest.mark.parametrize(
    "body",
    [
        "{ y = MatMul(x, w) }",
        "{ a = MatMul(x, w) y = Add(a, b) }",
        "{ a = MatMul(x, w) c = Add(b, a) y = Identity(c) }",
        "{ a = Gemm(x, w, b) y = Cast<to=1>(a) }",
        "{ a = Gemm(x, w, b) c = Unsqueeze(a, two) y = Flatten(c) }",
        "{ a = Gemm(x, w, b) c = QuantizeLinear(a, s) y = DequantizeLinear(c, s) }",
    ],
)
def test_logits_are_found_behind_what_only_rearranges(body: str) -> None:
    found = kind(
        f"(float[N,8] x) => (float[N,3] y) {body}",
        w=(8, 3),
        b=(3,),
        two=np.array([2]),
        s=np.array(0.5, np.float32),
    )
    assert found == OutputKind("y", "logits", (1,))


@pytest.mark.parametrize(
    "text, axes",
    [
        ("(float[N,8] x) => (float[N,1] y) { y = MatMul(x, one) }", (1,)),  # one number is no choice of classes
        ("(float[N,8] x) => (float[N,3] y) { a = MatMul(x, w) y = Relu(a) }", (1,)),
        ("(float[N,5,8] x) => (float[N,5,3] y) { y = MatMul(x, w) }", (2,)),
        ("(float[N,8] x, float[N,3] r) => (float[N,3] y) { a = MatMul(x, w) y = Add(a, r) }", (1,)),
        ("(float[N,3] x) => (float[N,3] y) { y = Relu(x) }", ()),
    ],
)
def test_other_numbers_are_values(text: str, axes: tuple[int, ...]) -> None:
    weights = {"w": (8, 3)} if "w)" in text else {"one": (8, 1)} if "one" in text else {}
    assert kind(text, **weights) == OutputKind("y", "values", axes)


def test_a_softmax_gives_probabilities_over_its_axis() -> None:
    last = kind("(float[N,8] x) => (float[N,3] y) { a = MatMul(x, w) y = Softmax(a) }", w=(8, 3))
    assert last == OutputKind("y", "probabilities", (1,))
    image = kind("(float[N,4,6,6] x) => (float[N,4,6,6] y) { y = LogSoftmax<axis=1>(x) }")
    assert image == OutputKind("y", "probabilities", (1,), log=True)


def test_before_opset_13_a_softmax_runs_over_all_axes_from_its_own_on() -> None:
    assert kind("(float[N,4,6,6] x) => (float[N,4,6,6] y) { y = Softmax(x) }", opset=11).axes == (1, 2, 3)
    assert kind("(float[N,4,1,1] x) => (float[N,4,1,1] y) { y = Softmax(x) }", opset=11).axes == (1,)
    flat = kind("(float[N,4,6,6] x) => (float[N,144] y) { a = Softmax(x) y = Flatten(a) }", opset=11)
    assert flat == OutputKind("y", "probabilities", (1,))


@pytest.mark.parametrize(
    "body, shape, axes",
    [
        ("a = Softmax<axis=1>(x) y = Transpose<perm=[0,2,3,1]>(a)", "N,6,5,4", (3,)),
        ("a = Softmax<axis=1>(x) y = Reshape(a, joined)", "N,4,30", (1,)),
        ("a = Softmax<axis=3>(x) y = Reshape(a, rows)", "M,5", (1,)),
    ],
)
def test_the_axis_follows_what_rearranges_it(body: str, shape: str, axes: tuple[int, ...]) -> None:
    targets = {"joined": np.array([0, 4, -1]), "rows": np.array([-1, 5])}
    used = {n: v for n, v in targets.items() if n in body}
    found = kind(f"(float[N,4,6,5] x) => (float[{shape}] y) {{ {body} }}", **used)
    assert found == OutputKind("y", "probabilities", axes)


def test_a_softmax_that_is_cut_up_afterwards_is_just_values() -> None:
    found = kind(
        "(float[N,4,6] x) => (float[N,2,12] y) { a = Softmax<axis=1>(x) y = Reshape(a, to) }", to=np.array([0, 2, 12])
    )
    assert found.kind == "values"


def test_a_softmax_in_single_steps_is_found() -> None:
    text = """(float[N,5] x) => (float[N,5] y) {
        top = ReduceMax<axes=[1]>(x) low = Sub(x, top) e = Exp(low) s = ReduceSum<keepdims=0>(e, one)
        column = Reshape(s, to) wide = Expand(column, shape) y = Div(e, wide) }"""
    options = {"one": np.array([1]), "to": np.array([-1, 1]), "shape": np.array([1, 5])}
    assert kind(text, **options) == OutputKind("y", "probabilities", (1,))
    other = text.replace("Div(e,", "Div(low,")  # a quotient of something else
    assert kind(other, **options).kind == "values"


def test_sigmoids_and_discrete_outputs_are_told_apart() -> None:
    found = kinds(
        """(float[N,8] x) => (float[N,3] p, int64[N,1] k, bool[N,3] b) {
        a = MatMul(x, w) p = Sigmoid(a) k = ArgMax<axis=1>(a) b = Greater(a, zero) }""",
        w=(8, 3),
        zero=np.zeros((), np.float32),
    )
    assert [(o.name, o.kind, o.learnable) for o in found] == [
        ("p", "sigmoid", True),
        ("k", "discrete", False),
        ("b", "discrete", False),
    ]


def test_sequences_are_discrete() -> None:
    found = kind("(float[N,4] x) => (seq(float[N,2]) y) { y = SplitToSequence<axis=1>(x, two) }", two=np.array(2))
    assert found.kind == "discrete"


def test_channels_are_followed_to_values() -> None:
    """A detector's head: a convolution with 2 anchors of 3 values, laid out in rows and joined."""
    text = """(float[1,4,5,5] x) => (float[1,100,3] y) {
        c = Conv(x, w) t = Transpose<perm=[0,2,3,1]>(c) r = Reshape(t, rows) y = Concat<axis=1>(r, r) }"""
    assert kind(text, w=(6, 4, 1, 1), rows=np.array([1, 50, 3])) == OutputKind("y", "values", (2,))
    upscaled = '(float[1,4,5,5] x) => (float[1,6,10,10] y) { c = Conv(x, w) y = Resize<mode="nearest">(c, , scales) }'
    assert kind(upscaled, w=(6, 4, 1, 1), scales=np.array([1, 1, 2, 2], np.float32)).axes == (1,)


def test_class_indices_lack_the_class_axis() -> None:
    free = OutputKind("y", "values")
    assert free.class_axis((8, 10), (8,)) == 1
    assert free.class_axis((8, 10), (8, 1)) == 1
    assert free.class_axis((2, 21, 6, 5), (2, 6, 5)) == 1
    assert free.class_axis((2, 6, 5, 21), (2, 6, 5)) == 3
    assert OutputKind("y", "values", (2,)).class_axis((2, 5, 5), (2, 5)) == 2  # known, so not taken for an image
    assert free.class_axis((8, 10), (10,)) is None  # classes are never counted along the samples
    assert free.class_axis((8, 10), (8, 10)) is None
