"""Where the numbers of a large tensor come from, read only when asked for and one tensor at a time."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxprune.errors import ModelRejected

__all__ = ["Computed", "Mapped", "MappedFile", "Payload", "dtype_of", "encode", "nbytes"]

_BITS = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4, 25: 2, 26: 2}


def dtype_of(elem_type: int) -> np.dtype:
    """numpy dtype (ml_dtypes where numpy has none) of an ONNX element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def nbytes(elem_type: int, dims: tuple[int, ...]) -> int:
    """Bytes of the raw data of a tensor; sub-byte types are packed."""
    if elem_type in _BITS:
        return (prod(dims) * _BITS[elem_type] + 7) // 8
    return prod(dims) * dtype_of(elem_type).itemsize


def encode(array: np.ndarray, elem_type: int) -> bytes | memoryview:
    """Raw data of a tensor as ONNX stores it (little-endian, sub-byte types packed)."""
    if elem_type in _BITS:
        return numpy_helper.from_array(array).raw_data
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class Payload(Protocol):
    """The values of a tensor."""

    def read(self, elem_type: int, dims: tuple[int, ...]) -> np.ndarray:
        """The values, possibly a read-only view of a mapped file."""

    def release(self) -> None:
        """The caller is done with what `read` gave: its memory may go."""


@dataclass(eq=False)
class MappedFile:
    """A read-only memory map of a whole file."""

    path: Path
    map: mmap.mmap = field(init=False, repr=False)

    def __post_init__(self) -> None:
        with self.path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True)
class Mapped:
    """A stretch of a mapped file."""

    file: MappedFile
    offset: int
    length: int

    def read(self, elem_type: int, dims: tuple[int, ...]) -> np.ndarray:
        expected = nbytes(elem_type, dims)
        if self.length != expected:
            raise ModelRejected(f"a tensor of shape {list(dims)} has {self.length} bytes of data, not {expected}")
        if elem_type in _BITS:
            proto = TensorProto(data_type=elem_type, dims=dims)
            proto.raw_data = self.file.map[self.offset : self.offset + self.length]
            return numpy_helper.to_array(proto)
        dtype = dtype_of(elem_type)
        return np.frombuffer(self.file.map, dtype, prod(dims), self.offset).reshape(dims)

    def release(self) -> None:
        first = -(-self.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self.offset + self.length - first
        if length > mmap.PAGESIZE and hasattr(self.file.map, "madvise"):
            self.file.map.madvise(mmap.MADV_DONTNEED, first, length)


@dataclass(frozen=True)
class Computed:
    """Values made on demand, such as the kept slice of another tensor."""

    make: Callable[[], np.ndarray]
    done: Callable[[], None] = lambda: None

    def read(self, elem_type: int, dims: tuple[int, ...]) -> np.ndarray:
        return self.make()

    def release(self) -> None:
        self.done()


def chunks(data: bytes | memoryview, step: int = 1 << 24) -> Iterator[bytes | memoryview]:
    """The data in pieces that a writer can take without a copy of the whole."""
    for start in range(0, len(data), step):
        yield data[start : start + step]


_ = ml_dtypes  # imported for its side effect: numpy learns bfloat16, float8 and int4
