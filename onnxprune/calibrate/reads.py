"""Where the units of a group are read: the products, sums and recurrent states in which its axis disappears.

What a unit is worth to the network is what arrives there. A residual stream is read at many places, and a unit of it is
gone when all of them see zeros; what lies between its production and them (sums, activations, pools) does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxprune.axes.analysis import Analysis
from onnxprune.axes.expr import Atom, Expr, atoms
from onnxprune.ops.rules import Contraction, Kind

__all__ = ["Operand", "Read", "reads_of"]


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that carries the units on one of its axes. input: of the node; None for a state that it keeps itself."""

    tensor: str
    axis: int
    expr: Expr
    input: int | None


@dataclass(frozen=True, slots=True)
class Read:
    """One contraction of a group's axis. operands: what varies with the data, two where both factors of a product do
    (attention). weight: the (input, axis) of the parameter that multiplies them; None where there is none."""

    node: int
    kind: Kind
    operands: tuple[Operand, ...]
    weight: tuple[int, int] | None


def reads_of(analysis: Analysis) -> Mapping[Atom, tuple[Read, ...]]:
    """The reads of every group, by its atom, in the graph's order. Groups that nothing reads are absent."""
    wanted = {g.atom for g in analysis.groups}
    found: dict[Atom, list[Read]] = {}
    for n, contractions in analysis.contractions.items():
        if n in analysis.arithmetic:
            continue
        for contraction in contractions:
            read = None if contraction.through else _read(analysis, n, contraction)
            if read is not None:
                for atom in {a for a in atoms(contraction.over) if a in wanted}:
                    found.setdefault(atom, []).append(read)
    return {atom: tuple(reads) for atom, reads in found.items()}


def _read(analysis: Analysis, n: int, contraction: Contraction) -> Read | None:
    graph, node = analysis.graph, analysis.graph.nodes[n]
    weight = next(((i, k) for i, k in contraction.operands if node.inputs[i] in graph.parameters), None)
    if contraction.kind is Kind.STATE:
        state = next((name for name in node.outputs if name), None)
        if state is None or state not in analysis.axes:
            return None
        axis = len(analysis.axes[state]) - 1
        return Read(n, contraction.kind, (Operand(state, axis, analysis.axes[state][axis], None),), weight)
    operands = []
    for i, k in contraction.operands:
        name = node.inputs[i]
        if name not in graph.static and name in analysis.axes:
            axis = k % len(analysis.axes[name])
            operands.append(Operand(name, axis, analysis.axes[name][axis], i))
    return Read(n, contraction.kind, tuple(operands), weight) if operands else None
