"""Groups that may lose all of their units: a residual branch that is removed whole.

When every unit of an atom goes, each tensor that carries it has an axis of size 0 and disappears, with the nodes that
make it. Where the axis is contracted, what is left is the consumer's bias: one number per channel. That can stand in
for the consumer's output as far as it only meets operators that broadcast, until one of them (the residual Add) takes
in a tensor of full size.
"""

from __future__ import annotations

import numpy as np

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.dead import EXACT
from onnxprune.axes.expr import Atom, Expr, atoms, kept
from onnxprune.model.graph import Node
from onnxprune.ops.rules import Kind

__all__ = ["broadcast_region", "removable"]

NOTHING = np.zeros(0, np.int64)


def removable(analysis: Analysis) -> set[Atom]:
    """The atoms of exact groups that may lose all of their units."""
    free = {g.atom for g in analysis.groups if g.kind == EXACT}
    carriers: dict[Atom, set[int]] = {a: set() for a in free}
    refused: set[Atom] = set()
    for node in analysis.graph.nodes:
        outside = {a for n in node.outputs for e in analysis.axes.get(n, ()) for a in atoms(e)} & free
        inside: set[Atom] = set()
        for i, name in enumerate(node.inputs):
            for expr in analysis.uses.get((node.index, i)) or analysis.axes.get(name, ()):
                found = free.intersection(atoms(expr))
                inside |= found
                refused.update(a for a in found if len(_left(expr, a)))
        for name in node.outputs:
            for expr in analysis.axes.get(name, ()):
                refused.update(a for a in free.intersection(atoms(expr)) if len(_left(expr, a)))
        for atom in inside - outside:
            carriers[atom].add(node.index)
        refused |= {a for a in outside if not _all_outputs(analysis, node, a)}
    return {
        a
        for a, ends in carriers.items()
        if a not in refused and ends and all(_ends(analysis, analysis.graph.nodes[k], a) for k in ends)
    }


def _left(expr: Expr, atom: Atom) -> np.ndarray:
    """What an axis keeps when all units of an atom go."""
    mask = kept(expr, {atom: NOTHING})
    return np.arange(expr.size) if mask is None else mask


def _all_outputs(analysis: Analysis, node: Node, atom: Atom) -> bool:
    """True where the node disappears as a whole."""
    return all(any(atom in set(atoms(e)) for e in analysis.axes.get(n, ())) for n in node.outputs if n)


def _ends(analysis: Analysis, node: Node, atom: Atom) -> bool:
    """True where a node that contracts the atom can be replaced by its bias."""
    graph = analysis.graph
    if all(n in graph.values for n in node.outputs):
        return all(analysis.registry[node.op].from_shape is None for _ in node.outputs)
    over = [c for c in analysis.contractions.get(node.index, ()) if atom in set(atoms(c.over))]
    if not over or any(c.kind is not Kind.PRODUCT for c in over) or len(node.outputs) != 1:
        return False
    bias = analysis.registry[node.op].bias
    if bias is None or (bias < len(node.inputs) and node.inputs[bias] and node.inputs[bias] not in graph.parameters):
        return False
    return broadcast_region(analysis, node.outputs[0]) is not None


def broadcast_region(analysis: Analysis, name: str) -> set[str] | None:
    """The tensors that get size 1 on every axis but their channels when `name` does; None where a reader of one of
    them does not broadcast."""
    graph = analysis.graph
    small, pending = {name}, [name]
    while pending:
        now = pending.pop()
        if now in graph.outputs or any(now in n.captured for n in graph.nodes):
            return None
        for reader, _ in graph.consumers.get(now, ()):
            operator = analysis.registry.get(reader.op)
            if operator is None or not operator.broadcasts or len(reader.outputs) != 1:
                return None
            out = reader.outputs[0]
            full = graph.shapes.get(out)
            others = [n for n in reader.inputs if n and n not in small]
            if out not in small and not any(graph.shapes.get(n) == full and n not in graph.parameters for n in others):
                small.add(out)
                pending.append(out)
    return small
