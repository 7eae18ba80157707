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

__all__ = [
    "SHOWN_PERFORMANCE",
    "new_table",
    "number_text",
    "percent_text",
    "performance_cells",
    "render_summary",
    "safe",
    "scaled_text",
]

MAX_FRONT = 20
MAX_VALUES = 8
_MS = 1e3
_GIB = 2**30
SHOWN_PERFORMANCE = ("tok/s/card", "TTFT ms", "TPOT ms")


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
    console.print(f"[bold]best[/bold]  {safe(row_name(best))}", highlight=False)
    numbers = (
        f"{number_text(best['output_tokens_per_s'])} output tokens/s",
        f"{number_text(best['output_tokens_per_s_per_card'])} a card",
        f"{number_text(best['requests_per_s'])} requests/s",
        f"TTFT {scaled_text(best['ttft_s'], _MS)} ms",
        f"TPOT {scaled_text(best['tpot_s'], _MS)} ms",
    )
    console.print("      " + ", ".join(numbers), highlight=False)
    memory = f"{scaled_text(best['memory_bytes'], 1 / _GIB)} GiB a card"
    free = f"{scaled_text(best['memory_free_bytes'], 1 / _GIB)} GiB free"
    console.print(f"      {memory}, {free}", highlight=False)


def _worth_table(dimensions: Iterable[Dimension]) -> Table:
    table = new_table(
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
            safe(value_name(feasible[0].value)),
            safe(value_name(feasible[1].value)) if several else "",
            safe(value_name(feasible[-1].value)) if several else "",
            percent_text(dimension.second_loss),
            percent_text(dimension.worst_loss),
            percent_text(dimension.variance_share) if several else "",
        )
    return table


def _values_table(dimensions: Iterable[Dimension]) -> Table:
    """The best of each value; dimensions with one value are left out."""
    table = new_table(
        "Best by value", f"at most {MAX_VALUES} values a dimension; one value: left out"
    )
    table.add_column("dimension")
    table.add_column("value")
    for heading in ("trials", "feasible", "loss", *SHOWN_PERFORMANCE):
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
    head = [safe(value_name(item.value)), f"{item.trials:,}", f"{item.feasible:,}"]
    if item.best is None:
        return [*head, "", "", "", ""]
    return [*head, percent_text(item.loss), *performance_cells(item.best)]


def _front_table(front: tuple[Row, ...]) -> Table:
    left_out = len(front) - MAX_FRONT
    table = new_table(
        "Pareto front: throughput per card, TPOT, TTFT",
        f"{left_out} slower ones left out" if left_out > 0 else None,
    )
    table.add_column("strategy")
    for heading in (*SHOWN_PERFORMANCE, "GiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in front[:MAX_FRONT]:
        memory = scaled_text(row["memory_bytes"], 1 / _GIB)
        table.add_row(safe(row_name(row)), *performance_cells(row), memory)
    return table


def performance_cells(row: Row) -> list[str]:
    return [
        number_text(row["output_tokens_per_s_per_card"]),
        scaled_text(row["ttft_s"], _MS),
        scaled_text(row["tpot_s"], _MS),
    ]


def new_table(title: str, caption: str | None) -> Table:
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


def safe(text: str) -> str:
    """Text from a file, with nothing in it read as markup."""
    from rich.markup import escape

    return escape(text)


def number_text(value: Cell) -> str:
    """Four significant digits, no exponent: 0.01234, 12.34, 1,234."""
    if not isinstance(value, int | float):
        return ""
    size = abs(value)
    digits = 0 if size >= 1e3 else 1 if size >= 1e2 else 2 if size >= 1e1 else 3  # noqa: PLR2004
    return f"{value:,.{digits}f}"


def scaled_text(value: Cell, factor: float) -> str:
    return number_text(value * factor) if isinstance(value, int | float) else ""


def percent_text(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
