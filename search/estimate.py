"""Estimate: the price of given strategies, one or a hundred thousand.

A point is a row of `INPUT_COLUMNS`; its phase says what is priced:

    prefill, decode   one forward pass of a strategy        (`estimate_steps`)
    serve             a serving benchmark of a strategy      (`estimate_serve`)
    op                one operator alone                     (`estimate_ops`)

An empty phase means op where `op` is filled and decode otherwise. Rows that share a layout are
priced together, one call a choice of dtypes. Columns of the answer, in this order: `status`,
`message`, `STEP_COLUMNS`, `SERVE_COLUMNS`, `fits`, `capacity_bytes`; a number that a row does not
have is empty.

`status` is `ok` or the code of the row's own error (`bad_input`, `unknown_name`,
`illegal_strategy`, ...), with the error in `message`; no row stops another. A strategy that does
not fit the memory is priced all the same: its status is `ok`, `fits` is false and `message` says
by how much it is over. `message` also holds the defaults that were chosen for the row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.memo import FEW_POINTS
from shardplan.models.errors import InputError, ShardplanError
from shardplan.search.estimate_layout import (
    LAYOUT_COLUMNS,
    Layout,
    attention_for,
    kv_dtype_for,
    make_layouts,
    weight_dtype_for,
)
from shardplan.search.estimate_ops import OP_GROUP, price_ops
from shardplan.search.estimate_points import Indices, Points, grouped, read_points
from shardplan.search.estimate_serve import SERVE_ARRAYS, price_serving
from shardplan.search.estimate_steps import price_steps

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "OUTPUT_COLUMNS",
    "SERVE_COLUMNS",
    "STEP_COLUMNS",
    "Prices",
    "check_columns",
    "dtypes_of",
    "estimate_one",
    "price_columns",
    "price_points",
]

STEP_COLUMNS = ("step_s", "compute_s", "collective_s", "overhead_s", "memory_bytes")
SERVE_COLUMNS = (
    "ttft_mean_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "tpot_p99_s",
    "output_tokens_per_s",
    "requests_per_s",
)
OUTPUT_COLUMNS = (
    "status",
    "message",
    *STEP_COLUMNS,
    *SERVE_COLUMNS,
    "fits",
    "capacity_bytes",
)
_CHOICES = ("weight_dtype", "kv_dtype", "attention")
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
        names = (*STEP_COLUMNS, *SERVE_COLUMNS, "capacity_bytes")
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
    for part in grouped(points, LAYOUT_COLUMNS, np.flatnonzero(good & (phases != "op"))):
        _attempt(points, part, functools.partial(_price_layout, points, prices, part, phases))
        if progress is not None:
            progress(len(part))
    for row in points.errors:
        for values in prices.numbers.values():
            values[row] = np.nan
    prices.errors = points.errors
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
    rows, time = price_ops(points, rows)
    if time is None:
        return
    collective = points.cell("op", int(rows[0])).endswith(("reduce", "gather", "scatter", "to_all"))
    body = time.compute_s + time.memory_s
    zero = np.zeros_like(body)
    prices.numbers["step_s"][rows] = time.total_s
    prices.numbers["compute_s"][rows] = zero if collective else body
    prices.numbers["collective_s"][rows] = time.total_s if collective else zero
    prices.numbers["overhead_s"][rows] = zero if collective else time.overhead_s


def _price_layout(points: Points, prices: Prices, rows: Indices, phases: NDArray[np.str_]) -> None:
    first = int(rows[0])
    layouts = make_layouts(**{name: points.cell(name, first) for name in LAYOUT_COLUMNS})
    for phase in ("prefill", "decode", "serve"):
        among = rows[phases[rows] == phase]
        parts = grouped(points, _CHOICES, among)
        for part in parts:
            wide = among if len(parts) > 1 else part
            price = functools.partial(_price_choice, points, prices, layouts, phase, part, wide)
            _attempt(points, part, price)


def _price_choice(
    points: Points,
    prices: Prices,
    layouts: Sequence[Layout],
    phase: str,
    rows: Indices,
    wide: Indices,
) -> None:
    """Rows of one layout, phase and choice of dtypes, each under its faster exchange.

    They are priced among the rows `wide` of all choices: most kernels cost the same under another
    choice, and the step model remembers the points that it has priced.
    """
    first = int(rows[0])
    kinds = dtypes_of(points, layouts[0], first)
    asked = np.resize(wide, max(len(wide), FEW_POINTS)) if len(wide) > len(rows) else wide
    places = np.searchsorted(wide, rows)
    found = [_priced(points, layout, phase, asked, kinds) for layout in layouts]
    best = found[0]
    for other in found[1:]:
        rank = "output_tokens_per_s" if phase == "serve" else "step_s"
        better = other[rank] > best[rank] if phase == "serve" else other[rank] < best[rank]
        best = {name: np.where(better, other[name], best[name]) for name in best}
    best = {name: values[places] for name, values in best.items()}
    for name, values in best.items():
        prices.numbers[name][rows] = values
    capacity = layouts[0].ledger.capacity_bytes
    prices.numbers["capacity_bytes"][rows] = capacity
    prices.fits[rows] = best["memory_bytes"] <= capacity
    said = "; ".join(_chosen(points, layouts[0], kinds, first))
    if said:
        prices.messages.update(dict.fromkeys(rows.tolist(), said))


def dtypes_of(points: Points, layout: Layout, row: int) -> dict[str, str]:
    """The dtypes and the attention kernel that a row is priced with."""
    device = layout.device
    return {
        "weight_dtype": weight_dtype_for(points.cell("weight_dtype", row), layout.spec, device),
        "kv_dtype": kv_dtype_for(points.cell("kv_dtype", row), device),
        "attention": attention_for(points.cell("attention", row), layout.engine),
    }


def _priced(
    points: Points, layout: Layout, phase: str, rows: Indices, kinds: Mapping[str, str]
) -> dict[str, NDArray[np.float64]]:
    """Output columns of rows under one layout."""
    extra: Mapping[str, NDArray[np.float64]] = {}
    if phase == "serve":
        given = {name: points.floats(name, rows) for name in SERVE_ARRAYS}
        served = price_serving(layout, given=given, **kinds)
        step, extra = served.step, served.columns
    else:
        step = price_steps(
            layout,
            "prefill" if phase == "prefill" else "decode",
            batch=points.floats("batch", rows),
            tokens=points.floats("tokens", rows),
            **kinds,
        )
    return {**{name: getattr(step, name) for name in STEP_COLUMNS}, **extra}


def _chosen(points: Points, layout: Layout, kinds: Mapping[str, str], row: int) -> Iterator[str]:
    """What the row left open, or what was changed in it."""
    yield from layout.notes
    own = layout.spec.dtype
    if not points.cell("weight_dtype", row) and own != kinds["weight_dtype"]:
        yield f"weight_dtype={kinds['weight_dtype']}: {layout.device.name} does not run {own}"
    for name in ("weight_dtype", "kv_dtype"):
        asked = points.cell(name, row)
        if asked and asked != kinds[name]:
            yield f"{name}={kinds[name]} for {asked}"


def _say_memory(prices: Prices) -> None:
    for row in np.flatnonzero(prices.fits == 0).tolist():
        if row in prices.errors:
            prices.fits[row] = -1
            continue
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
        **{name: prices.numbers[name] for name in (*STEP_COLUMNS, *SERVE_COLUMNS)},
        "fits": pd.array([None if v < 0 else bool(v) for v in prices.fits], dtype="boolean"),
        "capacity_bytes": prices.numbers["capacity_bytes"],
    }
    return pd.concat([frame, pd.DataFrame(found, index=frame.index)], axis=1)


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
