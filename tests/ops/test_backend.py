"""Every operator of ONNX's own node tests: the analysis never trips over it, and what its rule frees can be pruned.

onnx.backend.test builds the models in memory, with recorded inputs and outputs. They are used twice: as they are, and
surrounded by parameters (tests/ops/surround.py), so that every axis of every float tensor is free unless the operator's rule
says otherwise; then whatever the rule left free is pruned and proved.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxprune.axes.analysis import analyse
from onnxprune.axes.dead import INEXACT
from onnxprune.errors import ModelRejected, OnnxPruneError, VerificationFailed
from onnxprune.model.load import load
from onnxprune.model.save import write
from onnxprune.pipeline import inspect
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import prove
from tests.ops.surround import runs, surrounded

NOT_COMPARABLE = {  # infinite or no number where a unit is dead; random
    "test_reduce_max_empty_set",
    "test_reduce_min_empty_set",
    "test_mvn",
    "test_training_dropout",
    "test_training_dropout_default",
    "test_training_dropout_default_mask",
    "test_training_dropout_mask",
}


@cache
def cases() -> dict[str, list[Any]]:
    """ONNX's node tests by the operator of their first node; functions that onnx expands for us are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        found = defaultdict(list)
        for case in load_model_tests(kind="node"):
            if case.model is not None and "_expanded" not in case.name:
                found[case.model.graph.node[0].op_type].append(case)
    return dict(found)


OPERATORS = sorted(cases())


def test_there_are_cases_to_run() -> None:
    assert len(OPERATORS) > 150 and sum(map(len, cases().values())) > 1000


@pytest.mark.parametrize("op", OPERATORS)
def test_inspecting_raises_nothing_but_errors_of_its_own(op: str) -> None:
    for case in cases()[op]:
        try:
            inspect(case.model)
        except OnnxPruneError as error:
            assert error.exit_code == 3, case.name


@pytest.mark.parametrize("op", OPERATORS)
def test_inferred_types_and_shapes_are_those_of_the_recorded_outputs(op: str) -> None:
    for case in cases()[op]:
        try:
            graph = load(case.model)
        except OnnxPruneError:
            continue
        for name, recorded in zip(graph.outputs, case.data_sets[0][1], strict=True):
            if not isinstance(recorded, np.ndarray) or any("." in k for k in graph.pins):
                continue
            shape = graph.shapes.get(name)
            if shape is not None:
                assert len(shape) == recorded.ndim, (case.name, name)
                assert all(n in (None, m) for n, m in zip(shape, recorded.shape, strict=True)), (case.name, name, shape)
            value = graph.values.get(name)
            if value is not None:
                np.testing.assert_allclose(value, recorded, rtol=1e-3, atol=1e-6, err_msg=case.name)


def surrounded_case(case: Any) -> onnx.ModelProto | None:
    """None where a value is no tensor."""
    inputs, outputs = ([np.asarray(x) if isinstance(x, np.generic) else x for x in xs] for xs in case.data_sets[0])
    if not all(isinstance(x, np.ndarray) for x in (*inputs, *outputs)) or len(inputs) != len(case.model.graph.input):
        return None
    return surrounded(case.model, inputs, outputs)


@pytest.mark.parametrize("op", OPERATORS)
def test_what_a_rule_leaves_free_can_be_pruned(op: str, tmp_path: Path) -> None:
    """All groups at once, about half of the units of each."""
    rng = np.random.default_rng(0)
    for case in cases()[op]:
        model = surrounded_case(case)
        if model is None or case.name in NOT_COMPARABLE or not runs(model):
            continue
        analysis = analyse(load(model))
        keep = {
            g.id: np.sort(rng.permutation(g.size)[: max(1, g.size // 2)]) for g in analysis.groups if g.kind != INEXACT
        }
        plan = Plan(keep)
        write(rewrite(analysis, plan), tmp_path / "pruned.onnx")
        try:
            assert prove(analysis, plan, tmp_path / "pruned.onnx").passed
        except ModelRejected:
            continue  # the operator refuses a multiple of its recorded inputs, such as scales below 1
        except VerificationFailed as error:
            pytest.fail(f"{case.name}: {error}")


def test_the_rules_leave_something_free() -> None:
    """Were everything frozen, the test above would say nothing: these operators must have groups."""
    expected = {
        "Add",
        "AveragePool",
        "BatchNormalization",
        "Concat",
        "ConvTranspose",
        "Einsum",
        "Flatten",
        "GRU",
        "Gather",
        "Gemm",
        "InstanceNormalization",
        "LSTM",
        "LayerNormalization",
        "MatMul",
        "MaxPool",
        "Pad",
        "RNN",
        "ReduceMean",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Where",
    }
    without = []
    for op in expected:
        models = [m for m in map(surrounded_case, cases()[op]) if m is not None]
        if not any(analyse(load(m)).groups for m in models):
            without.append(op)
    assert not without
