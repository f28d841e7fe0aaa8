"""The mirror: an ONNX graph as a torch module that computes the same function, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping

import onnx
import torch
from torch.fx import GraphModule

from onnxprune.mirroring.build import Builder
from onnxprune.mirroring.fuse import fuse
from onnxprune.model.graph import Graph
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS
from onnxprune.ops.registry import Operator

__all__ = ["mirror"]


def mirror(
    model: str | os.PathLike[str] | onnx.ModelProto | Graph,
    *,
    half: torch.dtype | None = None,
    registry: Mapping[str, Operator] = OPERATORS,
) -> GraphModule:
    """A model as a torch module that computes the same function, ready to be trained.

    It takes the model's inputs in their order, and gives its output, or a tuple of them. Weights are parameters under
    their initializer's name (`state_dict` has the names of the file). It is in eval mode, where it agrees with
    onnxruntime; `.train()` lets BatchNormalization use and update batch statistics.

    half: the dtype to compute in where the model says float16 or bfloat16, such as torch.float32 for training.
    Raises ModelRejected, and NotMirrored where nodes have no form in torch: it names them all.
    """
    graph = model if isinstance(model, Graph) else load(model, registry=registry)
    module = Builder(graph, registry, half=half).build()
    fuse(module)
    return module.eval()
