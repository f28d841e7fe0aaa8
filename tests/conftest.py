"""Small models that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper

# The same examples in every run, so that a failure belongs to a change; longer hunts draw new ones.
settings.register_profile("same", derandomize=True)
if "ONNXPRUNE_EXAMPLES" not in os.environ:
    settings.load_profile("same")


def tiny_cnn_proto(*, channels: int = 64, classes: int = 10, seed: int = 0) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, Conv, GlobalAveragePool, Gemm: (N,3,16,16) to (N,classes).

    Two groups of `channels` units each; the Gemm's rows are the output's, so they stay.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "conv1.weight": rng.standard_normal((channels, 3, 3, 3)) / 5,
        "bn.gamma": rng.uniform(0.5, 1.5, channels),
        "bn.beta": rng.standard_normal(channels) / 5,
        "bn.mean": rng.standard_normal(channels) / 5,
        "bn.var": rng.uniform(0.5, 1.5, channels),
        "conv2.weight": rng.standard_normal((channels, channels, 3, 3)) / 25,
        "conv2.bias": rng.standard_normal(channels) / 5,
        "fc.weight": rng.standard_normal((classes, channels)) / 8,
        "fc.bias": rng.standard_normal(classes) / 5,
    }
    nodes = [
        helper.make_node("Conv", ["image", "conv1.weight"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "bn.gamma", "bn.beta", "bn.mean", "bn.var"], ["b1"], "bn"),
        helper.make_node("Relu", ["b1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "conv2.weight", "conv2.bias"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny_cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="tests")
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session")
def tiny_cnn_model() -> onnx.ModelProto:
    """The small network in memory; not to be changed."""
    return tiny_cnn_proto()


@pytest.fixture
def tiny_cnn(tmp_path: Path, tiny_cnn_model: onnx.ModelProto) -> Path:
    """The small network as a file."""
    path = tmp_path / "tiny.onnx"
    onnx.save(tiny_cnn_model, path)
    return path
