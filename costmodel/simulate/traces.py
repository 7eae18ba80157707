"""Traces of requests, read and written a row at a time, so that any length of them fits.

    .csv     TIMESTAMP,ContextTokens,GeneratedTokens of the Azure LLM inference traces: ISO 8601
             dates or seconds (Azure/AzurePublicDataset, 2023 and 2024)
    .jsonl   {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]} of Mooncake
             (kvcache-ai/Mooncake): an id stands for 512 tokens of a prompt after the same tokens;
             the last may be short. Without ids nothing is known of prefixes

Either also as .gz. Arrivals count from the first row's. `InputError` names file, row and rule.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from shardplan.costmodel.simulate.request import Asked
from shardplan.models.errors import InputError

__all__ = ["PART_TOKENS", "is_trace", "read_trace", "trace_lines"]

PART_TOKENS = 512
"""Tokens of an id of Mooncake's traces."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOST_TOKENS = 2**24
_MOST_LINE = 1 << 20
_MOST_ID = 2**62
_SUFFIXES = (".csv", ".jsonl")


def is_trace(path: Path) -> bool:
    """Whether a file's name says that it is a trace."""
    return _kind(path) in _SUFFIXES


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


class _Row:
    """What is wrong with a row, said once."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0

    def refuse(self, rule: str, got: object, hint: str = "") -> InputError:
        text = " ".join(str(got).split())[:80]
        return InputError(rule, got=f"{self.path} row {self.number}: {text}", hint=hint)

    def tokens(self, name: str, value: object) -> int:
        """A whole number of tokens, at least 1."""
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if isinstance(number, bool) or not isinstance(number, int):
            raise self.refuse(f"`{name}` is a whole number of tokens", f"{name}={value!r}")
        if not 1 <= number <= _MOST_TOKENS:
            raise self.refuse(
                f"`{name}` is from 1 to {_MOST_TOKENS:,} tokens",
                f"{name}={number}",
                "leave requests without prompt or output out of the trace",
            )
        return number

    def seconds(self, value: object) -> float:
        """Seconds of a date or a number."""
        number = math.nan
        try:
            number = float(value) if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]  # refused below
        except (OverflowError, TypeError, ValueError):
            if isinstance(value, str):
                number = _date_s(value)
        if not math.isfinite(number):
            raise self.refuse("a timestamp is a date or a finite number", f"timestamp={value!r}")
        return number


def _date_s(text: str) -> float:
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        return math.nan
    days = when.toordinal() * 86400.0
    offset = when.utcoffset()
    seconds = days + when.hour * 3600 + when.minute * 60 + when.second + when.microsecond * 1e-6
    return seconds - (offset.total_seconds() if offset else 0.0)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The text of a trace; what keeps it from being read is an `InputError`."""
    try:
        if not path.is_file():
            raise InputError("a trace exists and is a regular file", got=str(path))
        packed = path.suffix == ".gz"
        raw = cast("IO[bytes]", gzip.open(path)) if packed else path.open("rb")  # noqa: SIM115
        with raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            yield text
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError("the trace cannot be read", got=f"{path}: {reason}") from None
    except UnicodeDecodeError:
        raise InputError("a trace is text in UTF-8", got=str(path)) from None


def _lines(text: IO[str], row: _Row) -> Iterator[str]:
    """Lines that are not empty; `InputError` for one that is no line of a trace."""
    while line := text.readline(_MOST_LINE):
        row.number += 1
        if len(line) >= _MOST_LINE:
            raise row.refuse("a row is at most 1 MiB long", line[:40])
        if line.strip():
            yield line


def _azure(text: IO[str], row: _Row) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
    cells = csv.reader(_lines(text, row))
    try:
        head = [one.strip() for one in next(cells, [])]
        if any(name not in head for name in AZURE):
            raise row.refuse(f"a trace has columns {', '.join(AZURE)}", ",".join(head))
        when, prompt, output = (head.index(name) for name in AZURE)
        for one in cells:
            if len(one) != len(head):
                raise row.refuse(f"a row has {len(head)} cells", ",".join(one))
            yield (
                row.seconds(one[when]),
                row.tokens(AZURE[1], one[prompt]),
                row.tokens(AZURE[2], one[output]),
                (),
            )
    except csv.Error as error:
        raise row.refuse("a trace is CSV", error) from None


def _mooncake(text: IO[str], row: _Row) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
    for line in _lines(text, row):
        try:
            one: Any = json.loads(line)
        except (ValueError, RecursionError):
            one = None
        if not isinstance(one, dict):
            raise row.refuse("a row is one JSON object", line)
        for name in ("timestamp", "input_length", "output_length"):
            if name not in one:
                raise row.refuse(f"a row has `{name}`", line)
        yield (
            row.seconds(one["timestamp"]) / 1e3,
            row.tokens("input_length", one["input_length"]),
            row.tokens("output_length", one["output_length"]),
            _ids(one.get("hash_ids", []), row),
        )


def _ids(value: object, row: _Row) -> tuple[int, ...]:
    known = isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < _MOST_ID for one in value
    )
    if not known or not isinstance(value, list):
        raise row.refuse("`hash_ids` are whole numbers from 0 up", f"hash_ids={value!r}")
    return tuple(value)


def read_trace(path: Path) -> Iterator[Asked]:
    """Requests of a trace, in its order; `InputError` where a row breaks a rule, or there is none.

    Rows are read as they are asked for.
    """
    row = _Row(path)
    kind = _kind(path)
    if kind not in _SUFFIXES:
        raise InputError(
            "a trace is .csv (Azure) or .jsonl (Mooncake), or either with .gz", got=str(path)
        )
    first, last, any_row = 0.0, -math.inf, False
    with _opened(path) as text:
        rows = _azure(text, row) if kind == ".csv" else _mooncake(text, row)
        for when, prompt, output, ids in rows:
            if not any_row:
                first, any_row = when, True
            if when < last:
                raise row.refuse(
                    "rows are in the order of time", f"{when} s after {last} s", "sort the trace"
                )
            last = when
            yield Asked(when - first, prompt, output, ids)
    if not any_row:
        raise InputError("a trace holds at least one request", got=f"{path} is empty")


def trace_lines(asked: Iterable[Asked], kind: str) -> Iterator[str]:
    """Lines of a trace, `.csv` in seconds or `.jsonl` in milliseconds."""
    if kind == ".csv":
        yield ",".join(AZURE) + "\n"
        for one in asked:
            yield f"{one.arrival_s:.6f},{one.input_len},{one.output_len}\n"
        return
    for one in asked:
        row: dict[str, object] = {
            "timestamp": round(one.arrival_s * 1e3, 3),
            "input_length": one.input_len,
            "output_length": one.output_len,
        }
        if one.prefix:
            row["hash_ids"] = list(one.prefix)
        yield json.dumps(row) + "\n"
