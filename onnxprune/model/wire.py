"""The skeleton of a serialised ModelProto: the same message without the weights' bytes.

A model file is scanned once, length by length; the payload of every large tensor is left where it is and noted as
(offset, length). Weights are thereby memory-mapped and never parsed, copied or serialised again, and a 2 GB file
opens as fast as a small one. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

__all__ = ["INLINE_LIMIT", "Malformed", "Payloads", "field", "fields", "skeleton", "varint"]

INLINE_LIMIT = 1024  # bytes; smaller tensors stay in the skeleton, where shape arithmetic needs them

Payloads = list[tuple[int, int]]
Buffer = memoryview

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


class Malformed(ValueError):
    """The bytes are not a protobuf message, or end too early."""


def varint(value: int) -> bytes:
    """Base-128 encoding of a non-negative integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, payload: bytes | bytearray) -> bytes:
    """A length-delimited field, tag and length included."""
    return varint(number << 3 | LENGTH) + varint(len(payload)) + payload


def _read_varint(buffer: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise Malformed("a number runs past the end of its message")


def fields(buffer: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (number, wire type, start of the field, start of its value, end of its value)."""
    while at < end:
        start = at
        tag, at = _read_varint(buffer, at, end)
        kind = tag & 7
        if kind == LENGTH:
            length, at = _read_varint(buffer, at, end)
            stop = at + length
        elif kind == VARINT:
            _, stop = _read_varint(buffer, at, end)
        elif kind in (FIXED64, FIXED32):
            stop = at + (8 if kind == FIXED64 else 4)
        else:
            raise Malformed(f"wire type {kind} does not exist")
        if stop > end:
            raise Malformed(f"a field of {stop - at} bytes runs past the end of its message")
        yield tag >> 3, kind, start, at, stop
        at = stop


Rewriter = Callable[[Buffer, int, int, Payloads], bytes]


def _rewrite(children: dict[int, Rewriter]) -> Rewriter:
    """A function that copies a message, passing its large children of these numbers through their rewriters."""

    def rewrite(buffer: Buffer, at: int, end: int, payloads: Payloads) -> bytes:
        out = bytearray()
        copied = at
        for number, kind, start, value, stop in fields(buffer, at, end):
            if kind == LENGTH and number in children and stop - value > INLINE_LIMIT:
                out += buffer[copied:start]
                out += field(number, children[number](buffer, value, stop, payloads))
                copied = stop
        out += buffer[copied:end]
        return bytes(out)

    return rewrite


RAW_DATA, FLOAT_DATA, DOUBLE_DATA = 9, 4, 10


def _tensor(buffer: Buffer, at: int, end: int, payloads: Payloads) -> bytes:
    """Replace the (packed, little-endian) data of a TensorProto by a reference, in the form of external data."""
    out = bytearray()
    for number, kind, start, value, stop in fields(buffer, at, end):
        if kind == LENGTH and number in (RAW_DATA, FLOAT_DATA, DOUBLE_DATA) and stop - value > INLINE_LIMIT:
            entry = field(1, b"location") + field(2, reference(len(payloads)).encode())
            out += field(13, entry) + varint(14 << 3) + varint(1)  # external_data, data_location = EXTERNAL
            payloads.append((value, stop - value))
        else:
            out += buffer[start:stop]
    return bytes(out)


def reference(number: int) -> str:
    """The external-data location under which a skeleton names payload `number`. No file can be called so."""
    return f"\x00payload/{number}"


def _graph(buffer: Buffer, at: int, end: int, payloads: Payloads) -> bytes:
    return _rewrite({5: _tensor, 1: _node})(buffer, at, end, payloads)


_attribute = _rewrite({5: _tensor, 6: _graph, 11: _graph})
_node = _rewrite({5: _attribute})
_model = _rewrite({7: _graph})


def skeleton(buffer: Buffer) -> tuple[bytes, Payloads]:
    """Return the serialised model without its large payloads, and where each payload lies in the buffer.

    Raises Malformed where the bytes are no protobuf message.
    """
    payloads: Payloads = []
    return _model(buffer, 0, len(buffer), payloads), payloads
