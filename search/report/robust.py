"""How wrong the prices of a cost group may be before another strategy wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from shardplan.search.plan import Plan
from shardplan.search.plan_robustness import GroupRobustness, Robustness
from shardplan.search.report.lanes import ROW, lane_box
from shardplan.search.report.markup import Attribute, Html, legend, table, tag
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
    parts.append(_chart(told))
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


_TICKS = (0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0)
_SHOWN_TICKS = (0.5, 1.0, 2.0)
"""On narrow screens, too."""


def _chart(told: Robustness) -> Html:
    """A lane a cost group: its band, and where another plan wins; factors on a logarithmic axis."""
    most = max(told.most_factor, *(row.band_high or 1.0 for row in told.groups), 1.01)

    def at(factor: float) -> str:
        share = 0.5 + 0.5 * math.log(factor) / math.log(most)
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

    height = len(told.groups) * ROW
    parts: list[Html] = []
    for tick in (one for one in _TICKS if 1 / most <= one <= most):
        line: dict[str, Attribute] = {"x1": at(tick), "x2": at(tick), "y1": 0, "y2": height}
        parts.append(tag("line", class_="now" if tick == 1.0 else "grid", **line))
        where: dict[str, Attribute] = {"x": at(tick), "y": height + 16, "text_anchor": "middle"}
        words = "as priced" if tick == 1.0 else f"x{tick:g}"
        style = "tick" if tick in _SHOWN_TICKS else "tick thin"
        parts.append(tag("text", words, class_=style, **where))
    for place, row in enumerate(told.groups):
        parts += _lane(row, place * ROW + ROW / 2, at)
    label = "Bands of the cost groups and the factors at which another plan wins"
    keys = (
        ("bar band", f"{percent(told.level)} band of the group's time"),
        ("dot flip", "another plan wins from here on"),
        ("dot flip bad", "the same, inside the band"),
    )
    names = [row.group for row in told.groups]
    return tag("div", lane_box(label, names, parts, style="lane-box wide"), legend(keys))


def _lane(row: GroupRobustness, y: float, at: Callable[[float], str]) -> Iterator[Html]:
    """The band of one group and its flips."""
    if row.band_low is not None and row.band_high is not None:
        ends: dict[str, Attribute] = {"x1": at(row.band_low), "x2": at(row.band_high)}
        words = f"{row.group}: {factor_words(row.band_low)} to {factor_words(row.band_high)}"
        yield tag("line", tag("title", words), class_="band", y1=y, y2=y, **ends)
    for _, flip in flips_of(row):
        words = f"{row.group} {factor_words(flip.factor)}: another plan wins"
        dot: dict[str, Attribute] = {"cx": at(flip.factor), "cy": y, "r": 5}
        style = "flip bad" if flip.within_band else "flip"
        yield tag("circle", tag("title", words), class_=style, **dot)


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
