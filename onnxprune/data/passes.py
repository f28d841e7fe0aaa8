"""Passes over data that a user's code makes: how the next one begins, and what is done where there is none.

Functions are called anew for a pass, iterables are iterated again, readers with `get_next()` are rewound. What can be
passed over only once is kept on disk while its one pass goes on: a later pass reads the copy and then goes on with
the live one, so that an endless generator works too.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnxprune.data.arrays import Scratch
from onnxprune.data.fit import Fit
from onnxprune.data.hooks import hook_error
from onnxprune.data.records import Pair
from onnxprune.data.stream import Draws, parse_item
from onnxprune.errors import DataError

__all__ = ["Passes"]

Item = tuple[str, Pair]  # what to call it in a message, and its arrays

_ANEW = "let a function return a new iterator each time (a generator function does), and give that function"


class Passes:
    """Passes over `made`. make: the user's function that gave it, to be called again; None where it is the object
    itself. name: what the user calls it. `first` is its first item, taken to look at."""

    def __init__(self, made: Any, make: Callable[[], Any] | None, name: str, fit: Fit, scratch: Scratch) -> None:
        self._object, self._make, self._name, self._fit, self._scratch = made, make, name, fit, scratch
        self._copy: _Copy | None = None
        self._turn = 0
        items = self._items(self._iterate(), Draws(0, 0))
        first = next(items, None)
        if first is None:
            raise DataError(
                f"{name} ended at once: it gave no data", "is it used up already, or is the folder that it reads empty?"
            )
        self.first: Item = first
        # Where there may be no second pass, the rest of this one must not be lost.
        self._rest = items if _runs_out(made) or hasattr(made, "get_next") else None
        if _runs_out(made) and make is None:
            self._keep()

    @property
    def copied(self) -> bool:
        """Whether there is one pass only, of which a copy is kept."""
        return self._copy is not None

    def start(self, seed: int, epoch: int) -> Iterator[Item]:
        """Begin a pass. Raises DataError for what the user's code raises, and where the pass is empty."""
        draws = Draws(seed, epoch)
        if self._copy is None:
            try:
                with draws:
                    again = self._again()
            except (Exception, SystemExit) as error:
                raise hook_error(self._name, error) from error
            if not again:
                self._keep()
        if self._copy is not None:
            return self._copy.read()
        return self._nonempty(self._items(self._iterate(), draws))

    def _again(self) -> bool:
        """Make ready for another pass; False where the object can't be passed over again."""
        if _runs_out(self._object):
            assert self._make is not None
            made = self._make()
            if made is self._object and self._rest is not None:
                return False
            self._object, self._rest = made, None
        elif hasattr(self._object, "get_next"):
            try:
                self._object.rewind()
            except NotImplementedError:
                return False
        return True

    def _keep(self) -> None:
        assert self._rest is not None
        self._copy = _Copy(self.first, self._rest, self._scratch)

    def _iterate(self) -> Iterator[Any]:
        found = self._object
        try:
            return iter(found.get_next, None) if hasattr(found, "get_next") else iter(found)
        except (Exception, SystemExit) as error:
            if isinstance(error, TypeError) and not hasattr(found, "__iter__"):
                raise DataError(
                    f"{self._name} is no data: {type(found).__name__} is nothing to iterate over",
                    "give arrays, or an iterable of dicts or (inputs, target) pairs, or an object with get_next()",
                ) from None
            raise hook_error(self._name, error) from error

    def _items(self, iterator: Iterator[Any], draws: Draws) -> Iterator[Item]:
        """Named items; a rewound reader can't serve an older pass any more, which is said and not left to chance."""
        number, found = 0, self._object
        self._turn = turn = self._turn + 1
        while True:
            where = f"item {number} of {self._name}"
            if turn != self._turn and self._object is found and hasattr(found, "rewind"):
                raise DataError(
                    f"{self._name} was rewound for another pass before this one was at its end",
                    "a reader has one place: give a generator function or a list where several passes go on at once",
                )
            try:
                with draws:
                    item = next(iterator, _END)
            except (Exception, SystemExit) as error:
                raise hook_error(f"{self._name} (at item {number})", error) from error
            if item is _END:
                return
            yield where, parse_item(item, self._fit, where)
            number += 1

    def _nonempty(self, items: Iterator[Item]) -> Iterator[Item]:
        first = next(items, None)
        if first is None:
            raise DataError(f"{self._name} gave data on its first pass and none on this one", _ANEW)
        yield first
        yield from items


_END = object()


def _runs_out(made: Any) -> bool:
    """Whether an object has one pass only: an iterator, or a reader that can't be rewound."""
    if hasattr(made, "get_next"):
        return not callable(getattr(made, "rewind", None))
    return hasattr(made, "__next__")


class _Copy:
    """Items on disk as raw bytes, and the live rest behind them; any number of passes may read it at once."""

    def __init__(self, first: Item, rest: Iterator[Item], scratch: Scratch) -> None:
        self._rest, self._scratch = rest, scratch
        handle, name = tempfile.mkstemp(dir=scratch.folder, prefix="pass-", suffix=".bin")
        self._file: IO[bytes] = os.fdopen(handle, "w+b")
        weakref.finalize(self, _discard, self._file, Path(name))
        self._index: list[tuple[str, list[dict[str, _Place]]]] = []
        self._store(first)

    def read(self) -> Iterator[Item]:
        """All items from the first one on."""
        number = 0
        while True:
            if number == len(self._index):
                item = next(self._rest, None)
                if item is None:
                    return
                if number == len(self._index):  # no other pass was faster
                    self._store(item)
            yield self._load(number)
            number += 1

    def _store(self, item: Item) -> None:
        where, pair = item
        try:
            self._file.seek(0, os.SEEK_END)
            places = [{n: self._write(a) for n, a in arrays.items()} for arrays in pair]
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"the copy of data that can be read only once can't be written to {self._scratch.folder}: "
                f"{error.strerror or error}",
                f"free some space, or {_ANEW}",
            ) from None
        self._index.append((where, places))

    def _write(self, array: np.ndarray) -> _Place:
        if array.dtype == object:
            array = array.astype(np.str_)
        place = (self._file.tell(), array.dtype, array.shape)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return place

    def _load(self, number: int) -> Item:
        where, (inputs, targets) = self._index[number]
        return where, (
            {n: self._read(p) for n, p in inputs.items()},
            {n: self._read(p) for n, p in targets.items()},
        )

    def _read(self, place: _Place) -> np.ndarray:
        offset, dtype, shape = place
        self._file.seek(offset)
        array = np.empty(shape, dtype)
        self._file.readinto(array.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]
        return array


_Place = tuple[int, np.dtype, tuple[int, ...]]


def _discard(file: IO[bytes], path: Path) -> None:
    file.close()
    path.unlink(missing_ok=True)
