"""Measured against predicted, as one SVG that needs nothing else: logarithmic, a colour a kind.

Rates are drawn as their inverse, so that every dot is a time: of a call, of a step, of the first
token, per token, per request. On the diagonal they agree; the band around it is a fifth each way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardplan.costmodel.validation import Figure
from shardplan.search.report.markup import Attribute, Html, raw, tag

__all__ = ["KINDS", "kind_of", "scatter_svg"]

KINDS = {
    "matmul": "#0072b2",
    "attention": "#009e73",
    "experts": "#cc79a7",
    "collectives": "#e69f00",
    "steps": "#d55e00",
    "TTFT": "#56b4e9",
    "serving": "#555555",
}
"""Word of a family -> colour (Okabe and Ito's, told apart by most eyes)."""
_WIDTH, _HEIGHT = 860.0, 720.0
_LEFT, _TOP, _SIDE = 86.0, 30.0, 620.0
_BAND = 1.2
_SECONDS = ((1e-6, "us"), (1e-3, "ms"), (1.0, "s"))
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}"
    ".tick{font-size:12px;fill:#555}"
    ".grid{stroke:#ddd}.even{stroke:#222}.band{fill:#e4e4e4}"
    "circle,path{fill-opacity:.45;stroke-width:.8}"
)


def kind_of(family: str) -> str:
    """What a family is about: the key of `KINDS` among its words, or `steps`."""
    words = family.replace(",", "").split()
    return next((word for word in reversed(words) if word in KINDS), "steps")


def _vendor(figure: Figure) -> str:
    """NVIDIA figures are drawn as squares, Ascend and all else as circles."""
    return "NVIDIA" if figure.family.startswith(("h100", "h200", "hgx-")) else "Ascend"


def _times(figure: Figure) -> tuple[float, float] | None:
    """(measured, predicted) seconds; None where there is no prediction or no time."""
    if figure.predicted is None or figure.predicted <= 0.0 or figure.unit == "B":
        return None
    pair = (figure.measured, figure.predicted)
    return pair if figure.unit == "s" else (1.0 / pair[0], 1.0 / pair[1])


def _tick(seconds: float) -> str:
    unit, name = next(one for one in reversed(_SECONDS) if seconds >= one[0] or one is _SECONDS[0])
    return f"{seconds / unit:.6g} {name}"


def scatter_svg(figures: Sequence[Figure]) -> str:
    """The picture; figures without a prediction are left out."""
    known = [(one, times) for one in figures if (times := _times(one)) is not None]
    values = [value for _, times in known for value in times] or [1e-6, 1.0]
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    parts = [raw(f"<style>{_STYLE}</style>"), _box(0, 0, _WIDTH, _HEIGHT, fill="#fff")]
    parts += _ground(low, high)
    kinds = list(KINDS)
    known.sort(key=lambda pair: -kinds.index(kind_of(pair[0].family)))
    parts += [_mark(one, times, low, high) for one, times in known]
    parts += _legend([one for one, _ in known])
    size: dict[str, Attribute] = {"width": _WIDTH, "height": _HEIGHT, "role": "img"}
    picture = tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        aria_label="measured against predicted times",
        **size,
    )
    return picture.replace("><", ">\n<") + "\n"


def _at(value: float, low: int, high: int) -> float:
    """Pixels from the low end of an axis."""
    return _SIDE * (math.log10(value) - low) / (high - low)


def _x(value: float, low: int, high: int) -> float:
    return _LEFT + _at(value, low, high)


def _y(value: float, low: int, high: int) -> float:
    return _TOP + _SIDE - _at(value, low, high)


def _box(x: float, y: float, width: float, height: float, **more: Attribute) -> Html:
    return tag("rect", x=x, y=y, width=width, height=height, **more)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def _ground(low: int, high: int) -> list[Html]:
    """Band, grid, ticks, diagonal and the names of the axes."""
    first, last = 10.0**low, 10.0**high
    corners = (
        (first, first),
        (first, first * _BAND),
        (last / _BAND, last),
        (last, last),
        (last, last / _BAND),
        (first * _BAND, first),
    )
    points = " ".join(f"{_x(a, low, high):.1f},{_y(b, low, high):.1f}" for a, b in corners)
    parts = [tag("polygon", points=points, class_="band")]
    for power in range(low, high + 1):
        value = 10.0**power
        x, y = _x(value, low, high), _y(value, low, high)
        parts.append(_line(x, _TOP, x, _TOP + _SIDE, "grid"))
        parts.append(_line(_LEFT, y, _LEFT + _SIDE, y, "grid"))
        text = _tick(value)
        below: dict[str, Attribute] = {"x": x, "y": _TOP + _SIDE + 20, "text_anchor": "middle"}
        beside: dict[str, Attribute] = {"x": _LEFT - 8, "y": y + 4, "text_anchor": "end"}
        parts += [tag("text", text, class_="tick", **at) for at in (below, beside)]
    parts.append(_line(_LEFT, _TOP + _SIDE, _LEFT + _SIDE, _TOP, "even"))
    middle = _LEFT + _SIDE / 2
    parts.append(tag("text", "measured", x=middle, y=_TOP + _SIDE + 46, text_anchor="middle"))
    turned = f"rotate(-90 22 {_TOP + _SIDE / 2:g})"
    up: dict[str, Attribute] = {"x": 22, "y": _TOP + _SIDE / 2, "text_anchor": "middle"}
    parts.append(tag("text", "predicted", transform=turned, **up))
    return parts


def _mark(figure: Figure, times: tuple[float, float], low: int, high: int) -> Html:
    x, y = _x(times[0], low, high), _y(times[1], low, high)
    error = figure.error or 0.0
    title = tag("title", f"{figure.group}: {error:+.1%} ({figure.where})")
    return _shape(x, y, KINDS[kind_of(figure.family)], _vendor(figure), title)


def _shape(x: float, y: float, colour: str, vendor: str, *inside: Html) -> Html:
    if vendor == "NVIDIA":
        path = f"M{x - 2.3:.1f} {y - 2.3:.1f}h4.6v4.6h-4.6z"
        return tag("path", *inside, d=path, fill=colour, stroke=colour)
    where: dict[str, Attribute] = {"cx": x, "cy": y, "r": 2.7}
    return tag("circle", *inside, fill=colour, stroke=colour, **where)


def _legend(figures: Sequence[Figure]) -> list[Html]:
    """Colours with the number of their figures, and the two shapes."""
    x, y = _LEFT + _SIDE + 22.0, _TOP + 12.0
    parts: list[Html] = []
    for kind, colour in KINDS.items():
        count = sum(kind_of(one.family) == kind for one in figures)
        if count:
            parts.append(_shape(x, y - 4, colour, "Ascend"))
            parts.append(tag("text", f"{kind}, {count}", x=x + 12, y=y))
            y += 22
    y += 10
    for vendor in ("Ascend", "NVIDIA"):
        parts.append(_shape(x, y - 4, "#555555", vendor))
        parts.append(tag("text", vendor, x=x + 12, y=y))
        y += 22
    y += 10
    parts.append(_box(x - 5, y - 12, 12, 12, class_="band", stroke="#ccc"))
    parts.append(tag("text", f"within {_BAND - 1:.0%}", x=x + 12, y=y))
    return parts
