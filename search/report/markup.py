"""HTML and SVG as nested calls: whatever is not already markup is escaped, so nothing is missed."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

__all__ = ["Attribute", "Html", "attribute_text", "legend", "raw", "table", "tag"]

Attribute: TypeAlias = str | float | None

_LONG = 60
"""Letters of a first cell, markup with them, from which on it may take several lines."""
_VOID = {"meta", "br", "hr"}


class Html(str):
    """Text that is markup already. Everything else is plain text and gets escaped."""

    __slots__ = ()


def raw(text: str) -> Html:
    """Trust a text: for our own style sheet, never for what comes from a plan."""
    return Html(text)


def tag(name: str, /, *children: str, **attributes: Attribute) -> Html:
    """An element; `class_` and `aria_label` stand for `class` and `aria-label`, None for none."""
    start = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(attribute_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{start}>")
    inside = "".join(child if isinstance(child, Html) else html.escape(child) for child in children)
    return Html(f"<{start}>{inside}</{name}>")


def legend(keys: Iterable[tuple[str, str]]) -> Html:
    """(style, words) of each mark of a picture."""
    items = [tag("li", tag("i", class_=f"key {style}"), words) for style, words in keys]
    return tag("ul", *items, class_="legend")


def table(
    caption: str,
    headings: Iterable[str],
    rows: Iterable[Iterable[str]],
    *,
    words: int = 1,
    foot: Iterable[str] | None = None,
    chosen: int | None = None,
) -> Html:
    """A table in a box that scrolls sideways where the screen is narrow.

    The first `words` columns hold words, the rest numbers; the first cell heads its row. `chosen`:
    the row that stands out.
    """
    names, lines = list(headings), [list(row) for row in rows]
    wraps = any(len(row[0]) > _LONG for row in lines if row)

    def line(cells: Iterable[str], style: str | None = None) -> Html:
        first, *others = list(cells)
        data = [
            tag("td", cell, class_=None if place < words else "n")
            for place, cell in enumerate(others, start=1)
        ]
        return tag("tr", tag("th", first, scope="row"), *data, class_=style)

    head = [
        tag("th", name, scope="col", class_=None if place < words else "n")
        for place, name in enumerate(names)
    ]
    parts = [
        tag("caption", caption),
        tag("thead", tag("tr", *head)),
        tag(
            "tbody",
            *[line(row, "own" if at == chosen else None) for at, row in enumerate(lines)],
        ),
    ]
    if foot is not None:
        parts.append(tag("tfoot", line(foot)))
    scroller = {"class_": "scroll", "tabindex": "0", "role": "region", "aria_label": caption}
    return tag("div", tag("table", *parts, class_="wraps" if wraps else None), **scroller)


def attribute_text(value: str | float) -> str:
    """An attribute's value; coordinates to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
