"""The report of `shardplan validate` as text: tables on a terminal, CSV and Markdown.

Errors stand in percent, rounded to a tenth.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from shardplan.costmodel.catalog import cluster_names, load_cluster
from shardplan.costmodel.devices import device_names, load_device
from shardplan.costmodel.validation import Figure, GroupErrors
from shardplan.search.tables import add, new_table, rate_text, seconds_text, show

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shardplan.search.validate import Report

__all__ = [
    "SHORT",
    "figures_csv",
    "print_report",
    "short_table",
    "summary_table",
    "to_markdown",
    "worst_figures",
]

MOST_WORST = 10
MOST_SHOWN = 15
_NUMBERS = (
    "figures",
    "held out",
    "MAPE",
    "unseen",
    "median",
    "p90",
    "worst",
    "bias",
    "of fit",
)
_WORST = _NUMBERS.index("worst")
_RIGHT = {*_NUMBERS, "inside", "measured", "predicted", "error"}
_COLUMNS = (
    "family",
    "group",
    "where",
    "what",
    "metric",
    "unit",
    "measured",
    "predicted",
    "error",
    "low",
    "high",
    "held_out",
    "unseen",
    "fits",
    "reason",
    "source",
)
SHORT = ("figures", "held out", "MAPE", "p90", "of fit")
"""Numbers of the short table."""
LEGEND = (
    "Error of a figure: predicted / measured - 1. MAPE, median and p90 are of its size; bias is "
    "the median with its sign: above zero, times are predicted too long and rates too high. "
    "Held out: figures that no fit has seen; unseen: their MAPE. Of fit: the median error "
    "that the fit reports of rows left out of it (the largest, of several fits): what to expect "
    "where no figure is held out."
)
BAND_LEGEND = (
    " Inside: the share of measured figures within the band that the estimate itself gives."
)
_LARGE = 10.0
"""From a thousand per cent on tenths say nothing."""


def percent(value: float | None, *, signed: bool = False) -> str:
    """A share in percent; a dash for none."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= _LARGE else 1
    return f"{value:{'+' if signed else ''}.{digits}%}"


def value_text(figure: Figure, value: float | None) -> str:
    """A number of a figure in its unit; a dash for none."""
    if value is None:
        return "-"
    return seconds_text(value) if figure.unit == "s" else f"{rate_text(value)} {figure.unit}"


def _cells(one: GroupErrors, banded: bool) -> list[str]:
    """Numbers of a group, in the order of `_NUMBERS`, and the share inside the band."""
    count = str(one.figures) if one.priced == one.figures else f"{one.priced} of {one.figures}"
    cells = [count, str(one.held_out)]
    cells += [percent(value) for value in (one.mape, one.held_mape)]
    cells += [percent(value) for value in (one.median, one.p90, one.worst)]
    cells += [percent(one.bias, signed=True), percent(one.unseen)]
    return [*cells, _whole_percent(one.inside)] if banded else cells


def _whole_percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _banded(report: Report) -> bool:
    return any(one.inside is not None for one in report.groups)


def _legend(report: Report) -> str:
    return LEGEND + (BAND_LEGEND if _banded(report) else "")


def worst_figures(report: Report, most: int = MOST_WORST) -> list[Figure]:
    """Figures with the largest errors, at most one a group, the largest first."""
    known = [one for one in report.figures if one.error is not None]
    ordered = sorted(known, key=lambda one: (-abs(one.error or 0.0), one.where))
    first: dict[str, Figure] = {}
    for one in ordered:
        first.setdefault(one.group, one)
    return list(first.values())[:most]


def print_report(report: Report, console: Console) -> None:
    """Errors of families and of their groups, what was not priced, the worst figures."""
    one_each = len(report.families) == len(report.groups)
    if not one_each:
        show(console, _errors_table("errors by family", report.families, _banded(report)))
    show(console, _errors_table("errors by group", report.groups, _banded(report)))
    if report.unpriced:
        table = new_table("not priced", "where", "group", "why")
        for one in report.unpriced[:MOST_SHOWN]:
            add(table, one.where, one.group, one.reason)
        show(console, table)
        left = len(report.unpriced) - MOST_SHOWN
        if left > 0:
            console.print(f"{left} more are not priced; see --json\n", markup=False)
    numbers = ("measured", "predicted", "error")
    table = new_table("worst figure of a group", "where", "group", *numbers, right=numbers)
    for one in worst_figures(report):
        values = (value_text(one, one.measured), value_text(one, one.predicted))
        add(table, one.where, one.group, *values, percent(one.error, signed=True))
    show(console, table)
    console.print(_legend(report), markup=False)


def _errors_table(title: str, rows: Iterable[GroupErrors], banded: bool) -> Table:
    names = ("all", "held out", *_NUMBERS[2:])
    numbers = (*names, "inside") if banded else names
    table = new_table(title, "figures of", *numbers, right=numbers)
    table.columns[0].no_wrap = False  # a long name gives way, never a number
    for one in rows:
        add(table, one.name, *_cells(one, banded))
    return table


def figures_csv(report: Report) -> str:
    """A row a figure: what was measured, what is predicted, the error."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for one in report.figures:
        writer.writerow([_plain(getattr(one, name)) for name in _COLUMNS])
    return out.getvalue()


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.9g}"
    return "" if value is None else str(value)


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of `_RIGHT` hold numbers."""
    rule = ["---:" if name in _RIGHT else "---" for name in headings]
    lines = [list(headings), rule, *([cell.replace("|", "/") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary_table(report: Report) -> str:
    """Families, with the worst group of each."""
    banded = _banded(report)
    rows: list[list[str]] = []
    for one in report.families:
        worst = report.worst_group(one.name)
        several = worst is not None and worst.figures < one.figures
        name = f"{worst.name}: {percent(worst.mape)}" if worst is not None and several else ""
        cells = _cells(one, banded)
        rows.append([one.name, *cells[:_WORST], *cells[_WORST + 1 :], name])
    numbers = [name for name in _NUMBERS if name != "worst"]
    extra = ["inside"] if banded else []
    headings = ["what", *numbers, *extra, "worst group: MAPE"]
    return _markdown(headings, rows)


def short_table(report: Report, headings: Sequence[str]) -> str:
    """Families of Ascend machines: name and the numbers of `SHORT`; `headings` in any language."""
    machines = [
        *(device.name for device in map(load_device, device_names()) if device.vendor == "ascend"),
        *(one.name for one in map(load_cluster, cluster_names()) if one.device.vendor == "ascend"),
    ]
    rows = []
    for one in report.families:
        if one.name.split()[0] in machines:
            cells = dict(zip(_NUMBERS, _cells(one, banded=False), strict=True))
            rows.append([one.name, *(cells[name] for name in SHORT)])
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in ([*headings], rule, *rows))


def to_markdown(report: Report) -> str:
    """The page: families, groups, what was not priced, the worst figures."""
    banded = _banded(report)
    headings = ["what", *_NUMBERS, *(["inside"] if banded else [])]
    groups = _markdown(headings, [[one.name, *_cells(one, banded)] for one in report.groups])
    parts = [
        "# Predictions against measurements",
        "`shardplan validate` prices every measured figure that ships with the project "
        "(`costmodel/data/validation/`, sources in `sources.toml`) as `shardplan estimate` would.",
        _legend(report),
        "![measured against predicted](scatter.svg)",
        "## By family",
        summary_table(report).rstrip(),
        "## By group",
        groups.rstrip(),
        "## Worst figure of a group",
        _worst_markdown(report).rstrip(),
    ]
    if report.unpriced:
        rows = [[one.where, one.group, one.reason] for one in report.unpriced]
        parts += ["## Not priced", _markdown(("where", "group", "why"), rows).rstrip()]
    return "\n\n".join(parts) + "\n"


def _worst_markdown(report: Report) -> str:
    rows = [
        [
            one.group,
            f"`{one.where}`",
            one.what,
            value_text(one, one.measured),
            value_text(one, one.predicted),
            percent(one.error, signed=True),
        ]
        for one in worst_figures(report)
    ]
    return _markdown(("group", "where", "what", "measured", "predicted", "error"), rows)
