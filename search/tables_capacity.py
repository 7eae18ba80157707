"""Headroom and losses of a plan for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardplan.search.tables import add, new_table, rate_text, seconds_text, show

if TYPE_CHECKING:
    from rich.console import Console

    from shardplan.search.plan import Plan
    from shardplan.search.plan_capacity import Capacity, LossRow
    from shardplan.search.plan_cost import Cost

__all__ = [
    "again_words",
    "cost_words",
    "headroom_words",
    "print_capacity",
    "print_cost",
    "state_words",
]


def print_cost(plan: Plan, console: Console) -> None:
    """What the plan costs at the prices that were given."""
    found = plan.cost
    if found is None:
        return
    console.print(f"cost: {cost_words(found)}", markup=False)
    console.print()


def cost_words(found: Cost) -> str:
    """An hour and a million tokens."""
    return (
        f"{found.per_hour:.4g} an hour, {found.per_million_tokens:.4g} a million output "
        f"tokens ({found.per_million_tokens_full:.4g} at the most that is served), in the unit of "
        "--card-price"
    )


def print_capacity(plan: Plan, console: Console) -> None:
    """What is left after each loss, as it is and planned again."""
    found = plan.capacity
    if found is None:
        return
    title = f"what is left, at {rate_text(found.requests_per_s)} requests/s"
    numbers = ("left", "requests/s", "TTFT", "TPOT")
    table = new_table(title, "lost", *numbers, "service level", right=numbers)
    for row in found.losses:
        times = ("" if one is None else seconds_text(one) for one in (row.ttft_s, row.tpot_s))
        add(
            table,
            row.lost,
            row.replicas_left,
            rate_text(row.requests_per_s),
            *times,
            state_words(row),
        )
    show(console, table)
    for row in found.losses:
        if row.again is not None:
            console.print(again_words(row, found), markup=False)
    console.print(headroom_words(found), markup=False)
    console.print()


def state_words(row: LossRow) -> str:
    """Whether the rate is served within the limits, or what becomes of it."""
    if row.holds:
        return "holds"
    if not row.requests_per_s:
        return "nothing is left"
    if row.tpot_s is not None:
        return "served, limits broken"
    return f"saturated at {rate_text(row.requests_per_s)}"


def again_words(row: LossRow, found: Capacity) -> str:
    again = row.again
    assert again is not None
    words = f"{row.lost} lost, planned again on {again.cards} cards ({again.words}): "
    if again.holds:
        return words + "holds"
    if again.ttft_s is None or again.tpot_s is None:
        return words + f"saturated at {rate_text(again.requests_per_s)} requests/s"
    return words + (
        f"{rate_text(found.requests_per_s)} requests/s with TTFT {seconds_text(again.ttft_s)} and "
        f"TPOT {seconds_text(again.tpot_s)}; within the limits {rate_text(again.requests_per_s)}"
    )


def headroom_words(found: Capacity) -> str:
    words = f"{found.cards} cards in {found.replicas} that serve apart, {found.headroom:.2f} times "
    words += "the rate"
    if not found.spare:
        return words
    lost = f"{found.spare} {found.spare_unit}{'' if found.spare == 1 else 's'}"
    return f"{words}: as many as hold it with {lost} lost"
