"""What requests see at the asked rate, with its queue; nothing where no rate was asked."""

from __future__ import annotations

from shardplan.search.plan import Plan
from shardplan.search.report.markup import Html, table, tag
from shardplan.search.report.words import limit_time, number, time

__all__ = ["at_rate_section"]

_HEADS = ("Time", "Limits", "Mean", "p50", "p90", "p99")


def at_rate_section(plan: Plan) -> Html:
    """A row for TTFT and one for TPOT."""
    found, limits = plan.at_rate, plan.request.limits
    if found is None:
        return Html("")
    rows, first = [], "Time to first token, wait for a slot included"
    for name, times, most in (
        (first, found.ttft, (limits.ttft_s, limits.ttft_p99_s)),
        ("Time per output token", found.tpot, (limits.tpot_s, limits.tpot_p99_s)),
    ):
        told = zip(("mean", "p99"), most, strict=True)
        words = ", ".join(f"{what} {limit_time(one)}" for what, one in told if one is not None)
        values = (times.mean_s, times.p50_s, times.p90_s, times.p99_s)
        rows.append((name, words or "none", *map(time, values)))
    return tag(
        "section",
        tag("h2", f"At {found.requests_per_s:g} requests/s"),
        tag(
            "p",
            f"Requests come at random, at {found.used:.1%} of what all slots serve; "
            f"{number(found.concurrency)} are in flight. The figures above are those of all slots "
            "in use.",
        ),
        table("What requests see at the rate", _HEADS, rows, words=2),
    )
