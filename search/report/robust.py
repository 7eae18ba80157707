"""How wrong the prices of a cost group may be before another strategy wins."""

from __future__ import annotations

from shardplan.search.plan import Plan
from shardplan.search.plan_robustness import GroupRobustness
from shardplan.search.report.markup import Html, table, tag
from shardplan.search.report.words import percent
from shardplan.search.robust_words import (
    choice_sentence,
    factor_words,
    flips_of,
    runner_words,
    verdict,
)

__all__ = ["robustness_section"]


def robustness_section(plan: Plan) -> Html:
    """A row a cost group, the verdict, and what a robust plan gives up; nothing in older plans."""
    told = plan.robustness
    if told is None:
        return Html("")
    rows = [cells for row in told.groups for cells in _rows(row, plan)]
    parts = [tag("h2", "How robust"), tag("p", verdict(plan))]
    if told.choice is not None:
        parts.append(tag("p", choice_sentence(told.choice)))
    heads = (
        "Time of",
        "Then better",
        "Share",
        f"{percent(told.level)} band",
        "Flips at",
        "Limit at",
    )
    parts.append(table("How wrong a price may be before another plan wins", heads, rows, words=2))
    note = (
        f"Tried: {told.method}. An exclamation mark: within the band. Limit at: where the plan as "
        "it stands breaks a limit, its slots and step size not tuned again."
    )
    return tag("section", *parts, tag("p", note, class_="soft"))


def _rows(row: GroupRobustness, plan: Plan) -> list[tuple[str, ...]]:
    band = "-"
    if row.band_low is not None:
        band = f"{factor_words(row.band_low)} to {factor_words(row.band_high)}"
    limit = "-" if row.limit_factor is None else f"{row.limit} {factor_words(row.limit_factor)}"
    flips = list(flips_of(row))
    if not flips:
        return [(row.group, "nothing else", percent(row.share), band, "never", limit)]
    return [
        (
            row.group,
            runner_words(flip, plan),
            percent(row.share),
            band,
            f"{factor_words(flip.factor)}{'!' if flip.within_band else ''}",
            limit,
        )
        for _, flip in flips
    ]
