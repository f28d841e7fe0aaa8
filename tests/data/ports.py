"""Signatures that the tests of data share, and a batch's numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxprune.data import Batch, Port, Signature

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)


def one(*shape: int | None, dtype: object = np.float32) -> Signature:
    """A model of one input `x` and an output `y` of 10 classes."""
    return Signature((Port("x", np.dtype(dtype), shape),), (Port("y", FLOAT, (shape[0] if shape else None, 10)),))


def marked(count: int, *shape: int, dtype: object = np.float32) -> np.ndarray:
    """`count` samples, sample k filled with k."""
    numbers = np.arange(count, dtype=dtype).reshape(-1, *[1] * len(shape))
    return np.broadcast_to(numbers, (count, *shape)).copy()


def marks(batches: Iterable[Batch], name: str = "x") -> list[list[int]]:
    """The first value of every sample, batch by batch."""
    return [[int(v) for v in b.inputs[name].reshape(b.size, -1)[:, 0]] if b.size else [] for b in batches]
