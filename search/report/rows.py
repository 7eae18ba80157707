"""A graph as rows, one below the other in computing order, so that it fits a narrow screen.

Lines in the left margin join what is not the row above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardplan.search.report.markup import Attribute, Html, legend, tag

__all__ = ["CUT", "PARTIAL_SUM", "WHOLE", "Row", "rows_keys", "rows_picture", "size_text"]

_ROW, _BOX, _MARGIN = 44, 36, 17.0
CUT, PARTIAL_SUM, WHOLE = "c0", "c5", "c8"
"""Stripes of a row: how its result lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An operator or a collective: two lines of text and the stripe of its cut."""

    name: str
    inputs: tuple[str, ...]
    """Names of rows above."""
    first: str
    second: str
    stripe: str
    moves: bool = False
    """Whether it is a collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A line in the margin: from the row that makes a tensor to the rows that read it."""

    source: int
    readers: tuple[int, ...]
    lane: int


def rows_keys() -> Html:
    """What the stripes and colours of the rows mean."""
    names = {
        CUT: "split",
        PARTIAL_SUM: "partial sum",
        WHOLE: "whole on every rank",
        "c1": "collective",
    }
    return legend(names.items())


def rows_picture(rows: Sequence[Row], label: str) -> Html:
    """The picture; `label` says to a screen reader what it shows."""
    lines = _lines(rows)
    lanes = max((line.lane for line in lines), default=0) + 1
    parts = [part for line in lines for part in _draw_line(line, lanes)]
    for place, row in enumerate(rows):
        parts += _draw_row(row, place)
        if place and rows[place - 1].name in row.inputs:
            ends: dict[str, Attribute] = {"x1": "50%", "x2": "50%"}
            ends |= {"y1": place * _ROW - _ROW + _BOX, "y2": place * _ROW}
            parts.append(tag("line", class_="flow", **ends))
    return tag("svg", *parts, class_="block", height=len(rows) * _ROW, role="img", aria_label=label)


def _lines(rows: Sequence[Row]) -> list[_Line]:
    """One line a tensor that some row reads which is not the next; lanes are shared in turn."""
    places = {row.name: place for place, row in enumerate(rows)}
    readers: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        for source in dict.fromkeys(row.inputs):
            if places[source] < place - 1:
                readers.setdefault(places[source], []).append(place)
    busy: list[int] = []
    found = []
    for first in sorted(readers):
        lane = next((i for i, end in enumerate(busy) if end < first), len(busy))
        busy[lane : lane + 1] = [readers[first][-1]]
        found.append(_Line(source=first, readers=tuple(readers[first]), lane=lane))
    return found


def _draw_line(line: _Line, lanes: int) -> Iterator[Html]:
    """Out of the row's left side, down its lane, into each reader with an arrow."""
    at = f"{_MARGIN * (1 - (line.lane + 1) / (lanes + 1)):.2f}%"
    out, edge = line.source * _ROW + 0.7 * _BOX, f"{_MARGIN:.2f}%"
    turns = [row * _ROW + 0.3 * _BOX for row in line.readers]
    yield _flow(at, edge, out, out)
    yield _flow(at, at, out, turns[-1])
    for turn in turns:
        yield _flow(at, edge, turn, turn)
        place: dict[str, Attribute] = {"x": edge, "y": turn + 4, "text_anchor": "end"}
        yield tag("text", "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}", class_="tip", **place)


def _flow(x1: str, x2: str, y1: float, y2: float) -> Html:
    ends: dict[str, Attribute] = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
    return tag("line", class_="flow", **ends)


def _draw_row(row: Row, place: int) -> list[Html]:
    """The box, its two lines of text and the stripe."""
    top, edge = place * _ROW, f"{_MARGIN:.2f}%"
    box: dict[str, Attribute] = {"x": edge, "y": top, "width": f"{100 - _MARGIN:.2f}%"}
    mark: dict[str, Attribute] = {"x": edge, "y": top, "width": 5, "height": _BOX}
    text: dict[str, Attribute] = {"x": edge, "dx": 13}
    title = tag("title", f"{row.first}: {row.second}")
    return [
        tag("rect", title, class_="move" if row.moves else "op", height=_BOX, rx=4, **box),
        tag("rect", class_=row.stripe, **mark),
        tag("text", row.first, class_="what", y=top + 15, **text),
        tag("text", row.second, class_="how", y=top + 29, **text),
    ]


def size_text(size_bytes: float) -> str:
    """Bytes in the binary unit that suits: 64.0 MiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes >= 2**power:
            return f"{size_bytes / 2**power:,.1f} {unit}"
    return f"{size_bytes:,.0f} B"
