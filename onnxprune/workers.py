"""Work on all cores, that another program on one of them slows down by its share and no more.

The threads of OpenMP and OpenBLAS, which torch and numpy come with, wait for each other busily and at every step: with
one of two cores taken, a convolution of a small network or a Cholesky factor takes fifty times as long as on one
thread. So within `sparing_threads` every call is computed on few threads, and what runs side by side is larger pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

__all__ = ["add_squares", "each", "in_order", "over_panels", "product", "sparing_threads"]

MOST = 4  # workers; more cores than these are threads of each
PANEL = 256  # columns per call: enough to compute at full speed

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class _Workers:
    pool: ThreadPoolExecutor
    count: int


_workers: ContextVar[_Workers | None] = ContextVar("workers", default=None)


@contextmanager
def sparing_threads() -> Iterator[None]:
    """Calls of torch and numpy take a share of the threads that torch is set to; `each` and `in_order` run several
    at once. What comes out does not depend on which is faster."""
    cores = torch.get_num_threads()
    count = min(cores, MOST)
    share = max(1, cores // count)
    try:
        with (
            _controller().limit(limits=share, user_api="blas"),
            ThreadPoolExecutor(count, "onnxprune", initializer=torch.set_num_threads, initargs=(share,)) as pool,
        ):
            torch.set_num_threads(share)
            before = _workers.set(_Workers(pool, count) if count > 1 else None)
            try:
                yield
            finally:
                _workers.reset(before)
    finally:  # no sooner than every worker has ended, for they set it as well
        torch.set_num_threads(cores)


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def each(jobs: Iterable[Callable[[], object]]) -> None:
    """Run them, several at once; they must not write to the same place."""
    for _ in in_order(lambda job: job(), jobs):
        pass


def in_order(function: Callable[[A], B], values: Iterable[A]) -> Iterator[B]:
    """What a function gives, in order; as many at once as there are workers, and no further ahead."""
    workers = _workers.get()
    if workers is None:
        yield from map(function, values)
        return
    pending: deque[Future[B]] = deque()
    for value in values:
        pending.append(workers.pool.submit(function, value))
        if len(pending) == workers.count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def over_panels(job: Callable[[int, slice], object], groups: int, columns: int) -> None:
    """job(group, columns) for all of them. Where a panel holds all columns it runs where it is called: depthwise
    layers have hundreds of groups, each too small to be handed on."""
    if columns <= PANEL:
        for k in range(groups):
            job(k, slice(0, columns))
        return
    parts = [slice(k, min(k + PANEL, columns)) for k in range(0, columns, PANEL)]
    each(partial(job, k, at) for k in range(groups) for at in parts)


def add_squares(total: np.ndarray, x: np.ndarray) -> None:
    """total (g, p, p) += x' x of every group of x (g, n, p)."""
    over_panels(lambda k, at: _add_squares(total[k], x[k], at), len(x), x.shape[2])


def _add_squares(total: np.ndarray, x: np.ndarray, at: slice) -> None:
    """The columns `at` from the diagonal on, and the same rows: it is symmetric."""
    own, rest = x[:, at], slice(at.stop, None)
    total[at, at] += own.T @ own  # half of the work, which numpy knows of one matrix
    if at.stop < x.shape[1]:
        below = x[:, rest].T @ own
        total[rest, at] += below
        total[at, rest] += below.T


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, of (..., m, k) and (..., k, n)."""
    found = np.empty((*a.shape[:-1], b.shape[-1]), np.result_type(a, b))
    over_panels(lambda _, at: np.matmul(a, b[..., at], out=found[..., at]), 1, b.shape[-1])
    return found
