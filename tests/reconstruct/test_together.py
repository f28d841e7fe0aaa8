"""Files that are fixed to one sample, repaired on several at once: the same weights come out, only sooner."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from consumer_cases import stored
from test_repair import batches, network

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.model.infer import infer
from onnxprune.model.load import load
from onnxprune.reconstruct import repair
from onnxprune.reconstruct.lockstep import Side
from onnxprune.reconstruct.together import together
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.choose import choose
from onnxprune.select.target import parse_target
from tests.graphs import from_text

SAMPLES = 80  # fives, so that every fifth batch is held out


def for_one(model: onnx.ModelProto) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def several(analysis: Analysis, target: str = "channels=0.5") -> int:
    """How many samples a repair would run at once."""
    from onnxprune.reconstruct.consumers import consumers
    from onnxprune.reconstruct.tasks import LinearTask, ProductTask, Settings

    plan = choose(analysis, parse_target(target), align=1).plan
    pruned = infer(rewrite(analysis, plan), analysis.registry, analysis.graph.pins)
    sides = Side(analysis.graph, analysis.registry), Side(pruned, analysis.registry)
    settings = Settings("affine", (0.01,), 0, 1 << 30, 0)
    found, _ = consumers(analysis, plan, pruned, behind=True)
    tasks = [(ProductTask if hasattr(c, "left") else LinearTask)(c, sides, settings) for c in found]
    return together(sides, tasks, 16)


def test_the_weights_are_those_of_a_file_without_a_fixed_batch() -> None:
    free, one = analyse(load(network())), analyse(load(for_one(network())))
    plan = choose(free, parse_target("channels=0.5"), align=1).plan
    assert plan.keep.keys() == choose(one, parse_target("channels=0.5"), align=1).plan.keep.keys()
    fives = batches(count=SAMPLES // 5, size=5)
    ones = [{"x": x[None]} for b in fives for x in b["x"]]
    wanted = repair(free, plan, fives, samples=SAMPLES)
    found = repair(one, plan, ones, samples=SAMPLES)
    assert (found.samples, found.held_out, found.steps) == (SAMPLES, wanted.held_out, wanted.steps)
    for name, value in stored(wanted.model).items():
        np.testing.assert_allclose(stored(found.model)[name], value, atol=1e-6, err_msg=name)


def test_batches_that_the_caller_chose_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    one = analyse(load(for_one(network())))
    plan = choose(one, parse_target("channels=0.5"), align=1).plan
    ones = [{"x": x[None]} for b in batches(count=4, size=5) for x in b["x"]]
    assert repair(one, plan, ones, batch=1).held_out == 4
    assert repair(one, plan, ones, samples=SAMPLES).held_out == 5  # one of four batches of five


HEADS = """(float[1,6,8] x) => (float[1,6,8] y) {
    q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
    parts = Constant<value_ints=[1,6,2,4]>() whole = Constant<value_ints=[1,6,8]>()
    qr = Reshape(q, parts) kr = Reshape(k, parts) vr = Reshape(v, parts)
    qt = Transpose<perm=[0,2,1,3]>(qr) kt = Transpose<perm=[0,2,3,1]>(kr) vt = Transpose<perm=[0,2,1,3]>(vr)
    %s
    ot = Transpose<perm=[0,2,1,3]>(o) flat = Reshape(ot, whole) y = MatMul(flat, wo) }"""
APART = "l = MatMul(qt, kt) s = Softmax<axis=-1>(l) o = MatMul(s, vt)"
MERGED = """rows = Constant<value_ints=[2,6,4]>() columns = Constant<value_ints=[2,4,6]>()
    four = Constant<value_ints=[1,2,6,4]>() qm = Reshape(qt, rows) km = Reshape(kt, columns) vm = Reshape(vt, rows)
    l = MatMul(qm, km) s = Softmax<axis=-1>(l) om = MatMul(s, vm) o = Reshape(om, four)"""


@pytest.mark.parametrize(("middle", "count"), [(APART, 16), (MERGED, 1)])
def test_products_whose_heads_share_an_axis_with_the_batch_run_one_by_one(middle: str, count: int) -> None:
    """With several samples that axis would be of another size than the masks are of."""
    weights = dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8))
    assert several(analyse(load(from_text(HEADS % middle, **weights)))) == count


def test_a_file_for_any_number_is_left_alone() -> None:
    assert several(analyse(load(network()))) == 1
