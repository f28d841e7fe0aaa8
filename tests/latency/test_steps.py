"""Kernels that onnxruntime runs are traced back to the nodes they stand for."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnxprune.axes.analysis import analyse
from onnxprune.latency.anchors import anchors
from onnxprune.latency.steps import profile, token, tokens, typical
from onnxprune.model.load import load
from tests.graphs import random_model


def test_names_lead_back_to_nodes() -> None:
    assert tokens(f"{token(17)}/MatMulAddFusion/{token(3)}_nchwc") == [17, 3]
    assert tokens("fused Conv_17") == []


def test_a_convolution_with_all_that_is_fused_into_it_is_one_step(tiny_cnn: Path) -> None:
    graph = load(tiny_cnn)
    wanted = {n.index: n.label for n in graph.nodes if n.op in ("Conv", "Gemm")}
    found = profile(graph, wanted)
    owned = [wanted[k] for step in found.steps for k in step.nodes]
    assert sorted(owned) == ["conv1", "conv2", "fc"]
    by_node = {wanted[k]: step for step in found.steps for k in step.nodes}
    assert "r1" in by_node["conv1"].tensors  # batch normalisation and Relu are in it
    assert all(step.microseconds >= 0 for step in found.steps)
    assert found.total_us > 0 and found.feed["image"].shape == (1, 3, 16, 16)


def test_nodes_without_names_are_told_apart(tiny_cnn: Path) -> None:
    model = onnx.load(tiny_cnn)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tiny_cnn)
    graph = load(tiny_cnn)
    wanted = {n.index for n in graph.nodes if n.op in ("Conv", "Gemm")}
    assert {k for step in profile(graph, wanted).steps for k in step.nodes} == wanted
    assert {n.proto.name for n in graph.nodes} == {""}


@pytest.mark.parametrize("seed", range(12))
def test_no_node_is_counted_twice(seed: int) -> None:
    analysis = analyse(load(random_model(seed)))
    known = {a.node.index for a in anchors(analysis, {g.atom for g in analysis.groups})}
    owned = [k for step in profile(analysis.graph, known).steps for k in step.nodes]
    assert len(owned) == len(set(owned)) and set(owned) <= known


def test_what_disturbs_a_run_does_not_change_its_time() -> None:
    import numpy as np

    assert typical(np.array([10.0, 10.0, 10.0, 500.0])) == 10.0
    assert typical(np.array([7.0])) == 7.0
