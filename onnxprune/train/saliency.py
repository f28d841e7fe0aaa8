"""How much a unit matters, from what training shows of it: its slices x and the optimizer's direction d (x <- x - a d).

A criterion takes the statistics of all units and gives one number per unit: the higher, the more it matters. Mixtures
add criteria of different scales, each divided by its 2-norm over the network (as published) or by its mean over the
family (so that layers of different scale share one ranking).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.errors import UsageError

__all__ = ["SALIENCY", "Normalise", "Statistics", "per_family", "per_network", "saliency"]


@dataclass(frozen=True)
class Statistics:
    """Means over some steps, per unit: arrays (units,), float64.

    norm: |x|. cosine: of x and d. inner: <x, d>. inner_square: <x, d> squared. counts: numbers in a unit.
    families: which units are whose.
    """

    norm: np.ndarray
    cosine: np.ndarray
    inner: np.ndarray
    inner_square: np.ndarray
    counts: np.ndarray
    families: Mapping[str, slice]


Normalise = Callable[[np.ndarray, Mapping[str, slice]], np.ndarray]
Saliency = Callable[[Statistics, Normalise], np.ndarray]


def per_network(values: np.ndarray, families: Mapping[str, slice]) -> np.ndarray:
    """Divided by their 2-norm."""
    return values / max(float(np.linalg.norm(values)), np.finfo(np.float64).tiny)


def per_family(values: np.ndarray, families: Mapping[str, slice]) -> np.ndarray:
    """Divided by the mean of their absolute values in the family."""
    found = np.zeros(len(values))
    for where in families.values():
        found[where] = values[where] / max(float(np.abs(values[where]).mean()), np.finfo(np.float64).tiny)
    return found


def norm(s: Statistics, normalise: Normalise) -> np.ndarray:
    """|x|."""
    return s.norm


def average(s: Statistics, normalise: Normalise) -> np.ndarray:
    """|x| over the numbers in x."""
    return s.norm / np.maximum(s.counts, 1)


def cosine(s: Statistics, normalise: Normalise) -> np.ndarray:
    """1 - cos(x, d): what descending shrinks already matters less (arXiv 2303.06862, section 3.2)."""
    return 1 - s.cosine


def taylor(s: Statistics, normalise: Normalise) -> np.ndarray:
    """|<x, d>|: first-order change of the loss when x goes to 0 (arXiv 1906.10771)."""
    return np.abs(s.inner)


def taylor2(s: Statistics, normalise: Normalise) -> np.ndarray:
    """<x, d>^2 / 2: second-order change, with the Fisher matrix for the Hessian."""
    return s.inner_square / 2


def mixture(s: Statistics, normalise: Normalise) -> np.ndarray:
    """HESSO's (arXiv 2409.09085): a fifth each of |x|, average |x|, 1 + cos(x, d), |<x, d>| and <x, d>^2 / 2.

    The cosine counts the other way round than in `cosine` and in DHSPG's score, as published; beside 1 it
    weighs little.
    """
    parts = (s.norm, average(s, normalise), 1 + s.cosine, np.abs(s.inner), s.inner_square / 2)
    return np.sum([0.2 * normalise(part, s.families) for part in parts], axis=0)


def dhspg(s: Statistics, normalise: Normalise) -> np.ndarray:
    """DHSPG's score (arXiv 2303.06862, section 3.2), turned round: half each of cos(x, d) and 1 / average |x| say how
    redundant a unit is. exp(-score * sqrt(units)) falls with it, and is positive; a unit that is zero has 0."""
    magnitude = average(s, normalise)
    inverse = 1 / np.where(magnitude > 0, magnitude, np.inf)
    score = 0.5 * normalise(s.cosine, s.families) + 0.5 * normalise(inverse, s.families)
    scale = np.sqrt(len(score)) if normalise is per_network else 1.0
    return np.where(magnitude > 0, np.exp(-score * scale), 0.0)


SALIENCY: Mapping[str, Saliency] = {
    "mixture": mixture,
    "norm": norm,
    "average": average,
    "cosine": cosine,
    "taylor": taylor,
    "taylor2": taylor2,
    "dhspg": dhspg,
}


def saliency(
    statistics: Statistics, criterion: str | Saliency = "mixture", *, normalise: Normalise = per_network
) -> dict[str, np.ndarray]:
    """Per family, how much each unit matters. Raises UsageError for an unknown criterion."""
    if not callable(criterion):
        if criterion not in SALIENCY:
            raise UsageError(f"saliency '{criterion}' is none of {', '.join(SALIENCY)}")
        criterion = SALIENCY[criterion]
    values = np.nan_to_num(criterion(statistics, normalise))
    return {family: values[where] for family, where in statistics.families.items()}
