"""Lanes over time as inline SVG: a row a stage or a stream, slices in per cent of the width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardplan.search.report.markup import Attribute, Html, attribute_text, tag
from shardplan.search.report.svg import scale

__all__ = ["ROW", "Lane", "Slice", "lane_box", "lanes"]

ROW = 30
"""Height of a lane."""
_BOX, _TEXT = 22, 15
_FOOT = 22
_WORDS_FROM = 0.05
"""Slices of at least this share of the width carry their words; narrower screens clip them."""


class Slice(NamedTuple):
    """From `begin_s` for `seconds`."""

    begin_s: float
    seconds: float
    style: str
    title: str
    words: str = ""


class Lane(NamedTuple):
    """One row."""

    name: str
    slices: Sequence[Slice]


def lanes(label: str, rows: Sequence[Lane], end_s: float) -> Html:
    """Rows above one axis of time that ends on a round number; `label` tells it in words."""
    per_s, unit = (1e3, "ms") if end_s >= 1e-3 else (1e6, "µs")  # noqa: PLR2004
    axis = scale([end_s * per_s], from_zero=True)
    parts: list[Html] = []
    height = len(rows) * ROW
    for place, tick in enumerate(axis.ticks):
        at = _percent(axis.at(tick))
        ends: dict[str, Attribute] = {"x1": at, "x2": at, "y1": 0, "y2": height}
        parts.append(tag("line", class_="grid", **ends))
        last = place == len(axis.ticks) - 1
        anchor = "start" if place == 0 else "end" if last else "middle"
        where: dict[str, Attribute] = {"x": at, "y": height + 16, "text_anchor": anchor}
        words = f"{tick:,.6g}{f' {unit}' if last else ''}"
        skipped = not last and (place % 2 or place == len(axis.ticks) - 2)
        parts.append(tag("text", words, class_="tick thin" if skipped else "tick", **where))
    for row, lane in enumerate(rows):
        top = row * ROW + (ROW - _BOX) / 2
        for one in lane.slices:
            begin, width = (
                axis.at(value * per_s) for value in (one.begin_s, max(one.seconds, 0.0))
            )
            parts.append(_slice(one, begin, width, top))
    return lane_box(label, [lane.name for lane in rows], parts)


def lane_box(
    label: str, names: Sequence[str], parts: Sequence[Html], style: str = "lane-box"
) -> Html:
    """What is drawn in lanes, their names beside it; `label` tells it in words."""
    height = len(names) * ROW + _FOOT
    beside = [
        tag("text", name, class_="tick", x="100%", y=row * ROW + ROW / 2 + 4)
        for row, name in enumerate(names)
    ]
    left = tag("svg", *beside, class_="y-axis", height=height, aria_hidden="true")
    chart = tag("svg", *parts, class_="lanes", height=height, role="img", aria_label=label)
    return tag("div", left, chart, class_=style)


def _slice(one: Slice, begin: float, width: float, top: float) -> Html:
    box: dict[str, Attribute] = {"width": "100%", "height": _BOX}
    inside = [tag("rect", tag("title", one.title), class_=one.style, **box)]
    if one.words and width >= _WORDS_FROM:
        inside.append(tag("text", one.words, class_=f"on {one.style}", x=6, y=_TEXT))
    place: dict[str, Attribute] = {"x": _percent(begin), "y": top, "width": _percent(width)}
    return tag("svg", *inside, class_="slice", height=_BOX, **place)


def _percent(share: float) -> str:
    return f"{attribute_text(round(100 * share, 3))}%"
