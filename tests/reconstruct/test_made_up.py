"""Inputs made up for a repair without data, and what BatchNormalization tells of the data for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from consumer_cases import Function, stored
from onnx import TensorProto, helper, numpy_helper

from onnxprune.axes.analysis import analyse
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS
from onnxprune.reconstruct import repair
from onnxprune.reconstruct.imagined import coloured, imagine, imagined, mismatch
from onnxprune.reconstruct.lockstep import Side
from onnxprune.reconstruct.normalised import norms, statistics_on
from onnxprune.select.choose import choose
from onnxprune.select.target import parse_target

node = helper.make_node
CHANNELS = 12


def network(batch="N"):
    """Three layers whose BatchNormalization has statistics that were taken on correlated inputs, far from zero."""
    rng = np.random.default_rng(5)
    weights = {
        "w1": rng.standard_normal((CHANNELS, 3, 3, 3)) / 5,
        "w2": rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 10,
    }
    weights |= {"w3": rng.standard_normal((5, CHANNELS)), "b3": rng.standard_normal(5)}
    for k in "12":
        weights |= {f"gamma{k}": 1 + rng.random(CHANNELS), f"beta{k}": rng.standard_normal(CHANNELS)}
        weights |= {f"mean{k}": np.zeros(CHANNELS), f"var{k}": np.ones(CHANNELS)}
    norm = lambda k: [f"gamma{k}", f"beta{k}", f"mean{k}", f"var{k}"]  # noqa: E731
    nodes = [
        node("Conv", ["x", "w1"], ["a"], "first", pads=[1] * 4),
        node("BatchNormalization", ["a", *norm(1)], ["a.n"], "norm1"),
        node("Relu", ["a.n"], ["a.r"]),
        node("Conv", ["a.r", "w2"], ["b"], "second", pads=[1] * 4),
        node("BatchNormalization", ["b", *norm(2)], ["b.n"], "norm2"),
        node("Relu", ["b.n"], ["b.r"]),
        node("GlobalAveragePool", ["b.r"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w3", "b3"], ["y"], "head", transB=1),
    ]

    def made():
        graph = helper.make_graph(
            nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 10, 10])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
            [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    # `statistics_on` keeps what stands in the file: mean 0, variance 1. Here they are taken as training takes them.
    side = Side(load(made()), OPERATORS)
    x = torch.from_numpy(data())
    for k, source in (("1", "a"), ("2", "b")):
        seen = run(side, x, source)
        weights[f"mean{k}"] = seen.mean((0, 2, 3)).numpy()
        weights[f"var{k}"] = seen.var((0, 2, 3), unbiased=False).numpy()
        for n in (f"mean{k}", f"var{k}"):
            side.tensor(n).copy_(torch.from_numpy(weights[n]))
    return made()


def data(count=64, seed=1):
    """As the network was trained on: smooth, channels alike, around 3."""
    rng = np.random.default_rng(seed)
    shared = coloured(rng.standard_normal((count, 1, 10, 10)).astype(np.float32))
    return (3 + 2 * shared + 0.3 * rng.standard_normal((count, 3, 10, 10))).astype(np.float32)


def run(side, x, name):
    env = torch.fx.Interpreter(side.module, garbage_collect_values=False)
    with torch.no_grad():
        env.run(x)
    return env.env[side.places[name]]


@pytest.fixture(scope="module")
def analysis():
    return analyse(load(network()))


def noise(count=64, seed=2):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 3, 10, 10)).astype(np.float32))


def test_channels_have_the_stored_mean_and_deviation_on_other_inputs(analysis):
    side = Side(analysis.graph, OPERATORS)
    beta, gamma = (side.tensor(n).clone() for n in ("beta2", "gamma2"))
    x = noise()
    before = run(side, x, "b.n")
    statistics = statistics_on(side, [[x[:40]], [x[40:]]])
    after = run(side, x, "b.n")
    assert set(statistics) == {"mean1", "var1", "mean2", "var2"}
    assert (before.mean((0, 2, 3)) - beta).abs().max() > 0.5
    torch.testing.assert_close(after.mean((0, 2, 3)), beta, atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std((0, 2, 3)), gamma, atol=0, rtol=1e-3)


def test_the_data_itself_has_the_stored_statistics(analysis):
    side = Side(analysis.graph, OPERATORS)
    stored = {n: side.tensor(n).numpy().copy() for n in ("mean1", "var1", "mean2", "var2")}
    for name, found in statistics_on(side, [[torch.from_numpy(data())]]).items():
        np.testing.assert_allclose(found, stored[name], rtol=1e-3, atol=1e-4)


def test_a_channel_that_does_not_move_on_the_data_does_not_move_on_noise():
    side = Side(load(network()), OPERATORS)
    side.tensor("var1")[3] = 0.0
    x = noise()
    statistics_on(side, [[x]])
    found = run(side, x, "a.n")
    torch.testing.assert_close(found[:, 3], side.tensor("beta1")[3].expand_as(found[:, 3]), atol=1e-4, rtol=0)


def test_inputs_come_near_the_stored_statistics(analysis):
    side = Side(analysis.graph, OPERATORS)
    found = norms(side)
    (made,) = imagined(side, [{"x": noise(32).numpy()}])
    white, smooth, data_ = (
        float(mismatch(side, found, [x]))
        for x in (noise(32), torch.from_numpy(coloured(noise(32).numpy())), torch.from_numpy(data(32)))
    )
    with torch.no_grad():
        reached = float(mismatch(side, found, made))
    assert reached < 0.1 * min(white, smooth)
    assert data_ < 0.1 * white  # it is a measure of how unlike data inputs are


def test_noise_keeps_its_size_and_gains_neighbours_that_are_alike():
    white = noise(8).numpy()
    found = coloured(white)
    alike = lambda x: float((x[..., 1:] * x[..., :-1]).mean() / np.square(x).mean())  # noqa: E731
    assert found.dtype == np.float32 and abs(found.std() / white.std() - 1) < 1e-3
    assert abs(alike(white)) < 0.1 and alike(found) > 0.5
    rows = np.ones((4, 3), np.float32)
    assert coloured(rows) is rows


@pytest.mark.parametrize("batch", ["N", 1])
def test_repair_without_data_is_nearer_to_one_with_data(batch):
    """The error on the data is judged, which the repair has not seen."""
    analysis = analyse(load(network(batch)))
    plan = choose(analysis, parse_target("channels=0.5"), align=1).plan
    made = imagine(analysis, {"x": (2 if batch == "N" else batch, 3, 10, 10)}, samples=64)
    assert made.norms == 2 and made.samples == 64 and {len(b["x"]) for b in made.batches} == {4 if batch == "N" else 1}
    random = [{"x": noise(64).numpy()[k : k + 1]} for k in range(64)]
    errors = {}
    test = [{"x": data(seed=9)[k : k + 1]} for k in range(64)]
    for name, batches, statistics in (("bn", made.batches, made.statistics), ("random", random, None)):
        found = repair(analysis, plan, batches, mode="ls", statistics=statistics)
        errors[name] = error(analysis, found.model, test)
    errors["none"] = error(analysis, repair(analysis, plan, test, mode="none").model, test)
    assert errors["bn"] < 0.5 * errors["none"]
    assert errors["bn"] < errors["random"]


def test_changes_are_told_in_terms_of_the_stored_statistics(analysis):
    """Solved for on the data itself, under statistics that are shifted and scaled: the same as under the stored ones,
    for layers in front of which there is none of them; means are stored ones again."""
    plan = choose(analysis, parse_target("channels=0.5"), align=1).plan
    batches = [{"x": data()[k : k + 8]} for k in range(0, 64, 8)]
    side = Side(analysis.graph, OPERATORS)
    same = {n: side.tensor(n).double().numpy() for n in ("mean1", "var1", "mean2", "var2")}
    moved = same | {"mean2": same["mean2"] + 0.25}
    plain, shifted = (repair(analysis, plan, batches, turns=0, statistics=s).model for s in (same, moved))
    names = ("mean1", "mean2", "w2", "var2")
    one, other = (stored(m) for m in (plain, shifted))
    for name in names:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-5)
    assert not np.array_equal(one["mean2"], same["mean2"][: len(one["mean2"])])


def error(analysis, model, batches):
    wanted, found = (
        np.concatenate([f(b["x"]) for b in batches]) for f in (Function(analysis.graph.model), Function(model))
    )
    return np.square(found - wanted).sum() / np.square(wanted - wanted.mean(0)).sum()
