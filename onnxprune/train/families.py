"""The zero-invariant groups of a model as its mirror holds them: which slice of which tensor is which unit's.

What must be zero for a unit to vanish is what *produces* it: rows of weights, biases, scales and shifts of a
normalisation, also of one that was put back for training (Only-Train-Once, arXiv 2303.06862, section 3.1). What
consumes it is dropped with it and is no part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from onnxprune.axes.analysis import Analysis, Group
from onnxprune.axes.dead import INEXACT, PRODUCES
from onnxprune.mirroring.rebn import inserted
from onnxprune.select.importance import unit_of
from onnxprune.train.units import Part

__all__ = ["Grouping", "params_and_groups", "trainable_groups"]


class Grouping(NamedTuple):
    """A weight whose products run group by group, as in a grouped convolution. groups: how many, along axis 0.
    rows: the axis of a group's outputs, 0 (shared with the groups), or 1 in a transposed convolution."""

    groups: int
    rows: int


def params_and_groups(
    mirror: GraphModule,
    analysis: Analysis,
    *,
    weight_decay: float = 0.0,
    allow_inexact: bool = False,
) -> list[dict[str, Any]]:
    """The mirror's parameters as an optimizer's parameter groups, with their units.

    mirror: of the analysed graph, on its device. Of each group, "params" are the tensors and "parts", as long, says
    per tensor which of its axes are made of units (`units.Part`; families are named by the ids of the analysis'
    groups), and "grouping" whether it is a grouped convolution's weight. What produces a unit and is not learnt (a
    stored table, say) comes in a group of its own: it has no gradient, and vanishes with the unit. weight_decay: of
    parameters with two axes or more.
    allow_inexact: also groups whose removal changes the function.
    """
    tensors, groupings = _tensors(mirror), _groupings(mirror, analysis)
    places = _places(mirror, tensors)
    parts: dict[str, dict[tuple[str, int], Part]] = {}
    for group in trainable_groups(mirror, analysis, allow_inexact=allow_inexact):
        for target, axis, units in _producing(places, analysis, group):
            parts.setdefault(target, {})[group.id, axis] = Part(group.id, axis, units)
    groups: list[dict[str, Any]] = [
        {"params": [], "parts": [], "grouping": [], "weight_decay": w} for w in (weight_decay, 0.0, 0.0)
    ]
    for target, tensor in tensors.items():
        own = tuple(parts.get(target, {}).values())
        learnt = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        if learnt or own:
            chosen = groups[(0 if tensor.ndim > 1 else 1) if learnt else 2]
            chosen["params"].append(tensor)
            chosen["parts"].append(own)
            chosen["grouping"].append(groupings.get(target))
    return [g for g in groups if g["params"]]


def trainable_groups(mirror: GraphModule, analysis: Analysis, *, allow_inexact: bool = False) -> list[Group]:
    """The groups whose units can be driven to zero in the mirror: everything that produces them is a floating-point
    tensor there."""
    tensors, targets = _tensors(mirror), _targets(mirror)
    found = []
    for group in analysis.groups:
        if group.kind == INEXACT and not (allow_inexact and analysis.provable(group)):
            continue
        names = {m.initializer for m in group.members if m.role == PRODUCES}
        if names and all(any(t in tensors for t in targets.get(name, ())) for name in names):
            found.append(group)
    return found


def _places(mirror: GraphModule, tensors: Mapping[str, Tensor]) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Per stored tensor, its targets, each with scale and bias of a normalisation that was put in behind it."""
    normalised = inserted(mirror)
    return {
        name: [(t, normalised.get(t, ())) for t in found if t in tensors] for name, found in _targets(mirror).items()
    }


def _producing(
    places: Mapping[str, list[tuple[str, tuple[str, ...]]]], analysis: Analysis, group: Group
) -> Iterable[tuple[str, int, np.ndarray]]:
    """(target, axis, unit of every index) of what produces the group's units in the mirror."""
    for member in group.members:
        if member.role != PRODUCES:
            continue
        units = unit_of(analysis.uses[member.use][member.axis], group.atom)
        for target, behind in places[member.initializer]:
            yield target, member.axis, units
            if member.axis == 0:
                yield from ((t, 0, units) for t in behind)


def _groupings(mirror: GraphModule, analysis: Analysis) -> dict[str, Grouping]:
    """By target, the weights of grouped convolutions."""
    tensors, targets = _tensors(mirror), _targets(mirror)
    found = {}
    for (n, i), axes in analysis.uses.items():
        groups = analysis.noted.get(n, {}).get("groups")
        if groups is None or groups.size == 1 or i < 0 or len(axes) < 2:
            continue
        summed = [axis for c in analysis.contractions.get(n, ()) for operand, axis in c.operands if operand == i]
        for target in targets.get(analysis.graph.nodes[n].inputs[i], ()):
            if target in tensors:
                found[target] = Grouping(groups.size, 1 if 0 in summed else 0)
    return found


def _tensors(mirror: GraphModule) -> dict[str, Tensor]:
    """Floating-point parameters and buffers by target."""
    every = {**dict(mirror.named_buffers()), **dict(mirror.named_parameters())}
    return {target: t for target, t in every.items() if torch.is_floating_point(t)}


def _targets(mirror: GraphModule) -> dict[str, list[str]]:
    """The targets of every tensor that the model stores at its top."""
    found: dict[str, list[str]] = {}
    for target, path in mirror.meta["parameters"].items():
        if len(path) == 1:
            found.setdefault(path[0], []).append(target)
    return found
