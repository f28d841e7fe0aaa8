"""Write a model so that it appears whole or not at all, one tensor in memory at a time.

Up to 2 GB the weights stand in the file itself, which is written field by field without ever serialising them as a
whole; above that they go to `<out>.data` beside it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto

from onnxprune.errors import UsageError
from onnxprune.model.graph import Model
from onnxprune.model.load import stored_tensors
from onnxprune.model.payload import chunks, encode, nbytes
from onnxprune.model.wire import INLINE_LIMIT, varint

__all__ = ["EXTERNAL_FROM", "place", "to_proto", "write"]

EXTERNAL_FROM = 2_000_000_000  # bytes; protobuf ends at 2 GiB
ALIGNMENT = 4096  # of tensors in an external file, so that they can be memory-mapped


def place(path: Path, produce: Callable[[Path], None]) -> None:
    """Let `produce` write into a temporary folder beside `path`, then move what it wrote into place.

    Data files are moved before the model that refers to them.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent or ".") as folder:
        produce(Path(folder) / path.name)
        try:
            for file in sorted(Path(folder).iterdir(), key=lambda p: p.name == path.name):
                os.replace(file, path.parent / file.name)
        except OSError as error:
            raise UsageError(f"{path} can't be written: {error.strerror or error}") from None


def write(model: Model, path: Path, *, external: bool | None = None) -> int:
    """Write a model to `path` (and `<path>.data`); returns the number of bytes.

    external: put the weights in the data file; decided by the size where it is None.
    """
    tensors = _payload_tensors(model)
    total = sum(nbytes(t.data_type, tuple(t.dims)) for t in tensors)
    if external is None:
        external = total + 50_000_000 > EXTERNAL_FROM
    return _write_external(model, path) if external else _write_inline(model, path)


def to_proto(model: Model) -> onnx.ModelProto:
    """The whole model as a ModelProto in memory."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in _with_payload(proto.graph):
        _inline(model, tensor)
    return proto


def _with_payload(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    return (t for t in stored_tensors(graph) if t.data_location == TensorProto.EXTERNAL)


def _payload_tensors(model: Model) -> list[TensorProto]:
    return list(_with_payload(model.proto.graph))


def _inline(model: Model, tensor: TensorProto) -> None:
    payload = model.payload(tensor)
    assert payload is not None
    data = bytes(encode(payload.read(tensor.data_type, tuple(tensor.dims)), tensor.data_type))
    payload.release()
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    tensor.raw_data = data


def _write_inline(model: Model, path: Path) -> int:
    """ModelProto and GraphProto are written by hand round their parts: a message's fields may come in any order."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    initializers = list(model.proto.graph.initializer)
    del proto.graph.initializer[:]
    for tensor in _with_payload(proto.graph):
        _inline(model, tensor)
    rest = proto.graph.SerializeToString()
    proto.ClearField("graph")
    head = proto.SerializeToString()
    frames = [_frame(t) for t in initializers]
    length = len(rest) + sum(len(varint(5 << 3 | 2)) + len(varint(n)) + n for n, _ in frames)
    with path.open("wb") as file:
        file.write(head + varint(7 << 3 | 2) + varint(length) + rest)
        for tensor, (n, prefix) in zip(initializers, frames, strict=True):
            file.write(varint(5 << 3 | 2) + varint(n) + prefix)
            if tensor.data_location == TensorProto.EXTERNAL:
                _stream(model, tensor, file)
        return file.tell()


def _frame(tensor: TensorProto) -> tuple[int, bytes]:
    """Length of a serialised initializer, and all of it but its payload."""
    if tensor.data_location != TensorProto.EXTERNAL:
        data = tensor.SerializeToString()
        return len(data), data
    bare = TensorProto()
    bare.CopyFrom(tensor)
    del bare.external_data[:]
    bare.ClearField("data_location")
    size = nbytes(tensor.data_type, tuple(tensor.dims))
    prefix = bare.SerializeToString() + varint(9 << 3 | 2) + varint(size)
    return len(prefix) + size, prefix


def _stream(model: Model, tensor: TensorProto, file: BinaryIO) -> int:
    payload = model.payload(tensor)
    assert payload is not None
    data = encode(payload.read(tensor.data_type, tuple(tensor.dims)), tensor.data_type)
    expected = nbytes(tensor.data_type, tuple(tensor.dims))
    if len(data) != expected:
        raise AssertionError(f"tensor '{tensor.name}' has {len(data)} bytes, not {expected}")
    for chunk in chunks(data):
        file.write(chunk)
    payload.release()
    return expected


def _write_external(model: Model, path: Path) -> int:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    location = f"{path.name}.data"
    with (path.parent / location).open("wb") as file:
        for tensor in list(_with_payload(proto.graph)):
            if nbytes(tensor.data_type, tuple(tensor.dims)) <= INLINE_LIMIT:
                _inline(model, tensor)  # sizes and positions, which shape inference reads
                continue
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            offset = file.tell()
            length = _stream(model, tensor, file)
            del tensor.external_data[:]
            for key, value in (("location", location), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
        size = file.tell()
    data = proto.SerializeToString()
    path.write_bytes(data)
    return size + len(data)
