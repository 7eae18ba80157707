"""Reading a TOML data file whose every number says where it comes from.

A fact is an inline table `{ value = ..., kind = "...", source = "..." }`. The key carries the
vendor's unit (`hbm_gb_per_s`); a `Field` carries the factor to SI and the sane range, so a value is
converted once, here, and nowhere else. A label (name, title) is a plain string.

Refused, with the file, the key and the rule: a file that is absent, larger than 4 MiB, not UTF-8 or
not TOML; a key that is unknown (with the closest known one) or missing; a value of the wrong type,
not finite, or out of range; a fact without kind or source.

Left out: comments and the order of keys; nothing is written back.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, cast, get_args

from shardplan.costmodel.errors import DataFileError
from shardplan.costmodel.hardware import Fact, FactKind
from shardplan.models.errors import UnknownNameError

__all__ = [
    "MAX_FILE_BYTES",
    "Facts",
    "Field",
    "check_keys",
    "flag",
    "is_file_name",
    "label",
    "mapping",
    "number",
    "read_facts",
    "read_shipped",
    "read_toml",
    "shipped_names",
    "words",
]

MAX_FILE_BYTES = 4 * 2**20
_KINDS: tuple[FactKind, ...] = get_args(FactKind)
Shape = Literal["real", "count", "counts", "flag", "word", "words"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """How one key is read: the name it has inside, its shape, its unit, its range."""

    target: str
    shape: Shape
    scale: float = 1.0
    """SI units in one unit of the file."""
    low: float = 0.0
    high: float = math.inf
    """Range of the value in the file's unit, both ends allowed."""
    optional: bool = False
    choices: tuple[str, ...] = ()
    """Words allowed; any when empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Values in SI by inner name, and where each comes from."""

    values: Mapping[str, object]
    facts: Mapping[str, Fact]


def number(
    target: str,
    *,
    low: float,
    high: float,
    scale: float = 1.0,
    whole: bool = False,
    optional: bool = False,
) -> Field:
    """A number between `low` and `high` (file's unit), times `scale`; `whole` for a count."""
    shape: Shape = "count" if whole else "real"
    return Field(target=target, shape=shape, scale=scale, low=low, high=high, optional=optional)


def words(target: str, *, choices: tuple[str, ...] = ()) -> Field:
    """A list of different words, at least one."""
    return Field(target=target, shape="words", choices=choices)


def flag(target: str) -> Field:
    """True or false."""
    return Field(target=target, shape="flag")


def is_file_name(name_or_path: str | Path) -> bool:
    """Whether the user means a file: a `Path`, a string with a separator, `.toml` or `.json`."""
    if isinstance(name_or_path, Path):
        return True
    return name_or_path.endswith((".toml", ".json")) or "/" in name_or_path or "\\" in name_or_path


def _folder(folder: str) -> Traversable:
    return resources.files("shardplan.costmodel") / "data" / folder


def shipped_names(folder: str) -> tuple[str, ...]:
    """Names of the TOML files in `data/<folder>`, sorted."""
    names = (entry.name for entry in _folder(folder).iterdir())
    return tuple(sorted(name[: -len(".toml")] for name in names if name.endswith(".toml")))


def read_shipped(folder: str, what: str, name: str) -> Mapping[str, object]:
    """The table of a shipped file; `UnknownNameError` when the catalogue lacks the name."""
    known = shipped_names(folder)
    if name not in known:
        raise UnknownNameError(what, name, known)
    text = (_folder(folder) / f"{name}.toml").read_text(encoding="utf-8")
    return _parse(text, f"{folder}/{name}.toml")


def read_toml(path: Path, what: str) -> Mapping[str, object]:
    """The table of a user's file; `DataFileError` when it cannot be read as one."""
    try:
        if not path.is_file():
            raise DataFileError(f"a {what} file must exist and be a regular file", got=str(path))
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataFileError(
                f"a {what} file must not be larger than {MAX_FILE_BYTES} bytes",
                got=f"{path}: {size} bytes",
            )
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataFileError(
            f"a {what} file must be readable", got=f"{path}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataFileError(
            f"a {what} file must be UTF-8 text", got=f"{path}: byte {error.start}"
        ) from error
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Mapping[str, object]:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise DataFileError("a data file must be TOML", got=f"{where}: {reason}") from error
    if not table:
        raise DataFileError("a data file must not be empty", got=where)
    return table


def check_keys(
    table: Mapping[str, object], required: Iterable[str], optional: Iterable[str], where: str
) -> None:
    """`DataFileError` for a key that is neither required nor optional, or that is missing."""
    needed = set(required)
    known = needed | set(optional)
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}" if close else "known: " + ", ".join(sorted(known))
            shown = key if key.isidentifier() else _shown(key)
            raise DataFileError(
                "a data file has an unknown key", got=f"{where}: {shown}", hint=hint
            )
    missing = sorted(needed - set(table))
    if missing:
        raise DataFileError("a data file lacks a key", got=f"{where}: {', '.join(missing)}")


def label(table: Mapping[str, object], key: str, where: str, choices: tuple[str, ...] = ()) -> str:
    """The plain string under `key`, one of `choices` where given."""
    return _word(table[key], f"{where}: {key}", choices)


def mapping(value: object, where: str) -> Mapping[str, object]:
    """The value as a table; `DataFileError` when it is none."""
    if not isinstance(value, Mapping):
        raise DataFileError("a table is needed here", got=f"{where}: {_shown(value)}")
    return cast("Mapping[str, object]", value)


def read_facts(table: Mapping[str, object], schema: Mapping[str, Field], where: str) -> Facts:
    """The facts of `table` that `schema` names (absent optional ones left out), in SI units."""
    values: dict[str, object] = {}
    facts: dict[str, Fact] = {}
    for key, field in schema.items():
        if key in table:
            values[field.target], facts[field.target] = _fact(table[key], field, f"{where}: {key}")
        elif not field.optional:
            raise DataFileError("a data file lacks a key", got=f"{where}: {key}")
    return Facts(values=values, facts=facts)


def _fact(entry: object, field: Field, where: str) -> tuple[object, Fact]:
    form = '{ value = ..., kind = "...", source = "..." }'
    if not isinstance(entry, Mapping):
        raise DataFileError(
            "a fact needs its kind and source", got=f"{where} = {_shown(entry)}", hint=f"use {form}"
        )
    check_keys(entry, ("value", "kind", "source"), (), where)
    kind = _word(entry["kind"], f"{where}.kind", _KINDS)
    source = entry["source"]
    if isinstance(source, str):
        source = " ".join(source.split())
    source = _word(source, f"{where}.source", ())
    value = _READERS[field.shape](entry["value"], field, where)
    return value, Fact(kind=cast("FactKind", kind), source=source)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004 - a line's worth


def _word(value: object, where: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        rule = "a text of one line that is not blank is needed"
        raise DataFileError(rule, got=f"{where} = {_shown(value)}")
    if choices and value not in choices:
        rule = "a value must be one of " + ", ".join(choices)
        raise DataFileError(rule, got=f"{where} = {_shown(value)}")
    return value


def _in_range(value: object, field: Field, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataFileError("a number is needed", got=f"{where} = {_shown(value)}")
    if not field.low <= value <= field.high:
        rule = f"a value must lie between {field.low:g} and {field.high:g}"
        raise DataFileError(rule, got=f"{where} = {_shown(value)}")
    return value


def _real(value: object, field: Field, where: str) -> float:
    return float(_in_range(value, field, where)) * field.scale


def _count(value: object, field: Field, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataFileError("a whole number is needed", got=f"{where} = {_shown(value)}")
    return int(_in_range(value, field, where))


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise DataFileError("a list that is not empty is needed", got=f"{where} = {_shown(value)}")
    return value


def _distinct(items: tuple[object, ...], where: str) -> None:
    if len(set(items)) != len(items):
        raise DataFileError("a list must not repeat a value", got=f"{where} = {_shown(items)}")


def _counts(value: object, field: Field, where: str) -> tuple[int, ...]:
    items = tuple(_count(item, field, where) for item in _list(value, where))
    _distinct(items, where)
    return items


def _words(value: object, field: Field, where: str) -> tuple[str, ...]:
    items = tuple(_word(item, where, field.choices) for item in _list(value, where))
    _distinct(items, where)
    return items


def _flag(value: object, field: Field, where: str) -> bool:
    if not isinstance(value, bool):
        raise DataFileError(f"`{field.target}` is true or false", got=f"{where} = {_shown(value)}")
    return value


_READERS: Mapping[Shape, Callable[[object, Field, str], object]] = {
    "real": _real,
    "count": _count,
    "counts": _counts,
    "flag": _flag,
    "word": lambda value, field, where: _word(value, where, field.choices),
    "words": _words,
}
