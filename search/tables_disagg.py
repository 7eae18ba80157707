"""The pools of a disaggregated plan and the ways of serving side by side, for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardplan.search.tables import (
    add,
    bytes_text,
    memory_table,
    new_table,
    rate_text,
    seconds_text,
    show,
)

if TYPE_CHECKING:
    from rich.console import Console

    from shardplan.search.plan import Candidate, Plan, Pool

__all__ = [
    "bound_sentence",
    "instances_words",
    "print_pools",
    "print_servings",
    "transfer_sentence",
]

_BOUND = {
    "prefill": "the prefill pool binds the rate: its queue meets the TTFT limit, the requests in "
    "flight or its own most",
    "decode": "the decode pool binds the rate: all its slots are taken",
    "transfer": "the transfer of caches binds the rate",
    "demand": "nothing binds: the deployment serves the rate that is asked",
}


def instances_words(one: Plan | Candidate) -> str:
    """`4P x tp8 pp1 dp1 + 2D x tp8 ...`; "" for a plan without pools."""
    if hasattr(one, "pools"):
        pools = [(pool.instances, pool.role, pool.strategy) for pool in one.pools]
    elif one.prefill is not None:
        pools = [
            (one.prefill_instances, "prefill", one.prefill),
            (one.decode_instances, "decode", one.strategy),
        ]
    else:
        pools = []
    return " + ".join(
        f"{count}{role[0].upper()} x {way.parallelism().describe()}" for count, role, way in pools
    )


def bound_sentence(plan: Plan) -> str:
    """Which pool binds."""
    return "" if plan.transfer is None else _BOUND[plan.transfer.bound]


def transfer_sentence(plan: Plan) -> str:
    """How a cache gets to the decode instances, and how long it takes."""
    sent = plan.transfer
    if sent is None:
        return ""
    size, time = bytes_text(sent.request_bytes), seconds_text(sent.request_s)
    return (
        f"a prompt's cache of {size} takes {time} over the {sent.tier} tier "
        f"({sent.link_bytes_per_s / 1e9:.3g} GB/s a rank, {sent.basis}), links {sent.used:.1%} used"
    )


def print_pools(plan: Plan, console: Console) -> None:
    """Instances, cards, strategy and times of each pool; the memory of prefill; the transfer."""
    if not plan.pools:
        return
    numbers = ("instances", "cards each", "requests/s", "used", "step", "a request")
    table = new_table("pools", "pool", *numbers, "strategy", right=numbers)
    for pool in plan.pools:
        way, times = pool.strategy, pool.times
        size = f"chunk {way.chunk}" if pool.role == "prefill" else f"batch {way.batch}"
        add(
            table,
            f"{pool.role} on {pool.cluster.device}",
            str(pool.instances),
            str(way.ranks),
            rate_text(times.requests_per_s * pool.instances),
            f"{times.used:.0%}",
            seconds_text(times.step_s),
            seconds_text(times.service_s),
            f"{way.parallelism().describe()}, {size}, {way.weight_dtype} weights",
        )
    show(console, table)
    console.print(f"{bound_sentence(plan)}; {transfer_sentence(plan)}", markup=False)
    console.print()
    first: Pool = plan.pools[0]
    console.print("prefill instances", style="bold")
    show(console, memory_table([row.model_dump() for row in first.memory]))
    console.print("decode instances", style="bold")


def print_servings(plan: Plan, console: Console) -> None:
    """Aggregated and disaggregated serving side by side."""
    if not plan.servings:
        return
    numbers = ("gain", "cards", "TTFT", "TPOT")
    table = new_table("ways of serving", "serving", *numbers, "with", right=numbers)
    for row in plan.servings:
        gain = "-" if row.gain is None else f"{row.gain:.3f}x"
        times = ("-" if one is None else seconds_text(one) for one in (row.ttft_s, row.tpot_s))
        add(table, row.serving, gain, str(row.cards or "-"), *times, row.words)
    show(console, table)
