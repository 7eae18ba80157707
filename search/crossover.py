"""When pools of their own pay: both ways of serving side by side over a sweep.

Of a sweep over `serving` and other options, each combination of the others has two rows. With v the
objective of a row (fewer cards: their inverse)

    gain = v(disagg) / v(agg)

above 1 disaggregated serving is the better one; where one of them has no plan the other is.
Along the last numeric option the gain crosses 1 between two values, if it does; between them the
crossing is put where a straight line of log gain over log value meets 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from shardplan.search.sweep import Sweep
from shardplan.search.sweep_out import value_words
from shardplan.search.sweep_values import Axis
from shardplan.search.tables import add, new_table, show

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Crossover", "Line", "crossover_of", "print_crossover", "to_markdown"]

_WAYS = ("agg", "disagg")
_SAID = (
    "The best disaggregated plan over the best aggregated one, on the same cards: above 1 pools of "
    "their own pay."
)
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One combination of all options but the last."""

    fixed: tuple[Any, ...]
    gains: tuple[float | None, ...]
    """At each value of the last option; None: no plan of either way, inf: of disagg alone, 0: of
    agg alone."""
    rates: tuple[tuple[float | None, float | None], ...]
    """Objective of both ways."""
    crossing: float | None
    """Value of the last option where both are alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossover:
    """The gain over all combinations."""

    axes: tuple[Axis, ...]
    """Without serving; along the last one lines run."""
    lines: tuple[Line, ...]


def crossover_of(sweep: Sweep, objective: str) -> Crossover | None:
    """Both ways side by side; None of a sweep that is not over both and something else.

    Rows tell no cost: None of that objective, too.
    """
    axes = tuple(axis for axis in sweep.axes if axis.name != "serving")
    ways = [axis for axis in sweep.axes if axis.name == "serving"]
    if not axes or not ways or not set(_WAYS) <= set(ways[0].values) or objective == "cost":
        return None
    names = [axis.name for axis in axes]
    found = {(row["serving"], *(row[name] for name in names)): row for row in sweep.rows}
    last = axes[-1]
    lines = []
    for fixed in product(*(axis.values for axis in axes[:-1])):
        rates = tuple(
            (
                _worth(found["agg", *fixed, value], objective),
                _worth(found["disagg", *fixed, value], objective),
            )
            for value in last.values
        )
        gains = tuple(_gain(*pair) for pair in rates)
        crossing = _crossing(last.values, gains)
        lines.append(Line(fixed=fixed, gains=gains, rates=rates, crossing=crossing))
    return Crossover(axes=axes, lines=tuple(lines))


def _worth(row: Row, objective: str) -> float | None:
    if row["status"] != "ok":
        return None
    return 1.0 / float(row["ranks"]) if objective == "cards" else float(row["objective"])


def _gain(agg: float | None, disagg: float | None) -> float | None:
    if agg is None:
        return None if disagg is None else math.inf
    return 0.0 if disagg is None else disagg / agg


def _crossing(values: Sequence[Any], gains: Sequence[float | None]) -> float | None:
    """The first crossing, None of values that are no numbers above 0, or where nothing crosses."""
    if not all(isinstance(value, int | float) and value > 0 for value in values):
        return None
    points = [
        (math.log(value), math.log(gain))
        for value, gain in zip(values, gains, strict=True)
        if gain and math.isfinite(gain)
    ]
    for (left, low), (right, high) in pairwise(sorted(points)):
        if (low > 0.0) != (high > 0.0):
            return math.exp(left + (right - left) * low / (low - high))
    return None


def _word(gain: float | None) -> str:
    if gain is None:
        return "-"
    if not gain:
        return "agg alone"
    return "disagg alone" if math.isinf(gain) else f"{gain:.2f}"


def _crossing_word(line: Line) -> str:
    gains = [gain for gain in line.gains if gain is not None]
    if line.crossing is not None:
        return f"{line.crossing:.3g}"
    if not gains:
        return "no plan"
    return "pays throughout" if min(gains) > 1.0 else "never" if max(gains) <= 1.0 else "-"


def _table(found: Crossover) -> tuple[list[str], list[list[str]]]:
    """(heads, rows of cells)."""
    *others, last = found.axes
    heads = [axis.option for axis in others]
    heads += [f"{last.option} {value_words(value)}" for value in last.values]
    rows = [
        [
            *(value_words(value) for value in line.fixed),
            *(_word(gain) for gain in line.gains),
            _crossing_word(line),
        ]
        for line in found.lines
    ]
    return [*heads, f"alike at {last.option}"], rows


def to_markdown(found: Crossover, question: str) -> str:
    """A page: what is shown, a row a combination."""
    heads, rows = _table(found)
    lines = [
        "# Pools of their own against one pool",
        "",
        f"{question}.",
        "",
        f"{_SAID} `-`: neither way has a plan.",
        "",
        _joined(heads),
        _joined(["---"] * len(heads)),
        *(_joined(row) for row in rows),
        "",
    ]
    return "\n".join(lines)


def print_crossover(found: Crossover, console: Console) -> None:
    """The same for the terminal."""
    heads, rows = _table(found)
    table = new_table("disaggregated over aggregated", *heads, right=heads)
    for row in rows:
        add(table, *row)
    show(console, table)
    console.print(_SAID, markup=False)


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
