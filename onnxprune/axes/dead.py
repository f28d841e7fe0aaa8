"""Zero-invariance by abstract interpretation: what is left of a unit whose producing parameters are all zero.

For every atom and tensor the unit's slice is a known constant (zero, mostly) or unknown. Where the unit's axis is
contracted, that decides whether the unit can be removed: exactly, with a compensation, or not without changing
the function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.axes.expr import Atom, Expr, atoms
from onnxprune.model.graph import Graph, Node
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import Contraction, Kind

__all__ = ["COMPENSATED", "EXACT", "INEXACT", "Role", "Verdicts", "interpret", "roles_of"]

EXACT, COMPENSATED, INEXACT = "exact", "compensated", "inexact"
_ORDER = {EXACT: 0, COMPENSATED: 1, INEXACT: 2}

Use = tuple[int, int]  # node index, input index
Role = str  # 'produces', 'consumes' or 'follows'
PRODUCES, CONSUMES, FOLLOWS = "produces", "consumes", "follows"


@dataclass
class Verdicts:
    """kind and reason per atom, and for constants that are to be folded the constant per (node, atom)."""

    kind: dict[Atom, str] = field(default_factory=dict)
    reason: dict[Atom, str] = field(default_factory=dict)
    constants: dict[tuple[int, Atom], float] = field(default_factory=dict)

    def add(self, atom: Atom, kind: str, reason: str = "") -> None:
        """The worst verdict counts."""
        if _ORDER[kind] > _ORDER.get(self.kind.get(atom, EXACT), 0) or atom not in self.kind:
            self.kind[atom] = kind
            self.reason[atom] = reason


def free_atoms(axes: Sequence[Expr]) -> list[set[Atom]]:
    """Free atoms of every axis."""
    return [{a for a in atoms(e) if a.barrier is None and a.size > 1} for e in axes]


def roles_of(
    node: Node, operator: Operator, contractions: Sequence[Contraction], i: int, axis: int, atom: Atom
) -> Role:
    """What a parameter at input i does to an atom on one of its axes."""
    if i in operator.keeps:
        return FOLLOWS
    for contraction in contractions:
        if not contraction.through and (i, axis) in contraction.operands and atom in set(atoms(contraction.over)):
            return CONSUMES
    return PRODUCES


def interpret(
    graph: Graph,
    registry: Mapping[str, Operator],
    axes: Mapping[str, tuple[Expr, ...]],
    uses: Mapping[Use, tuple[Expr, ...]],
    contractions: Mapping[int, Sequence[Contraction]],
) -> Verdicts:
    """Run all atoms through the graph at once."""
    states: dict[str, dict[Atom, float | None]] = {}
    origin: dict[Atom, str] = {}
    verdicts = Verdicts()
    carried: dict[str, set[Atom]] = {}
    for node in graph.nodes:
        operator = registry.get(node.op)
        inside = contractions.get(node.index, ())
        made: dict[Atom, list[str]] = {}
        for name in node.outputs:
            if name in axes:
                found = carried[name] = set().union(*free_atoms(axes[name])) if axes[name] else set()
                for atom in found:
                    made.setdefault(atom, []).append(name)
        touched = _touched(node, axes, uses) if made or inside else []
        for atom, names in made.items():
            state = _after(graph, node, operator, inside, touched, states, atom)
            for name in names:
                states.setdefault(name, {})[atom] = state
            if state is None and atom not in origin and any(
                    s is not None for s in _inputs(graph, node, operator, inside, touched, states, atom)[0]):
                origin[atom] = f"{node.op} {node.label}"
        for contraction in inside:
            _judge(graph, node, operator, contraction, touched, states, origin, verdicts, uses)
    return verdicts


Touched = list[tuple[int, list[set[Atom]]]]


def _touched(node: Node, axes: Mapping[str, tuple[Expr, ...]], uses: Mapping[Use, tuple[Expr, ...]]) -> Touched:
    found: Touched = []
    for i, name in enumerate(node.inputs):
        at = uses.get((node.index, i)) or axes.get(name)
        if at:
            per_axis = free_atoms(at)
            if any(per_axis):
                found.append((i, per_axis))
    return found


def _inputs(
    graph: Graph, node: Node, operator: Operator | None, inside: Sequence[Contraction], touched: Touched,
    states: Mapping[str, Mapping[Atom, float | None]], atom: Atom,
) -> tuple[list[float | None], bool]:
    """State of the unit in each input, at axes that pass through; and whether any input carries it there."""
    found: list[float | None] = []
    carriers = dict(touched)
    any_carrier = False
    for i, name in enumerate(node.inputs):
        per_axis = carriers.get(i)
        through = per_axis is not None and any(
            atom in s and not _contracted(inside, i, k, atom) for k, s in enumerate(per_axis))
        if through:
            any_carrier = True
            if name in graph.parameters:
                found.append(None if operator is None or i in operator.keeps else 0.0)
            else:
                found.append(states.get(name, {}).get(atom))
        elif operator is not None and operator.joins and per_axis is None:
            found.append(math.nan if i == 0 or not _known_scalar(graph, name) else _uniform(graph, name))
        elif operator is not None and operator.joins:
            found.append(math.nan)
        else:
            found.append(_uniform(graph, name))
    return found, any_carrier


def _contracted(inside: Sequence[Contraction], i: int, axis: int, atom: Atom) -> bool:
    return any(not c.through and (i, axis) in c.operands and atom in set(atoms(c.over)) for c in inside)


def _known_scalar(graph: Graph, name: str) -> bool:
    value = graph.values.get(name)
    return value is not None and value.size == 1


def _uniform(graph: Graph, name: str) -> float | None:
    """The value of an input that doesn't carry the unit, where all its elements are the same."""
    value = graph.values.get(name) if name else None
    if value is None or value.size == 0 or value.dtype.kind not in "iufb":
        return None
    first = value.reshape(-1)[0]
    return float(first) if np.all(value == first) else None


def _after(
    graph: Graph, node: Node, operator: Operator | None, inside: Sequence[Contraction], touched: Touched,
    states: Mapping[str, Mapping[Atom, float | None]], atom: Atom,
) -> float | None:
    if operator is None or operator.dead is None:
        return None
    found, _ = _inputs(graph, node, operator, inside, touched, states, atom)
    return operator.dead(node, found)


def _judge(
    graph: Graph, node: Node, operator: Operator | None, contraction: Contraction, touched: Touched,
    states: Mapping[str, Mapping[Atom, float | None]], origin: Mapping[Atom, str], verdicts: Verdicts,
    uses: Mapping[Use, tuple[Expr, ...]],
) -> None:
    """What removing a unit does where its axis is contracted."""
    for atom in set(atoms(contraction.over)):
        if atom.barrier is not None or atom.size < 2:
            continue
        found: list[float | None] = []
        for i, _ in contraction.operands:
            name = node.inputs[i]
            if name in graph.parameters:
                found.append(None)
            else:
                found.append(states.get(name, {}).get(atom))
        where = f"{node.op} {node.label}"
        if contraction.kind is Kind.STATE:
            found = [states.get(name, {}).get(atom) for name in node.outputs[:1] if name] or [0.0]
        only_parameters = all(node.inputs[i] in graph.parameters for i, _ in contraction.operands)
        if contraction.kind in (Kind.NORM, Kind.EXTREME):
            verdicts.add(atom, INEXACT, f"{where} takes a {contraction.kind.value} over it")
        elif any(s == 0 for s in found) or (only_parameters and contraction.kind is not Kind.STATE):
            verdicts.add(atom, COMPENSATED if contraction.kind in (Kind.MEAN, Kind.RMS) else EXACT,
                         f"{where} is rescaled" if contraction.kind in (Kind.MEAN, Kind.RMS) else "")
        elif contraction.fold and found[0] is not None and node.inputs[contraction.operands[1][0]] in graph.parameters:
            verdicts.add(atom, COMPENSATED, f"its constant is folded into the bias of {where}")
            verdicts.constants[node.index, atom] = found[0]
        else:
            since = f", since {origin[atom]}" if atom in origin else ""
            verdicts.add(atom, INEXACT, f"{where} sees a unit that does not vanish{since}")
