"""How far two outputs are apart."""

from __future__ import annotations

import numpy as np

__all__ = ["SMALLEST_SCALE", "difference"]

SMALLEST_SCALE = 1e-2  # outputs below it (a saturated sigmoid) are compared absolutely: float32 sigmoids round at 1e-7
FAR = (float("inf"), float("inf"))


def difference(a: object, b: object) -> tuple[float, float]:
    """Largest absolute difference, and the same relative to the largest magnitude of `a` (at least SMALLEST_SCALE).

    Sequences and maps (the outputs of classical models) are compared element by element.
    """
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return _worst(difference(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return _worst(difference(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return _arrays(a, b)
    if isinstance(a, float) and isinstance(b, float):
        return _arrays(np.array([a]), np.array([b]))
    return (0.0, 0.0) if a == b else FAR


def _worst(pairs: object) -> tuple[float, float]:
    found = list(pairs)  # type: ignore[call-overload]
    return (max(p[0] for p in found), max(p[1] for p in found)) if found else (0.0, 0.0)


def _arrays(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    if a.shape != b.shape:
        return FAR
    if a.size == 0:
        return 0.0, 0.0
    if a.dtype.kind in "OSU":
        return (0.0, 0.0) if np.array_equal(a, b) else FAR
    x, y = a.astype(np.float64), b.astype(np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(x - y))
    worst = float(np.max(np.where(np.isnan(gap), np.inf, gap)))
    finite = np.abs(x[np.isfinite(x)])
    scale = float(finite.max()) if finite.size else 0.0
    return worst, worst / max(scale, SMALLEST_SCALE)
