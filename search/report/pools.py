"""Prefill and decode pools of a disaggregated plan, and both ways of serving side by side."""

from __future__ import annotations

from shardplan.search.plan import Plan, Pool
from shardplan.search.report.markup import Html, table, tag
from shardplan.search.report.words import gib, number, percent, time
from shardplan.search.tables_disagg import bound_sentence, transfer_sentence

__all__ = ["pools_section", "servings_section"]

_HEADS = (
    "Pool",
    "Strategy of an instance",
    "Instances",
    "Cards each",
    "Requests/s",
    "Used",
    "One step",
    "A request",
    "Fullest rank, GiB",
)


def _row(pool: Pool) -> tuple[str, ...]:
    way, times = pool.strategy, pool.times
    size = f"chunk {way.chunk:,}" if pool.role == "prefill" else f"batch {way.batch:,}"
    return (
        f"{pool.role} on {pool.cluster.device}",
        f"{way.parallelism().describe()}, {size}, {way.weight_dtype} weights",
        f"{pool.instances:,}",
        f"{way.ranks:,}",
        number(times.requests_per_s * pool.instances),
        percent(times.used),
        time(times.step_s),
        time(times.service_s),
        gib(max(row.total_bytes for row in pool.memory)),
    )


def pools_section(plan: Plan) -> Html:
    """Both pools, what joins them and which of them binds; nothing for a plan without pools."""
    if not plan.pools:
        return Html("")
    sentence = f"{bound_sentence(plan)}; {transfer_sentence(plan)}."
    return tag(
        "section",
        tag("h2", "Prefill and decode pools"),
        tag("p", sentence[0].upper() + sentence[1:]),
        table("Instances of each pool", _HEADS, [_row(pool) for pool in plan.pools], words=2),
    )


def servings_section(plan: Plan) -> Html:
    """Aggregated and disaggregated serving side by side, where both were searched."""
    if not plan.servings:
        return Html("")
    rows = [
        (
            {"agg": "aggregated", "disagg": "disaggregated"}[row.serving],
            "-" if row.gain is None else f"{row.gain:.3f}x",
            f"{row.cards:,}" if row.cards else "-",
            "-" if row.ttft_s is None else time(row.ttft_s),
            "-" if row.tpot_s is None else time(row.tpot_s),
            row.words,
        )
        for row in plan.servings
    ]
    heads = ("Serving", "Objective", "Cards", "TTFT", "TPOT", "With")
    return tag(
        "section",
        tag("h2", "Ways of serving"),
        table("The best plan of each way", heads, rows, words=1),
    )
