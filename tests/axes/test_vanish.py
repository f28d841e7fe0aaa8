"""Residual branches that go as a whole: which may, and what is left of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.axes.analysis import analyse
from onnxprune.axes.vanish import removable
from onnxprune.model.load import load
from onnxprune.model.save import to_proto, write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.choose import choose
from onnxprune.select.plan import Plan
from onnxprune.select.target import parse_target
from onnxprune.verify.equivalence import prove
from tests.graphs import from_text

RESIDUAL = """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
    s = Conv(x, stem)
    a = Conv<pads=[1,1,1,1]>(s, down, db)
    r = Relu(a)
    b = Conv(r, up, ub)
    t = Add(s, b)
    u = Relu(t)
    y = Conv(u, head)
}"""
SHAPES = {"stem": (8, 3, 1, 1), "down": (6, 8, 3, 3), "db": (6,), "up": (8, 6, 1, 1), "ub": (8,), "head": (4, 8, 1, 1)}


def sizes(model: onnx.ModelProto) -> set[int]:
    """Sizes of the groups that may go as a whole."""
    analysis = analyse(load(model))
    whole = removable(analysis)
    return {g.size for g in analysis.groups if g.atom in whole}


@pytest.fixture
def without(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Remove the groups of these sizes as a whole, prove it, and return the model."""

    def remove(model: onnx.ModelProto, *gone: int) -> onnx.ModelProto:
        analysis = analyse(load(model))
        plan = Plan({g.id: np.zeros(0, np.int64) for g in analysis.groups if g.size in gone})
        assert len(plan.keep) == len(gone)
        small = rewrite(analysis, plan)
        write(small, tmp_path / "small.onnx")
        assert prove(analysis, plan, tmp_path / "small.onnx").max_rel_error < 1e-4
        return to_proto(small)

    return remove


def test_the_inside_of_a_residual_branch_may_go_and_the_stream_may_not() -> None:
    assert sizes(from_text(RESIDUAL, **SHAPES)) == {6}


def test_what_is_left_of_a_branch_is_its_bias(without) -> None:
    small = without(from_text(RESIDUAL, **SHAPES), 6)
    assert [n.op_type for n in small.graph.node].count("Conv") == 2
    assert not {"down", "db", "up"} & {t.name for t in small.graph.initializer}


def test_a_branch_without_a_bias_leaves_nothing_that_counts(without) -> None:
    model = from_text(RESIDUAL.replace(", ub", ""), **{k: v for k, v in SHAPES.items() if k != "ub"})
    small = without(model, 6)
    assert sum(int(np.prod(t.dims)) for t in small.graph.initializer) <= 8 * 3 + 4 * 8 + 8


def test_a_plain_chain_has_nothing_that_may_go() -> None:
    text = "(float[N,5] x) => (float[N,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }"
    assert sizes(from_text(text, w1=(5, 8), w2=(8, 4))) == set(), "the graph output would lose its shape"


def test_a_branch_that_ends_in_something_that_does_not_broadcast_stays() -> None:
    text = RESIDUAL.replace("t = Add(s, b)", "t = Concat<axis=1>(s, b)")
    assert sizes(from_text(text, **{**SHAPES, "head": (4, 16, 1, 1)})) == set()


def test_two_branches_that_only_meet_each_other_may_not_both_go() -> None:
    """Add(b, c) with nothing of full size left: at most one of the two."""
    text = RESIDUAL.replace(
        "t = Add(s, b)",
        """
        e = Conv(s, down2)
        f = Relu(e)
        c = Conv(f, up2)
        t = Add(b, c)""",
    )
    analysis = analyse(load(from_text(text, down2=(5, 8, 1, 1), up2=(8, 5, 1, 1), **SHAPES)))
    assert len(removable(analysis)) <= 1


def test_one_group_that_feeds_both_sides_of_a_sum_may_not_go() -> None:
    text = """(float[N,5] x) => (float[N,4] y) {
        h = MatMul(x, w)
        a = Gemm(h, wa, b)
        c = Gemm(h, wc, b)
        s = Add(a, c)
        r = Relu(s)
        y = MatMul(r, w2)
    }"""
    shapes = {"w": (5, 6), "wa": (6, 8), "wc": (6, 8), "b": (8,), "w2": (8, 4)}
    assert 6 not in sizes(from_text(text, **shapes))


def test_several_branches_of_one_stream_may_all_go(without) -> None:
    text = RESIDUAL.replace(
        "u = Relu(t)",
        """
        d = Conv(t, down2)
        e = Relu(d)
        f = Conv(e, up2)
        u = Add(f, t)""",
    )
    model = from_text(text, down2=(5, 8, 1, 1), up2=(8, 5, 1, 1), **SHAPES)
    assert sizes(model) == {5, 6}
    small = without(model, 5, 6)
    assert [n.op_type for n in small.graph.node].count("Conv") == 2


def test_an_activation_and_a_scale_after_the_branch_are_followed(without) -> None:
    text = RESIDUAL.replace("t = Add(s, b)", "c = Sigmoid(b)\n d = Mul(c, gamma)\n t = Add(d, s)")
    model = from_text(text, gamma=(8, 1, 1), **SHAPES)
    assert sizes(model) == {6}
    without(model, 6)


def test_a_branch_with_a_sigmoid_inside_is_not_exact_and_stays() -> None:
    assert 6 not in sizes(from_text(RESIDUAL.replace("r = Relu(a)", "r = Sigmoid(a)"), **SHAPES))


def test_a_floor_of_zero_lets_a_branch_go_and_any_other_does_not() -> None:
    """550 parameters, of which 145 are left with one unit inside the branch, and 64 without it."""
    analysis = analyse(load(from_text(RESIDUAL, **SHAPES)), exclude=["stem"])
    assert [g.size for g in analysis.groups] == [6]
    whole = choose(analysis, parse_target("params=0.116"), floor=0.0)
    assert len(whole.plan.keep["g0"]) == 0 and whole.outcome.met
    kept = choose(analysis, parse_target("params=0.116"), floor=0.01)
    assert len(kept.plan.keep["g0"]) == 1 and not kept.outcome.met
