"""Runs side by side, groups, and one run against another as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardplan.search.analyze import row_name
from shardplan.search.analyze_tables import (
    SHOWN_PERFORMANCE,
    new_table,
    number_text,
    percent_text,
    performance_cells,
    safe,
    scaled_text,
)
from shardplan.search.groups import GroupRow
from shardplan.search.regressions import Comparison, MetricChange
from shardplan.search.runs import RunRow

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["render_comparison", "render_groups", "render_runs"]

MOST_GROUPS = 40
_MOST_CHANGES = 5
_MS = 1e3


def render_runs(runs: Sequence[RunRow], console: Console) -> None:
    """A row a run: its best strategy and what that does, against the first run's."""
    table = new_table(f"{len(runs)} runs side by side", None)
    table.add_column("run", overflow="fold")
    table.add_column("best strategy")
    for heading in ("trials", "feasible", *SHOWN_PERFORMANCE, "objective"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, run in enumerate(runs):
        cells = [f"{run.trials:,}", f"{run.feasible:,}"]
        if run.best is None:
            table.add_row(safe(run.run), "nothing feasible", *cells, "", "", "", "")
            continue
        gain = "first" if place == 0 else "" if run.gain is None else f"x{1 + run.gain:.4g}"
        shown = [*cells, *performance_cells(run.best), gain]
        table.add_row(safe(run.run), safe(row_name(run.best)), *shown)
    console.print(table)


def render_groups(columns: Sequence[str], groups: Sequence[GroupRow], console: Console) -> None:
    """A row a group, the best first."""
    left_out = len(groups) - MOST_GROUPS
    words = f"{left_out:,} worse groups left out (--json has all)" if left_out > 0 else None
    table = new_table(f"{len(groups):,} groups by {safe(', '.join(columns))}", words)
    for name in columns:
        table.add_column(safe(name))
    numbers = (
        "trials",
        "feasible",
        "loss",
        "best",
        "median tok/s/card",
        "least TTFT ms",
        "TPOT ms",
    )
    for heading in numbers:
        table.add_column(heading, justify="right")
    for group in groups[:MOST_GROUPS]:
        best = "" if group.best is None else number_text(group.best["output_tokens_per_s_per_card"])
        table.add_row(
            *(safe(value) for value in group.values),
            f"{group.trials:,}",
            f"{group.feasible:,}",
            percent_text(group.loss),
            best,
            number_text(group.median_throughput),
            scaled_text(group.least_ttft_s, _MS),
            scaled_text(group.least_tpot_s, _MS),
        )
    console.print(table)


def render_comparison(found: Comparison, console: Console) -> None:
    """What is worse, metric by metric, and what was lost."""
    render_runs(found.runs, console)
    counts = (
        f"{found.both:,} strategies in both runs, {found.base_only:,} in the base alone,"
        f" {found.now_only:,} in this one alone"
    )
    console.print(counts, highlight=False)
    same = "the same strategy" if found.same_best else "another strategy"
    console.print(f"the best is {same}", highlight=False)
    if found.lost:
        limits = ", ".join(f"{name} {count:,}" for name, count in found.lost_by.items())
        console.print(f"no more feasible: {found.lost:,} ({limits})", highlight=False, markup=False)
        for name in found.lost_best[:_MOST_CHANGES]:
            console.print(f"  {name}", highlight=False, markup=False)
    if found.won:
        console.print(f"feasible now: {found.won:,}", highlight=False)
    console.print()
    _render_metrics(found, console)


def _render_metrics(found: Comparison, console: Console) -> None:
    table = new_table(f"metrics, changes above {100 * found.tolerance:.3g} %", None)
    table.add_column("metric")
    for heading in ("worse", "better", "same", "median change (+ is worse)"):
        table.add_column(heading, justify="right")
    for one in found.metrics:
        # a change for the worse is told as what it is: more time, less throughput
        median = "" if one.median is None else f"{one.median:+.2%}"
        table.add_row(one.metric, f"{one.worse:,}", f"{one.better:,}", f"{one.same:,}", median)
    console.print(table)
    for one in found.metrics:
        if one.worst:
            _render_worst(one, console)


def _render_worst(one: MetricChange, console: Console) -> None:
    table = new_table(f"most worse in {one.metric}", None)
    table.add_column("strategy")
    for heading in ("base", "now", "worse by"):
        table.add_column(heading, justify="right")
    for change in one.worst[:_MOST_CHANGES]:
        values = (f"{value:.5g}" for value in (change.base, change.now))
        table.add_row(safe(change.strategy), *values, f"{change.worse:.1%}")
    console.print(table)
