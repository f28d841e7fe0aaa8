"""Whatever the graph and whatever the plan, the pruned model equals the masked original in onnxruntime.

`ONNXPRUNE_EXAMPLES=2000 pytest tests/rewrite/test_property.py` looks longer than CI does.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, assume, event, given, note, settings
from hypothesis import strategies as st
from onnx import printer

from onnxprune.axes.analysis import Analysis, Group, analyse
from onnxprune.axes.dead import INEXACT
from onnxprune.axes.expr import Atom
from onnxprune.axes.vanish import removable
from onnxprune.model.load import load
from onnxprune.model.save import write
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.select.plan import Plan
from onnxprune.verify.equivalence import prove
from tests.graphs import models

EXAMPLES = int(os.environ.get("ONNXPRUNE_EXAMPLES", "60"))
ROUNDING = 1e-4  # the models compute in float32, even where a weight is stored in a narrower type

thorough = settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
quick = settings(thorough, max_examples=max(EXAMPLES // 4, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pruned")


def some_plan(data: st.DataObject, groups: list[Group], whole: Collection[Atom]) -> Plan:
    """Any units of any groups; counts follow no block size. One unit stays, except of groups that may go as a whole.

    Inexact groups keep three: over a single unit a LayerNormalization divides rounding errors by a variance of zero.
    """
    keep = {}
    for group in groups:
        units = st.sampled_from(range(group.size))
        least = 3 if group.kind == INEXACT else 0 if group.atom in whole else 1
        most = max(group.size - least, 0)
        gone = data.draw(st.sets(units, max_size=most), label=f"units of {group.id} that go")
        if gone:
            keep[group.id] = np.setdiff1d(np.arange(group.size), list(gone))
    assume(keep)
    return Plan(keep)


def pruned(data: st.DataObject, model: onnx.ModelProto, path: Path, *, inexact: bool = False) -> tuple[Analysis, Plan]:
    """Analyse, draw a plan, rewrite, write to `path`."""
    note(printer.to_text(model))
    analysis = analyse(load(model))
    assert not analysis.graph.problems
    allowed = [g for g in analysis.groups if g.kind != INEXACT or (inexact and analysis.provable(g))]
    assume(any(g.kind == INEXACT for g in allowed) if inexact else allowed)
    event(f"{min(len(allowed), 4)} groups")
    plan = some_plan(data, allowed, removable(analysis))
    write(rewrite(analysis, plan), path)
    return analysis, plan


@given(model=models(), data=st.data())
@thorough
def test_a_pruned_model_equals_the_masked_original(folder: Path, model: onnx.ModelProto, data: st.DataObject) -> None:
    """For exact and compensated groups the masked original has only what *produces* a unit set to zero, so that the
    unit must vanish by itself for the outputs to agree."""
    analysis, plan = pruned(data, model, folder / "exact.onnx")
    assert prove(analysis, plan, folder / "exact.onnx").max_rel_error < ROUNDING


@given(model=models(), data=st.data())
@quick
def test_inexact_groups_equal_a_reference_that_leaves_their_units_out(
    folder: Path, model: onnx.ModelProto, data: st.DataObject
) -> None:
    analysis, plan = pruned(data, model, folder / "inexact.onnx", inexact=True)
    assert prove(analysis, plan, folder / "inexact.onnx").max_rel_error < ROUNDING


@given(model=models(blocks=4), data=st.data())
@quick
def test_a_pruned_model_runs_under_all_of_onnxruntimes_optimisations(
    folder: Path, model: onnx.ModelProto, data: st.DataObject
) -> None:
    """Fusions match patterns of nodes and sizes; none may choke on what the rewriter leaves behind.

    Only shapes are compared: onnxruntime's fused LayerNormalization takes an epsilon of its own where the graph's is
    large, with the original as well.
    """
    path = folder / "optimised.onnx"
    pruned(data, model, path)
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = outputs_of(ort.InferenceSession(path, plain, providers=["CPUExecutionProvider"]))
    found = outputs_of(ort.InferenceSession(path, providers=["CPUExecutionProvider"]))
    assert [a.shape for a in found] == [a.shape for a in expected]


@given(model=models(blocks=4), data=st.data())
@quick
def test_pruning_only_ever_removes_parameters_of_the_removed_units(
    folder: Path, model: onnx.ModelProto, data: st.DataObject
) -> None:
    """Every stored tensor of the pruned model that has a namesake in the original is that tensor, minus indices."""
    path = folder / "subset.onnx"
    analysis, plan = pruned(data, model, path)
    before = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    scaled = any("rescaled" in g.reason for g in plan.pruned(analysis))
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name not in before or tensor.data_type != onnx.TensorProto.FLOAT or scaled:
            continue
        old, new = before[tensor.name], onnx.numpy_helper.to_array(tensor)
        assert new.ndim == old.ndim
        assert all(n <= m for n, m in zip(new.shape, old.shape, strict=True))
        assert set(new.reshape(-1).tolist()) <= set(old.reshape(-1).tolist())


def outputs_of(session: ort.InferenceSession) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    feed = {}
    for i in session.get_inputs():
        shape = [n if isinstance(n, int) else 2 for n in i.shape]
        feed[i.name] = rng.integers(0, 9, shape) if "int64" in i.type else rng.standard_normal(shape).astype(np.float32)
    return session.run(None, feed)
