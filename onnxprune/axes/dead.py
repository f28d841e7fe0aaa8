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

from onnxprune.axes.expr import Atom, Expr, Solution
from onnxprune.model.graph import Graph, Node
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import Contraction, Kind

__all__ = ["COMPENSATED", "EXACT", "INEXACT", "Role", "Verdicts", "consumed", "interpret"]

EXACT, COMPENSATED, INEXACT = "exact", "compensated", "inexact"
_ORDER = {EXACT: 0, COMPENSATED: 1, INEXACT: 2}

Use = tuple[int, int]  # node index, input index
Role = str  # 'produces', 'consumes' or 'follows'
PRODUCES, CONSUMES, FOLLOWS = "produces", "consumes", "follows"
NONE: frozenset[Atom] = frozenset()
FEW = 8  # inputs of a concatenation, up to which all are asked


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


def consumed(contractions: Sequence[Contraction], i: int, axis: int, solution: Solution) -> frozenset[Atom]:
    """The atoms that disappear at a node, on one axis of one of its inputs."""
    gone = [solution.free(c.over) for c in contractions if not c.through and (i, axis) in c.operands]
    return frozenset().union(*gone) if gone else NONE


def interpret(
    graph: Graph,
    registry: Mapping[str, Operator],
    axes: Mapping[str, tuple[Expr, ...]],
    uses: Mapping[Use, tuple[Expr, ...]],
    contractions: Mapping[int, Sequence[Contraction]],
    solution: Solution,
) -> Verdicts:
    """Run all atoms through the graph at once."""
    run = _Interpreter(graph, registry, axes, uses, contractions, solution)
    for node in graph.nodes:
        run.visit(node)
    return run.verdicts


class _Interpreter:
    """states: per tensor and atom, the value of a dead unit's slice (None: unknown). origin: where an atom's units
    first became unknown, for the reason that the user gets."""

    def __init__(
        self,
        graph: Graph,
        registry: Mapping[str, Operator],
        axes: Mapping[str, tuple[Expr, ...]],
        uses: Mapping[Use, tuple[Expr, ...]],
        contractions: Mapping[int, Sequence[Contraction]],
        solution: Solution,
    ) -> None:
        self.graph = graph
        self.registry = registry
        self.axes = axes
        self.uses = uses
        self.contractions = contractions
        self.solution = solution
        self.states: dict[str, dict[Atom, float | None]] = {}
        self.origin: dict[Atom, str] = {}
        self.verdicts = Verdicts()

    def visit(self, node: Node) -> None:
        made: dict[Atom, list[str]] = {}
        for name in node.outputs:
            for expr in self.axes.get(name, ()):
                for atom in self.solution.free(expr):
                    names = made.setdefault(atom, [])
                    if not names or names[-1] is not name:
                        names.append(name)
        if made:
            self.propagate(node, made)
        for contraction in self.contractions.get(node.index, ()):
            self.judge(node, contraction)

    def propagate(self, node: Node, made: Mapping[Atom, Sequence[str]]) -> None:
        operator = self.registry.get(node.op)
        carriers = self.carriers(node)
        absent = self.absent(node, operator)
        for atom, names in made.items():
            inputs = carriers.get(atom, ())
            state: float | None = None
            states = absent
            if operator is not None and operator.dead is not None:
                if operator.joins and len(inputs) == 1 and len(absent) > FEW:
                    states = [self.state(node, operator, inputs[0], atom)]
                    state = states[0]
                else:
                    states = list(absent)
                    for i in inputs:
                        states[i] = self.state(node, operator, i, atom)
                    state = operator.dead(node, states)
            for name in names:
                self.states.setdefault(name, {})[atom] = state
            if state is None and atom not in self.origin and any(s is not None and s == s for s in states):
                self.origin[atom] = f"{node.op} {node.label}"

    def carriers(self, node: Node) -> dict[Atom, list[int]]:
        """Inputs that carry an atom on an axis that does not disappear."""
        inside = self.contractions.get(node.index, ())
        found: dict[Atom, list[int]] = {}
        for i, name in enumerate(node.inputs):
            for k, expr in enumerate(self.uses.get((node.index, i)) or self.axes.get(name, ())):
                free = self.solution.free(expr)
                gone = consumed(inside, i, k, self.solution) if inside and free else NONE
                for atom in free:
                    inputs = found.setdefault(atom, [])
                    if atom not in gone and (not inputs or inputs[-1] != i):
                        inputs.append(i)
        return found

    def absent(self, node: Node, operator: Operator | None) -> list[float | None]:
        """State of inputs that don't carry a unit: their value where it is one number, unknown otherwise; and no say
        at all for the tensors that a concatenation joins."""
        found: list[float | None] = []
        for i, name in enumerate(node.inputs):
            value = None if name in self.graph.varying else self.graph.values.get(name)
            joined = operator is not None and operator.joins and (i == 0 or value is None or value.size != 1)
            found.append(math.nan if joined else self.uniform(value))
        return found

    @staticmethod
    def uniform(value: np.ndarray | None) -> float | None:
        if value is None or value.size == 0 or value.dtype.kind not in "iufb":
            return None
        first = value.reshape(-1)[0]
        return float(first) if value.size == 1 or np.all(value == first) else None

    def state(self, node: Node, operator: Operator, i: int, atom: Atom) -> float | None:
        """A unit's value at an input: zero in parameters that produce it."""
        if node.inputs[i] in self.graph.parameters:
            return None if i in operator.keeps else 0.0
        return self.states.get(node.inputs[i], {}).get(atom)

    def judge(self, node: Node, contraction: Contraction) -> None:
        """What removing a unit does where its axis is contracted."""
        where = f"{node.op} {node.label}"
        names = [node.inputs[i] for i, _ in contraction.operands]
        if contraction.kind is Kind.STATE:
            names = [n for n in node.outputs if n][:1]
        only_parameters = all(n in self.graph.parameters for n in names)
        rescaled = contraction.kind in (Kind.MEAN, Kind.RMS)
        for atom in self.solution.free(contraction.over):
            found = [self.states.get(n, {}).get(atom) for n in names]
            if contraction.kind in (Kind.NORM, Kind.EXTREME):
                self.verdicts.add(atom, INEXACT, f"{where} takes a {contraction.kind.value} over it")
            elif only_parameters or (0 in found and math.inf not in found):
                self.verdicts.add(atom, COMPENSATED if rescaled else EXACT, f"{where} is rescaled" if rescaled else "")
            elif (
                contraction.fold
                and found[0] is not None
                and math.isfinite(found[0])
                and names[1] in self.graph.parameters
            ):
                self.verdicts.add(atom, COMPENSATED, f"its constant is folded into the bias of {where}")
                self.verdicts.constants[node.index, atom] = found[0]
            else:
                since = f", since {self.origin[atom]}" if atom in self.origin else ""
                self.verdicts.add(atom, INEXACT, f"{where} sees a unit that does not vanish{since}")
