"""Points as CSV: `in.csv` with one point a row -> `out.csv` with the answer's columns appended.

The input is UTF-8 with a header line and commas, at most `MAX_POINTS_BYTES`. Its cells go through
as they are, in their order. A row with too few or too many cells is refused like any other bad
row. Floats are written with nine significant digits, shares with four decimals: the same input
gives the same bytes.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardplan.costmodel.confidence import BASIS
from shardplan.models.errors import InputError, ShardplanError
from shardplan.search.estimate import (
    OUTPUT_COLUMNS,
    Prices,
    check_columns,
)
from shardplan.search.estimate_points import INPUT_COLUMNS

__all__ = ["MAX_POINTS_BYTES", "PointsTable", "priced_csv", "priced_rows", "read_points_csv"]

MAX_POINTS_BYTES = 128 * 2**20
_SHARE_DIGITS = 4
_SPECIAL = re.compile('[,"\\r\\n]')


@dataclass(frozen=True, slots=True, kw_only=True)
class PointsTable:
    """A points file: its header and its cells, column by column."""

    header: tuple[str, ...]
    columns: dict[str, list[str]]
    rows: int
    refused: dict[int, ShardplanError]
    """Rows whose number of cells is not the header's."""
    warnings: tuple[str, ...]


def _text(path: Path) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError("a points table is a file", got=f"file={path}")
        if found.st_size > MAX_POINTS_BYTES:
            raise InputError(
                f"a points table is at most {MAX_POINTS_BYTES} bytes",
                got=f"file={path}, bytes={found.st_size}",
                hint="split it",
            )
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            "a points table is CSV in UTF-8",
            got=f"file={path}, byte={error.start}",
            hint="export it as CSV",
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the file cannot be read: {reason}", got=f"file={path}") from None
    if "\0" in text:
        raise InputError("a points table is CSV, not binary", got=f"file={path}")
    return text


def _check_header(names: Sequence[str], path: Path, defaults: Sequence[str]) -> list[str]:
    """Warnings about columns that are not known; `InputError` where none can be used."""
    check_columns(names)
    known = [name for name in names if name in INPUT_COLUMNS]
    if not {"model", "op"} & {*known, *defaults}:
        raise InputError(
            "a points table needs the column `model` (or `op`)",
            got=f"file={path}, columns: {', '.join(names)[:200] or 'none'}",
            hint="add it, or give --model",
        )
    warnings = []
    for name in names:
        if name not in INPUT_COLUMNS:
            close = difflib.get_close_matches(name.lower(), INPUT_COLUMNS, n=1, cutoff=0.7)
            if close:
                warnings.append(f"column {name!r} is passed through; did you mean {close[0]}?")
    return warnings


def read_points_csv(path: Path, *, defaults: Sequence[str] = ()) -> PointsTable:
    """Read a points file; `defaults` names the columns that are given otherwise.

    `InputError` for a file that is missing, too large, not CSV in UTF-8, empty, or without rows.
    """
    text = _text(path)
    try:
        lines = [cells for cells in csv.reader(io.StringIO(text, newline="")) if cells]
    except csv.Error as error:
        raise InputError("a points table is CSV", got=f"file={path}: {error}") from None
    if not lines:
        raise InputError("a points table has a header line", got=f"file={path} is empty")
    header, body = lines[0], lines[1:]
    names = [name.strip() for name in header]
    warnings = _check_header(names, path, defaults)
    if not body:
        raise InputError("a points table has at least one row", got=f"file={path}: header only")
    refused: dict[int, ShardplanError] = {}
    width = len(header)
    for row, cells in enumerate(body):
        if len(cells) != width:
            got = f"row {row + 1}: {len(cells)} cells for {width}"
            refused[row] = InputError("a row has as many cells as the header", got=got)
            body[row] = (cells + [""] * width)[:width]
    columns = dict(zip(names, (list(cells) for cells in zip(*body, strict=True)), strict=True))
    return PointsTable(
        header=tuple(header),
        columns=columns,
        rows=len(body),
        refused=refused,
        warnings=tuple(warnings),
    )


def _numbers(prices: Prices, name: str) -> list[str]:
    """Cells of a column of numbers; those that a row does not have are empty."""
    rows = np.flatnonzero(~np.isnan(prices.numbers[name]))
    values = prices.numbers[name][rows]
    if name in BASIS:
        distinct, codes = np.unique(np.round(values, _SHARE_DIGITS), return_inverse=True)
        known = [f"{value:g}" for value in distinct.tolist()]
        texts = [known[code] for code in codes.tolist()]
    else:
        texts = (("%.9g " * rows.size) % tuple(values.tolist())).split(" ")[:-1]
    if rows.size == prices.rows:
        return texts
    cells = np.full(prices.rows, "", dtype=object)
    cells[rows] = texts
    found: list[str] = cells.tolist()
    return found


def _words(prices: Prices) -> dict[str, list[str]]:
    """Cells of the columns `status` and `message`."""
    status, message = ["ok"] * prices.rows, [""] * prices.rows
    for row, text in prices.messages.items():
        message[row] = text
    for row, error in prices.errors.items():
        status[row], message[row] = error.code, str(error)
    return {"status": status, "message": message}


def priced_csv(table: PointsTable, prices: Prices) -> str:
    """The text of `out.csv`."""
    words = {-1: "", 0: "false", 1: "true"}
    answer: dict[str, Sequence[str]] = {
        **{name: _quoted(cells) for name, cells in _words(prices).items()},
        **{name: _numbers(prices, name) for name in prices.numbers},
        "fits": [words[fits] for fits in prices.fits.tolist()],
    }
    cells = [*map(_quoted, table.columns.values()), *(answer[name] for name in OUTPUT_COLUMNS)]
    head = ",".join(_quoted([*table.header, *OUTPUT_COLUMNS]))
    lines = map(",".join, zip(*cells, strict=True))
    return "\n".join((head, *lines, ""))


def _quoted(cells: Sequence[str]) -> Sequence[str]:
    """Cells as CSV writes them: quoted where they hold a comma, a quote or the end of a line."""
    if not _SPECIAL.search("\0".join(cells)):
        return cells
    found = {
        cell: '"' + cell.replace('"', '""') + '"' for cell in set(cells) if _SPECIAL.search(cell)
    }
    return [found.get(cell, cell) for cell in cells]


def priced_rows(table: PointsTable, prices: Prices) -> list[dict[str, object]]:
    """The same as objects, for JSON; a number that a row does not have is null."""
    found: list[dict[str, object]] = []
    for row in range(prices.rows):
        one: dict[str, object] = {name: cells[row] for name, cells in table.columns.items()}
        one["status"], one["message"] = prices.status(row), prices.message(row)
        for name, values in prices.numbers.items():
            value = float(values[row])
            one[name] = value if math.isfinite(value) else None
        fits = int(prices.fits[row])
        one["fits"] = None if fits < 0 else bool(fits)
        found.append(one)
    return found
