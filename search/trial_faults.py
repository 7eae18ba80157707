"""Where a trial table first breaks a rule, in words: the file, the line, the column, the cell."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from shardplan.models.errors import InputError
from shardplan.search.trials import (
    COUNT_COLUMNS,
    FALSE,
    INTEGER_COLUMNS,
    MAX_INTEGER,
    POSITIVE,
    SWITCH_COLUMNS,
    TRIAL_COLUMNS,
    TRUE,
    WORD_COLUMNS,
    unreadable,
)

__all__ = ["broken_rule", "first_fault"]


def first_fault(path: Path) -> InputError:
    """Where a table that pandas refused first breaks a rule, in words."""
    try:
        for fault in _faults(path):
            return fault
    except (UnicodeDecodeError, csv.Error) as error:
        return InputError("a trial table is CSV in UTF-8", got=f"{path}: {error}")
    except OSError as error:
        return unreadable(path, error)
    return InputError("a trial table is CSV in UTF-8", got=str(path))


def _faults(path: Path) -> Iterator[InputError]:
    """Every cell that breaks a rule, in the order of the file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows)
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                yield InputError(
                    "a row of a trial table has a cell for each column",
                    got=f"{where}: {len(row)} cells, {len(header)} columns",
                )
                continue
            cells = dict(zip(header, row, strict=True))
            for name in (one for one in TRIAL_COLUMNS if one in cells):
                rule = broken_rule(name, cells[name], feasible=cells["feasible"] == TRUE)
                if rule:
                    yield InputError(rule, got=f"{where}, {name}={cells[name]!r}")


def broken_rule(name: str, cell: str, *, feasible: bool) -> str:
    """The rule that a cell breaks, "" when it keeps them all."""
    if name in WORD_COLUMNS:
        return ""
    if name in SWITCH_COLUMNS:
        return "" if cell in (TRUE, FALSE) else "the cell is true or false"
    if name in INTEGER_COLUMNS:
        low = 0 if name in ("rank", *COUNT_COLUMNS) else 1
        kept = (not cell and name == "rank") or _holds(
            int, cell, lambda value: low <= value <= MAX_INTEGER
        )
        return "" if kept else f"the cell is a whole number of at least {low}"
    if not cell:
        return "a feasible row has every number" if feasible else ""
    if not _holds(float, cell, math.isfinite):
        return "the cell is a number"
    if feasible and name in POSITIVE and float(cell) <= 0:
        return "times and rates of a feasible row are above 0"
    return ""


def _holds(parse: Callable[[str], float], cell: str, rule: Callable[[float], bool]) -> bool:
    """Whether a cell parses and keeps a rule."""
    try:
        return rule(parse(cell))
    except (ValueError, OverflowError):
        return False
