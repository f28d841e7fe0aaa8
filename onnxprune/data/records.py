"""Data that can be read at any place: what such data has to tell, and the commonest kind, files of arrays.

Every kind tells how many rows it has and gives any of them as admitted, unconverted `Rows`; joining, scaling and
casting them is the same for all (`gather`). Nothing is held but what mapped files and a few open ones need.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Protocol

import numpy as np

from onnxprune.data.fit import Fit, Rows
from onnxprune.errors import DataError

__all__ = ["FileRecords", "Records", "counted", "gather"]

_OPEN = 16  # files of arrays held open

Pair = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # inputs and targets


def counted(number: int, thing: str) -> str:
    """`1 sample`, `1,200 samples`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


class Records(Protocol):
    """Rows by number."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def block(self) -> int:
        """How many rows in a row belong together, so that shuffling must not part them."""

    @property
    def description(self) -> str:
        """For reports."""

    def rows(self, index: np.ndarray, key: tuple[int, int]) -> Iterator[Rows]:
        """The rows of these numbers, in this order, in as many pieces as is handy. key: seed and epoch, for samples
        that are made at random."""


def gather(pieces: Iterator[Rows], fit: Fit) -> Rows:
    """Convert the pieces and join them. Raises DataError where their shapes differ."""
    done: list[Rows] = []
    for piece in pieces:
        done.append(fit.convert(piece))
        if not done[0].same_form(done[-1]):
            raise DataError(*differing(done[0], done[-1]))
    if len(done) == 1:
        return done[0]
    inputs = {n: np.concatenate([d.inputs[n] for d in done]) for n in done[0].inputs}
    targets = {n: np.concatenate([d.targets[n] for d in done]) for n in done[0].targets}
    return Rows(inputs, targets, sum(d.count for d in done), done[0].where)


def differing(one: Rows, other: Rows) -> tuple[str, str]:
    """Message and hint for two samples that can't stand in one batch."""
    for kind, mine, theirs in (("input", one.inputs, other.inputs), ("target", one.targets, other.targets)):
        for name, array in mine.items():
            shapes = [str(a.shape[1:]).replace(" ", "").replace(",)", ")") for a in (array, theirs[name])]
            if shapes[0] != shapes[1]:
                return (
                    f"samples of different shapes can't stand in one batch: {kind} '{name}' is {shapes[0]} in "
                    f"{one.where} and {shapes[1]} in {other.where}",
                    "bring them to one size (pad or resize), or use batches of 1",
                )
    raise AssertionError("the samples have the same shapes")


class FileRecords:
    """Rows in files of arrays, each a sample or a batch.

    names: what to call the files. outline: shapes and dtypes of file k without its values, for counting.
    read: file k as arrays, mapped where they are large. Both give inputs and targets.
    """

    def __init__(
        self,
        names: Sequence[str],
        fit: Fit,
        *,
        outline: Callable[[int], Pair],
        read: Callable[[int], Pair],
        description: str,
    ) -> None:
        self._names, self._fit, self._read = names, fit, read
        first = fit.admit(*outline(0), names[0])
        counts = [first.count]
        for k in range(1, len(names)):
            # Where the first file is one sample, so are the others: that is checked when they are read.
            counts.append(1 if first.single else fit.admit(*outline(k), names[k]).count)
        self._ends = list(accumulate(counts))
        self.count = self._ends[-1]
        fixed = fit.signature.batch
        self.block = fixed if fixed and not fit.whole and set(counts) == {fixed} else 1
        things = "feed" if fit.whole else "sample"
        self.description = f"{description} ({counted(self.count, things)})"
        self._held: OrderedDict[int, Rows] = OrderedDict()

    def rows(self, index: np.ndarray, key: tuple[int, int]) -> Iterator[Rows]:
        """See Records."""
        located = ((bisect_right(self._ends, int(i)), int(i)) for i in index)
        for file, group in groupby(located, key=lambda pair: pair[0]):
            start = self._ends[file - 1] if file else 0
            numbers = [i - start for _, i in group]
            rows = self._file(file)
            run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            part = rows.take(slice(numbers[0], numbers[0] + len(numbers)) if run else np.asarray(numbers))
            yield replace(part, numbers=numbers) if rows.count > 1 else part

    def _file(self, k: int) -> Rows:
        if k in self._held:
            self._held.move_to_end(k)
            return self._held[k]
        rows = self._fit.admit(*self._read(k), self._names[k])
        expected = self._ends[k] - (self._ends[k - 1] if k else 0)
        if rows.count != expected:
            raise DataError(
                f"{self._names[k]} holds {counted(rows.count, 'sample')}, where {expected} "
                f"{'was' if expected == 1 else 'were'} expected",
                "let every file hold one sample, or every file a batch",
            )
        self._held[k] = rows
        if len(self._held) > _OPEN:
            self._held.popitem(last=False)
        return rows
