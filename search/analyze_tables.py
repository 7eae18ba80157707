"""A summary of trials as tables on a terminal, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from shardplan.search.analyze import (
    Cell,
    Dimension,
    DimensionValue,
    Row,
    Summary,
    row_name,
    value_name,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["render_summary"]

MAX_FRONT = 20
MAX_VALUES = 8
_MS = 1e3
_GIB = 2**30
_SHOWN_PERFORMANCE = ("tok/s/card", "TTFT ms", "TPOT ms")


def render_summary(summary: Summary, console: Console) -> None:
    """Print the best strategy, the worth of each dimension, its values, the front, refusals."""
    console.print(f"{summary.trials:,} trials, {summary.feasible:,} feasible", highlight=False)
    if summary.infeasible:
        parts = [f"{limit} {count:,}" for limit, count in summary.infeasible.items()]
        console.print(f"refused by: {', '.join(parts)}", highlight=False, markup=False)
    if summary.best is None:
        return
    console.print()
    _print_best(summary.best, console)
    console.print()
    console.print(_worth_table(summary.dimensions))
    console.print()
    console.print(_values_table(summary.dimensions))
    console.print()
    console.print(_front_table(summary.pareto))


def _print_best(best: Row, console: Console) -> None:
    """The best strategy and what it does, in three lines."""
    console.print(f"[bold]best[/bold]  {_safe(row_name(best))}", highlight=False)
    numbers = (
        f"{_number(best['output_tokens_per_s'])} output tokens/s",
        f"{_number(best['output_tokens_per_s_per_card'])} a card",
        f"{_number(best['requests_per_s'])} requests/s",
        f"TTFT {_scaled(best['ttft_s'], _MS)} ms",
        f"TPOT {_scaled(best['tpot_s'], _MS)} ms",
    )
    console.print("      " + ", ".join(numbers), highlight=False)
    memory = f"{_scaled(best['memory_bytes'], 1 / _GIB)} GiB a card"
    free = f"{_scaled(best['memory_free_bytes'], 1 / _GIB)} GiB free"
    console.print(f"      {memory}, {free}", highlight=False)


def _worth_table(dimensions: Iterable[Dimension]) -> Table:
    table = _table(
        "What each dimension is worth",
        "loss of the objective when forced to the second-best or the worst value, all else chosen"
        " anew; share of the spread of ln throughput among feasible trials",
    )
    for heading in ("dimension", "best", "second", "worst"):
        table.add_column(heading)
    for heading in ("loss second", "loss worst", "share"):
        table.add_column(heading, justify="right")
    for dimension in dimensions:
        feasible = [item for item in dimension.values if item.best is not None]
        several = len(feasible) > 1  # the rest of the line says nothing otherwise
        table.add_row(
            dimension.name,
            _safe(value_name(feasible[0].value)),
            _safe(value_name(feasible[1].value)) if several else "",
            _safe(value_name(feasible[-1].value)) if several else "",
            _percent(dimension.second_loss),
            _percent(dimension.worst_loss),
            _percent(dimension.variance_share) if several else "",
        )
    return table


def _values_table(dimensions: Iterable[Dimension]) -> Table:
    """The best of each value; dimensions with one value are left out."""
    table = _table("Best by value", f"at most {MAX_VALUES} values a dimension; one value: left out")
    table.add_column("dimension")
    table.add_column("value")
    for heading in ("trials", "feasible", "loss", *_SHOWN_PERFORMANCE):
        table.add_column(heading, justify="right")
    for dimension in dimensions:
        if len(dimension.values) == 1:
            continue
        shown = dimension.values[:MAX_VALUES]
        for index, item in enumerate(shown):
            table.add_row(
                dimension.name if index == 0 else "",
                *_value_cells(item),
                end_section=index == len(shown) - 1,
            )
    return table


def _value_cells(item: DimensionValue) -> list[str]:
    head = [_safe(value_name(item.value)), f"{item.trials:,}", f"{item.feasible:,}"]
    if item.best is None:
        return [*head, "", "", "", ""]
    return [*head, _percent(item.loss), *_performance_cells(item.best)]


def _front_table(front: tuple[Row, ...]) -> Table:
    left_out = len(front) - MAX_FRONT
    table = _table(
        "Pareto front: throughput per card, TPOT, TTFT",
        f"{left_out} slower ones left out" if left_out > 0 else None,
    )
    table.add_column("strategy")
    for heading in (*_SHOWN_PERFORMANCE, "GiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in front[:MAX_FRONT]:
        memory = _scaled(row["memory_bytes"], 1 / _GIB)
        table.add_row(_safe(row_name(row)), *_performance_cells(row), memory)
    return table


def _performance_cells(row: Row) -> list[str]:
    return [
        _number(row["output_tokens_per_s_per_card"]),
        _scaled(row["ttft_s"], _MS),
        _scaled(row["tpot_s"], _MS),
    ]


def _table(title: str, caption: str | None) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def _safe(text: str) -> str:
    """Text from a file, with nothing in it read as markup."""
    from rich.markup import escape

    return escape(text)


def _number(value: Cell) -> str:
    """Four significant digits, no exponent: 0.01234, 12.34, 1,234."""
    if not isinstance(value, int | float):
        return ""
    size = abs(value)
    digits = 0 if size >= 1e3 else 1 if size >= 1e2 else 2 if size >= 1e1 else 3  # noqa: PLR2004
    return f"{value:,.{digits}f}"


def _scaled(value: Cell, factor: float) -> str:
    return _number(value * factor) if isinstance(value, int | float) else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
