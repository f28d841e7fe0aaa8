"""Costs: multiply-accumulates, parameters and bytes against formulas written out by hand; and of any plan without
rewriting anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.axes.analysis import analyse
from onnxprune.axes.dead import INEXACT
from onnxprune.model.load import load
from onnxprune.model.profile import costs
from onnxprune.model.save import to_proto, write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from tests.graphs import from_text, random_model


def macs(text: str, **weights: object) -> float:
    return costs(analyse(load(from_text(text, **weights))))["macs"].total({})  # type: ignore[arg-type]


class TestMacs:
    """Multiply-accumulates per sample."""

    def test_a_convolution(self) -> None:
        found = macs(
            "(float[N,3,9,11] x) => (float[N,8,5,6] y) { y = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w) }",
            w=(8, 3, 3, 3),
        )
        assert found == 8 * 5 * 6 * 3 * 3 * 3

    def test_a_grouped_and_a_depthwise_convolution(self) -> None:
        assert (
            macs("(float[N,6,4,4] x) => (float[N,8,4,4] y) { y = Conv<group=2>(x, w) }", w=(8, 3, 1, 1)) == 8 * 16 * 3
        )
        assert macs("(float[N,6,4,4] x) => (float[N,6,2,2] y) { y = Conv<group=6>(x, w) }", w=(6, 1, 3, 3)) == 6 * 4 * 9

    def test_a_transposed_convolution_counts_its_input(self) -> None:
        found = macs(
            "(float[N,6,4,4] x) => (float[N,8,8,8] y) { y = ConvTranspose<strides=[2,2], group=2>(x, w) }",
            w=(6, 4, 2, 2),
        )
        assert found == 6 * 16 * 4 * 4

    @pytest.mark.parametrize(
        ("form", "shape", "weight"),
        [("Gemm(x, w)", "N,5", (5, 7)), ("Gemm<transB=1>(x, w)", "N,5", (7, 5)), ("MatMul(x, w)", "N,5", (5, 7))],
    )
    def test_a_layer(self, form: str, shape: str, weight: tuple[int, int]) -> None:
        assert macs(f"(float[{shape}] x) => (float[N,7] y) {{ y = {form} }}", w=weight) == 35

    def test_a_gemm_whose_first_operand_is_transposed(self) -> None:
        assert macs("(float[5,3] x) => (float[3,7] y) { y = Gemm<transA=1>(x, w) }", w=(5, 7)) == 3 * 5 * 7

    def test_products_over_batches_count_every_batch(self) -> None:
        found = macs("(float[N,4,5,6] a, float[N,4,6,7] b) => (float[N,4,5,7] y) { y = MatMul(a, b) }")
        assert found == 4 * 5 * 6 * 7

    def test_an_einsum(self) -> None:
        text = '(float[N,5,6] x) => (float[N,5,7] y) { y = Einsum<equation="bti,oi->bto">(x, w) }'
        assert macs(text, w=(7, 6)) == 5 * 6 * 7

    @pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    @pytest.mark.parametrize("directions", [1, 2])
    def test_recurrent_cells(self, op: str, gates: int, directions: int) -> None:
        direction = "bidirectional" if directions == 2 else "forward"
        text = (
            f"(float[7,N,5] x) => (float[7,{directions},N,6] y) "
            f'{{ y = {op}<hidden_size=6, direction="{direction}">(x, w, r) }}'
        )
        found = macs(text, w=(directions, gates * 6, 5), r=(directions, gates * 6, 6))
        assert found == 7 * directions * gates * 6 * (5 + 6)

    def test_elementwise_and_layout_operators_cost_nothing(self) -> None:
        assert (
            macs("""(float[N,6,4,4] x) => (float[N,96] y) {
            a = Relu(x)
            b = Add(a, x)
            c = MaxPool<kernel_shape=[1,1]>(b)
            y = Flatten(c)
        }""")
            == 0
        )

    def test_weight_arithmetic_costs_nothing_at_run_time(self) -> None:
        assert (
            macs("(float[N,5] x) => (float[N,7] y) { w = MatMul(a, b)\n y = MatMul(x, w) }", a=(5, 3), b=(3, 7)) == 35
        )

    def test_they_do_not_depend_on_how_the_batch_is_given(self) -> None:
        found = {
            macs(f"(float[{n},3,8,8] x) => (float[{n},4,8,8] y) {{ y = Conv(x, w) }}", w=(4, 3, 1, 1))
            for n in ("N", "1", "batch", "unk__1")
        }
        assert found == {64 * 4 * 3}


class TestParameters:
    """Elements of what can be learned."""

    def params(self, text: str, **weights: object) -> float:
        return costs(analyse(load(from_text(text, **weights))))["params"].total({})  # type: ignore[arg-type]

    def test_every_weight_counts_once(self) -> None:
        assert (
            self.params("(float[N,5] x) => (float[N,5] y) { a = Gemm(x, w, b)\n y = Gemm(a, w, b) }", w=(5, 5), b=(5,))
            == 30
        )

    def test_positions_and_sizes_are_no_parameters(self) -> None:
        assert (
            self.params(
                "(float[N,6] x) => (float[N,2,3] y) { a = MatMul(x, w)\n y = Reshape(a, s) }",
                w=(6, 6),
                s=np.array([0, 2, 3]),
            )
            == 36
        )


@given(st.integers(0, 10**6), st.data())
@settings(max_examples=40, deadline=None)
def test_the_cost_of_a_plan_is_that_of_the_model_that_it_gives(seed: int, data: st.DataObject) -> None:
    """Predicted from the axes' sizes; counted again on the rewritten graph."""
    analysis = analyse(load(random_model(seed, blocks=4)))
    predicted = costs(analysis)
    keep, counts = {}, {}
    for g in analysis.groups:
        if g.kind != INEXACT:
            n = data.draw(st.integers(1, g.size))
            if n < g.size:
                keep[g.id], counts[g.atom] = np.arange(g.size - n, g.size), n
    smaller = analyse(load(to_proto(rewrite(analysis, Plan(keep))), pins=dict(analysis.graph.pins)))
    assert costs(smaller)["macs"].total({}) == pytest.approx(predicted["macs"].total(counts), rel=1e-6)


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    text = "(float[N,64] x) => (float[N,4] y) { a = MatMul(x, w1)\n b = Cast<to=1>(h)\n c = MatMul(a, b)\n y = MatMul(c, w2) }"
    model = from_text(text, w1=(64, 96), h=np.zeros((96, 80), np.float16), w2=(80, 4))
    onnx.save(model, tmp_path / "m.onnx")
    analysis = analyse(load(tmp_path / "m.onnx"))
    size = costs(analysis)["size"]
    assert size.total({}) == (tmp_path / "m.onnx").stat().st_size
    keep = {g.id: np.arange(g.size // 2) for g in analysis.groups}
    write(rewrite(analysis, Plan(keep)), tmp_path / "small.onnx")
    predicted = size.total({g.atom: g.size // 2 for g in analysis.groups})
    assert (tmp_path / "small.onnx").stat().st_size == pytest.approx(predicted, abs=300), "but for the stored plan"
