"""Weights that reach their layer through nodes without data: when they are solved for, and why not where they are not."""

from __future__ import annotations

import numpy as np
import pytest
from consumer_cases import Case, model_of, planned, stored
from onnx import TensorProto, helper, numpy_helper

from onnxprune.reconstruct import repair
from onnxprune.rewrite.rewrite import rewrite

node = helper.make_node
rng = np.random.default_rng(3)


def left(nodes, weights):
    """The consumers' reasons for being left."""
    analysis, plan = planned(model_of(Case(nodes, weights, (5,))))
    repaired = repair(analysis, plan, [{"x": rng.standard_normal((30, 5))}], behind=False)
    before, after = stored(rewrite(analysis, plan)), stored(repaired.model)
    assert all(np.array_equal(before[n], after[n]) for n in before)
    return [x.reason for x in repaired.left]


TURN = node("Transpose", ["w"], ["w.t"], "turn", perm=[1, 0])
PRODUCT = node("MatMul", ["h", "w.t"], ["y"], "consumer")


@pytest.mark.parametrize("op", ["Exp", "Relu"])
def test_what_is_more_than_a_move_is_named(op):
    nodes = [node(op, ["w"], ["w.e"], "bend"), node("Transpose", ["w.e"], ["w.t"], "turn", perm=[1, 0]), PRODUCT]
    (found,) = left(nodes, {"w": rng.standard_normal((4, 6))})
    assert found == f"its weight is computed from what is stored by {op} 'bend'"


def test_a_weight_that_is_repeated_is_not_stored_number_by_number():
    nodes = [node("Expand", ["w", "shape"], ["w.t"], "expand"), PRODUCT]
    (found,) = left(nodes, {"w": rng.standard_normal((6, 1)), "shape": np.array([6, 4])})
    assert found == "its weight is computed from what is stored by Expand 'expand'"


def test_a_weight_in_integers_is_solved_for_and_rounded():
    weights = {"w": np.int8(rng.integers(-9, 9, (6, 4))), "scale": np.array(0.5, np.float32)}
    nodes = [
        node("DequantizeLinear", ["w", "scale"], ["w.f"], "scaled"),
        node("Cast", ["w.f"], ["w.t"], "cast", to=TensorProto.DOUBLE),
        PRODUCT,
    ]
    model = model_of(Case(nodes, weights, (5,)))
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(weights["scale"], "scale"))
    analysis, plan = planned(model)
    how = {"data": [{"x": rng.standard_normal((300, 5))}], "mode": "ls", "ridges": [1e-9]}
    repaired = repair(analysis, plan, **how)
    before, after = stored(rewrite(analysis, plan))["w"], stored(repaired.model)["w"]
    assert after.dtype == np.int8 and not np.array_equal(before, after) and not repaired.left
    # as solved for where the weight is stored in numbers
    model = model_of(Case(nodes[1:], {"w.f": 0.5 * weights["w"]}, (5,)))
    exact = stored(repair(*planned(model), **how).model)["w.f"]
    np.testing.assert_allclose(0.5 * after, exact, atol=0.25 + 1e-4)


def test_a_moved_weight_that_something_else_reads_is_left():
    other = [node("MatMul", ["n", "w.t"], ["two"], "two"), node("Sub", ["one", "two"], ["y"], "sub")]
    first = [TURN, node("Neg", ["h"], ["n"], "neg"), node("MatMul", ["h", "w.t"], ["one"], "one")]
    assert left([*first, *other], {"w": rng.standard_normal((4, 6))}) == ["several nodes share its weight"] * 2


def test_a_weight_that_is_an_output_is_left():
    """It lost nothing, and lies behind what did: the model's output stays what it was."""
    nodes = [node("MatMul", ["h", "w"], ["m"], "consumer"), node("MatMul", ["m", "v"], ["y"], "behind")]
    weights = {"w": rng.standard_normal((6, 4)), "v": rng.standard_normal((4, 3))}
    model = model_of(Case(nodes, weights, (5,)))
    model.graph.output.append(helper.make_tensor_value_info("v", TensorProto.DOUBLE, [4, 3]))
    analysis, plan = planned(model)
    repaired = repair(analysis, plan, [{"x": rng.standard_normal((30, 5))}])
    assert [c.label for c in repaired.consumers] == ["consumer"]
    np.testing.assert_array_equal(stored(repaired.model)["v"], weights["v"])
