"""Batches of a data source as tensors, fetched one ahead by a thread, and reproducible after a restart.

The idea needed to read it: a source and a model may both draw from the global random generators (an augmentation, a
dropout on the CPU). Beside each other they would mix their draws, a little differently every time. So the first two
batches of an epoch are fetched in step, and the thread takes over only where nobody has drawn in between, and where
fetching takes time: a thread that has next to nothing to do costs more than it saves.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxprune.data.source import Batch, Source
from onnxprune.errors import DataError

__all__ = ["Feed", "HostBatch", "Interrupted", "host_generators", "set_host_generators"]

POLL_S = 0.2
WORTH_A_THREAD = 0.1  # fetching, as a share of the time


@dataclass(frozen=True)
class HostBatch:
    """A batch in host memory (pinned for CUDA), of so many samples."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    samples: int

    def unusable(self) -> str | None:
        """The name of an array that holds nan."""
        named = {**self.inputs, **self.targets}
        return next((n for n, x in named.items() if x.is_floating_point() and bool(torch.isnan(x).any())), None)


class Interrupted(Exception):
    """The wait for a batch was broken off, because the process is to stop."""


class Feed:
    """The batches of one epoch after the other, as this process of `world` sees them.

    interrupted: asked while waiting. pin: for copies to CUDA. `open` begins an epoch, `next` gives its batches and then
    None. What the source raises comes out of `next` in its turn: DataError as it is, anything else as a DataError.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        seed: int,
        input_names: Sequence[str],
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.source, self.batch, self.seed = source, batch, seed
        self.input_names = tuple(input_names)
        self.rank, self.world, self.pin, self.interrupted = rank, world, pin, interrupted
        self.drop_last = source.size is None or source.size >= batch
        self._iterator: Iterator[Any] | None = None
        self._ahead: _Ahead | None = None
        self._epoch = self._index = self._fetched = 0
        self._before: dict[str, Any] = {}  # the generators after the first fetch
        self._quiet = False
        self._spent = self._opened = 0.0  # seconds in fetches in step, and when the epoch was opened

    @property
    def is_open(self) -> bool:
        return self._iterator is not None

    @property
    def in_step(self) -> bool:
        """Whether batches are fetched when they are needed, and not ahead."""
        return self._ahead is None

    @property
    def quiet(self) -> bool:
        """Whether neither source nor model seem to draw from the global generators."""
        return self._quiet

    def open(self, epoch: int, start: int = 0, generators: Mapping[str, Any] | None = None) -> None:
        """Begin an epoch, at batch `start`. generators: states of the global generators to go on with there.

        The epoch begins with generators that are seeded by its number. At a later batch the one before it is fetched
        again first, so that a source that passes over batches by drawing them has drawn as much as it had.
        """
        self.close()
        _seed_host_generators(self.seed, epoch, self.rank)
        back = 1 if start else 0
        self._epoch, self._index, self._fetched = epoch, start - back, 0
        self._quiet, self._spent, self._opened = False, 0.0, time.monotonic()
        with self._reported():
            self._iterator = iter(
                self.source.batches(
                    self.batch,
                    epoch=epoch,
                    seed=self.seed,
                    shuffle=True,
                    start=start - back,
                    rank=self.rank,
                    world=self.world,
                    drop_last=self.drop_last,
                )
            )
        if back:
            self.next()
            if generators is not None:
                set_host_generators(generators)
            self._before = host_generators()

    def next(self) -> HostBatch | None:
        """The next batch, or None at the end of the epoch. Raises DataError, or Interrupted."""
        assert self._iterator is not None
        if self.interrupted():
            raise Interrupted
        with self._reported():
            if self._ahead is not None:
                found = self._ahead.take(self.interrupted)
            else:
                found = self._fetch_in_step()
        self._index += 1
        return found

    def take_rests(self) -> bool:
        """From the next epoch on, give batches that are not full too. False where that was so already."""
        before, self.drop_last = self.drop_last, False
        return before

    def close(self) -> None:
        idle = self._ahead is None or self._ahead.close()
        if idle and self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = self._ahead = None

    def _fetch_in_step(self) -> HostBatch | None:
        begun = time.monotonic()
        found = self._fetch()
        now = time.monotonic()
        self._spent += now - begun
        self._fetched += 1
        if self._fetched == 1:
            self._before = host_generators()
        elif self._fetched == 2:
            self._quiet = _same(self._before, host_generators())
        if found is not None and self._quiet and (self.pin or self._spent > WORTH_A_THREAD * (now - self._opened)):
            self._ahead = _Ahead(self._fetch)
        return found

    def _fetch(self) -> HostBatch | None:
        assert self._iterator is not None
        found = next(self._iterator, None)
        return None if found is None else self._tensors(found)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (DataError, Interrupted):
            raise
        except Exception as error:
            raise DataError(
                f"the data source failed at batch {self._index} of epoch {self._epoch}: "
                f"{type(error).__name__}: {error}",
                "the cause stands above; iterate over the source without training to look into it",
            ) from error

    def _tensors(self, batch: Batch) -> HostBatch:
        missing = [name for name in self.input_names if name not in batch.inputs]
        if missing:
            raise DataError(
                f"a batch should hold inputs {', '.join(self.input_names)}; it lacks {', '.join(missing)}",
                "name the arrays as the model's inputs",
            )
        inputs = {name: _tensor(name, batch.inputs[name], self.pin) for name in self.input_names}
        targets = {name: _tensor(name, array, self.pin) for name, array in batch.targets.items()}
        return HostBatch(inputs, targets, batch.size)


class _Ahead:
    """A thread that calls `fetch` once more than `take` has been called."""

    def __init__(self, fetch: Callable[[], HostBatch | None]) -> None:
        self._fetch = fetch
        self._permits = threading.Semaphore(1)
        self._results: queue.SimpleQueue[tuple[HostBatch | None, BaseException | None]] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="onnxprune-data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._permits.acquire()
            if self._closed:
                return
            try:
                found = self._fetch()
            except BaseException as error:  # SystemExit too: the main thread waits for an answer
                self._results.put((None, error))
                return
            self._results.put((found, None))
            if found is None:
                return

    def take(self, interrupted: Callable[[], bool]) -> HostBatch | None:
        while True:
            try:
                found, error = self._results.get(timeout=POLL_S)
                break
            except queue.Empty:
                if interrupted():
                    raise Interrupted from None
                if not self._thread.is_alive() and self._results.empty():
                    raise RuntimeError("its thread ended without a word") from None
        if error is not None:
            raise error if isinstance(error, Exception) else RuntimeError(f"it ended with {error!r}") from error
        self._permits.release()
        return found

    def close(self) -> bool:
        """End the thread. False where it hangs in the user's code; it is left behind and ends with the process."""
        self._closed = True
        self._permits.release()
        self._thread.join(timeout=5)
        return not self._thread.is_alive()


def _tensor(name: str, array: Any, pin: bool) -> Tensor:
    """A copy in torch's own memory: aligned the same way in every run (which decides how sums are rounded), and safe
    from a source that fills one buffer again and again."""
    array = np.asarray(array)
    dtype = _torch_dtype(array.dtype)
    if dtype is None:
        raise DataError(f"'{name}' should hold numbers, found {array.dtype}")
    tensor = torch.empty(array.shape, dtype=dtype, pin_memory=pin)
    if dtype is torch.bfloat16:  # numpy has no such type of its own
        np.copyto(tensor.view(torch.int16).numpy(), array.view(np.int16))
    else:
        np.copyto(tensor.numpy(), array)
    return tensor


@functools.cache
def _torch_dtype(dtype: np.dtype) -> torch.dtype | None:
    if dtype.name == "bfloat16":
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError:
        return None


# The global generators that a data source may draw from


def host_generators() -> dict[str, Any]:
    """The states of python's, numpy's and torch's (CPU) global generators, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *(_plain(x) for x in rest)],
        "torch": torch.get_rng_state(),
    }


def set_host_generators(states: Mapping[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])


def _seed_host_generators(seed: int, epoch: int, rank: int) -> None:
    number = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return (
        a["python"] == b["python"]
        and bool(torch.equal(a["numpy"][1], b["numpy"][1]))
        and a["numpy"][2:] == b["numpy"][2:]
        and bool(torch.equal(a["torch"], b["torch"]))
    )


def _plain(x: Any) -> Any:
    return float(x) if isinstance(x, float) else int(x)
