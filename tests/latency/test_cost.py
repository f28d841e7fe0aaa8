"""The cost by the clock: what it adds up to, and how it falls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.errors import ModelRejected
from onnxprune.latency import cost as costing
from onnxprune.latency.cost import LatencyCost, Tabled, Worked, latency_cost
from onnxprune.latency.table import Table
from onnxprune.model.load import load
from onnxprune.select.allocate import allocate


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Three products of 512 wide layers, in two groups, and a Softmax that no group shrinks."""
    return analyse(load(mlp(tmp_path_factory.mktemp("cost") / "mlp.onnx", 512)))


def mlp(path: Path, width: int) -> Path:
    rng = np.random.default_rng(0)
    shapes = ((64, width), (width, width), (width, 64))
    weights = [
        numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), f"w{k}") for k, s in enumerate(shapes)
    ]
    nodes = []
    for k in range(3):
        nodes.append(helper.make_node("MatMul", [f"x{k}", f"w{k}"], [f"y{k}"]))
        nodes.append(helper.make_node("Relu" if k < 2 else "Softmax", [f"y{k}"], [f"x{k + 1}"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "mlp",
        [value("x0", TensorProto.FLOAT, ["N", 32, 64])],
        [value("x3", TensorProto.FLOAT, ["N", 32, 64])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def cost(analysis: Analysis) -> LatencyCost:
    return latency_cost(analysis, {g.atom: 16 for g in analysis.groups}, table=Table(1, None))


def test_the_whole_is_what_the_model_takes(analysis: Analysis, cost: LatencyCost) -> None:
    from onnxprune.verify.latency import measure

    [row] = measure([analysis.graph.model.source], seconds=0.5)
    assert cost.total({}) == pytest.approx(row.median_ms * 1e3, rel=0.5)


def test_terms_and_constant_add_up(analysis: Analysis, cost: LatencyCost) -> None:
    [g0, g1] = analysis.groups
    counts = {g0.atom: 128, g1.atom: 256}
    terms = [cost.term(k, counts) for k in range(len(cost.terms))]
    assert cost.total(counts) == pytest.approx(cost.constant + sum(terms))
    assert cost.constant > 0


def test_less_is_never_dearer_and_nothing_is_free(analysis: Analysis, cost: LatencyCost) -> None:
    for group in analysis.groups:
        times = [cost.total({group.atom: n}) for n in range(0, group.size + 1, 16)]
        assert times == sorted(times)
        assert all(a < b for a, b in zip(times, times[1:], strict=False))
        assert times[0] >= cost.constant


def test_the_middle_layer_falls_with_both_of_its_axes(analysis: Analysis, cost: LatencyCost) -> None:
    [g0, g1] = analysis.groups
    both = [p for p in cost.terms if len(p.axes) == 2]
    assert len(both) == 1 and isinstance(both[0], Tabled)
    quarter = both[0].value({g0.atom: 256, g1.atom: 256}) / both[0].value({})
    assert 0.15 < quarter < 0.45


def test_the_terms_of_a_group_are_those_that_change_with_it(analysis: Analysis, cost: LatencyCost) -> None:
    for group in analysis.groups:
        mine = cost.by_atom()[group.atom]
        for k in range(len(cost.terms)):
            changes = cost.term(k, {group.atom: 16}) != cost.term(k, {})
            assert changes == (k in mine)


def test_a_second_run_measures_no_operator_again(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {g.atom: 16 for g in analysis.groups}
    first = latency_cost(analysis, step, table=Table(1, tmp_path))
    assert first.known == 0 < first.measured

    def refuse(kernels: list[object], **_: object) -> dict[str, float]:
        assert not kernels
        return {}

    monkeypatch.setattr(costing, "measure", refuse)
    again = latency_cost(analysis, step, table=Table(1, tmp_path))
    assert again.known == again.measured == first.measured
    assert any(isinstance(p, Tabled) for p in again.terms)


def test_operators_that_are_not_in_the_table_count_by_their_work(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costing, "measure", lambda kernels, **_: {})
    [g0, g1] = analysis.groups
    found = latency_cost(analysis, {g0.atom: 16, g1.atom: 16}, table=Table(1, None))
    [both] = [p for p in found.terms if isinstance(p, Worked) and len(p.axes) == 2]
    assert both.value({g0.atom: 128, g1.atom: 256}) == pytest.approx(both.value({}) / 8)


def test_a_model_whose_kernels_can_not_be_traced_counts_by_its_work(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "load", full)
    found = latency_cost(analysis, {g.atom: 16 for g in analysis.groups}, table=Table(1, None))
    assert len(found.terms) == 3 and all(isinstance(p, Tabled | Worked) for p in found.terms)
    assert found.constant == pytest.approx(0, abs=1e-6 * found.total({}))


def test_a_plan_by_the_clock_comes_down_to_its_goal(analysis: Analysis, cost: LatencyCost) -> None:
    goal = 0.5 * cost.total({})
    scores = {g.id: np.ones(g.size) for g in analysis.groups}
    found = allocate(list(analysis.groups), scores, cost, goal, {g.id: 16 for g in analysis.groups})
    assert goal * 0.95 <= found.remaining < goal * 1.1
    assert all(len(kept) % 16 == 0 for kept in found.keep.values())


def test_the_table_is_read_exactly_at_its_points_and_between_them(analysis: Analysis) -> None:
    [g0, g1] = analysis.groups
    shares = np.array([[0.2, 0.4], [0.5, 1.0]])
    part = Tabled(1000.0, (g0.atom, g1.atom), ((128, 512), (256, 512)), shares)
    assert part.value({}) == 1000.0
    assert part.value({g0.atom: 128, g1.atom: 256}) == pytest.approx(200.0)
    assert part.value({g0.atom: 320, g1.atom: 384}) == pytest.approx(1000 * (0.2 + 0.4 + 0.5 + 1.0) / 4)


def test_less_than_a_block_takes_the_time_of_one_and_nothing_takes_none(analysis: Analysis) -> None:
    [g0, g1] = analysis.groups
    part = Tabled(1000.0, (g0.atom, g1.atom), ((128, 512), (256, 512)), np.array([[0.2, 0.4], [0.5, 1.0]]))
    assert part.value({g0.atom: 64}) == part.value({g0.atom: 128}) == pytest.approx(400.0)
    assert part.value({g0.atom: 0}) == 0.0


def test_a_model_that_onnxruntime_refuses_is_rejected(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Odd", ["y"], ["z"], domain="example.org")]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 4])],
        [value("z", TensorProto.FLOAT, [1, 4])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("example.org", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "odd.onnx")
    with pytest.raises(ModelRejected, match="Odd"):
        latency_cost(analyse(load(tmp_path / "odd.onnx")), {}, table=Table(1, None))
