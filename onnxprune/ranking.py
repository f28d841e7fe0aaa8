"""How `compress` ranks units and shares the cut out among groups, from what the user asked for: by weights alone, on
data, or by curves that `sensitivity` measured before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxprune.axes.analysis import Analysis, Group
from onnxprune.errors import DataError, UsageError
from onnxprune.model.profile import costs
from onnxprune.select.importance import CALIBRATED, Criterion, Scores, scores

if TYPE_CHECKING:
    from onnxprune.data.source import Source

__all__ = ["ALLOCATIONS", "AUTO", "Ranking", "measured_samples", "ranking"]

ALLOCATIONS = ("importance", "sensitivity")
AUTO = "auto"
OBS_WORK = 1e11  # multiply-accumulates over all inputs that 'obs' is affordable for: a minute or two
WORK = 5e12  # multiply-accumulates that measuring may take by itself: a few minutes
FEWEST = 16  # samples


@dataclass(frozen=True)
class Ranking:
    """What `select.choose` is given. about: in words."""

    importance: str | Criterion | Scores
    losses: Mapping[str, np.ndarray] | None = None
    about: str = ""


def ranking(
    analysis: Analysis,
    groups: list[Group],
    source: Source | None,
    *,
    importance: str | Criterion,
    allocate: str = "importance",
    stored: Path | None = None,
    samples: int | None = None,
    repaired: bool = False,
    seed: int = 0,
) -> Ranking:
    """Find out what was asked for.

    importance: AUTO takes 'obs' where the model will be repaired on the source, which is what it foresees, and
    'wanda' where that would take minutes; 'l2', which wants no data, where it won't. Ranked on data, a repaired network
    is nearly always better (`tools/ranking_table.py`).
    allocate: 'importance' guesses what groups lose from the importance of their units, 'sensitivity' measures it on
    data (or reads it from `stored`, with the importance it was measured by). samples: of the source, for everything.
    repaired: whether the model will be repaired in closed form on the source.

    Raises UsageError where data is wanted and there is none.
    """
    if allocate not in ALLOCATIONS:
        raise UsageError(f"--allocate '{allocate}' is none of {', '.join(ALLOCATIONS)}")
    if stored is not None:
        from onnxprune.sensitivity import Sensitivity

        found = Sensitivity.load(stored, analysis)
        return Ranking(found.scores, losses=found.losses(), about=f"{found.importance} and curves of {stored.name}")
    automatic = importance == AUTO
    if automatic:
        importance = _affordable(analysis, source, samples) if source is not None and repaired else "l2"
    name = importance if isinstance(importance, str) else getattr(importance, "__name__", "a criterion")
    on_data = importance in CALIBRATED if isinstance(importance, str) else True
    if source is None or not (on_data or allocate == "sensitivity"):
        if allocate == "sensitivity":
            raise UsageError("--allocate sensitivity is measured on data", "give it with --data, or --sensitivity FILE")
        return Ranking(importance, about=name)
    from onnxprune.calibrate.calibration import SAMPLES, Calibration

    calibration = Calibration(analysis, source, samples or SAMPLES, seed)
    about = f"{name} on {source.description}"
    if allocate == "importance":
        from onnxprune.train.batching import fitting

        try:
            with fitting():
                return Ranking(scores(analysis, groups, importance, seed=seed, calibration=calibration), about=about)
        except DataError:  # torch can't run the network on it: what is wrong is said when it comes to the repair
            if not automatic:
                raise
            return Ranking("l2", about="l2")
    from onnxprune.sensitivity import measure

    few = samples or measured_samples(analysis, groups, calibration.samples)
    measured = measure(analysis, groups, calibration, importance=importance, samples=few, seed=seed)
    return Ranking(measured.scores, losses=measured.losses(), about=f"{about}, and measured curves")


def _affordable(analysis: Analysis, source: Source, samples: int | None) -> str:
    from onnxprune.calibrate.calibration import SAMPLES

    inputs = min(samples or SAMPLES, source.size or SAMPLES)
    return "obs" if inputs * costs(analysis)["macs"].total({}) <= OBS_WORK else "wanda"


def measured_samples(analysis: Analysis, groups: list[Group], most: int) -> int:
    """How many samples curves are measured on unless told otherwise: what takes a few minutes."""
    from onnxprune.sensitivity import FRACTIONS

    each = max(costs(analysis)["macs"].total({}), 1.0) * max(1, ceil(len(groups) * len(FRACTIONS) / 2))
    return int(min(most, max(FEWEST, WORK // each)))
