"""Losses that stand in a graph. Their axes stay."""

from __future__ import annotations

from typing import Any

from onnxprune.ops.lazy import F, torch
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import MirrorContext

__all__ = ["OPERATORS"]


def settings(m: MirrorContext) -> dict[str, Any]:
    """What both losses have, as torch's functions want it."""
    return {
        "weight": m.optional(2),
        "ignore_index": int(m.attr("ignore_index", -100)),
        "reduction": m.attr("reduction", "mean"),
    }


def labels(m: MirrorContext) -> Any:
    return m.tensor(1) if m.dtype(1) == torch.int64 else m.tensor(1).to(torch.int64)


def likelihood_mirror(m: MirrorContext) -> Any:
    return F.nll_loss(m.tensor(0), labels(m), **settings(m))


def cross_entropy_mirror(m: MirrorContext) -> Any:
    if len(m.node.outputs) == 1 or not m.node.outputs[1]:
        return F.cross_entropy(m.tensor(0), labels(m), **settings(m))
    log_probabilities = F.log_softmax(m.tensor(0), 1)
    return [F.nll_loss(log_probabilities, labels(m), **settings(m)), log_probabilities]


OPERATORS = (
    Operator("NegativeLogLikelihoodLoss", mirror=likelihood_mirror, fixed=frozenset({2})),
    Operator("SoftmaxCrossEntropyLoss", mirror=cross_entropy_mirror, fixed=frozenset({2})),
)
