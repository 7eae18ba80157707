"""MindSpore's parallel strategy checkpoint, written and read without MindSpore.

    ParallelStrategyMap  1 current_stage  3 parallel_layout_item[]
    ParallelLayoutItem   1 param_name     2 parallel_layouts
    ParallelLayouts      1 dev_matrix[] {1 dim[]}  2 tensor_map[] {1 dim[]}
                         3 param_split_shape[] {}  5 field  6, 7 opt_weight_shard_step, _size

proto2: every number is a varint (negative ones as 64-bit two's complement), every text and message
is length-delimited. dev_matrix is the mesh of one stage, major to minor; tensor_map names for each
dim of a weight the mesh dim that cuts it, counted from the right, -1 for none. Of a pipeline, a
parameter's name begins with `<stage>-`.
Source: mindspore 2.10.0 mindspore/train/node_strategy.proto and
mindspore/parallel/_parallel_serialization.py (`_convert_to_list`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardplan.models.errors import InputError

__all__ = ["ParameterLayout", "decode", "encode"]

_VARINT, _BYTES = 0, 2
_BITS, _MORE, _WORD = 7, 0x80, 1 << 64
_TAG_BITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterLayout:
    """How one parameter lies on the ranks of its stage."""

    name: str
    mesh: tuple[int, ...]
    """Ranks of each mesh dim, major to minor."""
    cut: tuple[int, ...]
    """For each dim of the parameter the mesh dim that cuts it, from the right; -1 for none."""


def encode(layouts: Sequence[ParameterLayout], *, stage: int = 0) -> bytes:
    """The file of these parameters."""
    items = b"".join(_message(3, _item(one)) for one in layouts)
    return _number(1, stage) + items


def _item(one: ParameterLayout) -> bytes:
    mesh = b"".join(_number(1, size) for size in one.mesh)
    cut = b"".join(_number(1, axis) for axis in one.cut)
    layout = _message(1, mesh) + _message(2, cut) + _message(3, b"")
    layout += _number(5, 0) + _number(6, 0) + _number(7, 0)
    return _message(1, one.name.encode("utf-8")) + _message(2, layout)


def _varint(value: int) -> bytes:
    value %= _WORD
    out = bytearray()
    while value >= _MORE:
        out.append(value % _MORE | _MORE)
        value >>= _BITS
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << _TAG_BITS | _VARINT) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << _TAG_BITS | _BYTES) + _varint(len(content)) + content


def decode(data: bytes) -> tuple[int, list[ParameterLayout]]:
    """(stage, parameters) of a file. `InputError` for bytes that are none."""
    try:
        fields = list(_fields(data))
        stage = next(value for field, value in fields if field == 1)
        items = [_read_item(value) for field, value in fields if field == 3]  # noqa: PLR2004
    except (IndexError, KeyError, StopIteration, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            "a strategy checkpoint is a ParallelStrategyMap", got=f"{len(data)} bytes: {error}"
        ) from None
    if not isinstance(stage, int):
        raise InputError("current_stage of a strategy checkpoint is a number", got=repr(stage))
    return stage, items


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        value, at = _read_varint(data, at)
        if tag & 7 == _VARINT:
            yield tag >> _TAG_BITS, value - _WORD if value >= _WORD // 2 else value
        elif tag & 7 == _BYTES and at + value <= len(data):
            yield tag >> _TAG_BITS, data[at : at + value]
            at += value
        else:
            raise IndexError(f"no such field at byte {at}")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & (_MORE - 1)) << shift
        at, shift = at + 1, shift + _BITS
        if byte < _MORE:
            return value, at


def _read_item(data: int | bytes) -> ParameterLayout:
    parts = dict(_fields(_as_bytes(data)))
    layout = dict(_fields(_as_bytes(parts[2])))
    mesh, cut = (
        tuple(value for _, value in _fields(_as_bytes(layout[field])) if isinstance(value, int))
        for field in (1, 2)
    )
    return ParameterLayout(name=_as_bytes(parts[1]).decode("utf-8"), mesh=mesh, cut=cut)


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where a message stands")
    return value
