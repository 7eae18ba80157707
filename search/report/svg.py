"""Charts as inline SVG that keep their text size on any screen.

Nothing is scaled: along x everything is placed in per cent of the width, along y in pixels, so a
chart stretches with the page while letters and dots stay as they are. Colours are CSS classes, so
that they follow the reader's light or dark theme.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardplan.search.report.markup import Attribute, Html, attribute_text, raw, tag

__all__ = ["Point", "Scale", "Segment", "bar", "scale", "scatter"]

BAR_HEIGHT = 24
PLOT_HEIGHT = 340
_FOOT = 26
_LINE = 17
_MOST_STOPS = 24
"""Dots that the keyboard stops at; the others are in the table."""
_LOG_FROM = 20.0
"""A wider range than this is drawn on a logarithmic axis."""
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a bar: its share of the full width, its CSS class, its tooltip."""

    share: float
    style: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A dot in data units, with its tooltip, and the lines that are read out above the plot."""

    x: float
    y: float
    title: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """From data to 0..1, and the values to write along the axis."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Place of a value, 0 at the low end and 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def bar(
    label: str, segments: Sequence[Segment], *, marker: tuple[float, str] | None = None
) -> Html:
    """A stacked bar over the full width; `marker` is a line at a share, with its tooltip."""
    parts, start = [tag("rect", class_="track", width="100%", height=BAR_HEIGHT)], 0.0
    for segment in segments:
        place: dict[str, Attribute] = {
            "x": _share(start),
            "width": _share(segment.share),
            "height": BAR_HEIGHT,
        }
        parts.append(tag("rect", tag("title", segment.title), class_=segment.style, **place))
        start += segment.share
    if marker is not None:
        x = _share(marker[0])
        line: dict[str, Attribute] = {"x1": x, "x2": x, "y1": -4, "y2": BAR_HEIGHT + 4}
        parts.append(tag("line", tag("title", marker[1]), class_="capacity", **line))
    return tag("svg", *parts, class_="bar", height=BAR_HEIGHT, role="img", aria_label=label)


def scale(values: Sequence[float], *, from_zero: bool, most: int = 7) -> Scale:
    """An axis that holds all values (at least one, all positive) and ends on round numbers."""
    low, high = min(values), max(values)
    if not from_zero and high / low > _LOG_FROM:
        return _log_scale(low, high)
    if from_zero:
        low = 0.0
    if high == low:
        low, high = 0.9 * low, 1.1 * high
    step = _nice((high - low) / most)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = tuple(step * place for place in range(first, last + 1))
    return Scale(low=ticks[0], high=ticks[-1], log=False, ticks=ticks)


def _nice(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(factor for factor in _STEPS if factor * power >= step * (1 - 1e-9))


def _log_scale(low: float, high: float) -> Scale:
    """Ticks at 1, 2, 5 of each power of ten; powers alone where those would crowd."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    crowded = len(powers) > 3  # noqa: PLR2004
    digits = (1.0,) if crowded else (1.0, 2.0, 5.0)
    marks = [digit * 10.0**power for power in powers for digit in digits]
    first = max((mark for mark in marks if mark <= low), default=low)
    last = min((mark for mark in marks if mark >= high), default=high)
    ticks = tuple(mark for mark in marks if first <= mark <= last)
    return Scale(low=first, high=last, log=True, ticks=ticks)


def scatter(
    label: str,
    axes: tuple[Scale, Scale],
    *,
    cloud: Sequence[Point],
    front: Sequence[Point],
    line: Sequence[Point],
    chosen: Point,
    limit: tuple[float, str] | None,
) -> Html:
    """Dots of a cloud, larger dots of a front joined by a line, one chosen point.

    `limit` is a vertical line at an x, with its tooltip; left out where it lies off the axis.
    """
    x, y = axes
    parts = [*_grid(x, y)]
    if limit is not None and x.low <= limit[0] <= x.high:
        place = _share(x.at(limit[0]))
        ends: dict[str, Attribute] = {"x1": place, "x2": place, "y1": 0, "y2": PLOT_HEIGHT}
        parts.append(tag("line", tag("title", limit[1]), class_="limit", **ends))
    parts += [_dot(point, x, y, "cloud", 2.5) for point in cloud]
    for left, right in itertools.pairwise(line):
        step: dict[str, Attribute] = {
            "x1": _share(x.at(left.x)),
            "y1": _height(y, left.y),
            "x2": _share(x.at(right.x)),
            "y2": _height(y, right.y),
        }
        parts.append(tag("line", class_="front-line", **step))
    every = max(1, -(-len(front) // _MOST_STOPS))
    parts.append(_readout(chosen, "rest"))
    for index, point in enumerate(front):
        dot = _dot(point, x, y, "front", 4.0)
        parts.append(_mark(point, [dot], stop=index % every == 0))
    ring = _dot(chosen, x, y, "chosen-ring", 10.0)
    parts.append(_mark(chosen, [ring, _dot(chosen, x, y, "chosen", 5.5)], stop=True))
    plot = tag(
        "svg", *parts, class_="plot", height=PLOT_HEIGHT + _FOOT, role="group", aria_label=label
    )
    style = "plot-box tall" if len(chosen.lines) > 2 else "plot-box"  # noqa: PLR2004
    return tag("div", _y_labels(y), plot, class_=style)


def _grid(x: Scale, y: Scale) -> list[Html]:
    """Lines of both axes and the values under the x axis."""
    parts = []
    for value in y.ticks:
        height = _height(y, value)
        parts.append(tag("line", class_="grid", x1="0", x2="100%", y1=height, y2=height))
    for place, value in enumerate(x.ticks):
        at = _share(x.at(value))
        ends: dict[str, Attribute] = {"x1": at, "x2": at, "y1": 0, "y2": PLOT_HEIGHT}
        parts.append(tag("line", class_="grid", **ends))
        anchor = "start" if place == 0 else "end" if place == len(x.ticks) - 1 else "middle"
        where: dict[str, Attribute] = {"x": at, "y": PLOT_HEIGHT + 18, "text_anchor": anchor}
        parts.append(tag("text", f"{value:,.6g}", class_="tick", **where))
    return parts


def _y_labels(y: Scale) -> Html:
    """The values along the y axis, in their own column left of the plot."""
    texts = [
        tag("text", f"{value:,.6g}", class_="tick", x="100%", y=_height(y, value) + 4.0)
        for value in y.ticks
    ]
    return tag("svg", *texts, class_="y-axis", height=PLOT_HEIGHT + _FOOT, aria_hidden="true")


def _dot(point: Point, x: Scale, y: Scale, style: str, radius: float) -> Html:
    """One of thousands: written as a text, its only free part escaped."""
    across, down = _share(x.at(point.x)), attribute_text(_height(y, point.y))
    where = f'class="{style}" cx="{across}" cy="{down}" r="{attribute_text(radius)}"'
    return raw(f"<circle {where}><title>{html.escape(point.title)}</title></circle>")


def _mark(point: Point, dots: Sequence[Html], *, stop: bool) -> Html:
    """Dots that say what they are while they are pointed at or have the keyboard's focus."""
    focus: dict[str, Attribute] = {"tabindex": "0" if stop else None}
    spoken: dict[str, Attribute] = {"role": "img", "aria_label": point.title}
    return tag("g", *dots, _readout(point, "told"), class_="spot", **focus, **spoken)


def _readout(point: Point, style: str) -> Html:
    """Lines above the plot, cut off where the screen ends."""
    texts = [
        tag("text", line, x=0, y=_LINE * place + _LINE - 4)
        for place, line in enumerate(point.lines)
    ]
    height = _LINE * len(point.lines)
    place: dict[str, Attribute] = {"x": 0, "y": -height - 10, "width": "100%", "height": height}
    return tag("svg", *texts, class_=f"readout {style}", aria_hidden="true", **place)


def _height(y: Scale, value: float) -> float:
    """Pixels from the top."""
    return PLOT_HEIGHT * (1 - y.at(value))


def _share(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"
