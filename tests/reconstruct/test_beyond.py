"""Aims of layers in front of an activation or a sum: what is asked of them, and that solving for it again pays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from consumer_cases import Case, Function, model_of, planned, stored
from onnx import helper, numpy_helper

from onnxprune.model.infer import infer
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS
from onnxprune.ops.rules import Flat
from onnxprune.reconstruct import repair
from onnxprune.reconstruct.beyond import beyond
from onnxprune.rewrite.rewrite import rewrite

node = helper.make_node
r = np.random.default_rng(5).standard_normal

BATCH_NORM = {"gamma": 1 + r(4) / 4, "beta": r(4), "mean": r(4), "var": 1 + r(4) ** 2}
NODES = {
    "Relu": [node("Relu", ["m"], ["y"], "bend")],
    "LeakyRelu": [node("LeakyRelu", ["m"], ["y"], "bend", alpha=0.1)],
    "Clip": [node("Clip", ["m", "low", "high"], ["y"], "bend")],
    "BatchNormalization": [
        node("BatchNormalization", ["m", *BATCH_NORM], ["n"], "norm"),
        node("Relu", ["n"], ["y"], "bend"),
    ],
    "Mul": [node("Mul", ["scale", "m"], ["n"], "mul"), node("Relu", ["n"], ["y"], "bend")],
}
STORED = {"low": np.array(-0.5), "high": np.array(0.5), "scale": np.array([1.0, -2.0, 0.5, -0.25]), **BATCH_NORM}


def case(name: str) -> Case:
    nodes = [node("Gemm", ["h", "w", "b"], ["m"], "consumer"), *NODES[name]]
    used = {n for x in NODES[name] for n in x.input}
    return Case(nodes, {"w": r((6, 4)), "b": r(4), **{n: v for n, v in STORED.items() if n in used}}, (5,))


@pytest.mark.parametrize("name", NODES)
def test_turns_lower_the_error_behind_the_activation(name):
    model = model_of(case(name))
    analysis, plan = planned(model)
    x = np.random.default_rng(1).standard_normal((400, 5))
    wanted = Function(analysis.graph.model)(x)
    errors = []
    for turns in (0, 2):
        repaired = repair(analysis, plan, [{"x": x}], ridges=(0.0,), turns=turns)
        assert [c.turns for c in repaired.consumers] == [1 + turns]
        errors.append(np.square(Function(repaired.model)(x) - wanted).sum())
    assert errors[1] < 0.995 * errors[0]


def test_where_the_activation_is_flat_the_present_output_is_as_good():
    model = model_of(case("BatchNormalization"))
    analysis, plan = planned(model)
    pruned = infer(rewrite(analysis, plan), OPERATORS)
    found = beyond(analysis, plan.by_atom(analysis), pruned, "m")
    assert (found.y, found.u, found.activation.op) == ("m", "n", "Relu")
    slope = found.slope(lambda n: pruned.array(n) if n in pruned.parameters else None, 2)
    expected = BATCH_NORM["gamma"] / np.sqrt(BATCH_NORM["var"] + 1e-5)
    np.testing.assert_allclose(slope.numpy(), expected.reshape(1, 4)[0], rtol=1e-12)
    flat = found.flat(lambda n: None)
    present = torch.tensor([[-1.0, 2.0, -1.0, 2.0]], dtype=torch.float64)
    wanted = torch.tensor([[-3.0, -3.0, 1.5, 1.5]], dtype=torch.float64)
    y = torch.zeros(1, 4, dtype=torch.float64)
    aims = found.aims(y, present, wanted, slope, flat)
    right = torch.tensor([[-1.0, 0.0, 1.5, 1.5]], dtype=torch.float64)  # of u
    torch.testing.assert_close(aims * slope, right - present)
    torch.testing.assert_close(found.aims(y, present, wanted, slope, None) * slope, wanted - present)


def test_a_layer_makes_up_for_what_its_sum_lacks():
    """The branch that is solved for last aims at the original's sum, less the other branch as it is now."""
    nodes = [
        node("MatMul", ["h", "s"], ["skip"], "skip"),
        node("Gemm", ["h", "v", "c"], ["m"], "first"),
        node("Tanh", ["m"], ["t"], "bend"),
        node("Gemm", ["t", "w", "b"], ["branch"], "last"),
        node("Add", ["skip", "branch"], ["y"], "sum"),
    ]
    weights = {"s": r((6, 4)), "v": r((6, 3)), "c": r(3), "w": r((3, 4)), "b": r(4)}
    analysis, plan = planned(model_of(Case(nodes, weights, (5,))))
    x = np.random.default_rng(1).standard_normal((60, 5))

    repaired = repair(analysis, plan, [{"x": x}], ridges=(0.0,))

    found = stored(repaired.model)
    hidden = np.tanh(x @ found["p.w"] + found["p.b"])
    inner = np.tanh(hidden @ found["v"] + found["c"])
    wanted = Function(analysis.graph.model)(x) - hidden @ found["s"]
    solution = np.linalg.lstsq(np.c_[inner, np.ones(60)], wanted, rcond=None)[0]
    np.testing.assert_allclose(np.r_[found["w"], found["b"][None]], solution, atol=1e-5)


def test_what_several_nodes_read_is_its_own_aim():
    nodes = [
        node("Gemm", ["h", "w", "b"], ["m"], "consumer"),
        node("Relu", ["m"], ["one"], "bend"),
        node("Add", ["one", "m"], ["y"], "sum"),
    ]
    analysis, plan = planned(model_of(Case(nodes, {"w": r((6, 4)), "b": r(4)}, (5,))))
    pruned = infer(rewrite(analysis, plan), OPERATORS)
    assert beyond(analysis, plan.by_atom(analysis), pruned, "m") is None
    assert beyond(analysis, plan.by_atom(analysis), pruned, "y") is None  # an output of the model


@pytest.mark.parametrize(
    "made",
    [
        node("Relu", ["x"], ["y"]),
        node("Clip", ["x", "low", "high"], ["y"]),
        node("HardSwish", ["x"], ["y"]),
        node("HardSigmoid", ["x"], ["y"]),
        node("HardSigmoid", ["x"], ["y"], alpha=0.5, beta=0.25),
        node("ThresholdedRelu", ["x"], ["y"], alpha=0.5),
        node("LeakyRelu", ["x"], ["y"], alpha=0.3),
    ],
    ids=lambda n: n.op_type,
)
def test_flat_parts_are_those_of_the_function(made):
    floats = [helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, ["N"]) for n in "xy"]
    bounds = [np.array(-1.0), np.array(2.0)][: len(made.input) - 1]
    stored = [numpy_helper.from_array(b, n) for b, n in zip(bounds, made.input[1:], strict=True)]
    graph = helper.make_graph([made], "one", floats[:1], floats[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    (parsed,) = load(model).nodes
    operator = OPERATORS[made.op_type]
    flat = operator.flat(parsed, [None, *bounds])
    x = np.linspace(-5, 5, 2001)
    grows = np.abs(np.gradient(operator.evaluate(parsed, x, *bounds), x))
    outside = (x < flat.low - 0.01) | (x > flat.high + 0.01)
    assert outside.any()
    np.testing.assert_allclose(grows[outside], flat.leak, atol=1e-9)
    assert grows[~outside].max() > 0.05


def test_integers_are_flat_beyond_their_range():
    quantize = OPERATORS["QuantizeLinear"]
    made = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    flat = quantize.flat(made, [None, np.array(0.1), np.array(-128, np.int8)])
    assert (flat.low, flat.high, flat.leak) == pytest.approx((0, 25.5, 0))
    assert quantize.flat(made, [None, np.array(0.5)]) == Flat(0, 127.5)
    assert quantize.flat(made, [None, np.array([0.5, 0.1]), np.array(3, np.uint8)]) is None
    assert quantize.flat(made, [None, None, np.array(3, np.uint8)]) is None
