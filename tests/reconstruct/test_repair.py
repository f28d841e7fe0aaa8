"""What a repair of a whole network changes, what it leaves alone, and what it may cost."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from consumer_cases import Case, Function, model_of, planned, stored
from onnx import TensorProto, helper, numpy_helper

from onnxprune.axes.analysis import analyse
from onnxprune.errors import DataError
from onnxprune.model.infer import infer
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS
from onnxprune.reconstruct import repair
from onnxprune.reconstruct.frontier import Frontier
from onnxprune.reconstruct.lockstep import Lockstep, Side
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.choose import choose
from onnxprune.select.plan import Plan
from onnxprune.select.target import parse_target

node = helper.make_node


def network(seed=0, width=8):
    """A stem, a residual block whose sum and branch are pruned, a Concat, and two consumers of one tensor."""
    rng = np.random.default_rng(seed)
    r = lambda *shape: rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)  # noqa: E731
    weights = {
        "stem.w": r(width, 3, 3, 3),
        "stem.b": r(width),
        "a.w": r(width, width, 3, 3),
        "bn.gamma": 1 + r(width) / 4,
        "bn.beta": r(width),
        "bn.mean": r(width),
        "bn.var": 1 + r(width) ** 2,
        "b.w": r(width, width, 3, 3),
        "b.b": r(width),
        "left.w": r(width, width, 1, 1),
        "right.w": r(width, width, 1, 1),
        "right.b": r(width),
        "fc.w": r(5, 2 * width),
        "fc.b": r(5),
    }
    nodes = [
        node("Conv", ["x", "stem.w", "stem.b"], ["s"], "stem", pads=[1] * 4),
        node("Relu", ["s"], ["s.r"], "stem.relu"),
        node("Conv", ["s.r", "a.w"], ["a"], "a", pads=[1] * 4),
        node("BatchNormalization", ["a", "bn.gamma", "bn.beta", "bn.mean", "bn.var"], ["a.n"], "bn"),
        node("Relu", ["a.n"], ["a.r"], "a.relu"),
        node("Conv", ["a.r", "b.w", "b.b"], ["b"], "b", pads=[1] * 4),
        node("Add", ["b", "s.r"], ["sum"], "sum"),
        node("Relu", ["sum"], ["sum.r"], "sum.relu"),
        node("Conv", ["sum.r", "left.w"], ["left"], "left"),
        node("Conv", ["sum.r", "right.w", "right.b"], ["right"], "right"),
        node("Concat", ["left", "right"], ["both"], "both", axis=1),
        node("Relu", ["both"], ["both.r"], "both.relu"),
        node("GlobalAveragePool", ["both.r"], ["pooled"], "pool"),
        node("Flatten", ["pooled"], ["flat"], "flatten"),
        node("Gemm", ["flat", "fc.w", "fc.b"], ["y"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def pruned():
    analysis = analyse(load(network()))
    return analysis, choose(analysis, parse_target("channels=0.5"), align=1).plan


def batches(count=10, size=8, seed=3):
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((size, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def error(analysis, model, data):
    """Relative squared error of the output."""
    wanted, found = (
        np.concatenate([f(b["x"]) for b in data]) for f in (Function(analysis.graph.model), Function(model))
    )
    return np.square(found - wanted).sum() / np.square(wanted - wanted.mean(0)).sum()


def test_repair_brings_the_outputs_nearer_on_other_inputs(pruned):
    analysis, plan = pruned
    others = batches(seed=4)
    errors = {m: error(analysis, repair(analysis, plan, batches(), mode=m).model, others) for m in ("none", "affine")}
    assert errors["affine"] < errors["none"] / 4


def test_only_values_change(pruned):
    analysis, plan = pruned
    sliced, repaired = rewrite(analysis, plan), repair(analysis, plan, batches()).model

    def frame(model):
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        for tensor in proto.graph.initializer:
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
        return proto.SerializeToString(deterministic=True)

    assert frame(sliced) == frame(repaired)
    before, after = stored(sliced), stored(repaired)
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert changed == {"a.w", "bn.mean", "b.w", "b.b", "left.w", "right.w", "right.b", "fc.w", "fc.b"}


def test_a_constant_without_a_place_is_left_out(pruned):
    analysis, plan = pruned
    modes = {c.label: c.mode for c in repair(analysis, plan, batches()).consumers}
    assert modes == {"a": "affine", "b": "affine", "left": "ls", "right": "affine", "fc": "affine"}


def test_constant_behind_a_batch_normalisation_makes_means_equal(pruned):
    analysis, plan = pruned
    data = batches(1, 40)
    repaired = repair(analysis, plan, data, turns=0)
    original = Side(analysis.graph, OPERATORS)
    small = Side(infer(repaired.model, OPERATORS), OPERATORS)
    kept = next(
        plan.keep[g.id] for g in analysis.groups if any(m.initializer == "a.w" and m.axis == 0 for m in g.members)
    )
    means = []
    for side in (original, small):
        env = Lockstep([side], Frontier(1 << 30))
        env.append([torch.from_numpy(data[0]["x"])])
        seen = []
        env.step([{side.places["a.n"]}], [set()], lambda _, v, s=side, seen=seen: seen.append(v[0][s.places["a.n"]]))
        means.append(seen[0].mean((0, 2, 3)).numpy())
    np.testing.assert_allclose(means[1], means[0][kept], atol=1e-5)


def test_report_is_of_inputs_that_were_held_out(pruned):
    analysis, plan = pruned
    repaired = repair(analysis, plan, batches(10, 8))
    assert (repaired.samples, repaired.held_out) == (80, 16)
    assert all(c.after <= c.before for c in repaired.consumers)
    assert repaired.after < repaired.before and not repaired.dropped
    assert {c.label: c.rows for c in repaired.consumers}["a"] == 80 * 64
    assert {c.label: c.columns for c in repaired.consumers}["a"] == 9 * sum(
        len(plan.keep[g.id]) for g in analysis.groups if any(m.initializer == "stem.w" for m in g.members)
    )


def test_a_repair_that_fits_noise_is_dropped():
    """As many rows as columns and no ridge: exact where it was fitted, and far off on the inputs that were held out."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((40, 3)), "b": rng.standard_normal(3)}
    case = Case([node("Gemm", ["h", "w", "b"], ["y"], "consumer")], weights, (40,), units=40)
    analysis = analyse(load(model_of(case)))
    plan = Plan({analysis.groups[0].id: np.arange(38)})
    data = [{"x": rng.standard_normal((10, 40))} for _ in range(5)]

    repaired = repair(analysis, plan, data, ridges=(0.0,))

    (only,) = repaired.consumers
    assert only.mode in ("none", "mean")
    assert only.after <= only.before
    np.testing.assert_array_equal(stored(repaired.model)["w"], stored(rewrite(analysis, plan))["w"])


def test_each_node_runs_once_per_batch(pruned, monkeypatch):
    analysis, plan = pruned
    runs = []
    run = Side.run

    def counted(self, nodes, env):
        for n, value in run(self, nodes, env):
            runs.append((id(self.module), n.name) if n not in self.static else None)
            yield n, value

    monkeypatch.setattr(Side, "run", counted)
    repaired = repair(analysis, plan, batches(4), turns=0)

    assert repaired.steps == 4
    assert {count for key, count in Counter(runs).items() if key} == {4}


def test_activations_beyond_the_limit_lie_in_files_and_give_the_same(pruned):
    analysis, plan = pruned
    held, spilled = (repair(analysis, plan, batches(), memory_limit=m) for m in (1 << 30, 10_000))
    assert held.spilled_bytes == 0 < spilled.spilled_bytes
    assert spilled.peak_bytes <= 2 * 10_000 < held.peak_bytes
    for name, value in stored(held.model).items():
        np.testing.assert_array_equal(stored(spilled.model)[name], value)


def test_moments_that_do_not_fit_together_take_more_steps(pruned):
    analysis, plan = pruned
    assert repair(analysis, plan, batches(), memory_limit=1).steps > repair(analysis, plan, batches()).steps


def test_what_is_left_is_named_with_its_reason():
    weights = {n: np.random.default_rng(0).standard_normal((6, 6)) for n in ("wq", "wk", "wv", "wo")}
    nodes = [
        *(node("MatMul", ["h0", f"w{n}"], [n], n) for n in "qkv"),
        node("Transpose", ["k"], ["k.t"], "turn", perm=[0, 2, 1]),
        *(node("Tanh", [n], [f"{n}.bent"], f"bend {n}") for n in ("q", "k.t")),
        node("MatMul", ["q.bent", "k.t.bent"], ["scores"], "scores"),
        node("Softmax", ["scores"], ["shares"], "softmax", axis=-1),
        node("MatMul", ["shares", "v"], ["mixed"], "mix"),
        node("MatMul", ["mixed", "wo"], ["y"], "out"),
    ]
    case = Case([node("Identity", ["h"], ["h0"], "same"), *nodes], weights, (4, 6))
    analysis = analyse(load(model_of(case)))
    queries, values = (
        next(g for g in analysis.groups if any(m.initializer == w and m.axis == 1 for m in g.members))
        for w in ("wq", "wv")
    )
    plan = Plan({queries.id: np.array([0, 1, 4]), values.id: np.array([0, 1, 4])})

    repaired = repair(analysis, plan, [{"x": np.random.default_rng(1).standard_normal((30, 4, 6))}])

    assert [c.label for c in repaired.consumers] == ["out"]
    assert [(x.label, x.groups) for x in repaired.left] == [("scores", (queries.id,))]
    assert "Tanh 'bend q' lies between" in repaired.left[0].reason


def test_shared_weights_are_left():
    rng = np.random.default_rng(0)
    nodes = [
        node("MatMul", ["h", "w"], ["one"], "one"),
        node("Neg", ["h"], ["n"], "neg"),
        node("MatMul", ["n", "w"], ["two"], "two"),
        node("Sub", ["one", "two"], ["y"], "sub"),
    ]
    analysis, plan = planned(model_of(Case(nodes, {"w": rng.standard_normal((6, 4))}, (5,))))
    repaired = repair(analysis, plan, [{"x": rng.standard_normal((30, 5))}])
    assert [x.reason for x in repaired.left] == ["several nodes share its weight"] * 2


def test_no_inputs_is_an_error(pruned):
    with pytest.raises(DataError, match="no inputs"):
        repair(*pruned, [])


def routed(limit=0.0):
    """Rows are chosen by what the pruned layer gives: which ones, and how many, depends on the network."""
    rng = np.random.default_rng(0)
    weights = {"v": rng.standard_normal((6, 1)), "limit": np.array(limit), "w": rng.standard_normal((6, 4))}
    nodes = [
        node("MatMul", ["h", "v"], ["score"], "score"),
        node("Greater", ["score", "limit"], ["chosen"], "chosen"),
        node("NonZero", ["chosen"], ["places"], "places"),
        node("Split", ["places"], ["row", "column"], "split", axis=0),
        node("Squeeze", ["row", "axes"], ["at"], "squeeze"),
        node("Gather", ["h", "at"], ["rows"], "rows"),
        node("MatMul", ["rows", "w"], ["expert"], "expert"),
        node("ReduceSum", ["expert", "axes"], ["sum"], "sum"),
        node("MatMul", ["h", "u"], ["all"], "all"),
        node("Add", ["all", "sum"], ["y"], "add"),
    ]
    return model_of(Case(nodes, weights | {"axes": np.array([0]), "u": rng.standard_normal((6, 4))}, (5,)))


def test_a_layer_that_is_given_other_rows_is_left():
    analysis, plan = planned(routed())
    given = [{"x": np.random.default_rng(k).standard_normal((30, 5))} for k in range(6)]
    assert [c.label for c in repair(analysis, plan, given, turns=0).consumers] == ["score", "all"]
    (left,) = repair(analysis, plan, given, turns=0).left
    assert left.label == "expert"
    assert re.fullmatch(r"it is given other rows than in the original: \d+ and \d+ for the same inputs", left.reason)


def test_a_layer_that_is_given_no_rows_is_left():
    analysis, plan = planned(routed(limit=1e6))
    repaired = repair(analysis, plan, [{"x": np.random.default_rng(0).standard_normal((30, 5))}])
    assert [(x.label, x.reason) for x in repaired.left] == [
        ("expert", "none of the inputs gives it rows to learn from")
    ]


def ending(*nodes, outputs, weights=None):
    """A layer whose input is pruned, and what is made of its output."""
    rng = np.random.default_rng(0)
    stored = {"w": rng.standard_normal((6, 4)), "b": rng.standard_normal(4), **(weights or {})}
    case = Case([node("Gemm", ["h", "w", "b"], ["z"], "consumer"), *nodes, node("Abs", ["z"], ["y"])], stored, (5,))
    model = model_of(case)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(n, t, None) for n, t in outputs.items())
    return planned(model)


def numbers(count=10):
    return [{"x": np.random.default_rng(k).standard_normal((16, 5))} for k in range(count)]


def test_elements_without_a_number_do_not_count():
    nodes = [node("Greater", ["x.0", "zero"], ["hidden"]), node("Where", ["hidden", "low", "z"], ["masked"], "mask")]
    first = [node("Slice", ["x", "starts", "ends", "axis"], ["x.0"])]
    weights = {"zero": np.array(0.0), "low": np.array(-np.inf)}
    weights |= {"starts": np.array([0]), "ends": np.array([1]), "axis": np.array([1])}
    plain = repair(*ending(outputs={"y": TensorProto.DOUBLE}), numbers())
    masked = repair(*ending(*first, *nodes, outputs={"masked": TensorProto.DOUBLE}, weights=weights), numbers())
    assert not masked.dropped and masked.after < masked.before
    assert masked.before == pytest.approx(plain.before, rel=0.5)


def test_an_output_of_another_size_is_no_judge():
    nodes = [node("NonZero", ["sure"], ["found"]), node("Greater", ["z", "zero"], ["sure"])][::-1]
    given = {"y": TensorProto.DOUBLE, "found": TensorProto.INT64}
    other = repair(*ending(*nodes, outputs=given, weights={"zero": np.array(0.0)}), numbers())
    plain = repair(*ending(outputs={"y": TensorProto.DOUBLE}), numbers())
    assert (other.before, other.after) == (plain.before, plain.after) and not other.dropped


def test_labels_are_judged_by_how_many_are_right():
    found = repair(*ending(node("ArgMax", ["z"], ["label"], axis=1), outputs={"label": TensorProto.INT64}), numbers())
    assert not found.dropped and found.after <= found.before
    assert found.before * found.held_out == pytest.approx(round(found.before * found.held_out))


def test_inputs_that_a_network_cannot_be_run_on_are_left_out(pruned):
    """They are of a size that the network has no room for."""
    analysis, plan = pruned
    given = batches(10, 8)
    wrong = {n: x[:, :2] for n, x in given[0].items()}
    repaired = repair(analysis, plan, [*given[:3], wrong, *given[4:9], wrong])
    assert (repaired.samples, repaired.held_out) == (64, 8)
    assert repaired.after < repaired.before and not repaired.dropped
    with pytest.raises(RuntimeError):
        repair(analysis, plan, [wrong] * 3)
