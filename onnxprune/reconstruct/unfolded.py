"""A consumer as a matrix product: rows, targets and weight in the order (groups, rows, columns).

The operator's rule says how to look at the tensors (`ops.rules.Linear`); everything here is the labels' doing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import Tensor

from onnxprune.ops.rules import Linear
from onnxprune.reconstruct.moves import Stored

__all__ = ["Misfit", "Unfolded", "unfolded"]

UNMOVED = Stored()
BLOCK = 1 << 23  # numbers of rows that are unfolded at a time


class Misfit(Exception):
    """The tensors of the two networks don't belong together, for this reason."""


@dataclass(frozen=True, slots=True)
class Unfolded:
    """Labels by what they do: groups, rows, columns (what is summed over) and outputs. source: where the weight's
    numbers are stored."""

    linear: Linear
    groups: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    outputs: tuple[str, ...]
    source: Stored

    def sizes(self) -> tuple[int, int, int]:
        """Numbers of groups, columns and outputs."""
        size = dict(zip(self.linear.terms[1], self.linear.weight_shape, strict=True))
        g, p, o = (prod(size[n] for n in names) for names in (self.groups, self.columns, self.outputs))
        return g, p, o

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """A stored weight as (g, o, p), float64, with the product's scale in it."""
        order = self._order(1, (*self.groups, *self.outputs, *self.columns))
        g, p, o = self.sizes()
        viewed = self.source.seen(weight).reshape(self.linear.weight_shape).transpose(order)
        return np.array(viewed, np.float64).reshape(g, o, p) * self.linear.scale

    def stored(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of `matrix`."""
        order = self._order(1, (*self.groups, *self.outputs, *self.columns))
        sizes = [self.linear.weight_shape[k] for k in order]
        laid = (matrix / self.linear.scale).reshape(sizes).transpose(np.argsort(order))
        return self.source.back(laid, shape)

    def _order(self, term: int, wanted: tuple[str, ...]) -> list[int]:
        return [self.linear.terms[term].index(n) for n in wanted]

    def blocks(
        self, x: Tensor, y: Tensor, limit: int, rng: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows (g, n, p) and targets (g, n, o) in float64, at most `limit` rows in all, drawn evenly where there are
        more. x: the unfolded input; y: the targets with the axes of the third term. Raises Misfit where these are of
        other rows: some networks choose rows by what they compute, such as the expert for a word."""
        x = x.permute(self._order(0, (*self.rows, *self.groups, *self.columns)))
        y = y.permute(self._order(2, (*self.rows, *self.groups, *self.outputs)))
        g, p, o = self.sizes()
        places = tuple(x.shape[: len(self.rows)])
        if tuple(y.shape[: len(self.rows)]) != places:
            counts = prod(places), prod(y.shape[: len(self.rows)])
            raise Misfit("it is given other rows than in the original: {} and {} for the same inputs".format(*counts))
        count = prod(places)
        chosen = np.arange(count) if count <= limit else np.sort(rng.choice(count, limit, replace=False))
        step = max(1, BLOCK // max(1, g * p))
        for start in range(0, len(chosen), step):
            at = np.unravel_index(chosen[start : start + step], places) if places else ()
            rows, wanted = (_taken(t, at, s) for t, s in ((x, (-1, g, p)), (y, (-1, g, o))))
            yield rows.transpose(1, 0, 2), wanted.transpose(1, 0, 2)


def _taken(tensor: Tensor, at: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> np.ndarray:
    picked = tensor[at] if at else tensor
    return np.ascontiguousarray(picked.reshape(shape).double().numpy())


def unfolded(linear: Linear, source: Stored = UNMOVED) -> Unfolded | None:
    """None where an axis is summed over without a partner."""
    x, w, y = map(set, linear.terms)
    if (x - w - y) or (w - x - y) or (y - x - w):
        return None
    ordered = linear.terms
    return Unfolded(
        linear,
        tuple(n for n in ordered[2] if n in x and n in w),
        tuple(n for n in ordered[2] if n in x and n not in w),
        tuple(n for n in ordered[1] if n in x and n not in y),
        tuple(n for n in ordered[2] if n in w and n not in x),
        source,
    )
