"""Small float64 networks: a layer whose units are removed, and the consumer that is to make up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.mirroring import mirror
from onnxprune.model.graph import Model
from onnxprune.model.infer import infer
from onnxprune.model.load import load
from onnxprune.ops import OPERATORS
from onnxprune.select.plan import Plan

__all__ = ["Case", "Function", "model_of", "planned", "stored"]


@dataclass(frozen=True)
class Case:
    """nodes: from `h`, the producer's output, to `y`. weights: of these nodes, by name; `w` is the consumer's.
    shape: of the input `x`, without the batch. producer: 'conv' along axis 1, or 'rows' along the last axis.
    free: the stored tensor that a constant may go into; None where there is no place for one."""

    nodes: Sequence[onnx.NodeProto]
    weights: Mapping[str, np.ndarray]
    shape: tuple[int, ...]
    producer: str = "rows"
    units: int = 6
    free: str | None = "b"


def model_of(case: Case, seed: int = 0) -> onnx.ModelProto:
    """x -> producer -> h -> the case's nodes -> y, of units that depend on each other."""
    rng = np.random.default_rng(seed)
    if case.producer == "conv":
        made = rng.standard_normal((case.units, case.shape[0], *[1] * (len(case.shape) - 1)))
        first = [helper.make_node("Conv", ["x", "p.w", "p.b"], ["p"], "producer")]
    else:
        made = rng.standard_normal((case.shape[-1], case.units))
        first = [
            helper.make_node("MatMul", ["x", "p.w"], ["p.m"], "producer"),
            helper.make_node("Add", ["p.m", "p.b"], ["p"], "producer.bias"),
        ]
    weights = {"p.w": made, "p.b": rng.standard_normal(case.units), **case.weights}
    graph = helper.make_graph(
        [*first, helper.make_node("Tanh", ["p"], ["h"], "tanh"), *case.nodes],
        "case",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["N", *case.shape])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [
            numpy_helper.from_array(np.asarray(w, np.float64 if np.asarray(w).dtype.kind == "f" else None), n)
            for n, w in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


KEPT = {3: (0, 2), 6: (0, 2, 3)}


def planned(model: onnx.ModelProto) -> tuple[Analysis, Plan]:
    """A plan that removes half of the producer's units (of a grouped convolution: of the places in every group)."""
    analysis = analyse(load(model))
    group = next(g for g in analysis.groups if any(m.initializer == "p.w" for m in g.members))
    return analysis, Plan({group.id: np.array(KEPT[group.size])})


def stored(model: Model) -> dict[str, np.ndarray]:
    """The values of a model's stored tensors."""
    graph = infer(model, OPERATORS)
    return {n: np.array(graph.array(n)) for n in graph.parameters}


class Function:
    """A model as a function of its input and of its stored tensors, in torch."""

    def __init__(self, model: Model | onnx.ModelProto) -> None:
        self.graph = load(model) if isinstance(model, onnx.ModelProto) else infer(model, OPERATORS)
        self.module = mirror(self.graph)
        self.stored = {n: torch.from_numpy(np.array(self.graph.array(n))) for n in self.graph.parameters}

    def __call__(self, x: np.ndarray, **weights: np.ndarray) -> np.ndarray:
        values = self.stored | {n: torch.from_numpy(w) for n, w in weights.items()}
        used = {t: values[path[-1]] for t, path in self.module.meta["parameters"].items()}
        with torch.no_grad():
            return torch.func.functional_call(self.module, used, (torch.from_numpy(x),)).numpy()
