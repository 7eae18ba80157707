"""What a sweep varies: `NAME=VALUES`, the values a list, ranges, or both.

    input-len=1k,4k,16k      values
    nodes=1:8                every whole number from 1 to 8
    tpot-ms=20:60:10         from 20 to 60 in steps of 10
    nodes=1:16:x2            from 1 to 16, each twice the last
    weight-dtype=bf16,w8a8   words

k and M are powers of 1024 for lengths in tokens, of 1000 for all else. NAME is an option of
`search` that holds one number or word: a field of `request.Asked`. A value named twice counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from shardplan.models.errors import InputError, UnknownNameError
from shardplan.search.request import Asked

__all__ = ["MOST_COMBINATIONS", "Axis", "parse_axes", "parse_axis", "swept_names"]

Value = int | float | str | bool
MOST_COMBINATIONS = 4096
_LENGTHS = ("input_len", "output_len")
_SUFFIXES = {"k": 1, "K": 1, "m": 2, "M": 2}
_SWITCH = {"on": True, "off": False}
_RANGE = (2, 3)
"""Parts of a range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One swept option, as a field of `Asked`, and its values in the order given."""

    name: str
    values: tuple[Value, ...]

    @property
    def option(self) -> str:
        """As it is typed."""
        return self.name.replace("_", "-")


def swept_names() -> dict[str, str]:
    """Fields of a question that can be swept, each with its kind: whole, number, switch or word."""
    kinds = {"int": "whole", "float": "number", "bool": "switch"}
    return {one.name: kinds.get(str(one.type).partition(" ")[0], "word") for one in fields(Asked)}


def parse_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """All swept options. `InputError` where one is named twice or there are too many of them."""
    axes = tuple(parse_axis(text) for text in texts)
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                "an option is swept once",
                got=f"--sweep {name.replace('_', '-')}",
                hint="give all its values in one --sweep",
            )
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_COMBINATIONS:
        sizes = " x ".join(f"{len(axis.values)} {axis.option}" for axis in axes)
        raise InputError(
            f"a sweep has at most {MOST_COMBINATIONS:,} combinations",
            got=f"{sizes} = {count:,}",
            hint="sweep fewer values or larger steps",
        )
    return axes


def parse_axis(text: str) -> Axis:
    """One `NAME=VALUES`."""
    option, equals, listed = text.partition("=")
    name = option.strip().removeprefix("--").replace("-", "_")
    kinds = swept_names()
    if name not in kinds:
        known = [one.replace("_", "-") for one in kinds]
        raise UnknownNameError("option to sweep", name.replace("_", "-")[:60], known)
    if not equals or not listed.strip():
        raise InputError(
            "`--sweep` takes NAME=VALUES",
            got=repr(text[:60]),
            hint=f"try {name.replace('_', '-')}=1,2,4 or a range a:b:step",
        )
    found: list[Value] = []
    for item in listed.split(","):
        found += _values(name, kinds[name], item.strip())
        if len(found) > MOST_COMBINATIONS:
            break
    return Axis(name=name, values=tuple(dict.fromkeys(found)))


def _values(name: str, kind: str, item: str) -> Iterator[Value]:
    """The values of one item of the list."""
    if not item:
        raise _refused(name, item, "a value between commas", "leave out the comma")
    if kind == "word":
        yield item
    elif kind == "switch":
        if item not in _SWITCH:
            raise _refused(name, item, "on or off", f"try {name.replace('_', '-')}=off,on")
        yield _SWITCH[item]
    elif ":" in item:
        yield from _range(name, kind, item)
    else:
        yield _number(name, kind, item)


def _refused(name: str, item: str, what: str, hint: str) -> InputError:
    option = name.replace("_", "-")
    return InputError(f"`--sweep {option}` takes {what}", got=repr(item[:60]), hint=hint)


def _number(name: str, kind: str, item: str) -> int | float:
    """A number with an optional suffix."""
    body, scale = item, 1.0
    if item[-1] in _SUFFIXES:
        base = 1024.0 if name in _LENGTHS else 1000.0
        body, scale = item[:-1], base ** _SUFFIXES[item[-1]]
    try:
        if "_" in body:
            raise ValueError
        value = float(body) * scale
    except ValueError:
        what = "whole numbers" if kind == "whole" else "numbers"
        raise _refused(name, item, what, "such as 8, 4k or 1:8") from None
    if not math.isfinite(value):
        raise _refused(name, item, "finite numbers", "such as 8, 4k or 1:8")
    if kind == "number":
        return value
    if value != int(value):
        raise _refused(name, item, "whole numbers", f"try {int(value)}")
    return int(body) if scale == 1.0 and body.lstrip("+-").isdigit() else int(value)


def _range(name: str, kind: str, item: str) -> Iterator[int | float]:
    """From a to b, both ends included where the step meets them."""
    parts = [part.strip() for part in item.split(":")]
    if len(parts) not in _RANGE or not all(parts):
        raise _refused(name, item, "ranges a:b or a:b:step", "such as 1:8 or 1:16:x2")
    grows = len(parts) == _RANGE[1] and parts[2].startswith("x")
    if grows and not parts[2][1:]:
        raise _refused(name, item, "ranges a:b or a:b:step", "such as 1:8 or 1:16:x2")
    first, last = (_number(name, kind, part) for part in parts[:2])
    step = (
        _number(name, "number" if grows else kind, parts[2].removeprefix("x")) if parts[2:] else 1
    )
    if last < first or (step <= 1 and grows) or step <= 0 or (grows and first <= 0):
        raise _refused(
            name, item, "rising ranges", "a <= b, and a step above 0 (x1 for a factor of above 1)"
        )
    for place in range(MOST_COMBINATIONS + 1):
        value = first * step**place if grows else first + step * place
        if value > last * (1.0 + 1e-12):
            return
        yield round(value) if kind == "whole" else float(f"{value:.12g}")
