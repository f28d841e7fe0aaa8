"""Control flow: a branch that is always taken is followed, everything else is left alone; nothing changes its way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.axes.analysis import analyse
from onnxprune.model.load import load
from onnxprune.model.save import write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import prove
from tests.graphs import from_text


def with_if(text: str, then: list[onnx.NodeProto], other: list[onnx.NodeProto], **weights: object) -> onnx.ModelProto:
    """A model in whose text `z = Identity(flag)` stands for an If over `flag`."""
    model = from_text(text, **weights)  # type: ignore[arg-type]
    bodies = {}
    for name, nodes in (("then_branch", then), ("else_branch", other)):
        result = onnx.ValueInfoProto(name=nodes[-1].output[0])
        result.type.tensor_type.elem_type = TensorProto.FLOAT
        bodies[name] = helper.make_graph(nodes, name, [], [result])
    for node in model.graph.node:
        if list(node.input) == ["flag"] and node.op_type == "Identity":
            node.CopyFrom(helper.make_node("If", ["flag"], list(node.output), name="the if", **bodies))
    return model


def relu() -> list[onnx.NodeProto]:
    return [helper.make_node("Relu", ["a"], ["t"])]


def squeezed() -> list[onnx.NodeProto]:
    one = helper.make_node("Constant", [], ["axis"], value_ints=[1])
    return [one, helper.make_node("Squeeze", ["a", "axis"], ["s"]), helper.make_node("Unsqueeze", ["s", "axis"], ["e"])]


def pruned(model: onnx.ModelProto, path: Path, units: list[int]) -> list[int]:
    """Sizes of the groups; the first one is pruned to these units and proved."""
    analysis = analyse(load(model))
    if analysis.groups:
        plan = Plan({"g0": np.array(units)})
        write(rewrite(analysis, plan), path)
        assert prove(analysis, plan, path).max_rel_error < 1e-5
    return [g.size for g in analysis.groups]


SHAPES = {"w1": (5, 8), "w2": (8, 4)}


@pytest.mark.parametrize("flag", [True, False])
def test_the_shape_that_a_known_condition_leads_to_is_known(flag: bool) -> None:
    """The bodies give different ranks; both are a barrier to pruning."""
    text = """(float[N,5] x) => (float[N,4] y) {
        a = MatMul(x, w1)
        z = Identity(flag)
        y = MatMul(z, w2)
    }"""
    model = with_if(
        text,
        squeezed()[:2] if not flag else relu(),
        relu() if not flag else squeezed()[:2],
        flag=np.array(flag),
        **SHAPES,
    )
    graph = load(model)
    assert graph.shapes["z"] == (graph.pins["N"], 8)
    assert analyse(graph).groups == ()


@pytest.mark.parametrize("units", [[1, 3, 4], [5]])
def test_a_condition_on_a_size_is_answered_as_before_where_the_size_changes(tmp_path: Path, units: list[int]) -> None:
    """If the layer in front has one unit, negate: pruned to one unit, it must still not be negated."""
    text = """(float[N,5] x) => (float[N,4] y) {
        h = MatMul(x, w0)
        a = MatMul(h, w1)
        shape = Shape(h)
        width = Gather(shape, one)
        flag = Equal(width, one)
        z = Identity(flag)
        y = MatMul(z, w2)
    }"""
    negated = [helper.make_node("Neg", ["a"], ["n"])]
    model = with_if(text, negated, relu(), one=np.array(1), w0=(5, 6), w1=(6, 8), w2=(8, 4))
    assert pruned(model, tmp_path / "p.onnx", units) == [6]


def test_a_condition_on_data_leaves_what_the_branches_read_whole(tmp_path: Path) -> None:
    text = """(float[N,5] x, bool flag) => (float[N,4] y) {
        h = MatMul(x, w0)
        a = MatMul(h, w1)
        z = Identity(flag)
        y = MatMul(z, w2)
    }"""
    model = with_if(text, relu(), [helper.make_node("Neg", ["a"], ["n"])], w0=(5, 6), w1=(6, 8), w2=(8, 4))
    assert pruned(model, tmp_path / "p.onnx", [0, 4]) == [6], "only what lies in front of the branches' input"


def test_a_loop_leaves_what_its_body_reads_whole(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["m"]),
            helper.make_node("Add", ["m", "a"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    model = from_text(
        """(float[N,5] x) => (float[N,4] y) {
            h = MatMul(x, w0)
            a = MatMul(h, w1)
            z = Identity(a)
            y = MatMul(z, w2)
        }""",
        w0=(5, 6),
        w1=(6, 8),
        w=(8, 8),
        w2=(8, 4),
        times=np.array(3),
        yes=np.array(True),
    )
    model.graph.node[2].CopyFrom(helper.make_node("Loop", ["times", "yes", "a"], ["z"], body=body))
    assert pruned(model, tmp_path / "p.onnx", [0, 4]) == [6]
