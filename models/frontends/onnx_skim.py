"""Weights left on disk: a `.onnx` file without its initializers' payloads, and where they lie.

A `.onnx` file is one protobuf message (encoding: protobuf.dev/programming-guides/encoding; field
numbers: onnx.proto). Initializers lie in it whole, gigabytes of them, where only names, types and
shapes are wanted. Here the file is mapped, the payloads (`raw_data`, packed `float_data` and
`double_data`, all little-endian) are stepped over, and the rest comes back as a smaller message
that onnx parses.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KEPT_BYTES", "Payload", "skim"]

KEPT_BYTES = 4096
"""Payloads up to this stay in the message: shapes, axes, scalars, small tables."""

_GRAPH, _INITIALIZER, _NAME = 7, 5, 8
_PAYLOADS = (4, 9, 10)  # float_data, raw_data, double_data
_BYTES = 2  # wire type of everything that carries its length
_FIXED = {1: 8, 5: 4}


@dataclass(frozen=True, slots=True)
class Payload:
    """Where the elements of one initializer lie: a run of bytes in a file."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Field:
    number: int
    wire: int
    start: int
    """First byte of the tag."""
    body: int
    """First byte of the value."""
    end: int


def skim(file: Path) -> tuple[bytes, dict[str, Payload]]:
    """(the message without large payloads, initializer -> where its payload lies).

    `ValueError` for what is not such a message, `OSError` for a file that cannot be read.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found: dict[str, Payload] = {}
        parts: list[bytes] = []
        for one in _fields(data, 0, len(data)):
            if one.number == _GRAPH and one.wire == _BYTES:
                parts.append(_message(_GRAPH, _graph(data, one, file, found)))
            else:
                parts.append(data[one.start : one.end])
        return b"".join(parts), found


def _graph(data: mmap.mmap, whole: _Field, file: Path, found: dict[str, Payload]) -> bytes:
    parts = []
    for one in _fields(data, whole.body, whole.end):
        large = one.end - one.body > KEPT_BYTES
        if one.number == _INITIALIZER and one.wire == _BYTES and large:
            parts.append(_message(_INITIALIZER, _tensor(data, one, file, found)))
        else:
            parts.append(data[one.start : one.end])
    return b"".join(parts)


def _tensor(data: mmap.mmap, whole: _Field, file: Path, found: dict[str, Payload]) -> bytes:
    parts, name, payload = [], "", None
    for one in _fields(data, whole.body, whole.end):
        if one.number in _PAYLOADS and one.wire == _BYTES and one.end - one.body > KEPT_BYTES:
            payload = Payload(file, one.body, one.end - one.body)
            continue
        if one.number == _NAME:
            name = data[one.body : one.end].decode("utf-8", "replace")
        parts.append(data[one.start : one.end])
    if payload is not None:
        found[name] = payload
    return b"".join(parts)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    at = start
    while at < end:
        tag, body = _varint(data, at, end)
        wire, stop, first = tag & 7, body, body
        if wire == 0:
            _, stop = _varint(data, body, end)
        elif wire == _BYTES:
            length, first = _varint(data, body, end)
            stop = first + length
        elif wire in _FIXED:
            stop = body + _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if stop > end or not tag >> 3:
            raise ValueError(f"a field that does not end, at byte {at}")
        yield _Field(tag >> 3, wire, at, first, stop)
        at = stop


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """(value, first byte after it)."""
    value = 0
    for index in range(10):
        if at + index >= end:
            break
        byte = data[at + index]
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, at + index + 1
    raise ValueError(f"a number that does not end, at byte {at}")


def _message(number: int, body: bytes) -> bytes:
    return _number(number << 3 | _BYTES) + _number(len(body)) + body


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
