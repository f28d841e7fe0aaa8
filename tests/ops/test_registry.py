"""The table of operators, and how a user adds to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.axes.analysis import analyse
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS, Operator, Registry
from onnxprune.ops.matmul import gemm_axes, product_dead
from onnxprune.pipeline import compress, inspect, verify
from tests.graphs import from_text

FUSED = "com.microsoft::FusedGemm"  # Gemm and an activation; onnxprune has no entry for it


@pytest.fixture
def model() -> onnx.ModelProto:
    return from_text(
        """(float[N,5] x) => (float[N,4] y) <float[N,8] a> {
            a = com.microsoft.FusedGemm<activation="Relu">(x, w1, b1)
            y = Gemm(a, w2)
        }""",
        microsoft=True,
        w1=(5, 8),
        b1=(8,),
        w2=(8, 4),
    )


@pytest.fixture
def extended() -> Registry:
    return OPERATORS.extended([Operator(FUSED, axes=gemm_axes, dead=product_dead(0, 1, 2))])


def test_without_an_entry_an_operator_is_a_barrier(model: onnx.ModelProto) -> None:
    assert FUSED not in OPERATORS
    analysis = analyse(load(model))
    assert analysis.groups == ()
    assert any(b.barrier.op_type == FUSED for b in analysis.barriers)


def test_an_entry_of_the_user_frees_its_axes_from_inspection_to_proof(
    model: onnx.ModelProto, extended: Registry, tmp_path: Path
) -> None:
    assert [g.size for g in inspect(model, registry=extended).analysis.groups] == [8]
    onnx.save(model, tmp_path / "m.onnx")
    result = compress(tmp_path / "m.onnx", tmp_path / "s.onnx", target="params=0.6", deploy="none", registry=extended)
    assert result.verification is not None and result.verification.passed
    assert verify(tmp_path / "m.onnx", tmp_path / "s.onnx", registry=extended).passed
    small = {t.name: tuple(t.dims) for t in onnx.load(tmp_path / "s.onnx").graph.initializer}
    assert small["w1"][1] == small["b1"][0] == small["w2"][0] < 8


def test_extending_leaves_the_table_as_it_was_and_replaces_what_is_there(extended: Registry) -> None:
    assert len(extended) == len(OPERATORS) + 1 and FUSED not in OPERATORS
    replaced = OPERATORS.extended([Operator("Relu")])
    assert len(replaced) == len(OPERATORS) and replaced["Relu"].axes is None and OPERATORS["Relu"].axes is not None


def test_an_entry_without_an_axis_rule_is_a_barrier(tmp_path: Path) -> None:
    text = "(float[N,5] x) => (float[N,4] y) { a = MatMul(x, w1)\n r = Relu(a)\n y = MatMul(r, w2) }"
    model = from_text(text, w1=(5, 8), w2=(8, 4))
    assert [g.size for g in analyse(load(model)).groups] == [8]
    mute = OPERATORS.extended([Operator("Relu")])
    assert analyse(load(model, registry=mute), registry=mute).groups == ()


def test_a_rule_that_trips_over_a_node_is_a_barrier_with_its_reason() -> None:
    def broken(context: object) -> None:
        raise ValueError("three is not seven")

    text = "(float[N,5] x) => (float[N,4] y) { a = MatMul(x, w1)\n r = Relu(a)\n y = MatMul(r, w2) }"
    table = OPERATORS.extended([Operator("Relu", axes=broken)])
    analysis = analyse(load(from_text(text, w1=(5, 8), w2=(8, 4)), registry=table), registry=table)
    assert analysis.groups == ()
    assert any("three is not seven" in b.barrier.reason for b in analysis.barriers)


def test_names_are_unique_and_every_entry_stands_under_its_own() -> None:
    assert all(OPERATORS[name].name == name for name in OPERATORS)
    listed = [o.name for family in _families() for o in family.OPERATORS]
    assert len(listed) == len(set(listed)) == len(OPERATORS)


def _families() -> list:
    import importlib
    import pkgutil

    from onnxprune import ops

    modules = [importlib.import_module(f"onnxprune.ops.{m.name}") for m in pkgutil.iter_modules(ops.__path__)]
    return [m for m in modules if isinstance(getattr(m, "OPERATORS", None), tuple)]


def test_operators_that_zero_keeps_at_zero_say_so() -> None:
    """Where an operator has both a numpy form and a dead rule, the rule's zero is the form's zero."""

    class Node:
        op, opset, inputs, outputs, label = "", 17, ("x",), ("y",), ""
        attributes: dict[str, object] = {}

    checked = 0
    for name, operator in OPERATORS.items():
        if operator.dead is None or operator.evaluate is None:
            continue
        node = Node()
        node.op = name
        try:
            with np.errstate(all="ignore"):
                state = operator.dead(node, [0.0])
                value = np.asarray(operator.evaluate(node, np.zeros((2, 2), np.float32)))
        except (IndexError, ValueError, TypeError, KeyError):
            continue
        if state is not None and np.isfinite(state):
            assert np.allclose(value, state), name
            checked += 1
    assert checked > 30
