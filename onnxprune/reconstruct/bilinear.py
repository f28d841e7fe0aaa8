"""The ridge problem of a product of two tensors that both lost columns, solved from second moments per sample.

For rows Q' (n, d) and K' (m, d) of a sample, and the original's Q and K with all their columns, A (d, d) brings
Q' A K'^T near Q K^T, with a penalty on how far it is from the identity:

    sum |Q K^T - Q' A K'^T|^2 + r |A - I|^2    =>    sum Cq A Ck + r (A - I) = sum (Q'^T Q) (K^T K')

where Cq = Q'^T Q' and Ck = K'^T K' are of one sample, and the sums over samples. The products themselves are never
formed. Every head has an A of its own. Narrow heads are solved as d^2 equations, wider ones by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from onnxprune.reconstruct.solve import RIDGES

__all__ = ["Bilinear", "Grams", "bilinear", "solve_bilinear"]

DENSE = 576  # unknowns of a head that are solved for as one matrix: of more, conjugate gradients are faster
JITTER = 1e-12
ITERATIONS = 200
TOLERANCE = 1e-9  # of the residual, relative to that of the identity

Linear = Callable[[np.ndarray], np.ndarray]


@dataclass(eq=False, slots=True)
class Grams:
    """q, k: per batch, Cq and Ck of its samples, (samples, heads, d, d). right: (heads, d, d), the right-hand side.
    energy, total: (heads,), the sums of the products' squares and of the products, of which there are `count` per head.
    """

    right: np.ndarray
    energy: np.ndarray
    total: np.ndarray
    count: int = 0
    q: list[np.ndarray] = field(default_factory=list)
    k: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def zeros(cls, heads: int, width: int) -> Grams:
        return cls(np.zeros((heads, width, width)), np.zeros(heads), np.zeros(heads))

    @staticmethod
    def nbytes(samples: int, heads: int, width: int) -> int:
        """Of so many samples."""
        return 16 * samples * heads * width * width

    @property
    def samples(self) -> int:
        return sum(map(len, self.q))

    def add(self, q: np.ndarray, k: np.ndarray, whole_q: np.ndarray, whole_k: np.ndarray) -> None:
        """Rows of some samples, (samples, heads, rows, columns), in float64; whole_q, whole_k: the original's."""
        self.q.append(_gram(q, q))
        self.k.append(_gram(k, k))
        self.right += (_gram(q, whole_q) @ _gram(whole_k, k)).sum(0)
        own = _gram(whole_q, whole_q) * _gram(whole_k, whole_k)
        self.energy += own.sum((0, 2, 3))
        self.total += (whole_q.sum(2) * whole_k.sum(2)).sum((0, 2))
        self.count += len(q) * q.shape[2] * k.shape[2]

    def __iadd__(self, other: Grams) -> Grams:
        self.right += other.right
        self.energy += other.energy
        self.total += other.total
        self.count += other.count
        self.q += other.q
        self.k += other.k
        return self

    def spread(self) -> float:
        """Sum of squares of the products around each head's mean."""
        return float((self.energy - np.square(self.total) / max(self.count, 1)).sum())

    def of_head(self, h: int) -> tuple[np.ndarray, np.ndarray]:
        """Cq and Ck of a head, (samples, d, d)."""
        return np.concatenate([x[:, h] for x in self.q]), np.concatenate([x[:, h] for x in self.k])

    def error(self, mixed: np.ndarray) -> float:
        """Sum of squares of Q K^T - Q' A K'^T over all samples and heads. mixed: A, (heads, d, d)."""
        found = float(self.energy.sum()) - 2 * float((mixed * self.right).sum())
        for q, k in zip(self.q, self.k, strict=True):
            found += float((mixed * np.matmul(np.matmul(q, mixed), k).sum(0)).sum())
        return found


@dataclass(frozen=True, eq=False, slots=True)
class Bilinear:
    """A per head (heads, d, d), and how it came about: as `solve.Solution`."""

    mixed: np.ndarray
    mode: str
    ridge: float
    condition: float
    before: float
    after: float


def solve_bilinear(fit: Grams, held: Grams, ridges: Sequence[float] = RIDGES) -> Bilinear:
    """A with the ridge at which the samples that were held out come out best, from all samples; the identity where that
    is no worse there. fit, held: two parts of the samples; `fit` becomes all."""
    judge = held if held.q else fit
    same = np.broadcast_to(np.eye(fit.right.shape[1]), fit.right.shape)
    scale = max(judge.spread(), np.finfo(float).tiny)
    before = judge.error(same) / scale
    found = [(before, 0.0, "none")]
    if fit.q:
        tried = bilinear(fit, ridges)
        found += [(judge.error(a) / scale, size, "ls") for (a, _), size in zip(tried, ridges, strict=True)]
    after, size, mode = min(found, key=lambda f: f[0])
    if mode == "none":
        return Bilinear(same.copy(), mode, 0.0, 1.0, before, after)
    if held.q:
        fit += held
        ((mixed, condition),) = bilinear(fit, [size])
    else:
        mixed, condition = tried[list(ridges).index(size)]
    return Bilinear(mixed, mode, size, condition, before, after)


def bilinear(grams: Grams, ridges: Sequence[float]) -> list[tuple[np.ndarray, float]]:
    """Per ridge, A (heads, d, d) and the condition of what was solved for. ridges: in mean diagonals, head by head."""
    heads, d = grams.right.shape[:2]
    found = [(np.empty_like(grams.right), 1.0) for _ in ridges]
    for h in range(heads):
        q, k = grams.of_head(h)
        right = grams.right[h] - np.einsum("sab,sbe->ae", q, k)
        unit = float(np.einsum("saa,see->", q, k)) / d**2
        solved = _dense(q, k, right, unit, ridges) if d * d <= DENSE else _iterated(q, k, right, unit, ridges)
        for n, (step, condition) in enumerate(solved):
            found[n][0][h] = np.eye(d) + step
            found[n] = found[n][0], max(found[n][1], condition)
    return found


def _gram(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.matmul(a.swapaxes(-1, -2), b)


def _dense(
    q: np.ndarray, k: np.ndarray, right: np.ndarray, unit: float, ridges: Sequence[float]
) -> list[tuple[np.ndarray, float]]:
    """sum Cq X Ck + r X = right, as d^2 equations; r grows until they are positive definite to rounding."""
    d = len(right)
    if not unit > 0:
        return [(np.zeros_like(right), 1.0)] * len(ridges)
    pairs = (q.reshape(len(q), -1).T @ k.reshape(len(k), -1)).reshape(d, d, d, d)
    matrix = torch.from_numpy(np.ascontiguousarray(pairs.transpose(0, 3, 1, 2)).reshape(d * d, d * d))
    del pairs
    found = []
    for size in ridges:
        shift, jitter = size * unit, JITTER
        while True:
            shifted = matrix.clone()
            shifted.diagonal().add_(shift)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if not failed:
                break
            shift, jitter = shift + jitter * unit, jitter * 10
        spread = factor.diagonal()
        step = torch.cholesky_solve(torch.from_numpy(right.reshape(-1, 1)), factor).numpy().reshape(d, d)
        found.append((step, float(spread.max() / spread.min())))
    return found


def _iterated(
    q: np.ndarray, k: np.ndarray, right: np.ndarray, unit: float, ridges: Sequence[float]
) -> list[tuple[np.ndarray, float]]:
    """The same by conjugate gradients, from the solution for the next larger ridge. What makes them fast: the equations
    of the mean moments, sum Cq X sum Ck / samples + r X, which are solved in their eigenvectors."""
    d, count = len(right), len(q)
    if not unit > 0:
        return [(np.zeros_like(right), 1.0)] * len(ridges)
    wide = np.ascontiguousarray(q.transpose(1, 0, 2)).reshape(d, count * d)
    tall = np.ascontiguousarray(k.transpose(1, 0, 2)).reshape(d, count * d)
    (values_q, vectors_q), (values_k, vectors_k) = (np.linalg.eigh(x.sum(0)) for x in (q, k))
    values = np.maximum(values_q, 0)[:, None] * np.maximum(values_k, 0) / count

    def apply(shift: float, x: np.ndarray) -> np.ndarray:
        half = (x @ tall).reshape(d, count, d).transpose(1, 0, 2).reshape(count * d, d)
        return wide @ half + shift * x

    found: dict[float, tuple[np.ndarray, float]] = {}
    x = np.zeros_like(right)
    for size in sorted(ridges, reverse=True):
        shift = max(size, JITTER) * unit
        inverse = 1 / (values + shift)
        x = _conjugate(partial(apply, shift), right, x, partial(_turned, inverse, vectors_q, vectors_k))
        found[size] = x, float(np.sqrt((values.max() + shift) / (values.min() + shift)))
    return [found[size] for size in ridges]


def _turned(factors: np.ndarray, left: np.ndarray, right: np.ndarray, x: np.ndarray) -> np.ndarray:
    return left @ ((left.T @ x @ right) * factors) @ right.T


def _conjugate(apply: Linear, right: np.ndarray, x: np.ndarray, precondition: Linear) -> np.ndarray:
    """Preconditioned conjugate gradients from x."""
    residual = right - apply(x)
    goal = TOLERANCE * np.linalg.norm(right)
    turned = precondition(residual)
    direction, product = turned, float((residual * turned).sum())
    for _ in range(ITERATIONS):
        if np.linalg.norm(residual) <= goal or not product > 0:
            break
        ahead = apply(direction)
        step = product / float((direction * ahead).sum())
        x, residual = x + step * direction, residual - step * ahead
        turned = precondition(residual)
        last, product = product, float((residual * turned).sum())
        direction = turned + product / last * direction
    return x
