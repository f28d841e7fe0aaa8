"""Groups that may lose all of their units: a residual branch that is removed whole.

When every unit of an atom goes, each tensor that carries it has an axis of size 0 and disappears, with the nodes that
make it. Where the axis is contracted, what is left is the consumer's bias: one number per channel. That can stand in
for the consumer's output as far as it only meets operators that broadcast, until one of them (the residual Add) takes
in a tensor of full size.
"""

from __future__ import annotations

from collections.abc import Collection

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
                carried = free.intersection(atoms(expr))
                inside |= carried
                refused.update(a for a in carried if len(_left(expr, a)))
        for name in node.outputs:
            for expr in analysis.axes.get(name, ()):
                refused.update(a for a in free.intersection(atoms(expr)) if len(_left(expr, a)))
        for atom in inside - outside:
            carriers[atom].add(node.index)
        refused |= {a for a in outside if not _all_outputs(analysis, node, a)}
    found: set[Atom] = set()
    small: set[str] = set()
    for atom, ends in carriers.items():
        nodes = [analysis.graph.nodes[k] for k in ends]
        if atom in refused or not ends or not all(_leaves_bias(analysis, n, atom) for n in nodes):
            continue
        together = small | {n.outputs[0] for n in nodes if n.outputs[0] not in analysis.graph.values}
        if broadcast_region(analysis, together) is not None:
            found.add(atom)
            small = together
    return found


def _left(expr: Expr, atom: Atom) -> np.ndarray:
    """What an axis keeps when all units of an atom go."""
    mask = kept(expr, {atom: NOTHING})
    return np.arange(expr.size) if mask is None else mask


def _all_outputs(analysis: Analysis, node: Node, atom: Atom) -> bool:
    """True where the node disappears as a whole."""
    return all(any(atom in set(atoms(e)) for e in analysis.axes.get(n, ())) for n in node.outputs if n)


def _leaves_bias(analysis: Analysis, node: Node, atom: Atom) -> bool:
    """True where a node that contracts the atom can be replaced by its bias."""
    graph = analysis.graph
    if node.index in analysis.arithmetic:
        return analysis.registry[node.op].from_shape is None
    if all(n in graph.values for n in node.outputs):  # arithmetic among weights, which is folded elsewhere
        return False
    over = [c for c in analysis.contractions.get(node.index, ()) if atom in set(atoms(c.over))]
    if not over or any(c.kind is not Kind.PRODUCT for c in over) or len(node.outputs) != 1:
        return False
    bias = analysis.registry[node.op].bias
    return bias is not None and (
        bias >= len(node.inputs) or not node.inputs[bias] or node.inputs[bias] in graph.parameters
    )


def broadcast_region(analysis: Analysis, names: Collection[str]) -> set[str] | None:
    """The tensors that get size 1 on every axis but their channels when `names` do; None where a reader of one of
    them does not broadcast, or one leaves the graph. Any part of `names` then does as well as all of them."""
    graph = analysis.graph
    outside = {*graph.outputs, *(n for node in graph.nodes for n in node.captured)}
    small = set(names)
    pending = list(names)
    while pending:
        now = pending.pop()
        if now in outside:
            return None
        for reader, _ in graph.consumers.get(now, ()):
            operator = analysis.registry.get(reader.op)
            if operator is None or not operator.broadcasts or len(reader.outputs) != 1:
                return None
            out = reader.outputs[0]
            others = [n for n in reader.inputs if n and n not in small and n not in graph.parameters]
            if out not in small and not any(graph.shapes.get(n) == graph.shapes.get(out) for n in others):
                small.add(out)
                pending.append(out)
        if not pending:  # what absorbed a small tensor may have become small itself
            grown = [n for n in small if any(_small_now(analysis, r, small) for r, _ in graph.consumers.get(n, ()))]
            pending.extend(grown)
    return small


def _small_now(analysis: Analysis, reader: Node, small: set[str]) -> bool:
    graph = analysis.graph
    out = reader.outputs[0]
    others = [n for n in reader.inputs if n and n not in small and n not in graph.parameters]
    return out not in small and not any(graph.shapes.get(n) == graph.shapes.get(out) for n in others)
