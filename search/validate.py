"""Predictions against measured figures: those that ship, or a user's own table.

A table is a points file (`estimate_csv`) with one more column at least:

    measured_s                     a step or an operator, against `step_s`
    measured_ttft_s, _tpot_s       mean times of a serving run
    measured_output_tokens_per_s   and measured_requests_per_s
    measured_<column>              any other number that `estimate` gives

and, where one likes, `group` (a name for the row's errors), `held_out` (false where a fit has seen
the row), `source`, `note`. A row may hold several figures; an empty measured cell is none. Rows are
priced as `estimate --points` prices them. What cannot be priced is counted and named.

A family is wider than a group: a device and what was run on it, or a cluster and its steps or
serving runs.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.validation import (
    Figure,
    GroupErrors,
    by_name,
    group_errors,
    shipped_tables,
)
from shardplan.models.errors import InputError, ShardplanError
from shardplan.search.estimate import SERVE_COLUMNS, Prices, price_columns
from shardplan.search.estimate_csv import PointsTable, read_points_csv
from shardplan.search.estimate_points import INPUT_COLUMNS
from shardplan.search.estimate_steps import STEP_COLUMNS
from shardplan.search.validate_fit import unseen_median

__all__ = ["METRICS", "Report", "read_figures", "to_json", "validate"]

METRICS: Mapping[str, str] = {
    "measured_s": "step_s",
    "measured_ttft_s": "ttft_mean_s",
    "measured_tpot_s": "tpot_mean_s",
    **{f"measured_{name}": name for name in (*STEP_COLUMNS, *SERVE_COLUMNS)},
}
"""Measured column -> the column of the answer that it is compared with."""
_LABELS = {
    "step_s": "",
    "compute_s": "compute",
    "collective_s": "collectives",
    "ttft_mean_s": "TTFT",
    "tpot_mean_s": "TPOT",
    "output_tokens_per_s": "tokens/s",
    "requests_per_s": "requests/s",
}
_UNITS = {"output_tokens_per_s": "tokens/s", "requests_per_s": "requests/s", "memory_bytes": "B"}
_BANDS = {
    "step_s": ("step_low_s", "step_high_s"),
    "output_tokens_per_s": ("output_tokens_per_s_low", "output_tokens_per_s_high"),
}
"""Columns of the estimate's own band, where it has one."""
_KINDS = {
    "matmul": "matmul",
    "moe": "experts",
    "attention_prefill": "attention",
    "attention_decode": "attention",
    "mla_prefill": "attention",
    "mla_decode": "attention",
}
_YES = {"": True, "true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Figures with their errors, and the errors of each group and family."""

    figures: tuple[Figure, ...]
    groups: tuple[GroupErrors, ...]
    families: tuple[GroupErrors, ...]

    @property
    def unpriced(self) -> list[Figure]:
        """Figures that the model could not price."""
        return [one for one in self.figures if one.predicted is None]

    @property
    def unfit(self) -> list[Figure]:
        """Figures of runs that the memory ledger says cannot run."""
        return [one for one in self.figures if one.fits is False]

    def worst_group(self, family: str) -> GroupErrors | None:
        """The group of a family with the largest MAPE."""
        names = {one.group for one in self.figures if one.family == family}
        among = [one for one in self.groups if one.name in names and one.mape is not None]
        return max(among, key=lambda one: (one.mape or 0.0, one.name), default=None)


def validate(
    path: Path | None = None,
    *,
    group: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> Report:
    """Errors on a user's table, or on all that ships; `group` keeps the names that hold it.

    `InputError` for a table that breaks its rules (with lines), for a `group` that no name holds,
    and where nothing at all could be priced.
    """
    figures: list[Figure] = []
    if path is not None:
        figures += read_figures(path, defaults=defaults)
    else:
        for entry in shipped_tables():
            with resources.as_file(entry) as file:
                figures += read_figures(file)
    wanted = group.lower()
    kept = [one for one in figures if wanted in one.group.lower() or wanted in one.family.lower()]
    if not kept:
        names = ", ".join(by_name(figures, "family"))
        raise InputError("no group has this name", got=f"group={group[:60]!r}", hint=f"try {names}")
    if path is not None and all(one.predicted is None for one in kept):
        first = kept[0]
        raise InputError("no row of the table can be priced", got=f"{first.where}: {first.reason}")
    return Report(
        figures=tuple(kept),
        groups=tuple(group_errors(*item) for item in sorted(by_name(kept, "group").items())),
        families=tuple(group_errors(*item) for item in sorted(by_name(kept, "family").items())),
    )


def read_figures(path: Path, *, defaults: Mapping[str, Any] | None = None) -> list[Figure]:
    """The figures of one table, priced.

    `InputError` for a missing or an unknown measured column, for rows that break the table's
    rules (measured values that are not above 0, missing ones, wrong numbers of cells) and for
    what `read_points_csv` refuses.
    """
    table = read_points_csv(path, defaults=tuple(defaults or ()))
    metrics = _metrics(table, path)
    lines = _lines(path)
    measured = _measured(table, metrics, lines, path)
    seen = _held_out(table, lines, path)
    prices = price_columns(table.columns, table.rows, defaults=defaults)
    found = []
    for row in range(table.rows):
        names = _Names.of(table, row, defaults or {})
        for name, answer in metrics.items():
            value = measured[name][row]
            if value is not None:
                where = f"{path.name}:{lines[row]}"
                found.append(_figure(names, answer, value, _Answer(prices, row), where, seen[row]))
    return found


def _metrics(table: PointsTable, path: Path) -> dict[str, str]:
    """Measured columns of the table, each with the answer's column."""
    names = [name for name in table.columns if name.startswith("measured")]
    known = ", ".join(METRICS)
    for name in names:
        if name not in METRICS:
            raise InputError("unknown measured column", got=f"{path}: {name[:60]}", hint=known)
    if not names:
        raise InputError(
            "a table of figures needs a measured column", got=str(path), hint=f"one of {known}"
        )
    return {name: METRICS[name] for name in names}


def _lines(path: Path) -> list[int]:
    """The line on which each row ends, 1 for the first line of the file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        return [reader.line_num for cells in reader if cells][1:]


def _refuse(rule: str, wrong: Sequence[str], path: Path, hint: str = "") -> None:
    """`InputError` that lists the first wrong lines, if there is one."""
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError(rule, got=f"{path}: {'; '.join(wrong[:_SHOWN])}{more}", hint=hint)


def _measured(
    table: PointsTable, metrics: Mapping[str, str], lines: Sequence[int], path: Path
) -> dict[str, list[float | None]]:
    """Values `[rows]` of each measured column, None where a cell is empty."""
    wrong = [f"line {lines[row]}" for row in sorted(table.refused)]
    _refuse("a row has as many cells as the header", wrong, path)
    found = {name: [_value(cell) for cell in table.columns[name]] for name in metrics}
    wrong = [
        f"line {lines[row]}: {name}={table.columns[name][row][:40]!r}"
        for row in range(table.rows)
        for name in metrics
        if (value := found[name][row]) is not None and not 0.0 < value < math.inf
    ]
    _refuse("a measured value is a number above 0", wrong, path, "leave a cell empty for none")
    empty = [
        f"line {lines[row]}"
        for row in range(table.rows)
        if all(values[row] is None for values in found.values())
    ]
    _refuse("a row needs a measured value", empty, path, f"columns: {', '.join(metrics)}")
    return found


def _value(cell: str) -> float | None:
    """None for an empty cell, NaN for one that is no number."""
    if not cell.strip():
        return None
    try:
        return math.nan if "_" in cell else float(cell)
    except ValueError:
        return math.nan


def _held_out(table: PointsTable, lines: Sequence[int], path: Path) -> list[bool]:
    """Whether no fit has seen each row; empty cells mean none has."""
    cells = [cell.strip().lower() for cell in table.columns.get("held_out", [""] * table.rows)]
    wrong = [
        f"line {lines[row]}: {cell[:40]!r}" for row, cell in enumerate(cells) if cell not in _YES
    ]
    _refuse("`held_out` is true or false", wrong, path)
    return [_YES[cell] for cell in cells]


@functools.lru_cache(maxsize=256)
def _device_of(cluster: str) -> str:
    """Name of a cluster's device; the cluster's own where it cannot be read."""
    try:
        return load_cluster(cluster).device.name
    except ShardplanError:
        return Path(cluster).stem


@dataclass(frozen=True, slots=True)
class _Names:
    """What a row is called."""

    family: str
    group: str
    what: str
    source: str
    unseen: float | None

    @classmethod
    def of(cls, table: PointsTable, row: int, defaults: Mapping[str, Any]) -> _Names:
        cells = {name: str(value) for name, value in defaults.items()}
        cells |= {
            name: values[row].strip()
            for name, values in table.columns.items()
            if values[row].strip() or name not in cells
        }
        given = [f"{name}={cells[name]}" for name in INPUT_COLUMNS if cells.get(name)]
        phase = cells.get("phase") or ("op" if cells.get("op") else "decode")
        family, group = _names(cells, phase)
        return cls(
            family=family,
            group=cells.get("group") or group,
            what=" ".join(given),
            source=cells.get("source", ""),
            unseen=_unseen(cells) if phase == "op" else None,
        )


def _unseen(cells: Mapping[str, str]) -> float | None:
    names = ("op", "dtype", "device", "cluster", "engine_profile", "ranks")
    return unseen_median(*(cells.get(name, "") for name in names))


def _names(cells: Mapping[str, str], phase: str) -> tuple[str, str]:
    """(family, group) of a row that does not name its group."""
    cluster = cells.get("cluster", "")
    short = Path(cluster).stem if cluster.endswith(".toml") else cluster
    engine = cells.get("engine_profile", "")
    if phase == "op":
        op = cells.get("op", "")
        device = cells.get("device") or _device_of(cluster)
        device = Path(device).stem if device.endswith(".toml") else device
        words = (device, op, cells.get("dtype", "") if op in ("matmul", "moe") else "", engine)
        return f"{device} {_KINDS.get(op, 'collectives')}", " ".join(word for word in words if word)
    model = cells.get("model", "")
    model = Path(model).parent.name or model if model.endswith(".json") else model
    if phase == "serve":
        return f"{short} serving", " ".join(word for word in (short, engine or "serving") if word)
    return f"{short} steps", f"{short} {model} tp{cells.get('tp') or 1} {phase}"


@dataclass(frozen=True, slots=True)
class _Answer:
    """One row of the prices."""

    prices: Prices
    row: int

    def __getitem__(self, name: str) -> float | None:
        """A finite number, or None."""
        values = self.prices.numbers.get(name)
        value = math.nan if values is None else float(values[self.row])
        return value if math.isfinite(value) else None

    def fits(self) -> bool | None:
        """Whether the memory ledger lets it run; None where memory is not counted."""
        fits = int(self.prices.fits[self.row])
        return None if fits < 0 else bool(fits)

    def why_not(self, name: str) -> str:
        """Why there is no such number."""
        if self.row in self.prices.errors:
            return str(self.prices.errors[self.row])
        return f"this phase has no {name}"


def _figure(
    names: _Names, metric: str, measured: float, answer: _Answer, where: str, held_out: bool
) -> Figure:
    label = _LABELS.get(metric, metric)
    added = f", {label}" if label else ""
    predicted = answer[metric]
    low, high = _BANDS.get(metric, ("", ""))
    return Figure(
        family=names.family + added,
        group=names.group + added,
        where=where,
        what=names.what,
        metric=metric,
        unit=_UNITS.get(metric, "s"),
        measured=measured,
        predicted=predicted,
        reason="" if predicted is not None else answer.why_not(metric),
        held_out=held_out,
        unseen=names.unseen,
        low=answer[low],
        high=answer[high],
        fits=answer.fits(),
        source=names.source,
    )


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data: errors are shares, times seconds."""
    return {
        "figures": len(report.figures),
        "not_priced": [
            {"where": one.where, "what": one.what, "metric": one.metric, "reason": one.reason}
            for one in report.unpriced
        ],
        "families": [asdict(one) for one in report.families],
        "groups": [asdict(one) for one in report.groups],
        "rows": [{**asdict(one), "error": one.error} for one in report.figures],
    }
