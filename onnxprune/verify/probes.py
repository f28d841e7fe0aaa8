"""Where a model's outputs can't be compared: behind operators that select (NonMaxSuppression, TopK, ArgMax).

A rounding error may change what they select, and everything behind them. There the proof is taken at the tensors
where the data first meets a selection, on every path, as long as all of the surgery lies in front of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import Atom, kept
from onnxprune.model.graph import Graph, Model, Node
from onnxprune.ops.registry import Operator
from onnxprune.select.plan import Plan

__all__ = ["Probes", "behind_selection", "find_probes"]

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Probes:
    """tensors: what to compare instead; outputs: graph outputs that can be compared as they are."""

    tensors: tuple[str, ...]
    outputs: tuple[str, ...]

    def add_to(self, model: Model) -> None:
        """Make the probed tensors outputs of a model."""
        known = {o.name for o in model.proto.graph.output}
        for name in self.tensors:
            if name not in known:
                model.proto.graph.output.add(name=name)


def find_probes(analysis: Analysis, plan: Plan) -> Probes | None:
    """The probes of a model, None where it selects nothing or where some of the surgery lies behind a selection."""
    graph = analysis.graph
    behind = behind_selection(graph, analysis.registry)
    if not behind:
        return None
    border = [node for node in graph.nodes if any(n in behind for n in node.outputs)]
    tensors = [name for node in border for name in _floats(graph, node) if name not in behind]
    probes = Probes(tuple(dict.fromkeys(tensors)), tuple(o for o in graph.outputs if o not in behind))
    reached = _ancestors(graph, {*probes.tensors, *probes.outputs})
    keep = plan.by_atom(analysis)
    outside = any(
        _touched(analysis, n.index, keep) for n in graph.nodes if n.index not in reached and not _known(graph, n)
    )
    return None if outside or not (probes.tensors or probes.outputs) else probes


def _known(graph: Graph, node: Node) -> bool:
    """Shape arithmetic, which computes nothing from the data."""
    return all(n in graph.values for n in node.outputs)


def _floats(graph: Graph, node: Node) -> list[str]:
    """Inputs that a rounding error can be in."""
    return [n for n in node.inputs if n and n not in graph.static and graph.types.get(n) in _FLOATS]


def _selects(graph: Graph, operator: Operator | None, node: Node) -> bool:
    return operator is not None and operator.discrete and bool(_floats(graph, node))


def behind_selection(graph: Graph, registry: Mapping[str, Operator]) -> set[str]:
    """Tensors in which a rounding error may change everything."""
    behind: set[str] = set()
    for node in graph.nodes:
        if _selects(graph, registry.get(node.op), node) or any(n in behind for n in (*node.inputs, *node.captured)):
            behind.update(node.outputs)
    return behind


def _ancestors(graph: Graph, names: set[str]) -> set[int]:
    """Nodes that the named tensors depend on."""
    found: set[int] = set()
    wanted = set(names)
    for node in reversed(graph.nodes):
        if any(n in wanted for n in node.outputs):
            found.add(node.index)
            wanted.update(node.inputs)
            wanted.update(node.captured)
    return found


def _touched(analysis: Analysis, k: int, keep: Mapping[Atom, np.ndarray]) -> bool:
    node = analysis.graph.nodes[k]
    axes: list[Sequence] = [analysis.axes.get(n, ()) for n in (*node.inputs, *node.outputs)]
    axes += [analysis.uses.get((k, i), ()) for i in range(len(node.inputs))]
    return any(kept(e, keep) is not None for found in axes for e in found)
