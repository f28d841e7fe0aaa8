"""Batches from rows, for data that can be read at any place and for streams.

The first is shuffled by permutation, skips for free and reads only the share of its rank. Of a stream everything is
read, and what is no portion of the right size is cut and joined until it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np

from onnxprune.data.fit import Fit, Rows
from onnxprune.data.passes import Passes
from onnxprune.data.records import Records, counted, differing, gather
from onnxprune.errors import DataError

__all__ = ["Batch", "IndexedSource", "Source", "StreamSource"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of the model's dtypes and targets as they came, by name: contiguous arrays that nobody else holds."""

    inputs: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]

    @property
    def size(self) -> int:
        """Samples in it: the first size that the inputs share, 1 where they share none."""
        sizes = {a.shape[0] if a.ndim else None for a in self.inputs.values()}
        size = next(iter(sizes)) if len(sizes) == 1 else None
        return 1 if size is None else size


@runtime_checkable
class Source(Protocol):
    """Data that can be passed over any number of times."""

    size: int | None  # samples in an epoch, where known without reading
    targets: tuple[str, ...]  # names of the targets

    @property
    def description(self) -> str:
        """For reports, such as `calib.npz (512 samples)`."""

    def batches(
        self,
        size: int,
        *,
        epoch: int = 0,
        seed: int = 0,
        shuffle: bool = False,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """One pass: global batches of `size` samples, from global batch `start` on.

        Of each global batch the share of `rank` is given, as np.array_split parts it among `world`; it may be empty.
        A model of fixed batch size B gets batches of B, whatever `size` is; the global batch is then B * world, and a
        rest that fills none is left out. So it is with complete feeds, where B is one feed.
        shuffle: data that can be read at any place is permuted by (seed, epoch); a stream goes through a buffer of
        16 batches (at most 64 MB), out of which samples are drawn. Both are the same in every process.
        Raises DataError.
        """


class _Plan:
    """How rows become batches, the same for both sources."""

    def __init__(self, fit: Fit, size: int, start: int, rank: int, world: int) -> None:
        if size < 1 or start < 0 or not 0 <= rank < world:
            raise ValueError(f"no batches of {size} from {start} on for rank {rank} of {world}")
        fixed = 1 if fit.whole else fit.signature.batch
        self.exact = fixed is not None
        self.unit = fixed or size  # rows that a share or, where the size is free, a global batch has
        self.rows = self.unit * world if self.exact else size  # rows of a global batch
        self.start, self.rank, self.world, self.whole = start, rank, world, fit.whole

    def share(self, count: int) -> slice:
        """The part of `count` rows that is this rank's."""
        each, more = divmod(count, self.world)
        begin = self.rank * each + min(self.rank, more)
        return slice(begin, begin + each + (self.rank < more))

    def batch(self, rows: Rows) -> Batch:
        """Rows as the model takes them."""
        if not self.whole:
            return Batch(rows.inputs, rows.targets)
        inputs, targets = (
            {n: a.reshape(a.shape[1:]) for n, a in arrays.items()} for arrays in (rows.inputs, rows.targets)
        )
        return Batch(inputs, targets)


class IndexedSource:
    """Over data that can be read at any place."""

    def __init__(self, records: Records, fit: Fit) -> None:
        self._records, self._fit = records, fit
        name, fixed = records.description, None if fit.whole else fit.signature.batch
        if not records.count:
            raise DataError(f"{name}: there is no sample in it")
        if fixed and records.count < fixed:
            raise DataError(
                f"{name} is less than a batch, and the model takes batches of {fixed} only", "give more samples"
            )
        gather(records.rows(np.arange(fixed or 1), (0, 0)), fit)
        self.targets = fit.targets
        rest = records.count % fixed if fixed else 0
        self.size: int | None = records.count - rest
        self.description = name + (f", the last {rest} left out: the model takes batches of {fixed}" if rest else "")

    def batches(
        self,
        size: int,
        *,
        epoch: int = 0,
        seed: int = 0,
        shuffle: bool = False,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """See Source."""
        plan = _Plan(self._fit, size, start, rank, world)
        end = self._records.count
        if plan.exact or drop_last:
            end -= end % plan.rows
        if not end:
            raise _too_few(self._records.description, plan)
        order = self._order(seed, epoch) if shuffle else None
        for begin in range(start * plan.rows, end, plan.rows):
            count = min(plan.rows, end - begin)
            share = plan.share(count)
            numbers = np.arange(begin + share.start, begin + share.stop)
            index = numbers if order is None else order[numbers]
            if not len(index):
                index = np.arange(1)  # for the form of an empty share
            rows = gather(self._records.rows(index, (seed, epoch)), self._fit)
            yield plan.batch(rows if len(numbers) else rows.take(slice(0)))

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """The permutation of an epoch; rows that belong together stay so."""
        count, block = self._records.count, self._records.block
        order = np.random.default_rng([abs(seed), epoch]).permutation(count // block)
        return (order[:, None] * block + np.arange(block)).reshape(-1) if block > 1 else order


def _too_few(name: str, plan: _Plan) -> DataError:
    return DataError(
        f"{name} does not fill one batch of {plan.rows}" + (f" ({plan.world} processes)" if plan.world > 1 else ""),
        "give more samples" if plan.exact else "use smaller batches, or give more samples",
    )


class StreamSource:
    """Over a stream. Its length is unknown until it was passed over once; to skip is to read."""

    def __init__(self, passes: Passes, name: str, fit: Fit) -> None:
        self._passes, self._fit, self._name = passes, fit, name
        where, pair = passes.first
        fit.convert(fit.admit(*pair, where))
        self.size: int | None = None
        self.targets = fit.targets

    @property
    def description(self) -> str:
        """For reports; says so where a copy is kept."""
        size = "a stream" if self.size is None else counted(self.size, "feed" if self._fit.whole else "sample")
        note = ""
        if self._passes.copied:
            note = ", one pass only: copied to disk as it is read; a function that returns a new one needs no copy"
        return f"{self._name} ({size}{note})"

    def batches(
        self,
        size: int,
        *,
        epoch: int = 0,
        seed: int = 0,
        shuffle: bool = False,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """See Source."""
        plan = _Plan(self._fit, size, start, rank, world)
        rows = self._rows(seed, epoch)
        if shuffle:
            block = plan.unit if plan.exact else 1
            rng = np.random.default_rng([abs(seed), epoch])
            rows = _shuffled(_recut(rows, block, exact=plan.exact), rng, 16 * plan.unit // block)
        number = 0
        if plan.exact:
            units = _recut(rows, plan.unit, exact=True)
            while len(group := list(islice(units, world))) == world:
                number += 1
                if number > start:
                    yield plan.batch(group[rank])
        else:
            for whole in _recut(rows, size, drop_last=drop_last):
                number += 1
                if number > start:
                    yield plan.batch(whole.take(plan.share(whole.count)))
        if not number and self.size == 0:
            raise DataError(f"{self._name} gave batches without a single sample", "give at least one sample")
        if not number:
            raise _too_few(self._name, plan)

    def _rows(self, seed: int, epoch: int) -> Iterator[Rows]:
        count = 0
        for where, pair in self._passes.start(seed, epoch):
            rows = self._fit.convert(self._fit.admit(*pair, where))
            if rows.count:
                count += rows.count
                yield rows
        self.size = count


def _recut(stream: Iterable[Rows], size: int, *, exact: bool = False, drop_last: bool = False) -> Iterator[Rows]:
    """Rows in portions of `size`.

    Batches whose free sizes differ are never merged: what is pending comes out as a smaller portion. exact: smaller
    portions are left out; drop_last: only the one at the end is.
    """
    pending: list[Rows] = []
    held = 0
    for rows in stream:
        if pending and not pending[0].same_form(rows):
            if rows.single:
                raise DataError(*differing(pending[0], rows))
            if not exact:
                yield _joined(pending)
            pending, held = [], 0
        begin = 0
        while held + rows.count - begin >= size:
            cut = begin + size - held
            yield _joined([*pending, rows.take(slice(begin, cut))])
            pending, held, begin = [], 0, cut
        if begin < rows.count:
            pending.append(rows.take(slice(begin, None)))
            held += rows.count - begin
    if pending and not exact and not drop_last:
        yield _joined(pending)


def _joined(parts: list[Rows]) -> Rows:
    """One contiguous piece of several."""
    first = parts[0]
    if len(parts) == 1:
        return first
    inputs = {n: np.concatenate([p.inputs[n] for p in parts]) for n in first.inputs}
    targets = {n: np.concatenate([p.targets[n] for p in parts]) for n in first.targets}
    return Rows(inputs, targets, sum(p.count for p in parts), first.where, first.single)


def _shuffled(stream: Iterable[Rows], rng: np.random.Generator, capacity: int) -> Iterator[Rows]:
    """Pieces in the order in which they are drawn from a buffer of at most `capacity` of them and 64 MB. Where the
    form changes the buffer is emptied first, so that pieces of one form stay together."""
    buffer: list[Rows] = []
    for rows in stream:
        if buffer and not buffer[0].same_form(rows):
            yield from _drained(buffer, rng)
        buffer.append(rows)
        each = sum(a.nbytes for a in (*rows.inputs.values(), *rows.targets.values())) or 1
        while len(buffer) > max(2, min(capacity, (64 << 20) // each)):
            yield _drawn(buffer, rng)
    yield from _drained(buffer, rng)


def _drawn(buffer: list[Rows], rng: np.random.Generator) -> Rows:
    k = int(rng.integers(len(buffer)))
    buffer[k], buffer[-1] = buffer[-1], buffer[k]
    return buffer.pop()


def _drained(buffer: list[Rows], rng: np.random.Generator) -> Iterator[Rows]:
    while buffer:
        yield _drawn(buffer, rng)
