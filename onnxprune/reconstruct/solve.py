"""The ridge problem of one consumer, solved from moments.

`affine` looks for W' and b' with W' x + b' near y, with a penalty on how far W' is from the sliced weight W; centred
covariances give W' = W + (C_yx - W C_xx)(C_xx + r I)^-1 and b' = mean(y) - W' mean(x). Where y is the original layer's
output and x a part of its input, that is W_K + W_S C_SK (C_KK + r I)^-1: the removed units are predicted from the kept.
`ls` leaves the constant as it is and takes raw moments instead; `mean` changes the constant alone.

The ridge is taken where the error on rows that were held out is least, downhill from the middle; then all rows are
used.
Whatever is worse than no repair on those rows is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onnxprune.reconstruct.moments import Moments
from onnxprune.workers import product

__all__ = ["MODES", "RIDGES", "Solution", "ridge", "solve"]

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal
JITTER = 1e-12  # of the mean diagonal: where a Cholesky factor fails all the same, ten times as much, and so on
MODES = ("none", "mean", "ls", "affine")


@dataclass(frozen=True, eq=False, slots=True)
class Solution:
    """A new weight (g, o, p) and offset (g, o), how they came about, and the mean relative error on the rows that were
    held out, without repair and with it. condition: the square root of that of the matrix that was solved for, from its
    Cholesky factor's diagonal."""

    weight: np.ndarray
    offset: np.ndarray
    mode: str
    ridge: float
    condition: float
    before: float
    after: float


def solve(
    fit: Moments,
    held: Moments,
    weight: np.ndarray,
    offset: np.ndarray,
    mode: str,
    *,
    free: bool,
    ridges: Sequence[float] = RIDGES,
    begin: float | None = None,
    final: bool = True,
    snap: Callable[[np.ndarray], np.ndarray] = lambda weight: weight,
) -> Solution:
    """The best of `mode` and what is simpler. fit, held: moments of two parts of the rows.

    weight (g, o, p), offset (g, o): as they are after slicing. free: whether the offset can be changed. begin: the
    ridge that is tried first. final: the solution is of all rows; else of `fit` alone, and rows that were held out can
    judge what comes after it. snap: what becomes of a weight when it is stored, in integers perhaps.
    """
    judge = held if held.n else fit
    scale = max(judge.spread(), np.finfo(float).tiny)
    before = judge.error(weight, offset) / scale
    affine = free and mode == "affine"
    found: list[tuple[float, str, float]] = [(before, "none", 0.0)]
    if free and mode in ("mean", "affine"):
        found.append((judge.error(weight, centre(fit, weight)) / scale, "mean", 0.0))
    if mode in ("ls", "affine"):

        def error(size: float) -> float:
            tried = snap(ridge(fit, weight, None if affine else offset, size)[0])
            return judge.error(tried, centre(fit, tried) if affine else offset) / scale

        tried = downhill(error, sorted(ridges), begin) if fit.n else {}
        found += [(e, "affine" if affine else "ls", size) for size, e in tried.items()]
    after, chosen, size = min(found, key=lambda f: f[0])
    moments, condition = fit + held if final and held.n else fit, 1.0
    if chosen in ("ls", "affine"):
        weight, condition = ridge(moments, weight, None if affine else offset, size)
        weight = snap(weight)
    if chosen in ("mean", "affine"):
        offset = centre(moments, weight)
    return Solution(weight, offset, chosen, size, condition, before, after)


def downhill(error: Callable[[float], float], sizes: Sequence[float], begin: float | None) -> dict[float, float]:
    """Errors of sizes around the least: from one to the next, as long as it falls."""
    here = sizes.index(begin) if begin in sizes else (len(sizes) - 1) // 2
    found = {sizes[here]: error(sizes[here])}
    for way in (1, -1):
        k = here
        while 0 <= k + way < len(sizes):
            found[sizes[k + way]] = error(sizes[k + way])
            if found[sizes[k + way]] >= found[sizes[k]]:
                break
            k += way
        if k != here:
            break
    return found


def centre(moments: Moments, weight: np.ndarray) -> np.ndarray:
    """The offset (g, o) with which the mean output is right."""
    return (moments.y - np.einsum("gop,gp->go", weight, moments.x)) / moments.n


def ridge(moments: Moments, weight: np.ndarray, offset: np.ndarray | None, size: float) -> tuple[np.ndarray, float]:
    """The weight (g, o, p) that solves the ridge problem around `weight`, and the condition of what was solved.

    offset: a constant that is given; None where it is free. size: of the ridge, in mean diagonals.
    """
    found, worst = np.empty_like(weight), 1.0
    n = moments.n
    for k in range(len(weight)):
        xx, yx = moments.xx[k] / n, moments.yx[k] / n
        if offset is None:
            mean = moments.x[k] / n
            xx -= np.outer(mean, mean)
            yx -= np.outer(moments.y[k] / n, mean)
        else:
            yx -= np.outer(offset[k], moments.x[k] / n)
        step, condition = _solved(xx, yx - product(weight[k], xx), size)
        found[k], worst = weight[k] + step, max(worst, condition)
    return found, worst


def _solved(matrix: np.ndarray, right: np.ndarray, size: float) -> tuple[np.ndarray, float]:
    """right (matrix + r I)^-1, where r grows until the matrix is positive definite to rounding. `matrix` is used up.

    In torch: numpy solves no triangular systems, and its threads wait for each other at every column, which takes a
    hundred times as long where something else keeps a core busy.
    """
    diagonal = np.einsum("ii->i", matrix)
    unit = diagonal.mean()
    if not 0 < unit < np.inf:
        return np.zeros_like(right), 1.0
    diagonal += size * unit
    jitter = JITTER
    while True:
        factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
        if not failed:
            break
        diagonal += jitter * unit
        jitter *= 10
    spread = factor.diagonal()
    step = torch.cholesky_solve(torch.from_numpy(np.ascontiguousarray(right.T)), factor)
    return step.numpy().T, float(spread.max() / spread.min())
