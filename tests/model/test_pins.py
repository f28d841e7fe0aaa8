"""Sizes for symbolic dimensions: found without being told, and consistent with each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.model.load import load
from onnxprune.model.pins import evaluate_dim, pin_candidates, symbolic_inputs
from tests.graphs import from_text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("past + sequence", 15),
        ("past+1", 9),
        ("2*sequence", 14),
        ("sequence - 1", 6),
        ("past // 2", 4),
        ("floor(past/2)", 4),
        ("(past + sequence) * 2", 30),
        ("7", 7),
        ("past", 8),
    ],
)
def test_an_expression_follows_its_names(expression: str, value: int) -> None:
    assert evaluate_dim(expression, {"past": 8, "sequence": 7}) == value


@pytest.mark.parametrize(
    "expression",
    [
        "unknown + 1",
        "past /",
        "past / 0",
        "",
        "__import__('os')",
        "past ** 99",
        "'a'",
        "past.bit_length()",
        "lambda: 0",
        "Max(1, past)",
    ],
)
def test_what_is_no_arithmetic_has_no_value_and_no_effect(expression: str) -> None:
    assert evaluate_dim(expression, {"past": 8}) is None


@given(st.text(max_size=40))
def test_any_text_is_safe(text: str) -> None:
    value = evaluate_dim(text, {"a": 3, "b": 4})
    assert value is None or isinstance(value, int)


def test_every_candidate_names_every_symbol_and_expressions_agree() -> None:
    graph = load(
        from_text(
            """(float[batch,past,8] cache, float[batch,"past + n",8] x) => (float[batch,m,8] y) {
        y = Concat<axis=1>(cache, x)
    }""".replace('"past + n"', "total")
        )
    )
    model = graph.model.proto
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "past + n"
    model.graph.input[0].type.tensor_type.shape.dim[2].ClearField("dim_value")
    for pins in pin_candidates(graph):
        assert {"batch", "past", "past + n", "cache.2"} <= set(pins)
        assert all(isinstance(n, int) and n > 0 for n in pins.values())
    assert symbolic_inputs(graph)["cache"] == ["batch", "past", "cache.2"]


@pytest.mark.parametrize("size", [224, 64, 32])
def test_the_image_size_that_a_reshape_demands_is_found(size: int) -> None:
    """A classifier that was exported with symbolic height and width but flattens to a fixed number."""
    cells = (size // 32) ** 2
    model = from_text(
        """(float[N,3,H,W] x) => (float[N,4] y) {
        p = AveragePool<kernel_shape=[32,32], strides=[32,32]>(x)
        f = Flatten(p)
        y = Gemm(f, w)
    }""",
        w=(3 * cells, 4),
    )
    graph = load(model)
    assert not graph.problems and (graph.pins["H"], graph.pins["W"]) == (size, size)


def test_given_sizes_win() -> None:
    model = from_text("(float[N,T,5] x) => (float[N,T,4] y) { y = MatMul(x, w) }", w=(5, 4))
    assert load(model, pins={"T": 77}).shapes["y"][1] == 77
