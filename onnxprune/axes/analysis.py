"""From a graph to the axes of every tensor, the zero-invariant groups, and the reasons why the rest is frozen.

`walk` collects the equalities that the operators' rules state, `dead` interprets dead units, `groups` reads the result
off. None of them looks at a weight.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from onnxprune.axes.dead import Use, Verdicts, interpret
from onnxprune.axes.expr import (
    Atom,
    Expr,
    atoms,
    show,
)
from onnxprune.axes.groups import BarrierCost, Coverage, Group, Member, find_coverage, find_groups
from onnxprune.axes.walk import Walk
from onnxprune.model.graph import Graph
from onnxprune.ops import OPERATORS
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import Contraction, Kind

__all__ = ["Analysis", "BarrierCost", "Coverage", "Group", "Member", "analyse"]

NEEDS_MASK = frozenset({Kind.NORM, Kind.RMS, Kind.EXTREME, Kind.MEAN})


@dataclass(eq=False)
class Analysis:
    """What `analyse` found out.

    axes: per tensor, its axes as expressions; uses: the axes of parameters at each of their uses (node, input).
    arithmetic: nodes that compute sizes and positions; covered: the fraction of each parameter that is in a group.
    """

    graph: Graph
    registry: Mapping[str, Operator]
    axes: dict[str, tuple[Expr, ...]]
    uses: dict[Use, tuple[Expr, ...]]
    groups: tuple[Group, ...]
    barriers: tuple[BarrierCost, ...]
    coverage: Coverage
    verdicts: Verdicts
    contractions: dict[int, list[Contraction]]
    noted: dict[int, dict[str, Expr]]
    arithmetic: set[int]
    covered: dict[str, float]
    exclude: tuple[str, ...]
    seconds: float
    _names: dict[Atom, str]

    def provable(self, group: Group) -> bool:
        """True where pruning an inexact group can be checked against a reference that leaves its units out of every
        reduction: each such reduction's operator must say how."""
        for n, contractions in self.contractions.items():
            operator = self.registry[self.graph.nodes[n].op]
            for c in contractions:
                if c.kind in NEEDS_MASK and operator.mask is None and group.atom in set(atoms(c.over)):
                    return False
        return True

    def describe(self, tensor: str) -> str:
        """The axes of a tensor, readable: `N, (g3:12 64), g7:768`. Bare numbers are frozen."""
        found = self.axes.get(tensor)
        if found is None:
            found = next((a for (n, i), a in self.uses.items() if self.graph.nodes[n].inputs[i] == tensor), None)
        if found is None:
            raise KeyError(tensor)
        return ", ".join(show(e, self._names) for e in found)


def analyse(graph: Graph, *, registry: Mapping[str, Operator] = OPERATORS, exclude: Sequence[str] = ()) -> Analysis:
    """Find every zero-invariant group of a graph.

    exclude: regular expressions; initializers and nodes whose name matches keep all of their units.
    Raises UsageError where a pattern matches nothing.
    """
    start = time.perf_counter()
    with _collector_at_rest():
        walk = Walk(graph, registry)
        walk.run()
        walk.exclude(exclude)
        walk.tie()
        solution = walk.solve()
        verdicts = interpret(graph, registry, walk.axes, walk.uses, walk.contractions, solution)
        groups = find_groups(walk, verdicts, solution)
        coverage, barriers, covered = find_coverage(walk, groups)
    return Analysis(
        graph,
        registry,
        walk.axes,
        walk.uses,
        groups,
        barriers,
        coverage,
        verdicts,
        walk.contractions,
        walk.noted,
        walk.arithmetic,
        covered,
        tuple(exclude),
        time.perf_counter() - start,
        {g.atom: g.id for g in groups},
    )


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """The many small values made here are all kept: looking for garbage among them makes large graphs quadratic."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
