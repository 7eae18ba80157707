"""Estimate: the price of given strategies, one or a hundred thousand.

A point is a row of `INPUT_COLUMNS`; its phase says what is priced:

    prefill, decode   one forward pass of a strategy        (`estimate_steps`)
    serve             a serving benchmark of a strategy      (`estimate_serve`)
    op                one operator alone                     (`estimate_ops`)

An empty phase means op where `op` is filled and decode otherwise. Rows of one machine and engine
are priced together (`estimate_fleets`). Columns of the answer, in this order: `status`,
`message`, `STEP_COLUMNS`, `SERVE_COLUMNS`, `fits`, `capacity_bytes`, `SURE_COLUMNS`; a number that
a row does not have is empty.

`status` is `ok` or the code of the row's own error (`bad_input`, `unknown_name`,
`illegal_strategy`, ...), with the error in `message`; no row stops another. A strategy that does
not fit the memory is priced all the same: its status is `ok`, `fits` is false and `message` says
by how much it is over. `message` also holds the defaults that were chosen for the row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.confidence import BASIS, operator_confidence
from shardplan.models.errors import InputError, ShardplanError
from shardplan.search.estimate_fleets import price_strategies
from shardplan.search.estimate_ops import OP_GROUP, price_ops
from shardplan.search.estimate_points import Indices, Points, grouped, read_points
from shardplan.search.estimate_steps import STEP_COLUMNS

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "OUTPUT_COLUMNS",
    "SERVE_COLUMNS",
    "SURE_COLUMNS",
    "Prices",
    "check_columns",
    "estimate_one",
    "price_columns",
    "price_points",
]

SERVE_COLUMNS = (
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p90_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "tpot_p50_s",
    "tpot_p90_s",
    "tpot_p99_s",
    "output_tokens_per_s",
    "requests_per_s",
)
SURE_COLUMNS = (
    "step_low_s",
    "step_high_s",
    *BASIS,
    "output_tokens_per_s_low",
    "output_tokens_per_s_high",
)
"""Band and basis of a price (`costmodel.confidence`)."""
OUTPUT_COLUMNS = (
    "status",
    "message",
    *STEP_COLUMNS,
    *SERVE_COLUMNS,
    "fits",
    "capacity_bytes",
    *SURE_COLUMNS,
)
_GIB = 2.0**30
Progress = Callable[[int], None]


@dataclass(slots=True, kw_only=True)
class Prices:
    """The answer column by column; NaN where a row has no such number."""

    rows: int
    numbers: dict[str, NDArray[np.float64]]
    fits: NDArray[np.int8]
    """1, 0, or -1 where memory was not counted."""
    messages: dict[int, str] = field(default_factory=dict)
    errors: dict[int, ShardplanError] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int) -> Prices:
        """No row priced yet."""
        names = (*STEP_COLUMNS, *SERVE_COLUMNS, "capacity_bytes", *SURE_COLUMNS)
        return cls(
            rows=rows,
            numbers={name: np.full(rows, np.nan) for name in names},
            fits=np.full(rows, -1, dtype=np.int8),
        )

    def status(self, row: int) -> str:
        """`ok` or an error code."""
        return self.errors[row].code if row in self.errors else "ok"

    def message(self, row: int) -> str:
        """The error, or what is worth knowing of a price; empty mostly."""
        return str(self.errors[row]) if row in self.errors else self.messages.get(row, "")


def _resolve_phase(points: Points) -> NDArray[np.str_]:
    named = np.asarray(points.values["phase"], dtype=np.str_)[points.codes["phase"]]
    ops = np.asarray(points.values["op"], dtype=np.str_)[points.codes["op"]]
    return np.where(named == "", np.where(ops == "", "decode", "op"), named)


def price_columns(
    columns: Mapping[str, Sequence[Any]],
    rows: int,
    *,
    defaults: Mapping[str, Any] | None = None,
    refused: Mapping[int, ShardplanError] | None = None,
    progress: Progress | None = None,
) -> Prices:
    """Price `rows` points given column by column; columns that are not inputs are ignored.

    `defaults` stand in for missing columns and empty cells (`InputError` where one of them breaks
    its rule); `refused` rows keep the error they come with. `progress` is called with the number
    of rows done after each group.
    """
    points = read_points(columns, rows, defaults or {})
    points.errors.update(refused or {})
    prices = Prices.empty(rows)
    phases = _resolve_phase(points)
    good = np.ones(rows, dtype=np.bool_)
    good[list(points.errors)] = False
    ops = np.flatnonzero(good & (phases == "op"))
    for part in grouped(points, OP_GROUP, ops):
        _attempt(points, part, functools.partial(_price_op_group, points, prices, part))
        if progress is not None:
            progress(len(part))
    price_strategies(
        points,
        np.flatnonzero(good & (phases != "op")),
        phases,
        prices.numbers,
        prices.messages,
        (lambda _: None) if progress is None else progress,
    )
    bad = list(points.errors)
    for values in prices.numbers.values():
        values[bad] = np.nan
    prices.errors = points.errors
    counted = np.isfinite(prices.numbers["memory_bytes"])
    over = prices.numbers["memory_bytes"] > prices.numbers["capacity_bytes"]
    prices.fits[counted] = ~over[counted]
    _say_memory(prices)
    return prices


def _attempt(points: Points, rows: Indices, price: Callable[[], None]) -> None:
    """Price a group; what the group breaks refuses its rows alone."""
    try:
        price()
    except ShardplanError as error:
        points.refuse(rows, error)


def _price_op_group(points: Points, prices: Prices, rows: Indices) -> None:
    if points.cell("op", int(rows[0])) == "":
        raise InputError("phase op needs an operator", got="op is empty", hint="see the column op")
    rows, time, section = price_ops(points, rows)
    if time is None:
        return
    collective = points.cell("op", int(rows[0])).endswith(("reduce", "gather", "scatter", "to_all"))
    body = time.compute_s + time.memory_s
    zero = np.zeros_like(body)
    prices.numbers["step_s"][rows] = time.total_s
    prices.numbers["compute_s"][rows] = zero if collective else body
    prices.numbers["collective_s"][rows] = time.total_s if collective else zero
    prices.numbers["overhead_s"][rows] = zero if collective else time.overhead_s
    sure = operator_confidence(section, time.total_s)
    for name, values in sure.columns(time.total_s).items():
        prices.numbers[name][rows] = values


def _say_memory(prices: Prices) -> None:
    for row in np.flatnonzero(prices.fits == 0).tolist():
        held = prices.numbers["memory_bytes"][row] / _GIB
        capacity = prices.numbers["capacity_bytes"][row] / _GIB
        said = f"does not fit: {held:.1f} GiB of {capacity:.1f} GiB"
        before = prices.messages.get(row)
        prices.messages[row] = f"{said}; {before}" if before else said


def estimate_one(**point: Any) -> dict[str, Any]:
    """Price one point, given by column name; the answer's columns that the phase has.

    Raises the point's own error, and `InputError` for a name that is not a column.
    """
    from shardplan.search.estimate_points import INPUT_COLUMNS

    for name in point:
        if name not in INPUT_COLUMNS:
            raise InputError("unknown column", got=name, hint="known: " + ", ".join(INPUT_COLUMNS))
    prices = price_columns({name: [value] for name, value in point.items()}, 1)
    if 0 in prices.errors:
        raise prices.errors[0]
    found: dict[str, Any] = {"status": "ok", "message": prices.message(0)}
    for name, values in prices.numbers.items():
        if np.isfinite(values[0]):
            found[name] = float(values[0])
    if prices.fits[0] >= 0:
        found["fits"] = bool(prices.fits[0])
    return found


def price_points(frame: DataFrame, *, defaults: Mapping[str, Any] | None = None) -> DataFrame:
    """The frame with the columns of the answer appended; its own stay as they are.

    `InputError` where the frame has a column of the answer already.
    """
    import pandas as pd

    check_columns(tuple(str(name) for name in frame.columns))
    columns = {str(name): frame[name].tolist() for name in frame.columns}
    prices = price_columns(columns, len(frame), defaults=defaults)
    rows = range(len(frame))
    found: dict[str, Any] = {
        "status": [prices.status(row) for row in rows],
        "message": [prices.message(row) for row in rows],
        **prices.numbers,
        "fits": pd.array([None if v < 0 else bool(v) for v in prices.fits], dtype="boolean"),
    }
    answer = pd.DataFrame({name: found[name] for name in OUTPUT_COLUMNS}, index=frame.index)
    return pd.concat([frame, answer], axis=1)


def check_columns(names: Sequence[str]) -> None:
    """`InputError` where a table has a column twice, or one of the answer's."""
    for name in names:
        if name in OUTPUT_COLUMNS:
            raise InputError(
                "a points table must not hold a column of the answer",
                got=f"column {name}",
                hint=f"rename it, for example to {name}_measured",
            )
        if names.count(name) > 1:
            raise InputError("a points table holds each column once", got=f"column {name[:60]!r}")
