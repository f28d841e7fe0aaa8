"""A plan: which units of which groups stay. It is stored in the pruned model, so that the proof can be repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.axes.analysis import Analysis, Group
from onnxprune.axes.expr import Atom
from onnxprune.errors import ModelRejected

__all__ = ["METADATA_KEY", "Plan", "plan_from_text", "plan_to_text", "stored_settings"]

METADATA_KEY = "onnxprune.plan"
SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """Kept unit indices (ascending) per group id; groups that lose nothing are absent."""

    keep: Mapping[str, np.ndarray]

    def by_atom(self, analysis: Analysis) -> dict[Atom, np.ndarray]:
        """Kept indices by the analysis' atoms."""
        return {g.atom: self.keep[g.id] for g in analysis.groups if g.id in self.keep}

    def pruned(self, analysis: Analysis) -> list[Group]:
        """The groups that lose units."""
        return [g for g in analysis.groups if g.id in self.keep]


def _ranges(indices: np.ndarray) -> str:
    """`0-15,32,40-47`."""
    if len(indices) == 0:
        return ""
    breaks = np.flatnonzero(np.diff(indices) != 1)
    starts = np.concatenate([[0], breaks + 1])
    ends = np.concatenate([breaks, [len(indices) - 1]])
    pairs = ((int(indices[a]), int(indices[b])) for a, b in zip(starts, ends, strict=True))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def _indices(text: str, size: int) -> np.ndarray:
    """The indices of `_ranges`: ascending, each once, below `size`. Raises ValueError."""
    kept: list[int] = []
    for item in filter(None, text.split(",")):
        first, _, last = item.partition("-")
        a, b = int(first), int(last or first)
        if not (kept[-1] if kept else -1) < a <= b < size:
            raise ValueError(f"'{item}' of {size} units")
        kept.extend(range(a, b + 1))
    return np.array(kept, np.int64)


def plan_to_text(plan: Plan, analysis: Analysis) -> str:
    """JSON for the pruned model's metadata. A group is known again by its id, its size and its first member."""
    groups = [
        {
            "id": g.id,
            "size": g.size,
            "member": g.members[0].initializer,
            "axis": g.members[0].axis,
            "kept": _ranges(plan.keep[g.id]),
        }
        for g in plan.pruned(analysis)
    ]
    settings = {"pins": dict(analysis.graph.pins), "exclude": list(analysis.exclude)}
    return json.dumps({"schema": SCHEMA, "groups": groups, **settings}, separators=(",", ":"))


def plan_from_text(text: str, analysis: Analysis) -> Plan:
    """The plan stored in a pruned model, for the analysis of its original. Raises ModelRejected where they differ."""
    hint = "is this the model that it was pruned from, and the same version of onnxprune?"
    known = {g.id: g for g in analysis.groups}
    keep: dict[str, np.ndarray] = {}
    try:
        for entry in json.loads(text)["groups"]:
            group = known.get(entry["id"])
            if group is None or group.size != entry["size"] or group.members[0].initializer != entry["member"]:
                raise ModelRejected(f"group {entry['id']} of the stored plan does not exist in the original", hint)
            keep[group.id] = _indices(entry["kept"], group.size)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelRejected(f"the plan stored in the pruned model can't be read: {error}", hint) from None
    return Plan(keep)


def stored_settings(text: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """What the analysis behind a stored plan was given: sizes of symbolic dimensions, and names to leave alone."""
    try:
        document = json.loads(text)
        pins = {str(k): int(v) for k, v in document.get("pins", {}).items()}
        return pins, tuple(map(str, document.get("exclude", ())))
    except (json.JSONDecodeError, AttributeError, ValueError, TypeError):
        raise ModelRejected("the plan stored in the pruned model can't be read") from None
