"""How robust a plan is, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardplan.search.robust_words import (
    choice_sentence,
    factor_words,
    flips_of,
    runner_words,
    verdict,
)
from shardplan.search.tables import add, new_table, show

if TYPE_CHECKING:
    from rich.console import Console

    from shardplan.search.plan import Plan

__all__ = ["print_robustness"]


def print_robustness(plan: Plan, console: Console) -> None:
    """Of each cost group, how wrong its time may be before another strategy is the better one."""
    told = plan.robustness
    if told is None:
        return
    numbers = ("share", f"{told.level:.0%} band", "limit at", "flips at")
    title = "how wrong may a price be before another plan wins"
    table = new_table(title, "time of", *numbers, "then better", right=numbers)
    for row in told.groups:
        ends = f"{factor_words(row.band_low)} to {factor_words(row.band_high)}"
        limit = "-" if row.limit_factor is None else f"{row.limit} {factor_words(row.limit_factor)}"
        head = (row.group, f"{row.share:.0%}", ends if row.band_low is not None else "-", limit)
        flips = list(flips_of(row))
        if not flips:
            add(table, *head, "never", "")
        for _, flip in flips:
            mark = "!" if flip.within_band else ""
            words = runner_words(flip, plan)
            add(table, *head, f"{factor_words(flip.factor)}{mark}", words)
            head = ("", "", "", "")
    show(console, table)
    console.print(verdict(plan), markup=False)
    if told.choice is not None:
        console.print(choice_sentence(told.choice), markup=False)
    console.print(
        f"limit at: where the plan as it stands breaks it. Tried: {told.method}.", markup=False
    )
    console.print()
