"""A plan comes as near to its target as whole blocks do, from above where they are small, and costs what was promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.errors import NothingPrunable, TargetNotReached, UsageError
from onnxprune.model.load import load
from onnxprune.model.save import to_proto, write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.align import block_size, steps
from onnxprune.select.choose import Choice, choose, cost_of
from onnxprune.select.plan import Plan
from onnxprune.select.target import parse_target
from tests.graphs import from_text, random_model

CNN = """(float[1,3,8,8] x) => (float[1,10,8,8] y) {
    a = Conv(x, w1)
    r = Relu(a)
    b = Conv<pads=[1,1,1,1]>(r, w2)
    s = Relu(b)
    c = Conv(s, w3)
    d = Add(c, r)
    y = Conv(d, w4)
}"""
SHAPES = {"w1": (64, 3, 1, 1), "w2": (96, 64, 3, 3), "w3": (64, 96, 1, 1), "w4": (10, 64, 1, 1)}
WIDE = {"w1": (256, 3, 1, 1), "w2": (384, 256, 3, 3), "w3": (256, 384, 1, 1), "w4": (10, 256, 1, 1)}


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(load(from_text(CNN, **SHAPES)))


@pytest.fixture(scope="module")
def wide() -> Analysis:
    """The same with so many units that one is far less than one percent."""
    return analyse(load(from_text(CNN, **WIDE)))


def counted(model: onnx.ModelProto) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of the four convolutions over their 64 pixels, counted from the file."""
    sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    return sum(sizes.values()), 64 * sum(sizes[n.input[1]] for n in model.graph.node if n.op_type == "Conv")


def counts(analysis: Analysis, plan: Plan) -> dict[int, int]:
    """Units that stay, by the size of the group."""
    return {g.size: len(plan.keep.get(g.id, range(g.size))) for g in analysis.groups}


class TestTargets:
    """How close a plan gets."""

    @pytest.mark.parametrize("metric", ["params", "macs"])
    @pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5, 0.3, 0.15])
    @pytest.mark.parametrize("scope", ["global", "local"])
    def test_it_is_met_from_above_within_one_percent(
        self, wide: Analysis, metric: str, fraction: float, scope: str
    ) -> None:
        choice = choose(wide, parse_target(f"{metric}={fraction}"), scope=scope, floor=0.02)
        k = 0 if metric == "params" else 1
        before = counted(from_text(CNN, **WIDE))[k]
        after = counted(to_proto(rewrite(wide, choice.plan)))[k]
        assert fraction * (1 - 1e-9) <= after / before <= fraction * 1.01
        assert choice.outcome.reached == pytest.approx(after / before, rel=1e-9)
        assert choice.outcome.met and choice.outcome.wanted == pytest.approx(fraction)

    def test_an_absolute_amount(self, analysis: Analysis) -> None:
        choice = choose(analysis, parse_target("params=30k"), floor=0.02)
        assert 30_000 <= counted(to_proto(rewrite(analysis, choice.plan)))[0] <= 30_300

    def test_the_size_of_the_file(self, tmp_path: Path) -> None:
        onnx.save(from_text(CNN, **SHAPES), tmp_path / "m.onnx")
        whole = (tmp_path / "m.onnx").stat().st_size
        found = analyse(load(tmp_path / "m.onnx"))
        choice = choose(found, parse_target("size=50%"), floor=0.02)
        write(rewrite(found, choice.plan), tmp_path / "small.onnx")
        assert 0.49 <= (tmp_path / "small.onnx").stat().st_size / whole <= 0.515

    def test_channels_are_counted_over_all_groups(self, analysis: Analysis) -> None:
        choice = choose(analysis, parse_target("channels=0.5"))
        assert 80 <= sum(counts(analysis, choice.plan).values()) <= 81

    def test_a_local_scope_takes_the_same_share_of_every_group(self, analysis: Analysis) -> None:
        choice = choose(analysis, parse_target("params=0.4"), scope="local", floor=0.02)
        shares = [n / size for size, n in counts(analysis, choice.plan).items()]
        assert max(shares) - min(shares) < 0.05

    def test_a_global_scope_takes_from_the_group_that_matters_less(self, analysis: Analysis) -> None:
        """A criterion that calls the smaller group's units a thousand times as important as others of it."""
        choice = choose(analysis, parse_target("channels=0.6"), importance=_mostly_dead, floor=0.02)
        kept = counts(analysis, choice.plan)
        assert kept[96] < 40 and kept[64] > 60

    def test_the_least_important_units_go(self, analysis: Analysis) -> None:
        choice = choose(analysis, parse_target("params=0.5"), importance=lambda s, r: np.arange(1.0, s.units + 1))
        for g in choice.plan.pruned(analysis):
            kept = choice.plan.keep[g.id]
            assert kept.tolist() == list(range(g.size - len(kept), g.size))

    def test_more_than_there_is_is_refused(self, analysis: Analysis) -> None:
        with pytest.raises(UsageError, match="and the model has"):
            choose(analysis, parse_target("params=10G"))

    def test_a_target_out_of_reach_is_not_met_and_the_plan_is_as_close_as_it_gets(self, analysis: Analysis) -> None:
        choice = choose(analysis, parse_target("params=0.01"), floor=0.5)
        assert not choice.outcome.met
        assert counts(analysis, choice.plan) == {64: 32, 96: 48}
        assert choice.least == pytest.approx(choice.outcome.reached)

    @pytest.mark.parametrize("macs", [0.86, 0.72, 0.54])
    def test_a_layer_that_saves_little_is_not_stripped_to_fill_a_gap(self, macs: float) -> None:
        """Of the 10 channels each takes a tenth of the cost, all 32 hidden units together take 3 %."""
        model = "(float[1,3,20,20] x) => (float[1,10] y) { a = Conv(x, w1)\n r = Relu(a)\n p = GlobalAveragePool(r)\n"
        model += "f = Flatten(p)\n h = MatMul(f, w2)\n i = Relu(h)\n y = MatMul(i, w3) }"
        found = analyse(load(from_text(model, w1=(10, 3, 1, 1), w2=(10, 32), w3=(32, 10))))
        choice = choose(found, parse_target(f"macs={macs}"))
        assert choice.outcome.reached == pytest.approx(macs, abs=0.05)
        assert counts(found, choice.plan)[32] >= 24

    def test_a_target_between_two_plans_is_met_by_the_smaller(self) -> None:
        """Four units: half of them is within 10 % of 0.55, and three quarters are more than 0.7."""
        model = "(float[1,5] x) => (float[1,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }"
        found = analyse(load(from_text(model, w1=(5, 4), w2=(4, 4))))
        nearer = choose(found, parse_target("macs=0.55"), floor=0.0)
        assert nearer.outcome.reached == 0.5 and nearer.outcome.met
        below = choose(found, parse_target("macs=0.7"), floor=0.0)
        assert below.outcome.reached == 0.5 and below.outcome.met
        above = choose(found, parse_target("macs=0.72"), floor=0.0)
        assert above.outcome.reached == 0.75 and above.outcome.met

    @pytest.mark.parametrize(("option", "value"), [("scope", "universal"), ("floor", -0.1), ("floor", 1.0)])
    def test_options_out_of_range(self, analysis: Analysis, option: str, value: object) -> None:
        with pytest.raises(UsageError, match=option):
            choose(analysis, parse_target("params=0.5"), **{option: value})  # type: ignore[arg-type]

    def test_the_same_seed_gives_the_same_plan(self, analysis: Analysis) -> None:
        first, second = (choose(analysis, parse_target("macs=0.5"), importance="random", seed=4) for _ in range(2))
        assert {k: v.tolist() for k, v in first.plan.keep.items()} == {
            k: v.tolist() for k, v in second.plan.keep.items()
        }


def _mostly_dead(slices: object, rng: np.random.Generator) -> np.ndarray:
    units = slices.units  # type: ignore[attr-defined]
    values = np.ones(units)
    if units == 96:
        values[: 96 - 20] = 1e-3
    return values


class TestFloor:
    """Every group keeps its share."""

    @pytest.mark.parametrize("floor", [0.1, 0.25, 0.6])
    def test_no_group_falls_below_it(self, analysis: Analysis, floor: float) -> None:
        choice = choose(analysis, parse_target("params=0.01"), floor=floor)
        for size, n in counts(analysis, choice.plan).items():
            assert n >= floor * size

    def test_one_unit_stays_at_least(self, analysis: Analysis) -> None:
        choice = choose(analysis, parse_target("params=0.0001"), floor=0.001)
        assert all(n >= 1 for n in counts(analysis, choice.plan).values())


class TestAlignment:
    """Kept counts are whole blocks."""

    @pytest.mark.parametrize("align", [4, 8, 16])
    @pytest.mark.parametrize("scope", ["global", "local"])
    def test_counts_are_multiples_of_the_block(self, analysis: Analysis, align: int, scope: str) -> None:
        choice = choose(analysis, parse_target("params=0.5"), align=align, scope=scope)
        assert choice.align == align or choice.align < align
        assert all(n % choice.align == 0 for n in counts(analysis, choice.plan).values())
        assert choice.outcome.reached >= 0.5 * (1 - 1e-9)

    def test_blocks_are_halved_where_whole_ones_do_not_reach_the_target(self, analysis: Analysis) -> None:
        choice = choose(analysis, parse_target("params=0.9"), align=64)
        assert choice.align < 64 and choice.outcome.met

    def test_a_group_smaller_than_a_block_stays_whole(self) -> None:
        found = analyse(
            load(
                from_text(
                    "(float[1,5] x) => (float[1,4] y) { a = MatMul(x, w1)\n b = MatMul(a, w2)\n y = MatMul(b, w3) }",
                    w1=(5, 6),
                    w2=(6, 64),
                    w3=(64, 4),
                )
            )
        )
        choice = choose(found, parse_target("params=0.64"), align=8)
        assert choice.align == 8 and counts(found, choice.plan) == {6: 6, 64: 40}

    def test_a_size_that_is_no_multiple_is_rounded_down_first(self) -> None:
        found = analyse(
            load(
                from_text(
                    "(float[1,5] x) => (float[1,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }", w1=(5, 70), w2=(70, 4)
                )
            )
        )
        choice = choose(found, parse_target("params=0.91"), align=16)
        assert choice.align == 16 and counts(found, choice.plan) == {70: 64}

    def test_heads_whose_width_is_a_block_go_one_by_one(self) -> None:
        model = from_text(
            """(float[1,5,64] x) => (float[1,5,7] y) {
                apart = Constant<value = int64[4] {0, 0, 6, 32}>()
                q = MatMul(x, wq)
                k = MatMul(x, wk)
                v = MatMul(x, wv)
                q4 = Reshape(q, apart)
                k4 = Reshape(k, apart)
                v4 = Reshape(v, apart)
                qh = Transpose<perm=[0,2,1,3]>(q4)
                kt = Transpose<perm=[0,2,3,1]>(k4)
                vh = Transpose<perm=[0,2,1,3]>(v4)
                s = MatMul(qh, kt)
                p = Softmax<axis=-1>(s)
                o = MatMul(p, vh)
                ot = Transpose<perm=[0,2,1,3]>(o)
                merged = Constant<value = int64[3] {0, 0, 192}>()
                of = Reshape(ot, merged)
                y = MatMul(of, wo)
            }""",
            wq=(64, 192),
            wk=(64, 192),
            wv=(64, 192),
            wo=(192, 7),
        )
        found = analyse(load(model))
        by_size = {g.size: steps(found, list(found.groups), 16)[g.id] for g in found.groups}
        assert by_size[6] == 1, "a head of 32 channels is two whole blocks"
        assert by_size[32] == 8, "6 heads lose 6 channels at a time: 8 of these are three blocks of 16"

    @pytest.mark.parametrize(
        ("deploy", "expected"), [("openvino", {16}), ("tensorrt", {8}), ("none", {1}), ("ort-cpu", {8, 16})]
    )
    def test_deployments_have_their_blocks(self, deploy: str, expected: set[int]) -> None:
        assert block_size(deploy) in expected
        assert block_size(deploy, 3) == 3

    @pytest.mark.parametrize(("deploy", "align"), [("abacus", None), ("none", 0), ("none", -8)])
    def test_unknown_deployments_and_blocks_are_refused(self, deploy: str, align: int | None) -> None:
        with pytest.raises(UsageError):
            block_size(deploy, align)


class TestNothing:
    """Where no plan is possible."""

    def test_no_group_names_what_stands_in_the_way(self) -> None:
        found = analyse(load(from_text("(float[1,5] x) => (float[1,4] y) { y = MatMul(x, w) }", w=(5, 4))))
        with pytest.raises(NothingPrunable, match="graph input|graph output"):
            choose(found, parse_target("params=0.5"))

    def test_only_inexact_groups_need_to_be_allowed(self) -> None:
        found = analyse(
            load(
                from_text(
                    """(float[1,5] x) => (float[1,4] y) {
                a = MatMul(x, w1)
                n = LayerNormalization(a, gamma)
                y = MatMul(n, w2)
            }""",
                    w1=(5, 16),
                    gamma=(16,),
                    w2=(16, 4),
                )
            )
        )
        with pytest.raises(NothingPrunable, match="inexact") as caught:
            choose(found, parse_target("params=0.5"))
        assert "--allow-inexact" in caught.value.hint
        assert choose(found, parse_target("params=0.5"), allow_inexact=True).plan.keep

    def test_a_floor_that_forbids_everything(self) -> None:
        found = analyse(
            load(
                from_text(
                    "(float[1,5] x) => (float[1,4] y) { a = MatMul(x, w1)\n y = MatMul(a, w2) }", w1=(5, 4), w2=(4, 4)
                )
            )
        )
        with pytest.raises(TargetNotReached):
            choose(found, parse_target("params=0.5"), floor=0.99)


@given(
    st.integers(0, 10**6),
    st.sampled_from(["params", "macs", "channels"]),
    st.floats(0.3, 0.95),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["global", "local"]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_promised_is_what_remains(seed: int, metric: str, fraction: float, align: int, scope: str) -> None:
    """Whatever the graph: whole blocks are kept, and below the goal no block is gone that could have stayed."""
    found = analyse(load(random_model(seed)))
    try:
        choice: Choice = choose(found, parse_target(f"{metric}={fraction:.4f}"), align=align, scope=scope, floor=0.05)
    except (NothingPrunable, TargetNotReached, UsageError):
        return
    step = steps(found, list(found.groups), choice.align)
    for g in choice.plan.pruned(found):
        assert 1 <= len(choice.plan.keep[g.id]) < g.size
        assert len(choice.plan.keep[g.id]) % step[g.id] == 0
    assert choice.outcome.met == (
        choice.outcome.reached <= choice.outcome.wanted * (1.05 if choice.least <= choice.outcome.wanted else 1.01)
    )
    if choice.outcome.reached < choice.outcome.wanted * (1 - 1e-6):
        groups = [g for g in found.groups if g.kind != "inexact"]
        cost = cost_of(parse_target(f"{metric}={fraction:.4f}"), found, groups)
        counts = {g.atom: len(choice.plan.keep.get(g.id, range(g.size))) for g in groups}
        for g in choice.plan.pruned(found):
            with_one_more = {**counts, g.atom: min(g.size, counts[g.atom] + step[g.id])}
            assert cost.total(with_one_more) >= choice.outcome.wanted * cost.total({}) * (1 - 1e-6)
    if metric == "channels":
        total = sum(g.size for g in found.groups if g.kind != "inexact")
        gone = sum(g.size - len(choice.plan.keep[g.id]) for g in choice.plan.pruned(found))
        assert choice.outcome.reached == pytest.approx(1 - gone / total)
