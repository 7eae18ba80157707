"""Graph sizes and step sizes of a plan for people: what to capture, and what each gains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardplan.search.tables import add, new_table, seconds_text, show

if TYPE_CHECKING:
    from rich.console import Console

    from shardplan.search.plan import Plan
    from shardplan.search.plan_batching import Batching, GraphSizes

__all__ = ["print_batching"]

_MIB = 2.0**20
_MOST_SHOWN = 24
_OF = {"prefill": "a prompt", "decode": "a step"}


def print_batching(plan: Plan, console: Console) -> None:
    """Sizes of both phases beside what one might take instead, then the step sizes."""
    found = plan.batching
    if found is None:
        return
    for one in (found.prefill, found.decode):
        if one is not None:
            _print_sizes(one, console)
    _print_settings(found, console)
    console.print(
        f"a graph keeps {found.graph_bytes / _MIB:g} MiB of a rank ({found.graph_bytes_kind}: "
        f"{found.graph_bytes_source})",
        markup=False,
    )
    for text in found.notes:
        console.print(f"  - {text}", markup=False)
    console.print()


def _print_sizes(one: GraphSizes, console: Console) -> None:
    numbers = ("graphs", _OF[one.phase], "padding", "gain")
    table = new_table(f"{one.phase} graphs, {one.unit}", "sizes", *numbers, right=numbers)
    time = seconds_text(one.expected_s)
    add(table, "these", len(one.sizes), time, f"{one.padding:.1%}", "")
    for other in one.others:
        gain = f"{other.expected_s / one.expected_s - 1.0:+.2%}"
        time = seconds_text(other.expected_s)
        add(table, other.name, other.count, time, f"{other.padding:.1%}", gain)
    show(console, table)
    words = ", ".join(str(size) for size in one.sizes[:_MOST_SHOWN])
    more = f" and {len(one.sizes) - _MOST_SHOWN} more" if len(one.sizes) > _MOST_SHOWN else ""
    console.print(f"sizes: {words}{more}; for {one.loads}", markup=False)
    console.print()


def _print_settings(found: Batching, console: Console) -> None:
    if not found.settings:
        return
    numbers = ("plan", "default", "gain")
    table = new_table(
        "step sizes against the engine's defaults", "setting", *numbers, right=numbers
    )
    for row in found.settings:
        own, default = ("" if one is None else one for one in (row.value, row.default))
        gain = f"breaks {row.limit}" if row.gain is None else f"{row.gain - 1.0:+.2%}"
        add(table, row.setting, own, default, gain)
    show(console, table)
