"""First and second moments of a linear layer's rows and of what they should give: all that its repair wants to know.

Sums are in float64, over as many blocks of rows as come: the rows themselves are never kept. Layers of several groups
(grouped convolutions, a weight per head) have moments per group: g groups, p columns and o outputs each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxprune.workers import add_squares, over_panels, product

__all__ = ["Moments"]


@dataclass(eq=False, slots=True)
class Moments:
    """Sums over n rows x (p) and targets y (o). xx: (g, p, p), yx: (g, o, p), x: (g, p), y: (g, o), yy: (g, o)."""

    n: int
    xx: np.ndarray
    yx: np.ndarray
    x: np.ndarray
    y: np.ndarray
    yy: np.ndarray

    @classmethod
    def zeros(cls, groups: int, columns: int, outputs: int) -> Moments:
        shapes = ((columns, columns), (outputs, columns), (columns,), (outputs,), (outputs,))
        return cls(0, *(np.zeros((groups, *s)) for s in shapes))

    @staticmethod
    def nbytes(groups: int, columns: int, outputs: int) -> int:
        """Of moments of this size."""
        return 8 * groups * (columns * (columns + outputs) + columns + 2 * outputs)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """x: (g, n, p) and y: (g, n, o), float64."""
        self.n += x.shape[1]
        self.x += x.sum(1)
        add_squares(self.xx, x)
        self.aim(x, y)

    def aim(self, x: np.ndarray, y: np.ndarray) -> None:
        """Of rows that were added before, other targets: see `aimed`."""
        over_panels(partial(self._aim, x, y), len(x), x.shape[2])
        self.y += y.sum(1)
        self.yy += np.einsum("gno,gno->go", y, y)

    def _aim(self, x: np.ndarray, y: np.ndarray, k: int, at: slice) -> None:
        self.yx[k, :, at] += y[k].T @ x[k][:, at]

    def aimed(self) -> Moments:
        """Of the same rows, and no targets yet; the rows' moments are shared."""
        return Moments(self.n, self.xx, np.zeros_like(self.yx), self.x, np.zeros_like(self.y), np.zeros_like(self.yy))

    def __add__(self, other: Moments) -> Moments:
        names = ("xx", "yx", "x", "y", "yy")
        return Moments(self.n + other.n, *(getattr(self, name) + getattr(other, name) for name in names))

    def error(self, weight: np.ndarray, offset: np.ndarray) -> float:
        """Sum of squares of x w' + offset - y over all rows and outputs. weight: (g, o, p), offset: (g, o)."""
        predicted = np.einsum("gop,gop->", product(weight, self.xx) - 2 * self.yx, weight)
        shifted = 2 * np.einsum("go,go->", offset, np.einsum("gop,gp->go", weight, self.x) - self.y)
        return float(predicted + shifted + self.n * np.square(offset).sum() + self.yy.sum())

    def spread(self) -> float:
        """Sum of squares of y around its mean: the error of the best constant."""
        return float(self.yy.sum() - np.square(self.y).sum() / max(self.n, 1))
