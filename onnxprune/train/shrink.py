"""The mirror made small: what a plan removes is gone from the network, and what is trained is what is written."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.mirroring import mirror
from onnxprune.mirroring.values import stored_values
from onnxprune.model.graph import Graph
from onnxprune.model.infer import infer
from onnxprune.rewrite.rewrite import rewrite
from onnxprune.rewrite.weights import with_weights
from onnxprune.select.plan import Plan

__all__ = ["shrink"]


def shrink(
    module: GraphModule, analysis: Analysis, plan: Plan, *, half: torch.dtype | None = None
) -> tuple[GraphModule, Graph]:
    """The mirror of the pruned model, with the weights that `module` has now, and that model.

    module: a mirror of the analysed graph. The model's own rewriter does the slicing, so that the small mirror is the
    mirror of the file that would be written.
    """
    registry = analysis.registry
    graph = infer(with_weights(analysis.graph, stored_values(module)), registry, analysis.graph.pins)
    again = analyse(graph, registry=registry, exclude=analysis.exclude)
    small = infer(rewrite(again, plan), registry, graph.pins)
    return mirror(small, half=half, registry=registry).train(module.training), small
