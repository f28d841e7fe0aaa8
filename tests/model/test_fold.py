"""Weights that are computed from statistics of weights: stored as what they come to, and prunable then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxprune.axes.analysis import analyse
from onnxprune.model.load import load
from onnxprune.model.profile import costs
from onnxprune.model.save import to_proto, write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import prove
from tests.graphs import from_text

STANDARDISED = """
    m{k} = ReduceMean<axes=[1,2,3]>(w{k})
    c{k} = Sub(w{k}, m{k})
    q{k} = Mul(c{k}, c{k})
    v{k} = ReduceMean<axes=[1,2,3]>(q{k})
    e{k} = Add(v{k}, tiny)
    r{k} = Sqrt(e{k})
    s{k} = Div(c{k}, r{k})
    u{k} = Mul(s{k}, g{k})"""

NORMED = """
    n{k} = ReduceL2<axes=[1,2,3]>(w{k})
    s{k} = Div(w{k}, n{k})
    u{k} = Mul(s{k}, g{k})"""


def network(weights: str) -> onnx.ModelProto:
    first, second = (weights.format(k=k) for k in (1, 2))
    return from_text(
        f"""(float[N,3,6,6] x) => (float[N,4,6,6] y) {{{first}{second}
            h = Conv<pads=[1,1,1,1]>(x, u1, b1)
            a = Relu(h)
            y = Conv<pads=[1,1,1,1]>(a, u2)
        }}""",
        opset=17,
        w1=(8, 3, 3, 3),
        g1=(8, 1, 1, 1),
        b1=(8,),
        w2=(4, 8, 3, 3),
        g2=(4, 1, 1, 1),
        tiny=np.array(1e-5, np.float32),
    )


def outputs(model: onnx.ModelProto, seed: int = 0) -> list[np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((2, 3, 6, 6)).astype(np.float32)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})


@pytest.mark.parametrize("weights", [STANDARDISED, NORMED])
def test_the_function_stays_and_the_arithmetic_goes(weights: str) -> None:
    model = network(weights)
    graph = load(model)
    assert [n.op for n in graph.nodes] == ["Conv", "Relu", "Conv"]
    assert set(graph.parameters) - {"tiny"} == {"u1", "u2", "b1"}
    folded = to_proto(graph.model)
    onnx.checker.check_model(folded, full_check=True)
    for a, b in zip(outputs(model), outputs(folded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [STANDARDISED, NORMED])
def test_its_channels_are_exact_and_the_rest_of_the_weights_keep_their_values(tmp_path: Path, weights: str) -> None:
    graph = load(network(weights))
    analysis = analyse(graph)
    assert [(g.size, g.kind) for g in analysis.groups] == [(8, "exact")]
    plan = Plan({"g0": np.array([0, 3, 6])})
    pruned = rewrite(analysis, plan)
    write(pruned, tmp_path / "p.onnx")
    assert prove(analysis, plan, tmp_path / "p.onnx").max_rel_error < 1e-5
    after = {t.name: onnx.numpy_helper.to_array(t) for t in to_proto(pruned).graph.initializer}
    assert np.array_equal(after["u2"], graph.array("u2")[:, [0, 3, 6]])


def test_the_input_model_is_not_touched() -> None:
    model = network(STANDARDISED)
    before = model.SerializeToString(deterministic=True)
    load(model)
    assert model.SerializeToString(deterministic=True) == before


def test_the_size_that_folding_saves_is_not_counted_as_a_size_that_stays() -> None:
    """Two copies of the weights, one of them transposed for a mean over its leading axes, as torch exports it."""
    model = from_text(
        """(float[N,5] x) => (float[N,4] y) {
            m = ReduceMean<axes=[0], keepdims=0>(wt)
            u = Sub(w, m)
            a = MatMul(x, u)
            r = Relu(a)
            y = MatMul(r, w2)
        }""",
        opset=17,
        w=(5, 64),
        wt=(5, 64),
        w2=(64, 4),
    )
    graph = load(model)
    assert graph.model.folded == 5 * 64 * 4
    analysis = analyse(graph)
    cost = costs(analysis)
    assert cost["params"].total({}) == 5 * 64 + 64 * 4
    overhead = graph.model.nbytes - (5 * 64 * 2 + 64 * 4) * 4
    assert cost["size"].total({g.atom: 0 for g in analysis.groups}) == overhead


class TestWhatIsLeftAlone:
    """Arithmetic among weights that does not depend on a statistic, or is more than arithmetic among weights."""

    def unchanged(self, model: onnx.ModelProto) -> None:
        graph = load(model)
        assert [n.op for n in graph.nodes] == [n.op_type for n in model.graph.node]

    def test_a_factorised_matrix(self) -> None:
        self.unchanged(
            from_text(
                """(float[N,8] x) => (float[N,6] y) {
                    w = MatMul(a, b)
                    y = MatMul(x, w)
                }""",
                a=(8, 2),
                b=(2, 6),
            )
        )

    def test_a_statistic_of_data(self) -> None:
        self.unchanged(
            from_text(
                """(float[N,8] x) => (float[N,6] y) {
                    m = ReduceMean<axes=[1]>(x)
                    c = Sub(x, m)
                    y = MatMul(c, w)
                }""",
                opset=17,
                w=(8, 6),
            )
        )

    def test_noise(self) -> None:
        self.unchanged(
            from_text(
                """(float[N,8] x) => (float[N,6] y) {
                    m = ReduceMean<axes=[1]>(w)
                    z = RandomNormalLike(w)
                    c = Sub(z, m)
                    y = MatMul(x, c)
                }""",
                opset=17,
                w=(8, 6),
            )
        )

    def test_what_would_grow(self) -> None:
        self.unchanged(
            from_text(
                """(float[50,8,6] x) => (float[50,8,6] y) {
                    m = ReduceMax<axes=[1]>(w)
                    e = Expand(m, wide)
                    y = Add(x, e)
                }""",
                opset=17,
                w=(1, 3, 6),
                wide=np.array([50, 8, 6]),
            )
        )


def test_a_weight_that_is_also_read_raw_stays_beside_its_standardised_form() -> None:
    model = from_text(
        """(float[N,8] x) => (float[N,6] y) {
            m = ReduceMean<axes=[0]>(w)
            c = Sub(w, m)
            a = MatMul(x, c)
            b = MatMul(x, w)
            y = Add(a, b)
        }""",
        opset=17,
        w=(8, 6),
    )
    graph = load(model)
    assert [n.op for n in graph.nodes] == ["MatMul", "MatMul", "Add"]
    assert set(graph.parameters) == {"c", "w"}


def test_one_output_of_a_node_is_folded_while_another_leaves_the_graph() -> None:
    """A Split of standardised weights, one half of which is a graph output."""
    model = from_text(
        """(float[N,8] x) => (float[N,3] y, float[8,3] q) {
            m = ReduceMean<axes=[0]>(w)
            c = Sub(w, m)
            p, q = Split<axis=1>(c, halves)
            y = MatMul(x, p)
        }""",
        opset=17,
        w=(8, 6),
        halves=np.array([3, 3]),
    )
    graph = load(model)
    folded = to_proto(graph.model)
    onnx.checker.check_model(folded, full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    runs = [ort.InferenceSession(m.SerializeToString()).run(None, {"x": x}) for m in (model, folded)]
    assert "p" in graph.parameters
    for a, b in zip(*runs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
