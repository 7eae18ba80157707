"""A sweep as a table: `sweep.csv`, the rows that `--json` prints, and what a terminal shows.

Floats have ten significant digits as in plan.json; what a row has not is an empty cell, null in
JSON.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.atomic import write_atomically
from shardplan.search.sweep import Sweep, columns
from shardplan.search.tables import add, new_table, rate_text, seconds_text, show

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["layout_words", "print_sweep", "sweep_json", "value_words", "write_sweep"]

_MOST_SHOWN = 64


def write_sweep(sweep: Sweep, path: Path) -> None:
    """Write sweep.csv, whole or not at all."""
    names = columns(sweep.axes)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row[name]) for name in names] for row in sweep.rows)
    write_atomically(path, text.getvalue())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}" if math.isfinite(value) else ""
    if isinstance(value, tuple | list):
        return ("-" if isinstance(value[0], str) else ",").join(map(str, value))
    return str(value)


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    """What was swept, how many rows have which status, and the rows."""

    def rounded(value: Any) -> Any:
        return float(f"{value:.10g}") if isinstance(value, float) else value

    return {
        "sweep": {axis.name: list(axis.values) for axis in sweep.axes},
        "interrupted": sweep.interrupted,
        "counts": sweep.counts(),
        "rows": [{name: rounded(value) for name, value in row.items()} for row in sweep.rows],
    }


def value_words(value: Any) -> str:
    """A swept value as people write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return Path(text).stem if "/" in text else text


def layout_words(row: Mapping[str, Any]) -> str:
    """The layout that a row chose, axes of one left out: `tp8 dp4 ep32 sp a2a`."""
    words = [f"{name}{row[name]}" for name in ("tp", "pp", "dp", "ep", "cp") if row[name] > 1]
    if row["sp"]:
        words.append("sp")
    if row["ep"] > 1 and row["exchange"] == "alltoall":
        words.append("a2a")
    if row["mtp"]:
        words.append(f"mtp{row['mtp']}")
    return " ".join(words) or "tp1"


def print_sweep(sweep: Sweep, console: Console) -> None:
    """A row a combination: what it chose and does, or which limit binds."""
    names = [axis.option for axis in sweep.axes]
    numbers = ("tokens/s", "TTFT", "TPOT", "uses", "batch")
    table = new_table("sweep", *names, *numbers, "layout, or what binds", right=(*names, *numbers))
    for row in sweep.rows[:_MOST_SHOWN]:
        head = [value_words(row[axis.name]) for axis in sweep.axes]
        if row["status"] == "ok":
            times = (seconds_text(row[name]) for name in ("ttft_s", "tpot_s"))
            cells = (rate_text(row["output_tokens_per_s"]), *times, row["ranks"], row["batch"])
            add(table, *head, *cells, layout_words(row))
        else:
            add(table, *head, *("",) * len(numbers), row["limit"] or row["status"])
    show(console, table)
    if len(sweep.rows) > _MOST_SHOWN:
        rest = len(sweep.rows) - _MOST_SHOWN
        console.print(f"{rest} more rows are in sweep.csv", markup=False)
    counts = ", ".join(f"{count} {name}" for name, count in sweep.counts().items())
    console.print(f"{len(sweep.rows)} combinations: {counts}", markup=False)
    shown = dict.fromkeys(row["message"] for row in sweep.rows if row["status"] != "ok")
    for message in list(shown)[:3]:
        console.print(f"  - {message}", markup=False)
