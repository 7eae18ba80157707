"""A sweep as pictures, by matplotlib, which is the extra `plots`.

One option with several values: a line. Two: a pair of heat maps, what the best plan reaches and
which layout it is, a cell a combination. More: such a pair for every combination of the others, up
to a stated number. Combinations without a plan are hatched and name the limit that binds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.atomic import written_bytes
from shardplan.models.errors import InputError
from shardplan.search.sweep import Sweep
from shardplan.search.sweep_out import layout_words, value_words
from shardplan.search.sweep_values import Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MOST_PLOTS", "draw_sweep", "new_figure", "save_figure"]

MOST_PLOTS = 12
"""Pairs of heat maps of one sweep."""
_DPI = 150
_NONE, _INK, _LINE = "#e6e6e6", "#222222", "#0072b2"
_LAYOUTS = (
    *("#a6cee3", "#fdbf6f", "#b2df8a", "#fb9a99", "#cab2d6", "#ffff99"),
    *("#8dd3c7", "#d9d9d9", "#fccde5", "#80b1d3", "#bebada", "#ffed6f"),
)
"""Light colours, on which dark words can be read; used again after the last."""
_UNITS = {
    "input_len": "prompt tokens",
    "output_len": "output tokens",
    "rate": "requests/s",
    "concurrency": "requests in flight",
    "ttft_ms": "TTFT limit, ms",
    "tpot_ms": "TPOT limit, ms",
}
_DARK = 0.45
"""Share of the colour scale below which words are white."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Metric:
    """What a picture shows of a plan."""

    column: str
    label: str

    def of(self, row: Row) -> float:
        """Its value of a row that has a plan."""
        return float(row[self.column])


def draw_sweep(
    sweep: Sweep, objective: str, out_dir: Path, *, title: str = ""
) -> tuple[list[Path], list[str]]:
    """(files drawn into `out_dir`, notes). `InputError` without matplotlib or a place to write.

    `objective`: that of all combinations, or throughput where it is swept. `title`: what all
    combinations have in common.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("plots need matplotlib", hint="pip install 'shardplan[plots]'") from None
    metric = _metric(sweep, objective)
    wide = [axis for axis in sweep.axes if len(axis.values) > 1]
    if not wide:
        return [], ["nothing is drawn of a single combination"]
    if len(wide) == 1:
        figure = _line(sweep.rows, wide[0], metric, title)
        return save_figure(figure, out_dir / f"sweep_{wide[0].name}"), []
    first, second, *others = sorted(wide, key=lambda axis: -len(axis.values))
    planes = list(itertools.product(*(axis.values for axis in others)))
    notes = []
    if len(planes) > MOST_PLOTS:
        notes.append(f"the first {MOST_PLOTS} of {len(planes)} heat maps are drawn")
    paths = []
    for place, values in enumerate(planes[:MOST_PLOTS]):
        fixed = dict(zip((axis.name for axis in others), values, strict=True))
        rows = [row for row in sweep.rows if all(row[n] == v for n, v in fixed.items())]
        words = (f"{n.replace('_', '-')} {value_words(v)}" for n, v in fixed.items())
        figure = _maps(
            rows, first, second, metric, ", ".join([*([title] if title else []), *words])
        )
        tail = f"_{place + 1}" if others else ""
        paths += save_figure(figure, out_dir / f"sweep_{first.name}_{second.name}{tail}")
    return paths, notes


def _metric(sweep: Sweep, objective: str) -> _Metric:
    if any(axis.name == "objective" for axis in sweep.axes):
        objective = "throughput"
    return {
        "latency": _Metric("end_to_end_s", "seconds a request"),
        "cards": _Metric("ranks", "cards"),
    }.get(objective, _Metric("output_tokens_per_s", "output tokens/s"))


def new_figure(width: float, height: float) -> Figure:
    """A figure drawn without a display and without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """PNG and SVG, the same bytes each time."""
    import matplotlib as mpl

    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")]
    with written_bytes(paths[0]) as file:
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    with mpl.rc_context({"svg.hashsalt": "shardplan"}), written_bytes(paths[1]) as file:
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return paths


def _axis_label(axis: Axis) -> str:
    unit = _UNITS.get(axis.name)
    return axis.option if unit is None else f"{axis.option} ({unit})"


def _number_text(value: float) -> str:
    if value >= 100:  # noqa: PLR2004
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _why(row: Row) -> str:
    return str(row["limit"] or row["status"]).replace("_", " ")


def _line(rows: Sequence[Row], axis: Axis, metric: _Metric, title: str) -> Figure:
    """Values in the order given, as far apart as their places: words and powers read alike."""
    figure = new_figure(max(7.0, 1.1 * len(rows)), 4.6)
    axes: Axes = figure.add_subplot()
    good = [(at, metric.of(row)) for at, row in enumerate(rows) if row["status"] == "ok"]
    top = max((value for _, value in good), default=1.0)
    if good:
        axes.plot(*zip(*good, strict=True), marker="o", color=_LINE)
    for at, row in enumerate(rows):
        if row["status"] == "ok":
            words = f"{_number_text(metric.of(row))}\n{layout_words(row)}"
            axes.annotate(
                words,
                (at, metric.of(row)),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        else:
            axes.axvspan(at - 0.4, at + 0.4, color=_NONE, hatch="//", ec="#bbbbbb", lw=0)
            axes.text(at, top * 0.05, f"no plan:\n{_why(row)}", ha="center", fontsize=8)
    axes.set_xticks(range(len(rows)), [value_words(row[axis.name]) for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(0, top * 1.25)
    axes.set_xlabel(_axis_label(axis))
    axes.set_ylabel(metric.label)
    axes.spines[["top", "right"]].set_visible(False)
    head = f"Best plan by {axis.option}{', ' if title else ''}{title}"
    axes.set_title(head, loc="left", fontsize=11, fontweight="bold")
    return figure


def _maps(rows: Sequence[Row], x: Axis, y: Axis, metric: _Metric, title: str) -> Figure:
    """What the best plan reaches (left) and which layout it is (right)."""
    cells = {(x.values.index(row[x.name]), y.values.index(row[y.name])): row for row in rows}
    width = max(4.0, 1.05 * len(x.values)) + 1.2
    figure = new_figure(2.0 * width, max(2.6, 0.62 * len(y.values) + 1.7))
    left, right = figure.subplots(1, 2)
    _reached(left, cells, metric, figure)
    _chosen(right, cells)
    heads = (f"What the best plan reaches: {metric.label}", "Its layout, and sequences a group")
    for axes, head in zip((left, right), heads, strict=True):
        axes.set_title(head, loc="left", fontsize=10, fontweight="bold")
        axes.set_xticks(range(len(x.values)), [value_words(value) for value in x.values])
        axes.set_yticks(range(len(y.values)), [value_words(value) for value in y.values])
        axes.set_xlim(-0.5, len(x.values) - 0.5)
        axes.set_ylim(-0.5, len(y.values) - 0.5)
        axes.set_xlabel(_axis_label(x))
        axes.set_ylabel(_axis_label(y))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def _cell(axes: Axes, at: tuple[int, int], colour: Any, words: str, ink: str = _INK) -> None:
    from matplotlib.patches import Rectangle

    hatch = "///" if colour == _NONE else None
    box = Rectangle(
        (at[0] - 0.5, at[1] - 0.5), 1, 1, fc=colour, ec="#bbbbbb" if hatch else "white", hatch=hatch
    )
    axes.add_patch(box)
    back = {"facecolor": _NONE, "edgecolor": "none", "pad": 1.5} if hatch else None
    axes.text(*at, words, ha="center", va="center", fontsize=8, color=ink, bbox=back)


def _reached(
    axes: Axes, cells: Mapping[tuple[int, int], Row], metric: _Metric, figure: Figure
) -> None:
    """A colour by value; a bar says which."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = [metric.of(row) for row in cells.values() if row["status"] == "ok"]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    scale = Normalize(low, high if high > low else low + 1.0)
    shades = mpl.colormaps["viridis"]
    for at, row in cells.items():
        if row["status"] == "ok":
            share = float(scale(metric.of(row)))
            ink = "white" if share < _DARK else _INK
            _cell(axes, at, shades(share), _number_text(metric.of(row)), ink)
        else:
            _cell(axes, at, _NONE, f"no plan:\n{_why(row)}")
    if values:
        bar = figure.colorbar(ScalarMappable(norm=scale, cmap=shades), ax=axes, pad=0.02)
        bar.set_label(metric.label)
        bar.outline.set_visible(False)


def _chosen(axes: Axes, cells: Mapping[tuple[int, int], Row]) -> None:
    """A colour a layout."""
    layouts = [layout_words(row) for row in cells.values() if row["status"] == "ok"]
    colours = dict(zip(dict.fromkeys(layouts), itertools.cycle(_LAYOUTS), strict=False))
    for at, row in cells.items():
        if row["status"] == "ok":
            layout = layout_words(row)
            _cell(axes, at, colours[layout], f"{_folded(layout)}\nbatch {row['batch']}")
        else:
            _cell(axes, at, _NONE, f"no plan:\n{_why(row)}")


def _folded(layout: str) -> str:
    """Two axes a line."""
    words = layout.split()
    return "\n".join(" ".join(words[at : at + 2]) for at in range(0, len(words), 2))
