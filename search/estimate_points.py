"""Points: the columns that `estimate` takes, and how their cells are read.

A cell that is empty, or a column that is missing, takes its default (`INPUT_COLUMNS`); one that
breaks its rule refuses its own row and no other. Each distinct cell of a column is read once, so
that the work grows with the distinct values, not with the rows.

Whole numbers may be written `4`, `4.0` or `4e3`; they go from their least value to 2**31 - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.models.errors import InputError, ShardplanError, UnknownNameError
from shardplan.models.modules import MODULES
from shardplan.search.workload import DEFAULT_INPUT, DEFAULT_OUTPUT

__all__ = [
    "INPUT_COLUMNS",
    "MAX_WHOLE",
    "OPS",
    "PHASES",
    "Column",
    "Points",
    "codes_of",
    "grouped",
    "read_cell",
    "read_points",
]

MAX_WHOLE = 2**31 - 1
MAX_BYTES = 2**43
_MAX_SHOWN = 60
_MAX_WORD = 4096
PHASES = ("prefill", "decode", "serve", "op")
OPS = (
    "matmul",
    "attention_prefill",
    "attention_decode",
    "mla_prefill",
    "mla_decode",
    "moe",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
)

Cell = Any
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One input column: how a cell is read, and what an empty one means."""

    name: str
    read: Callable[[str, Cell], Cell]
    default: Cell
    """None: there is none, and a phase that needs the cell refuses the row."""


def _shown(cell: Cell) -> str:
    text = str(cell)
    text = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _number(name: str, cell: Cell) -> float:
    """A cell as a float; NaN and text are refused."""
    value = math.nan
    if not isinstance(cell, bool) and "_" not in str(cell):
        try:
            value = float(cell)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
    if math.isnan(value):
        raise InputError(f"`{name}` must be a number", got=f"{name}={_shown(cell)!r}")
    return value


def _whole(least: int, most: int = MAX_WHOLE) -> Callable[[str, Cell], int]:
    def read(name: str, cell: Cell) -> int:
        value = _number(name, cell)
        if not value.is_integer():
            raise InputError(f"`{name}` must be a whole number", got=f"{name}={_shown(cell)}")
        if not least <= value <= most:
            raise InputError(
                f"`{name}` must be from {least} to {most}", got=f"{name}={_shown(cell)}"
            )
        return int(value)

    return read


def _share(name: str, cell: Cell) -> float:
    value = _number(name, cell)
    if not 0.0 <= value < 1.0:
        raise InputError(f"`{name}` must be from 0 to below 1", got=f"{name}={_shown(cell)}")
    return value


def _part(name: str, cell: Cell) -> float:
    value = _number(name, cell)
    if not 0.0 <= value <= 1.0:
        raise InputError(f"`{name}` must be from 0 to 1", got=f"{name}={_shown(cell)}")
    return value


def _rate(name: str, cell: Cell) -> float:
    """Requests a second; infinity means that all are sent at once."""
    value = _number(name, cell)
    if not value > 0.0:
        raise InputError(
            f"`{name}` must be above 0", got=f"{name}={_shown(cell)}", hint="inf: all at once"
        )
    return value


def _word(name: str, cell: Cell) -> str:
    text = str(cell).strip()
    if "\0" in text or len(text) > _MAX_WORD:
        raise InputError(f"`{name}` must be a name or a path", got=f"{name}={_shown(cell)!r}")
    return text


def _one_of(*choices: str) -> Callable[[str, Cell], str]:
    def read(name: str, cell: Cell) -> str:
        text = str(cell).strip().lower()
        if text not in choices:
            raise UnknownNameError(name, _shown(cell), choices)
        return text

    return read


def _dtype(name: str, cell: Cell) -> str:
    """A dtype by name; `auto` stands for the default."""
    text = _word(name, cell).lower()
    return "" if text == "auto" else text


def _columns(*entries: tuple[str, Callable[[str, Cell], Cell], Cell]) -> Mapping[str, Column]:
    return {name: Column(name=name, read=read, default=value) for name, read, value in entries}


INPUT_COLUMNS: Mapping[str, Column] = _columns(
    ("model", _word, None),
    ("cluster", _word, None),
    ("nodes", _whole(1), None),
    ("device", _word, None),
    ("engine_profile", _word, ""),
    ("weight_dtype", _dtype, ""),
    ("kv_dtype", _dtype, ""),
    ("attention", _one_of("flash", "naive", "auto"), "auto"),
    ("tp", _whole(1), 1),
    ("pp", _whole(1), 1),
    ("dp", _whole(1), 1),
    ("ep", _whole(1), 1),
    ("cp", _whole(1), 1),
    ("mtp", _whole(0, 64), 0),
    *((f"{module}_tp", _whole(0), 0) for module in MODULES),
    ("weight_prefetch", _one_of("off", "on"), "off"),
    ("fused_collectives", _one_of("off", "on"), "off"),
    ("phase", _one_of(*PHASES), ""),
    ("batch", _whole(1), 1),
    ("tokens", _whole(1), DEFAULT_INPUT),
    ("input_len", _whole(1), DEFAULT_INPUT),
    ("output_len", _whole(1), DEFAULT_OUTPUT),
    ("concurrency", _whole(1), None),
    ("request_rate", _rate, math.inf),
    ("num_prompts", _whole(1), None),
    ("prefix_hit", _share, 0.0),
    ("mtp_acceptance", _part, None),
    ("max_num_seqs", _whole(1), None),
    ("max_num_batched_tokens", _whole(1), None),
    ("op", _one_of(*OPS), ""),
    ("m", _whole(1), None),
    ("n", _whole(1), None),
    ("k", _whole(1), None),
    ("dtype", _dtype, ""),
    ("heads", _whole(1), None),
    ("kv_heads", _whole(0), 0),
    ("head_dim", _whole(1), 128),
    ("hidden", _whole(1), None),
    ("ffn", _whole(1), None),
    ("experts", _whole(1), None),
    ("topk", _whole(1), None),
    ("ranks", _whole(1), None),
    ("message_bytes", _whole(1, MAX_BYTES), None),
)
"""Input columns in order: the reader of a cell, and what an empty cell means."""


def _empty(cell: Cell) -> bool:
    if cell is None:
        return True
    if isinstance(cell, str):
        return not cell.strip()
    return isinstance(cell, float | np.floating) and math.isnan(cell)


def read_cell(name: str, cell: Cell) -> Cell:
    """The value of one cell; `InputError` where it breaks its column's rule."""
    column = INPUT_COLUMNS[name]
    return column.default if _empty(cell) else column.read(name, cell)


@dataclass(slots=True, kw_only=True)
class Points:
    """Rows column by column: distinct values, and a code a row that points into them."""

    rows: int
    values: dict[str, list[Cell]] = field(default_factory=dict)
    codes: dict[str, Indices] = field(default_factory=dict)
    given: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Whether the row's cell was filled."""
    errors: dict[int, ShardplanError] = field(default_factory=dict)
    """Row -> why it is refused."""
    numbers: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Distinct values of the columns of numbers that were asked for."""

    def cell(self, name: str, row: int) -> Cell:
        """The value of one cell."""
        return self.values[name][self.codes[name][row]]

    def floats(self, name: str, rows: Indices) -> NDArray[np.float64]:
        """Values of a column of numbers; NaN where a cell is empty and has no default."""
        known = self.numbers.get(name)
        if known is None:
            values = [math.nan if value is None else float(value) for value in self.values[name]]
            known = self.numbers[name] = np.asarray(values, dtype=np.float64)
        return known[self.codes[name][rows]]

    def refuse(self, rows: Indices, error: ShardplanError) -> None:
        """Give these rows an error, unless they have one."""
        for row in rows.tolist():
            self.errors.setdefault(row, error)


def codes_of(cells: Sequence[Hashable]) -> tuple[list[Any], Indices]:
    """(distinct cells in order of appearance, code of each cell)."""
    places = {cell: place for place, cell in enumerate(dict.fromkeys(cells))}
    if len(places) == 1:
        return list(places), np.zeros(len(cells), dtype=np.int64)
    found = np.fromiter(map(places.__getitem__, cells), dtype=np.int64, count=len(cells))
    return list(places), found


def _distinct(cells: Sequence[Cell]) -> tuple[list[Cell], Indices]:
    """Distinct cells as text, None for empty ones; code of each cell."""
    try:
        "".join(cells)
    except TypeError:  # not all of them are text
        cells = [None if _empty(c) else str(c) for c in cells]
    known, codes = codes_of(cells)
    if not any(cell is not None and not cell.strip() for cell in known):
        return known, codes
    merged, again = codes_of([None if cell is None or not cell.strip() else cell for cell in known])
    return merged, again[codes]


def read_points(
    columns: Mapping[str, Sequence[Cell]], rows: int, defaults: Mapping[str, Cell]
) -> Points:
    """Every known column of `rows` rows; unknown ones are left alone.

    `defaults` stand in for missing columns and empty cells, before the columns' own.
    `InputError` where a default itself breaks its rule.
    """
    points = Points(rows=rows)
    for name, column in INPUT_COLUMNS.items():
        spare = read_cell(name, defaults.get(name))
        distinct, codes = [None], np.zeros(rows, dtype=np.int64)
        if name in columns:
            distinct, codes = _distinct(columns[name])
        values: list[Cell] = []
        bad: dict[int, ShardplanError] = {}
        for place, cell in enumerate(distinct):
            try:
                values.append(spare if cell is None else column.read(name, cell))
            except ShardplanError as error:
                values.append(spare)
                bad[place] = error
        points.values[name], points.codes[name] = values, codes
        filled = np.asarray([cell is not None for cell in distinct], dtype=np.bool_)
        points.given[name] = filled[codes]
        for row in np.flatnonzero(np.isin(codes, list(bad))).tolist() if bad else ():
            points.errors.setdefault(row, bad[int(codes[row])])
    return points


def grouped(points: Points, names: Sequence[str], rows: Indices) -> list[Indices]:
    """Rows split into groups that agree in every named column, in order of appearance."""
    if not len(rows):
        return []
    key = np.zeros(len(rows), dtype=np.int64)
    for name in (one for one in names if len(points.values[one]) > 1):
        _, key = np.unique(
            key * len(points.values[name]) + points.codes[name][rows], return_inverse=True
        )
    order = np.argsort(key, kind="stable")
    cuts = np.flatnonzero(np.diff(key[order])) + 1
    return sorted((rows[part] for part in np.split(order, cuts)), key=lambda part: int(part[0]))
