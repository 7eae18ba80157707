"""An explanation on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shardplan.search.tables import (
    add,
    bytes_text,
    memory_table,
    new_table,
    rate_text,
    seconds_text,
    share_bar,
    show,
    time_table,
)
from shardplan.search.tables_plan import strategy_words

if TYPE_CHECKING:
    from rich.console import Console

    from shardplan.search.explanation import Difference, Explanation, Rival

__all__ = ["print_explanation"]

_MOST = 6
"""Rows of differences of a kind."""


def print_explanation(found: Explanation, console: Console) -> None:
    """Limits, time, memory, what changes would buy, the rival."""
    console.print(f"{found.model} on {found.cluster}", markup=False)
    if not found.pools:
        console.print(f"plan: {strategy_words(found.strategy)}", style="bold green", markup=False)
    console.print()
    _print_bindings(found, console)
    for phase in ("prefill", "decode"):
        rows = [row.model_dump() for row in found.breakdown if row.phase == phase]
        rows.sort(key=lambda row: -row["total_s"])
        total = sum(row["total_s"] for row in rows)
        if rows:
            show(console, time_table(f"one {phase} step: {seconds_text(total)}", rows, total))
    for pool in found.pools:
        many = "instance" if pool.instances == 1 else "instances"
        words = f"{pool.instances} {pool.role} {many} on {pool.cards} cards"
        console.print(f"{words}: {strategy_words(pool.strategy)}", style="bold", markup=False)
        show(console, memory_table([row.model_dump() for row in pool.memory]))
    if not found.pools:
        show(console, memory_table([row.model_dump() for row in found.memory]))
    _print_shadows(found, console)
    if found.rival is not None:
        _print_rival(found, found.rival, console)


def _print_bindings(found: Explanation, console: Console) -> None:
    if not found.bindings:
        return
    table = new_table("limits", "limit", "value", "allowed", "used", "", right=("value", "allowed"))
    for one in found.bindings:
        text = _text_of(one.name)
        mark = "binds" if one.binds else ""
        used = f"{share_bar(one.used, 12)} {one.used:.0%}"
        add(table, one.name, text(one.value), text(one.limit), used, mark)
    show(console, table)


def _text_of(limit: str) -> Callable[[float], str]:
    """How values of a limit are written."""
    if limit.endswith("memory"):
        return bytes_text
    return seconds_text if limit[:4] in ("ttft", "tpot") else _per_s


def _per_s(requests: float) -> str:
    return f"{rate_text(requests)} req/s"


def _print_shadows(found: Explanation, console: Console) -> None:
    if not found.shadows:
        return
    table = new_table("what a change would buy", "change", "gain", "the best plan then")
    for one in found.shadows:
        gain = "-" if one.gain is None else f"{one.gain - 1.0:+.1%}"
        best = one.note or (strategy_words(one.strategy) if one.strategy else "")
        add(table, one.change, gain, best)
    show(console, table)


def _print_rival(found: Explanation, rival: Rival, console: Console) -> None:
    words = rival.words or strategy_words(rival.strategy)
    console.print(f"against: {words}", style="bold", markup=False)
    for sentence in rival.notes:
        console.print(f"  {sentence}", style="dim", markup=False)
    for sentence in rival.broken:
        console.print(f"  {sentence}", style="red", markup=False)
    if rival.performance is None or rival.ratio is None:
        return
    console.print(f"  {rival.ratio:.1%} of the plan's objective")
    console.print()
    table = new_table("", "what", "plan", "rival", "more", right=("plan", "rival", "more"))
    for words, name, shown in (
        ("output tokens/s", "output_tokens_per_s", rate_text),
        ("TTFT mean", "ttft_s", seconds_text),
        ("TPOT mean", "tpot_s", seconds_text),
    ):
        one, two = getattr(found.performance, name), getattr(rival.performance, name)
        add(table, words, shown(one), shown(two), f"{two / one - 1.0:+.1%}")
    for row in _largest(rival.differences):
        text = bytes_text if row.what.startswith("memory") else seconds_text
        sign = "-" if row.more < 0 else "+"
        add(table, row.what, text(row.plan), text(row.rival), sign + text(abs(row.more)))
    show(console, table)


def _largest(rows: Sequence[Difference]) -> list[Difference]:
    """The largest of each kind (a step of either phase, memory), in the order they come."""
    kinds = ("decode", "prefill", "memory")
    by_kind = [[row for row in rows if row.what.startswith(kind)][:_MOST] for kind in kinds]
    return [row for some in by_kind for row in some]
