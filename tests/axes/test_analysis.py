"""What the analysis finds in each construct: the groups, what removing their units does, and what stands in the way.

A group is written as `size kind: producers -> consumers | followers`, each member as `initializer[axis]`. Whatever
is found is also pruned and proved in onnxruntime, by `proved`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.axes.dead import CONSUMES, FOLLOWS, INEXACT, PRODUCES
from onnxprune.errors import UsageError
from onnxprune.model.load import load
from onnxprune.model.save import write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import prove
from tests.graphs import from_text


def groups(model: onnx.ModelProto, **options: object) -> list[str]:
    """The groups of a model, as text."""
    return described(analyse(load(model), **options))  # type: ignore[arg-type]


def described(analysis: Analysis) -> list[str]:
    lines = []
    for g in analysis.groups:
        by_role = {
            role: list(dict.fromkeys(f"{m.initializer}[{m.axis}]" for m in g.members if m.role == role))
            for role in (PRODUCES, CONSUMES, FOLLOWS)
        }
        line = f"{g.size} {g.kind}: {' '.join(by_role[PRODUCES])}"
        line += f" -> {' '.join(by_role[CONSUMES])}" if by_role[CONSUMES] else ""
        line += f" | {' '.join(by_role[FOLLOWS])}" if by_role[FOLLOWS] else ""
        lines.append(line)
    return lines


def barriers(model: onnx.ModelProto) -> list[str]:
    """Why the rest is frozen, most parameters first."""
    return [f"{b.barrier.op_type}: {b.barrier.reason}" for b in analyse(load(model)).barriers]


@pytest.fixture
def proved(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Prunes the first unit and every third one after it of all groups that may be pruned, and proves the result."""

    def prune_and_prove(model: onnx.ModelProto, *, inexact: bool = False, tolerance: float = 1e-4) -> None:
        analysis = analyse(load(model))
        keep = {}
        for g in analysis.groups:
            if g.kind == INEXACT and not (inexact and analysis.provable(g)):
                continue
            units = np.arange(g.size)
            keep[g.id] = units[units % 3 != 0] if g.size > 1 else units
        assert keep
        plan = Plan(keep)
        path = tmp_path / "pruned.onnx"
        write(rewrite(analysis, plan), path)
        assert prove(analysis, plan, path).max_rel_error < tolerance

    return prune_and_prove


class TestConvolutions:
    """Channels of images."""

    def test_a_chain_has_one_group_between_two_convolutions(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1, b1)
            r = Relu(a)
            y = Conv(r, w2, b2)
        }""",
            w1=(8, 3, 1, 1),
            b1=(8,),
            w2=(4, 8, 1, 1),
            b2=(4,),
        )
        assert groups(model) == ["8 exact: w1[0] b1[0] -> w2[1]"]
        assert barriers(model) == ["output: graph output 'y'"]
        proved(model)

    def test_batch_normalization_belongs_to_the_channels_and_its_statistics_follow(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            n = BatchNormalization(a, gamma, beta, mean, var)
            y = Conv(n, w2)
        }""",
            w1=(8, 3, 1, 1),
            gamma=(8,),
            beta=(8,),
            mean=(8,),
            var=np.linspace(0.5, 1.5, 8, dtype=np.float32),
            w2=(4, 8, 1, 1),
        )
        assert groups(model) == ["8 exact: w1[0] gamma[0] beta[0] -> w2[1] | mean[0] var[0]"]
        proved(model)

    def test_a_residual_ties_all_writers_of_the_stream(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            s = Conv(x, stem)
            a = Conv(s, down)
            r = Relu(a)
            b = Conv(r, up)
            t = Add(s, b)
            y = Conv(t, head)
        }""",
            stem=(8, 3, 1, 1),
            down=(6, 8, 1, 1),
            up=(8, 6, 1, 1),
            head=(4, 8, 1, 1),
        )
        assert groups(model) == ["8 exact: stem[0] up[0] -> down[1] head[1]", "6 exact: down[0] -> up[1]"]
        proved(model)

    def test_a_concatenation_keeps_its_branches_apart(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, wa)
            b = Conv(x, wb)
            c = Concat<axis=1>(a, x, b)
            y = Conv(c, w)
        }""",
            wa=(8, 3, 1, 1),
            wb=(6, 3, 1, 1),
            w=(4, 17, 1, 1),
        )
        assert groups(model) == ["8 exact: wa[0] -> w[1]", "6 exact: wb[0] -> w[1]"]
        proved(model)

    def test_branches_that_are_added_after_concatenation_are_refined_to_common_pieces(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w24)
            b = Conv(x, w40)
            c = Conv(x, w32a)
            d = Conv(x, w32b)
            ab = Concat<axis=1>(a, b)
            cd = Concat<axis=1>(c, d)
            s = Add(ab, cd)
            y = Conv(s, w)
        }""",
            w24=(24, 3, 1, 1),
            w40=(40, 3, 1, 1),
            w32a=(32, 3, 1, 1),
            w32b=(32, 3, 1, 1),
            w=(4, 64, 1, 1),
        )
        assert groups(model) == [
            "24 exact: w24[0] w32a[0] -> w[1]",
            "8 exact: w40[0] w32a[0] -> w[1]",
            "32 exact: w40[0] w32b[0] -> w[1]",
        ]
        proved(model)

    def test_depthwise_channels_are_those_of_their_neighbours(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, expand)
            d = Conv<group=8, pads=[1,1,1,1]>(a, depth, bias)
            y = Conv(d, project)
        }""",
            expand=(8, 3, 1, 1),
            depth=(8, 1, 3, 3),
            bias=(8,),
            project=(4, 8, 1, 1),
        )
        assert groups(model) == ["8 exact: expand[0] depth[0] bias[0] -> project[1]"]
        proved(model)

    def test_a_grouped_convolution_loses_whole_groups_or_the_same_place_in_every_group(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            b = Conv<group=3>(a, w2)
            y = Conv(b, w3)
        }""",
            w1=(12, 3, 1, 1),
            w2=(6, 4, 1, 1),
            w3=(4, 6, 1, 1),
        )
        assert groups(model) == ["3 exact: w1[0] w2[0] -> w3[1]", "4 exact: w1[0] -> w2[1]", "2 exact: w2[0] -> w3[1]"]
        proved(model)

    def test_a_transposed_convolution_has_its_outputs_on_the_second_axis(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,16,16] y) {
            a = Conv(x, w1)
            b = ConvTranspose<strides=[2,2]>(a, w2, b2)
            y = Conv(b, w3)
        }""",
            w1=(8, 3, 1, 1),
            w2=(8, 6, 2, 2),
            b2=(6,),
            w3=(4, 6, 1, 1),
        )
        assert groups(model) == ["8 exact: w1[0] -> w2[0]", "6 exact: w2[1] b2[0] -> w3[1]"]
        proved(model)

    def test_a_channel_shuffle_has_units_of_whole_groups_and_of_places_in_groups(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            apart = Constant<value = int64[5] {0, 3, 4, 8, 8}>()
            together = Constant<value = int64[4] {0, -1, 8, 8}>()
            r = Reshape(a, apart)
            t = Transpose<perm=[0,2,1,3,4]>(r)
            s = Reshape(t, together)
            y = Conv(s, w2)
        }""",
            w1=(12, 3, 1, 1),
            w2=(4, 12, 1, 1),
        )
        assert groups(model) == ["3 exact: w1[0] -> w2[1]", "4 exact: w1[0] -> w2[1]"]
        proved(model)

    @pytest.mark.parametrize("mode", ["DCR", "CRD"])
    def test_a_pixel_shuffle_has_units_of_a_whole_block(self, proved, mode: str) -> None:
        model = from_text(
            f"""(float[N,3,8,8] x) => (float[N,4,16,16] y) {{
            a = Conv(x, w1, b1)
            d = DepthToSpace<blocksize=2, mode="{mode}">(a)
            y = Conv(d, w2)
        }}""",
            w1=(12, 3, 1, 1),
            b1=(12,),
            w2=(4, 3, 1, 1),
        )
        assert groups(model) == ["3 exact: w1[0] b1[0] -> w2[1]"]
        proved(model)

    def test_squeeze_and_excite_has_its_own_bottleneck_and_the_gated_channels(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            m = GlobalAveragePool(a)
            s = Conv(m, squeeze, bs)
            r = Relu(s)
            e = Conv(r, excite, be)
            g = Sigmoid(e)
            o = Mul(a, g)
            y = Conv(o, w2)
        }""",
            w1=(8, 3, 1, 1),
            squeeze=(2, 8, 1, 1),
            bs=(2,),
            excite=(8, 2, 1, 1),
            be=(8,),
            w2=(4, 8, 1, 1),
        )
        assert groups(model) == [
            "8 exact: w1[0] excite[0] be[0] -> squeeze[1] w2[1]",
            "2 exact: squeeze[0] bs[0] -> excite[1]",
        ]
        proved(model)

    def test_the_channels_that_a_shortcut_pads_are_units_of_the_other_branch(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            pads = Constant<value = int64[8] {0,2,0,0,0,4,0,0}>()
            p = Pad(a, pads)
            b = Conv(a, w2)
            s = Add(p, b)
            y = Conv(s, w3)
        }""",
            w1=(8, 3, 1, 1),
            w2=(14, 8, 1, 1),
            w3=(4, 14, 1, 1),
        )
        assert groups(model) == [
            "8 exact: w1[0] w2[0] -> w2[1] w3[1]",
            "2 exact: w2[0] -> w3[1]",
            "4 exact: w2[0] -> w3[1]",
        ]
        proved(model)

    def test_the_slopes_of_a_prelu_follow(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            p = PRelu(a, slope)
            y = Conv(p, w2)
        }""",
            w1=(8, 3, 1, 1),
            slope=(8, 1, 1),
            w2=(4, 8, 1, 1),
        )
        assert groups(model) == ["8 exact: w1[0] -> w2[1] | slope[0]"]
        proved(model)


class TestAttention:
    """Heads and head widths are factors of the projections."""

    REST = """
        qh = Transpose<perm=[0,2,1,3]>(q4)
        kt = Transpose<perm=[0,2,3,1]>(k4)
        vh = Transpose<perm=[0,2,1,3]>(v4)
        s = MatMul(qh, kt)
        p = Softmax<axis=-1>(s)
        o = MatMul(p, vh)
        ot = Transpose<perm=[0,2,1,3]>(o)
        merged = Constant<value = int64[3] {0, 0, -1}>()
        of = Reshape(ot, merged)
        y = MatMul(of, wo)
    }"""

    def test_separate_projections(self, proved) -> None:
        """Heads tie all three; query-key channels tie two; value channels stand alone."""
        model = from_text(
            """(float[N,5,16] x) => (float[N,5,7] y) {
            apart = Constant<value = int64[4] {0, 0, 3, -1}>()
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            q4 = Reshape(q, apart)
            k4 = Reshape(k, apart)
            v4 = Reshape(v, apart)"""
            + self.REST,
            wq=(16, 12),
            wk=(16, 12),
            wv=(16, 18),
            wo=(18, 7),
        )
        assert groups(model) == [
            "3 exact: wq[1] wk[1] wv[1] -> wo[0]",
            "4 exact: wq[1] wk[1]",
            "6 exact: wv[1] -> wo[0]",
        ]
        proved(model)

    @pytest.mark.parametrize("way", ["split", "slices"])
    def test_a_packed_projection_taken_apart(self, proved, way: str) -> None:
        taken = (
            "q, k, v = Split<axis=2>(qkv, sizes)"
            if way == "split"
            else """
            q = Slice(qkv, c0, c12, c2)
            k = Slice(qkv, c12, c24, c2)
            v = Slice(qkv, c24, c36, c2)"""
        )
        model = from_text(
            f"""(float[N,5,16] x) => (float[N,5,7] y) {{
            apart = Constant<value = int64[4] {{0, 0, 3, -1}}>()
            qkv = MatMul(x, w)
            {taken}
            q4 = Reshape(q, apart)
            k4 = Reshape(k, apart)
            v4 = Reshape(v, apart)"""
            + self.REST,
            w=(16, 36),
            wo=(12, 7),
            **(
                {"sizes": np.array([12, 12, 12])}
                if way == "split"
                else {f"c{k}": np.array([k]) for k in (0, 2, 12, 24, 36)}
            ),
        )
        assert groups(model) == ["3 exact: w[1] -> wo[0]", "4 exact: w[1]", "4 exact: w[1] -> wo[0]"]
        proved(model)

    def test_a_packed_projection_as_a_fifth_axis(self, proved) -> None:
        """timm: (N, T, 3, h, d), transposed to (3, N, h, T, d), taken apart by Gather."""
        model = from_text(
            """(float[N,5,16] x) => (float[N,5,7] y) {
            apart = Constant<value = int64[5] {0, 0, 3, 3, 4}>()
            zero = Constant<value = int64 {0}>()
            one = Constant<value = int64 {1}>()
            two = Constant<value = int64 {2}>()
            qkv = MatMul(x, w)
            five = Reshape(qkv, apart)
            t = Transpose<perm=[2,0,3,1,4]>(five)
            qh = Gather<axis=0>(t, zero)
            k = Gather<axis=0>(t, one)
            vh = Gather<axis=0>(t, two)
            kt = Transpose<perm=[0,1,3,2]>(k)"""
            + self.REST[self.REST.index("        s =") :],
            w=(16, 36),
            wo=(12, 7),
        )
        found = groups(model)
        assert found[0] == "3 exact: w[1] -> wo[0]"
        assert len(found) >= 2
        proved(model)

    def test_grouped_queries_lose_key_value_heads_with_all_of_their_queries(self, proved) -> None:
        model = from_text(
            """(float[N,5,16] x) => (float[N,5,7] y) {
            qs = Constant<value = int64[4] {0, 0, 6, 4}>()
            ks = Constant<value = int64[4] {0, 0, 2, 4}>()
            wide = Constant<value = int64[5] {1, 1, 3, 1, 1}>()
            heads = Constant<value = int64[4] {0, 6, 5, 4}>()
            two = Constant<value = int64[1] {2}>()
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            q4 = Reshape(q, qs)
            k4 = Reshape(k, ks)
            v4 = Reshape(v, ks)
            qh = Transpose<perm=[0,2,1,3]>(q4)
            kh = Transpose<perm=[0,2,1,3]>(k4)
            vh0 = Transpose<perm=[0,2,1,3]>(v4)
            ku = Unsqueeze(kh, two)
            vu = Unsqueeze(vh0, two)
            ke = Expand(ku, wide)
            ve = Expand(vu, wide)
            kr = Reshape(ke, heads)
            vh = Reshape(ve, heads)
            kt = Transpose<perm=[0,1,3,2]>(kr)"""
            + self.REST[self.REST.index("        s =") :],
            wq=(16, 24),
            wk=(16, 8),
            wv=(16, 8),
            wo=(24, 7),
        )
        analysis = analyse(load(model))
        found = described(analysis)
        assert "2 exact: wq[1] wk[1] wv[1] -> wo[0]" in found
        assert "4 exact: wq[1] wk[1]" in found and "4 exact: wv[1] -> wo[0]" in found
        repeats = next(g for g in analysis.groups if g.size == 3)
        assert repeats.kind == INEXACT, "one query head of a shared key-value head does not vanish by itself"
        assert {m.initializer for m in repeats.members} == {"wq", "wo"}
        proved(model)

    def test_rotary_embeddings_tie_the_two_halves_of_a_head(self, proved) -> None:
        turn = """
            {0}l = Slice({0}h, c0, c2, c3)
            {0}r = Slice({0}h, c2, c4, c3)
            {0}n = Neg({0}r)
            {0}t = Concat<axis=3>({0}n, {0}l)
            {0}c = Mul({0}h, cos)
            {0}s = Mul({0}t, sin)
            {0}e = Add({0}c, {0}s)"""
        model = from_text(
            """(float[N,5,16] x) => (float[N,5,7] y) {
            apart = Constant<value = int64[4] {0, 0, 3, -1}>()
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            q4 = Reshape(q, apart)
            k4 = Reshape(k, apart)
            v4 = Reshape(v, apart)
            qh = Transpose<perm=[0,2,1,3]>(q4)
            kh = Transpose<perm=[0,2,1,3]>(k4)
            vh = Transpose<perm=[0,2,1,3]>(v4)"""
            + turn.format("q")
            + turn.format("k")
            + """
            kx = Transpose<perm=[0,1,3,2]>(ke)
            s = MatMul(qe, kx)"""
            + self.REST[self.REST.index("        p =") :],
            wq=(16, 12),
            wk=(16, 12),
            wv=(16, 12),
            wo=(12, 7),
            cos=(5, 4),
            sin=(5, 4),
            **{f"c{k}": np.array([k]) for k in (0, 2, 3, 4)},
        )
        found = groups(model)
        assert "3 exact: wq[1] wk[1] wv[1] -> wo[0]" in found
        halves = next(line for line in found if line.startswith("2 exact: wq[1]"))
        assert "wk[1]" in halves and "wv" not in halves
        proved(model)

    def test_microsoft_attention(self, proved) -> None:
        model = from_text(
            """(float[N,5,16] x) => (float[N,5,7] y) {
            a = com.microsoft.Attention<num_heads=3>(x, w, b)
            y = MatMul(a, wo)
        }""",
            microsoft=True,
            w=(16, 36),
            b=(36,),
            wo=(12, 7),
        )
        assert groups(model) == ["3 exact: w[1] b[0] -> wo[0]"], "the kernel derives its scale from the head width"
        proved(model)

    def test_microsoft_attention_with_a_scale_of_its_own(self, proved) -> None:
        model = from_text(
            """(float[N,5,16] x) => (float[N,5,7] y) {
            a = com.microsoft.Attention<num_heads=3, scale=0.5>(x, w, b)
            y = MatMul(a, wo)
        }""",
            microsoft=True,
            w=(16, 36),
            b=(36,),
            wo=(12, 7),
        )
        assert groups(model) == ["3 exact: w[1] b[0] -> wo[0]", "4 exact: w[1] b[0] -> wo[0]"]
        proved(model)

    def test_microsoft_multi_head_attention(self, proved) -> None:
        model = from_text(
            """(float[N,5,16] x) => (float[N,5,7] y) {
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            a = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v)
            y = MatMul(a, wo)
        }""",
            microsoft=True,
            wq=(16, 12),
            wk=(16, 12),
            wv=(16, 18),
            wo=(18, 7),
        )
        assert groups(model) == ["3 exact: wq[1] wk[1] wv[1] -> wo[0]", "6 exact: wv[1] -> wo[0]"]
        proved(model)


class TestLayers:
    """Matrix products, recurrent cells, gates, shared parameters."""

    def test_a_gemm_chain(self, proved) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = Gemm<transB=1>(x, w1, b1)
            r = Relu(a)
            y = Gemm(r, w2, b2)
        }""",
            w1=(8, 5),
            b1=(8,),
            w2=(8, 4),
            b2=(4,),
        )
        assert groups(model) == ["8 exact: w1[0] b1[0] -> w2[0]"]
        proved(model)

    @pytest.mark.parametrize("way", ["split", "two layers"])
    def test_a_gated_unit_ties_the_gate_to_what_it_gates(self, proved, way: str) -> None:
        if way == "split":
            head, weights, members = "h = MatMul(x, w)\n a, g = Split<axis=1>(h)", {"w": (5, 12)}, "w[1]"
        else:
            head, weights, members = (
                "a = MatMul(x, wa)\n g = MatMul(x, wg)",
                {"wa": (5, 6), "wg": (5, 6)},
                "wa[1] wg[1]",
            )
        model = from_text(
            f"""(float[N,5] x) => (float[N,4] y) {{
            {head}
            s = Sigmoid(g)
            m = Mul(a, s)
            y = MatMul(m, w2)
        }}""",
            w2=(6, 4),
            **weights,
        )
        assert groups(model) == [f"6 exact: {members} -> w2[0]"]
        proved(model)

    @pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    def test_a_bidirectional_cell_has_one_group_over_gates_directions_and_recurrence(
        self, proved, op: str, gates: int
    ) -> None:
        model = from_text(
            f"""(float[7,N,5] x) => (float[7,N,4] y) {{
            h = {op}<hidden_size=6, direction="bidirectional">(x, w, r, b)
            t = Transpose<perm=[0,2,1,3]>(h)
            flat = Constant<value = int64[3] {{0, 0, 12}}>()
            f = Reshape(t, flat)
            y = MatMul(f, w2)
        }}""",
            w=(2, 6 * gates, 5),
            r=(2, 6 * gates, 6),
            b=(2, 12 * gates),
            w2=(12, 4),
        )
        assert groups(model) == ["6 exact: w[1] r[1] b[1] -> r[2] w2[0]"]
        proved(model)

    def test_an_einsum_contracts_its_missing_letters(self, proved) -> None:
        model = from_text(
            """(float[N,5,6] x) => (float[N,5,4] y) {
            a = Einsum<equation="bti,io->bto">(x, w1)
            y = Einsum<equation="...i,oi->...o">(a, w2)
        }""",
            w1=(6, 8),
            w2=(4, 8),
        )
        assert groups(model) == ["8 exact: w1[1] -> w2[1]"]
        proved(model)

    def test_a_small_parameter_that_is_shared_is_pruned_for_each_use_apart(self, proved) -> None:
        """An exporter merges equal biases; that ties no layers."""
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = Gemm(x, w1, b)
            r = Relu(a)
            c = Gemm(r, w2, b)
            y = Gemm(c, w3)
        }""",
            w1=(5, 8),
            w2=(8, 8),
            w3=(8, 4),
            b=(8,),
        )
        assert groups(model) == ["8 exact: w1[1] b[0] -> w2[0]", "8 exact: w2[1] b[0] -> w3[0]"]
        proved(model)

    def test_a_matrix_that_is_shared_stays_one_matrix(self, proved) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            b = MatMul(a, w)
            r = Relu(b)
            c = MatMul(r, w)
            y = MatMul(c, w2)
        }""",
            w1=(5, 8),
            w=(8, 8),
            w2=(8, 4),
        )
        found = groups(model)
        assert found == ["8 exact: w1[1] w[1] -> w[0] w2[0]"]
        proved(model)

    def test_tied_embeddings_share_their_width(self, proved) -> None:
        """The table looks words up and scores them: words stay, the width is one group."""
        model = from_text(
            """(int64[N,5] ids) => (float[N,5,9] y) {
            e = Gather(table, ids)
            r = Relu(e)
            h = MatMul(r, w)
            t = Transpose<perm=[1,0]>(table)
            s = Add(h, e)
            y = MatMul(s, t)
        }""",
            table=(9, 8),
            w=(8, 8),
        )
        found = groups(model)
        assert len(found) == 1 and found[0].startswith("8 exact: table[1]")
        proved(model)


class TestQuantised:
    """Scales and zero points follow; integers that stand for zero are zero."""

    def test_weights_quantised_per_channel(self, proved) -> None:
        rng = np.random.default_rng(0)
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            wf = DequantizeLinear<axis=0>(w1, s1, z1)
            a = Conv(x, wf, b1)
            q = QuantizeLinear(a, sa, za)
            d = DequantizeLinear(q, sa, za)
            r = Relu(d)
            y = Conv(r, w2)
        }""",
            w1=rng.integers(-127, 128, (8, 3, 1, 1)).astype(np.int8),
            s1=np.linspace(0.01, 0.02, 8, dtype=np.float32),
            z1=rng.integers(-3, 4, 8).astype(np.int8),
            b1=(8,),
            sa=np.array(0.05, np.float32),
            za=np.array(7, np.uint8),
            w2=(4, 8, 1, 1),
        )
        assert groups(model) == ["8 exact: w1[0] b1[0] -> w2[1] | s1[0] z1[0]"]
        proved(model)

    def test_qlinear_conv(self, proved) -> None:
        rng = np.random.default_rng(0)
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            q = QuantizeLinear(x, sx, zx)
            a = QLinearConv(q, sx, zx, w1, s1, z1, sa, za, b1)
            b = QLinearConv(a, sa, za, w2, s2, z2, sx, zx)
            y = DequantizeLinear(b, sx, zx)
        }""",
            sx=np.array(0.05, np.float32),
            zx=np.array(128, np.uint8),
            w1=rng.integers(-99, 99, (8, 3, 1, 1)).astype(np.int8),
            s1=np.linspace(0.01, 0.02, 8, dtype=np.float32),
            z1=np.zeros(8, np.int8),
            sa=np.array(0.05, np.float32),
            za=np.array(3, np.uint8),
            b1=rng.integers(-99, 99, 8).astype(np.int32),
            w2=rng.integers(-99, 99, (4, 8, 1, 1)).astype(np.int8),
            s2=np.array([0.01], np.float32),
            z2=np.array([0], np.int8),
        )
        assert groups(model) == ["8 exact: w1[0] b1[0] -> w2[1] | s1[0] z1[0]"]
        proved(model, tolerance=1e-6)

    def test_matmul_nbits_loses_columns_one_by_one_and_rows_by_blocks(self, proved) -> None:
        rng = np.random.default_rng(0)
        model = from_text(
            """(float[N,48] x) => (float[N,4] y) {
            a = com.microsoft.MatMulNBits<K=48, N=64, bits=4, block_size=16>(x, b1, s1)
            r = Relu(a)
            b = com.microsoft.MatMulNBits<K=64, N=12, bits=4, block_size=16>(r, b2, s2)
            y = MatMul(b, w)
        }""",
            microsoft=True,
            b1=rng.integers(0, 256, (64, 3, 8)).astype(np.uint8),
            s1=(64 * 3,),
            b2=rng.integers(0, 256, (12, 4, 8)).astype(np.uint8),
            s2=(12 * 4,),
            w=(12, 4),
        )
        found = groups(model)
        assert any(line.startswith("4 exact: ") and "b2[1]" in line for line in found), "four blocks of 16 rows"
        assert any(line.startswith("12 exact: ") and line.endswith("-> w[0] | b2[0]") for line in found)
        proved(model)


class TestExactness:
    """What a dead unit leaves behind, where its axis disappears."""

    def test_a_layer_norm_over_the_axis_is_inexact(self, proved) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            n = LayerNormalization<axis=-1>(a, gamma, beta)
            y = MatMul(n, w2)
        }""",
            w1=(5, 9),
            gamma=(9,),
            beta=(9,),
            w2=(9, 4),
        )
        analysis = analyse(load(model))
        assert described(analysis) == ["9 inexact: w1[1] gamma[0] beta[0] -> w2[0]"]
        assert "LayerNormalization" in analysis.groups[0].reason
        if analysis.provable(analysis.groups[0]):
            proved(model, inexact=True)

    def test_a_layer_norm_over_another_axis_is_exact(self, proved) -> None:
        model = from_text(
            """(float[N,3,6] x) => (float[N,4,6] y) {
            a = Conv(x, w1)
            n = LayerNormalization<axis=2>(a, gamma, beta)
            y = Conv(n, w2)
        }""",
            w1=(8, 3, 1),
            gamma=(6,),
            beta=(6,),
            w2=(4, 8, 1),
        )
        assert groups(model)[0].startswith("8 inexact"), "beta, which every channel shares, brings a dead one to life"
        without_beta = from_text(
            """(float[N,3,6] x) => (float[N,4,6] y) {
            a = Conv(x, w1)
            n = LayerNormalization<axis=2>(a, gamma)
            y = Conv(n, w2)
        }""",
            w1=(8, 3, 1),
            gamma=(6,),
            w2=(4, 8, 1),
        )
        assert groups(without_beta) == ["8 exact: w1[0] -> w2[1]"]
        proved(without_beta)

    def test_skip_layer_normalization_is_inexact_in_its_width_only(self) -> None:
        model = from_text(
            """(float[N,5,6] x) => (float[N,5,4] y) {
            a = MatMul(x, w1)
            r = Relu(a)
            b = MatMul(r, w2)
            s = MatMul(x, w3)
            n = com.microsoft.SkipLayerNormalization(b, s, gamma, beta)
            y = MatMul(n, w4)
        }""",
            microsoft=True,
            w1=(6, 7),
            w2=(7, 8),
            w3=(6, 8),
            gamma=(8,),
            beta=(8,),
            w4=(8, 4),
        )
        assert groups(model) == ["7 exact: w1[1] -> w2[0]", "8 inexact: w2[1] w3[1] gamma[0] beta[0] -> w4[0]"]

    def test_group_normalization_loses_whole_groups_exactly(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            n = GroupNormalization<num_groups=3>(a, gamma, beta)
            y = Conv(n, w2)
        }""",
            opset=21,
            ir=10,
            w1=(12, 3, 1, 1),
            gamma=(12,),
            beta=(12,),
            w2=(4, 12, 1, 1),
        )
        assert groups(model) == [
            "3 exact: w1[0] gamma[0] beta[0] -> w2[1]",
            "4 inexact: w1[0] gamma[0] beta[0] -> w2[1]",
        ]
        proved(model)

    def test_an_instance_norm_is_exact_in_its_channels(self, proved) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            n = InstanceNormalization(a, gamma, beta)
            y = Conv(n, w2)
        }""",
            w1=(8, 3, 1, 1),
            gamma=(8,),
            beta=(8,),
            w2=(4, 8, 1, 1),
        )
        assert groups(model) == ["8 exact: w1[0] gamma[0] beta[0] -> w2[1]"]
        proved(model)

    def test_a_root_mean_square_over_the_axis_is_compensated(self, proved) -> None:
        written_out = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            two = Constant<value = float {2.0}>()
            eps = Constant<value = float {0.001}>()
            s = Pow(a, two)
            m = ReduceMean<axes=[-1]>(s)
            e = Add(m, eps)
            r = Sqrt(e)
            d = Div(a, r)
            n = Mul(d, gamma)
            y = MatMul(n, w2)
        }""",
            w1=(5, 9),
            gamma=(9,),
            w2=(9, 4),
        )
        assert groups(written_out) == ["9 compensated: w1[1] gamma[0] -> w2[0]"]
        proved(written_out)
        fused = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            n = RMSNormalization<axis=-1, epsilon=0.001>(a, gamma)
            y = MatMul(n, w2)
        }""",
            opset=23,
            ir=11,
            w1=(5, 9),
            gamma=(9,),
            w2=(9, 4),
        )
        assert groups(fused) == ["9 compensated: w1[1] gamma[0] -> w2[0]"]
        proved(fused)

    def test_a_mean_over_the_axis_is_compensated_and_a_maximum_is_not(self, proved) -> None:
        text = """(float[N,3,8,8] x) => (float[N,4,8,8] y) {{
            a = Conv(x, w1)
            m = {0}<axes=[1]>(a)
            y = Conv(m, w2)
        }}"""
        mean = from_text(text.format("ReduceMean"), w1=(9, 3, 1, 1), w2=(4, 1, 1, 1))
        assert groups(mean) == ["9 compensated: w1[0]"]
        proved(mean)
        maximum = from_text(text.format("ReduceMax"), w1=(9, 3, 1, 1), w2=(4, 1, 1, 1))
        assert groups(maximum) == ["9 inexact: w1[0]"]

    def test_a_constant_is_folded_into_a_gemm(self, proved) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = Gemm(x, w1, b1)
            s = Sigmoid(a)
            y = Gemm(s, w2, b2)
        }""",
            w1=(5, 9),
            b1=(9,),
            w2=(9, 4),
            b2=(4,),
        )
        assert groups(model) == ["9 compensated: w1[1] b1[0] -> w2[0]"]
        proved(model)

    def test_a_constant_before_a_padded_convolution_is_inexact_and_before_an_unpadded_one_is_folded(
        self, proved
    ) -> None:
        text = """(float[N,3,8,8] x) => (float[N,4,h,w] y) {{
            a = Conv(x, w1)
            s = Sigmoid(a)
            y = Conv{0}(s, w2)
        }}"""
        padded = from_text(text.format("<pads=[1,1,1,1]>"), w1=(9, 3, 1, 1), w2=(4, 9, 3, 3))
        assert groups(padded) == ["9 inexact: w1[0] -> w2[1]"]
        proved(padded, inexact=True)
        plain = from_text(text.format(""), w1=(9, 3, 1, 1), w2=(4, 9, 3, 3))
        assert groups(plain) == ["9 compensated: w1[0] -> w2[1]"]
        proved(plain)

    def test_a_bias_after_the_activation_brings_a_unit_to_life_unless_it_is_pruned_too(self, proved) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,4] y) {
            a = MatMul(x, w1)
            b = Add(a, bias)
            one = Constant<value = float {1.0}>()
            c = Add(b, one)
            y = MatMul(c, w2)
        }""",
            w1=(5, 9),
            bias=(9,),
            w2=(9, 4),
        )
        assert groups(model) == ["9 compensated: w1[1] bias[0] -> w2[0]"], "the constant 1 is folded"
        proved(model)


class TestBarriers:
    """What is not understood stays, with the reason."""

    def test_a_softmax_over_channels(self) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            s = Softmax<axis=1>(a)
            y = Conv(s, w2)
        }""",
            w1=(8, 3, 1, 1),
            w2=(4, 8, 1, 1),
        )
        assert groups(model) == []
        assert "Softmax: a Softmax runs over it" in barriers(model)

    def test_an_operator_that_nobody_knows(self) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) <float[N,8,8,8] c, float[N,5,8,8] e> {
            a = Conv(x, w1)
            r = Relu(a)
            b = Conv(r, w2)
            c = com.microsoft.Mystery(b)
            d = Conv(c, w3)
            e = com.microsoft.Mystery(d)
            y = Conv(e, w4)
        }""",
            microsoft=True,
            w1=(6, 3, 1, 1),
            w2=(8, 6, 1, 1),
            w3=(5, 8, 1, 1),
            w4=(4, 5, 1, 1),
        )
        assert groups(model) == ["6 exact: w1[0] -> w2[1]"]
        assert "com.microsoft::Mystery: com.microsoft::Mystery is not understood" in barriers(model)

    def test_a_weight_that_a_control_flow_body_captures(self) -> None:
        body = {}
        for branch, op in (("then_branch", "Add"), ("else_branch", "Sub")):
            out = helper.make_tensor_value_info(branch, TensorProto.FLOAT, None)
            body[branch] = helper.make_graph([helper.make_node(op, ["h", "b"], [branch])], branch, [], [out])
        model = from_text(
            """(float[N,5] x, bool[1] c) => (float[N,4] y) {
            h = MatMul(x, w1)
            i = Identity(h)
            r = Relu(i)
            y = MatMul(r, w2)
        }""",
            w1=(5, 8),
            b=(8,),
            w2=(8, 4),
        )
        made = helper.make_node("If", ["c"], ["i"], **body)
        model.graph.node[1].CopyFrom(made)
        assert groups(model) == []
        assert any(b.startswith("If: a control-flow body") for b in barriers(model))

    def test_a_graph_output_keeps_its_axes(self) -> None:
        model = from_text(
            """(float[N,5] x) => (float[N,8] h, float[N,4] y) {
            h = MatMul(x, w1)
            y = MatMul(h, w2)
        }""",
            w1=(5, 8),
            w2=(8, 4),
        )
        assert groups(model) == []
        assert set(barriers(model)) >= {"output: graph output 'h'"}

    def test_what_is_looked_up_by_index_stays(self) -> None:
        model = from_text(
            """(int64[N,5] ids) => (float[N,5,4] y) {
            e = Gather(table, ids)
            y = MatMul(e, w)
        }""",
            table=(9, 8),
            w=(8, 4),
        )
        assert groups(model) == ["8 exact: table[1] -> w[0]"]

    def test_every_parameter_is_either_in_a_group_or_behind_a_barrier(self) -> None:
        model = from_text(
            """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)
            s = Softmax<axis=1>(a)
            b = Conv(s, w2)
            y = Conv(b, w3)
        }""",
            w1=(8, 3, 1, 1),
            w2=(6, 8, 1, 1),
            w3=(4, 6, 1, 1),
        )
        analysis = analyse(load(model))
        total = 8 * 3 + 6 * 8 + 4 * 6
        assert analysis.coverage.params_total == total
        assert analysis.coverage.params_prunable == 6 * 8 + 4 * 6
        assert sum(b.params for b in analysis.barriers) == total - analysis.coverage.params_prunable


class TestExclude:
    """Regular expressions of what to leave alone."""

    MODEL = """(float[N,5] x) => (float[N,4] y) {
        [first] a = MatMul(x, w1)
        [second] b = MatMul(a, w2)
        [third] y = MatMul(b, w3)
    }"""
    SHAPES = {"w1": (5, 8), "w2": (8, 6), "w3": (6, 4)}

    @pytest.mark.parametrize(
        ("pattern", "left"),
        [
            ("^w1$", ["6 exact: w2[1] -> w3[0]"]),
            ("^first$", ["6 exact: w2[1] -> w3[0]"]),
            ("^third$", ["8 exact: w1[1] -> w2[0]"]),
            ("w[23]", []),
        ],
    )
    def test_groups_that_a_matching_name_takes_part_in_stay_whole(self, pattern: str, left: list[str]) -> None:
        assert groups(from_text(self.MODEL, **self.SHAPES), exclude=[pattern]) == left

    def test_the_reason_names_the_pattern(self) -> None:
        analysis = analyse(load(from_text(self.MODEL, **self.SHAPES)), exclude=["second"])
        assert any("excluded by 'second'" in b.barrier.reason for b in analysis.barriers)

    @pytest.mark.parametrize("pattern", ["no such name", "(", "*"])
    def test_a_pattern_that_matches_nothing_or_is_none_is_refused(self, pattern: str) -> None:
        with pytest.raises(UsageError):
            groups(from_text(self.MODEL, **self.SHAPES), exclude=[pattern])
