"""Single operators: made at the sizes that pruning would leave, and timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.axes.expr import Atom
from onnxprune.latency.anchors import Kernels, anchors, sized
from onnxprune.latency.kernels import Kernel, Operand, measure
from onnxprune.model.graph import attribute_value
from onnxprune.model.load import load
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from tests.graphs import random_model

FLOAT = TensorProto.FLOAT


def product(rows: int, depth: int, columns: int, *, op: str = "MatMul") -> Kernel:
    """(rows, depth) times a stored (depth, columns)."""
    operands = (Operand(FLOAT, (rows, depth), False), Operand(FLOAT, (depth, columns), True))
    return Kernel(op, "", b"", operands, (FLOAT,), (("", 17),), 8)


def halves(analysis: Analysis) -> dict[Atom, int]:
    """Half of the units of every group, one at least."""
    return {g.atom: max(1, g.size // 2) for g in analysis.groups}


def test_more_work_takes_longer() -> None:
    small, large = product(64, 64, 64), product(64, 1024, 1024)
    found = measure([small, large], threads=1, seconds=60)
    assert found.keys() == {small.key, large.key}
    assert found[large.key] > 20 * found[small.key] > 0


def test_an_operator_that_does_not_run_costs_no_other() -> None:
    good = [product(8, 16 * k, 16) for k in range(1, 6)]
    bad = product(8, 16, 16, op="Frobnicate")
    assert measure([*good[:2], bad, *good[2:]], threads=1, seconds=60).keys() == {k.key for k in good}


def test_time_that_is_up_leaves_operators_out() -> None:
    assert measure([product(8, 16, 16)], threads=1, seconds=-1.0) == {}


def test_many_operators_are_timed_in_several_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.latency.kernels.MOST_KERNELS", 2)
    kernels = [product(8, 16, 16 * k) for k in range(1, 6)]
    assert len(measure(kernels, threads=1, seconds=60)) == 5


def test_keys_tell_sizes_attributes_versions_and_weights_apart() -> None:
    plain = product(8, 16, 16)
    data = Kernel("MatMul", "", b"", tuple(Operand(FLOAT, o.shape, False) for o in plain.inputs if o), *_rest(plain))
    newer = Kernel("MatMul", "", b"", plain.inputs, (FLOAT,), (("", 18),), 8)
    held = onnx.NodeProto(attribute=[helper.make_attribute("group", 2)]).SerializeToString()
    grouped = Kernel("MatMul", "", held, plain.inputs, *_rest(plain))
    assert len({k.key for k in (plain, data, newer, grouped, product(8, 16, 32))}) == 5
    assert plain.key == product(8, 16, 16).key


def _rest(kernel: Kernel) -> tuple[tuple[int, ...], tuple[tuple[str, int], ...], int]:
    return kernel.outputs, kernel.opsets, kernel.ir_version


@pytest.mark.parametrize("seed", range(40))
def test_an_operator_at_other_sizes_is_the_one_that_the_rewriter_writes(seed: int) -> None:
    """Attributes and weights' shapes, against the model that is pruned as a whole."""
    analysis = analyse(load(random_model(seed)))
    counts = halves(analysis)
    plan = Plan({g.id: np.arange(counts[g.atom]) for g in analysis.groups if counts[g.atom] < g.size})
    small = rewrite(analysis, plan).proto
    stored = {t.name: tuple(t.dims) for t in small.graph.initializer}
    written = {name: node for node in small.graph.node for name in node.output}
    kernels = Kernels(analysis, analysis.graph.shapes)
    found = anchors(analysis, counts)
    for anchor in found:
        kernel = kernels.kernel(anchor, counts)
        assert kernel is not None, anchor.node.op
        output = anchor.node.outputs[0]  # where a constant is added behind a node, its own has another name
        node = written.get(f"{output}_uncompensated", written[output])
        held = {a.name: attribute_value(a) for a in onnx.NodeProto.FromString(kernel.attributes).attribute}
        assert held == {a.name: attribute_value(a) for a in node.attribute}
        for name, operand in zip(node.input, kernel.inputs, strict=True):
            assert (operand is None) == (not name)
            if operand is not None and name in stored:
                assert operand.stored and operand.shape == stored[name]
    assert bool(found) == bool(analysis.groups)


@pytest.mark.parametrize("seed", [1, 5, 9, 14, 23, 31])
def test_operators_at_other_sizes_run(seed: int) -> None:
    analysis = analyse(load(random_model(seed)))
    kernels = Kernels(analysis, analysis.graph.shapes)
    made = [k for a in anchors(analysis, halves(analysis)) if (k := kernels.kernel(a, halves(analysis)))]
    assert measure(made, threads=1, seconds=60).keys() == {k.key for k in made}


def test_coordinates_are_the_axes_that_may_shrink(tiny_cnn: Path) -> None:
    analysis = analyse(load(tiny_cnn))
    by_name = {a.node.label: a for a in anchors(analysis, {g.atom for g in analysis.groups})}
    assert {name: len(a.coordinates) for name, a in by_name.items()} == {"conv1": 1, "conv2": 2, "fc": 1}
    [g0, g1] = analysis.groups
    assert by_name["conv2"].work({g0.atom: 32, g1.atom: 16}) == by_name["conv2"].work({}) / 8


def test_sizes_are_whole_blocks_and_one_block_at_least(tiny_cnn: Path) -> None:
    analysis = analyse(load(tiny_cnn))
    [g0, _] = analysis.groups
    sizes = [sized(g0.atom, share, {g0.atom: 16})[g0.atom] for share in (1.0, 0.75, 0.6, 0.3, 0.01)]
    assert sizes == [64, 48, 32, 16, 16]
    assert sized(g0.atom, 0.5, {g0.atom: 48}) == {g0.atom: 48}
    assert sized(g0.atom, 0.5, {}) == {}
