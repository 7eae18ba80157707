"""Runs beside one another, and groups, as PNG pictures (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.models.errors import InputError
from shardplan.search.analyze import THROUGHPUT
from shardplan.search.analyze_plots import COLOURS, MS, draw, dress, require_matplotlib
from shardplan.search.groups import GroupRow
from shardplan.search.kept import pareto_mask
from shardplan.search.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_groups", "draw_runs"]

MOST_GROUPS = 30
_LABEL = 40
"""Letters of a name; longer ones keep their ends."""


def draw_runs(runs: Sequence[Run], out_dir: Path) -> list[Path]:
    """`runs.png`: the front of each run in TPOT and throughput. `InputError` as of `draw_plots`."""
    require_matplotlib()
    fronts = []
    for run in runs:
        good = run.frame.loc[run.frame["feasible"].to_numpy(bool)].sort_values("tpot_s")
        tpot, rate = (good[name].to_numpy(float) for name in ("tpot_s", THROUGHPUT))
        front = pareto_mask(rate, tpot)
        if front.any():
            fronts.append((run.name, tpot[front] * MS, rate[front]))
    if not fronts:
        raise InputError("plots need a feasible trial", got="0 in all runs")

    def drawing(axes: Axes) -> None:
        for place, (name, x, y) in enumerate(fronts):
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(x, y, marker="o", markersize=3.5, linewidth=1, color=colour, label=_end(name))
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        dress(axes, "Front of each run, TTFT left aside", "TPOT, ms", "output tokens/s per card")

    return [draw(out_dir / "runs.png", drawing)]


def draw_groups(columns: Sequence[str], groups: Sequence[GroupRow], out_dir: Path) -> list[Path]:
    """`groups.png`: the best throughput per card of each group, and its median."""
    require_matplotlib()
    shown = [group for group in groups if group.best is not None][:MOST_GROUPS]
    if not shown:
        raise InputError("plots need a feasible trial", got="0 in all groups")
    names = [
        _end(
            ", ".join(f"{name} {value}" for name, value in zip(columns, group.values, strict=True))
        )
        for group in shown
    ]
    best = [float(group.best[THROUGHPUT] or 0.0) for group in shown if group.best is not None]
    median = [group.median_throughput or 0.0 for group in shown]

    def drawing(axes: Axes) -> None:
        places = range(len(shown))
        axes.barh(places, best, height=0.7, color="#b5cfe3", label="best")
        axes.barh(places, median, height=0.35, color=COLOURS[0], label="median")
        axes.set_yticks(list(places), names)
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower right")
        dress(axes, f"By {', '.join(columns)}", "output tokens/s per card", "")

    return [draw(out_dir / "groups.png", drawing)]


def _end(name: str) -> str:
    """What a legend has room for; `$` would begin a formula."""
    short = name if len(name) <= _LABEL else "..." + name[3 - _LABEL :]
    return short.replace("$", r"\$")
