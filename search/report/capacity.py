"""Headroom of a plan and what is left of it after losses; nothing where that was not asked."""

from __future__ import annotations

from shardplan.search.plan import Plan
from shardplan.search.report.markup import Html, legend, table, tag
from shardplan.search.report.svg import Segment, bar
from shardplan.search.report.words import number, time
from shardplan.search.tables_capacity import again_words, headroom_words, state_words

__all__ = ["capacity_section"]

_HEADS = ("Lost", "Service level", "Left that serve", "Requests/s", "TTFT", "TPOT")


def capacity_section(plan: Plan) -> Html:
    """A bar and a row for each loss, and what planning again would do."""
    found = plan.capacity
    if found is None:
        return Html("")
    most = max(found.requests_per_s, *(row.requests_per_s for row in found.losses))
    asked = f"the rate: {number(found.requests_per_s)} requests/s"
    bars = []
    for row in found.losses:
        told = f"{number(row.requests_per_s)} requests/s within the limits"
        part = Segment(
            share=row.requests_per_s / most, style="c0" if row.holds else "c5", title=told
        )
        marker = (found.requests_per_s / most, asked)
        bars.append(
            tag(
                "div",
                tag("p", tag("b", f"Lost: {row.lost}"), tag("span", told), class_="bar-head"),
                bar(f"{row.lost} lost: {told}", [part], marker=marker),
            )
        )
    keys = (("c0", "holds the rate"), ("c5", "does not"), ("capacity", asked))
    rows = [
        (
            row.lost,
            state_words(row),
            f"{row.replicas_left:,}",
            number(row.requests_per_s),
            "-" if row.ttft_s is None else time(row.ttft_s),
            "-" if row.tpot_s is None else time(row.tpot_s),
        )
        for row in found.losses
    ]
    again = [tag("li", again_words(row, found)) for row in found.losses if row.again is not None]
    words = headroom_words(found)
    return tag(
        "section",
        tag("h2", "What may be lost"),
        tag("p", f"{words[0].upper()}{words[1:]}."),
        *bars,
        legend(keys),
        table("What is left after each loss, at the rate", _HEADS, rows, words=2),
        tag("ul", *again, class_="notes") if again else "",
    )
