"""Which units of which groups lie where behind a gate: one table for all that works on units in torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxprune.axes.dead import PRODUCES
from onnxprune.axes.expr import Atom, Expr
from onnxprune.calibrate.reads import reads_of
from onnxprune.calibrate.watched import Watched
from onnxprune.select.importance import unit_of

__all__ = ["Part", "made_parts", "read_parts"]


@dataclass(frozen=True, eq=False)
class Part:
    """The units of a group on an axis of a gated tensor: unit `units[k]` at index `at[k]` of `length` indices.
    constant: what a dead unit's activation is there."""

    gate: int
    group: str
    axis: int
    length: int
    at: Tensor
    units: Tensor
    constant: float = 0.0

    def mask(self, kept: Tensor) -> Tensor:
        """Numbers per unit as numbers per index, 1 for what belongs to no unit."""
        found = kept.new_ones(self.length)
        return found.index_put((self.at,), kept[self.units])


def read_parts(watched: Watched) -> Mapping[int, list[Part]]:
    """By the gate's number, the units that are read behind it. Where both factors of a product carry them, one of them
    stands for both: without it the product is gone."""
    analysis = watched.analysis
    numbers = {(g.node, g.tensor): k for k, g in enumerate(watched.gates) if not g.made}
    reads = reads_of(analysis)
    found: dict[int, list[Part]] = {}
    for group in analysis.groups:
        seen: set[tuple[int, int]] = set()
        for read in reads.get(group.atom, ()):
            operand = next((o for o in read.operands if (read.node, o.tensor) in numbers and o.input is not None), None)
            if operand is None:
                continue
            number = numbers[read.node, operand.tensor]
            if (number, operand.axis) not in seen:
                seen.add((number, operand.axis))
                constant = analysis.verdicts.constants.get((read.node, group.atom), 0.0)
                part = _part(number, group.id, operand.axis, operand.expr, group.atom, constant)
                found.setdefault(number, []).append(part)
    return found


def made_parts(watched: Watched) -> Mapping[str, list[Part]]:
    """By the group's id, where its units are made: zeros there and the units vanish."""
    analysis = watched.analysis
    numbers = {(g.node, g.tensor): k for k, g in enumerate(watched.gates) if g.made}
    found: dict[str, list[Part]] = {}
    for group in analysis.groups:
        parts = found.setdefault(group.id, [])
        for m in group.members:
            number = numbers.get((m.use[0], m.initializer))
            if m.role == PRODUCES and number is not None:
                parts.append(_part(number, group.id, m.axis, analysis.uses[m.use][m.axis], group.atom))
    return found


def _part(gate: int, group: str, axis: int, expr: Expr, atom: Atom, constant: float = 0.0) -> Part:
    units = unit_of(expr, atom)
    at = np.flatnonzero(units >= 0)
    return Part(gate, group, axis, len(units), torch.from_numpy(at), torch.from_numpy(units[at]), constant)
