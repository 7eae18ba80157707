"""The gain of pools over one pool as lines, by matplotlib, which is the extra `plots`."""

from __future__ import annotations

import math
from pathlib import Path

from shardplan.models.errors import InputError
from shardplan.search.crossover import Crossover
from shardplan.search.sweep_out import value_words
from shardplan.search.sweep_plots import new_figure, save_figure

__all__ = ["draw_crossover"]

_MOST_LINES = 12


def draw_crossover(found: Crossover, stem: Path) -> list[Path]:
    """Files of the picture, a line a combination, the first twelve. `InputError` as of sweeps."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("plots need matplotlib", hint="pip install 'shardplan[plots]'") from None
    *others, last = found.axes
    figure = new_figure(7.6, 4.6)
    axes = figure.add_subplot()
    for line in found.lines[:_MOST_LINES]:
        good = [
            (at, gain)
            for at, gain in enumerate(line.gains)
            if gain is not None and 0.0 < gain < math.inf
        ]
        words = ", ".join(
            f"{axis.option} {value_words(value)}"
            for axis, value in zip(others, line.fixed, strict=True)
        )
        if good:
            axes.plot(*zip(*good, strict=True), marker="o", label=words or None)
    axes.axhline(1.0, color="#222222", lw=1, ls="--")
    axes.set_xticks(range(len(last.values)), [value_words(value) for value in last.values])
    axes.set_xlabel(last.option)
    axes.set_ylabel("disaggregated over aggregated")
    axes.spines[["top", "right"]].set_visible(False)
    if others:
        axes.legend(fontsize=7, frameon=False)
    return save_figure(figure, stem)
