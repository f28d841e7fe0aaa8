"""Arrays in files, mapped and not read: `.npy`, and the members of an `.npz`.

A member that np.savez stored uncompressed is a .npy file inside the zip, so it can be mapped where it lies; one that
np.savez_compressed packed is unpacked once to a scratch folder and mapped there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
import weakref
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from onnxprune.errors import DataError

__all__ = ["Scratch", "map_npy", "map_npz", "outline"]

_BROKEN = (zipfile.BadZipFile, ValueError, OSError, EOFError, zlib.error, struct.error, NotImplementedError)


class Scratch:
    """A folder for copies of data on disk: the given one, or a temporary one that is removed at exit."""

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder, made when it is first asked for."""
        if self._folder is None:
            if self._cache is not None:
                self._cache.mkdir(parents=True, exist_ok=True)
                self._folder = self._cache
            else:
                self._folder = Path(tempfile.mkdtemp(prefix="onnxprune-data-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder


def map_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped. Raises DataError."""
    try:
        with path.open("rb") as file:
            shape, order, dtype = _header(file, str(path))
            return _mapped(path, file.tell(), shape, order, dtype)
    except _BROKEN as error:
        raise DataError(f"{path} can't be read as .npy: {error}", "was it copied completely?") from None


def map_npz(path: Path, scratch: Scratch | None) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, mapped; compressed ones by way of `scratch`, or read where that is None.

    Raises DataError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {_name(info): _member(archive, path, info, scratch) for info in _members(archive, path)}
    except _BROKEN as error:
        raise DataError(f"{path} can't be read as .npz: {error}", "was it copied completely?") from None


def outline(path: Path) -> dict[str, np.ndarray]:
    """Arrays of the shapes and dtypes of an .npz file's, without its values (no memory behind them)."""
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in _members(archive, path):
                with archive.open(info) as file:
                    shape, _, dtype = _header(file, f"{path}:{_name(info)}")
                found[_name(info)] = np.broadcast_to(np.zeros((), dtype), shape)
    except _BROKEN as error:
        raise DataError(f"{path} can't be read as .npz: {error}", "was it copied completely?") from None
    return found


def _members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    if not members:
        raise DataError(f"{path} holds no arrays", "write it with np.savez(path, input_name=array, ...)")
    return members


def _name(info: zipfile.ZipInfo) -> str:
    return info.filename.removesuffix(".npy")


def _header(file: IO[bytes], what: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and dtype; the file is then at the values."""
    version = npy.read_magic(file)
    if version[0] > 2:
        raise DataError(f"{what} is of .npy version {version[0]}, for structured arrays", "save plain arrays")
    read = npy.read_array_header_1_0 if version[0] == 1 else npy.read_array_header_2_0
    shape, order, dtype = read(file)
    if dtype.hasobject or dtype.names:
        raise DataError(f"{what} holds Python objects or records, not numbers", "save plain arrays: np.stack the list")
    return shape, order, dtype


def _mapped(path: Path, offset: int, shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size < offset + prod(shape) * dtype.itemsize:
        raise ValueError("it ends in the middle of an array")
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _member(archive: zipfile.ZipFile, path: Path, info: zipfile.ZipInfo, scratch: Scratch | None) -> np.ndarray:
    with archive.open(info) as member:
        shape, order, dtype = _header(member, f"{path}:{_name(info)}")
        if info.compress_type == zipfile.ZIP_STORED and shape:
            return _mapped(path, _start(path, info) + member.tell(), shape, order, dtype)
        if scratch is None or not shape:
            member.seek(0)
            return npy.read_array(member, allow_pickle=False)
    return map_npy(_unpacked(archive, path, info, scratch))


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose name and extra field have their own lengths."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    name, extra = struct.unpack("<HH", local[26:30])
    return info.header_offset + 30 + int(name) + int(extra)


def _unpacked(archive: zipfile.ZipFile, path: Path, info: zipfile.ZipInfo, scratch: Scratch) -> Path:
    """The member as a file of its own, found again by what it was made from; several processes may make it at once."""
    key = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns} {info.filename} {info.CRC}"
    out = scratch.folder / f"unpacked-{hashlib.sha1(key.encode()).hexdigest()[:20]}.npy"
    if out.exists():
        return out
    handle, part = tempfile.mkstemp(dir=scratch.folder, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as target, archive.open(info) as source:
            shutil.copyfileobj(source, target, 1 << 20)
        os.replace(part, out)
    except OSError as error:
        raise DataError(
            f"{path} can't be unpacked to {scratch.folder}: {error.strerror or error}",
            "free some space, or save it uncompressed with np.savez",
        ) from None
    finally:
        Path(part).unlink(missing_ok=True)
    return out
