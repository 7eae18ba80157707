"""A trial table as pictures: PNG files by matplotlib, which is the extra `plots`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.atomic import written_bytes
from shardplan.models.errors import InputError
from shardplan.search.analyze import THROUGHPUT, best_first, pareto_rows, summarise, value_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["COLOURS", "MS", "draw", "draw_plots", "dress", "require_matplotlib"]

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a7a7a", "#000000")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""
_THROUGHPUT_LABEL = "output tokens/s per card"
_DPI = 150
MS = 1e3
_GIB = 2**30


def draw_plots(frame: DataFrame, out_dir: Path) -> list[Path]:
    """Draw the feasible trials into `out_dir` and return the files.

    `pareto.png` TPOT against throughput, `worth.png` loss by dimension, `tp_batch.png` best
    throughput by tp and batch, `memory.png` memory against throughput. `InputError` when
    matplotlib is absent, nothing is feasible, or the folder cannot be written.
    """
    require_matplotlib()
    good = best_first(frame)
    if good.empty:
        raise InputError("plots need a feasible trial", got=f"0 of {len(frame):,} trials")
    drawings: tuple[tuple[str, Callable[[DataFrame, Axes], None]], ...] = (
        ("pareto.png", _draw_pareto),
        ("worth.png", _draw_worth),
        ("tp_batch.png", _draw_heat_map),
        ("memory.png", _draw_memory),
    )
    return [draw(out_dir / name, functools.partial(drawing, good)) for name, drawing in drawings]


def require_matplotlib() -> None:
    """`InputError` where it is absent."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("plots need matplotlib", hint="pip install 'shardplan[plots]'") from None


def draw(path: Path, drawing: Callable[[Axes], None]) -> Path:
    """One picture, drawn without a display and without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawing(axes)
    with written_bytes(path) as file:
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return path


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def _scatter_by_tp(good: DataFrame, x: Any, axes: Axes) -> None:
    """Throughput per card over `x`, a colour for each tp."""
    for place, tp in enumerate(sorted(good["tp"].unique().tolist())):
        chosen = (good["tp"] == tp).to_numpy()
        axes.scatter(
            x[chosen],
            good[THROUGHPUT].to_numpy()[chosen],
            s=9,
            alpha=0.45,
            linewidths=0,
            color=COLOURS[place % len(COLOURS)],
            label=f"tp {tp}",
        )
    axes.grid(alpha=0.25)
    axes.set_ylim(bottom=0)


def _legend(axes: Axes) -> None:
    for handle in axes.legend(frameon=False, markerscale=2).legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _draw_pareto(good: DataFrame, axes: Axes) -> None:
    tpot_ms = good["tpot_s"].to_numpy(float) * MS
    _scatter_by_tp(good, tpot_ms, axes)
    front = good.iloc[pareto_rows(good)].sort_values("tpot_s", kind="stable")
    axes.scatter(
        front["tpot_s"] * MS,
        front[THROUGHPUT],
        s=22,
        facecolors="none",
        edgecolors="black",
        linewidths=0.8,
        label="Pareto front, TTFT included",
    )
    dress(axes, f"{len(good):,} feasible strategies", "TPOT, ms", _THROUGHPUT_LABEL)
    _legend(axes)


def _draw_memory(good: DataFrame, axes: Axes) -> None:
    _scatter_by_tp(good, good["memory_bytes"].to_numpy(float) / _GIB, axes)
    dress(axes, "Memory and throughput", "memory of the fullest card, GiB", _THROUGHPUT_LABEL)
    _legend(axes)


def _draw_worth(good: DataFrame, axes: Axes) -> None:
    """Loss when forced to the second-best and the worst value of each dimension."""
    dimensions = [item for item in summarise(good).dimensions if item.worst_loss is not None]
    dimensions.sort(key=lambda item: item.worst_loss or 0.0)
    places = range(len(dimensions))
    worst = [100 * (item.worst_loss or 0.0) for item in dimensions]
    second = [100 * (item.second_loss or 0.0) for item in dimensions]
    axes.barh(places, worst, height=0.7, color="#b5cfe3", label="forced to the worst value")
    axes.barh(places, second, height=0.35, color=COLOURS[0], label="forced to the second best")
    labels = [f"{item.name} (best: {value_name(item.values[0].value)})" for item in dimensions]
    axes.set_yticks(list(places), labels)
    for place, loss in zip(places, worst, strict=True):
        axes.annotate(
            f"{loss:.1f}", (loss, place), xytext=(3, 0), textcoords="offset points", va="center"
        )
    axes.set_xlim(0, max(worst, default=0.0) * 1.1 or 1.0)
    dress(axes, "What each dimension is worth", "loss of the objective, %", "")
    if dimensions:
        axes.legend(frameon=False, loc="lower right")
    else:
        axes.text(0.5, 0.5, "every dimension has one value", transform=axes.transAxes, ha="center")


def _draw_heat_map(good: DataFrame, axes: Axes) -> None:
    """Best throughput for each tp and batch; blank where nothing is feasible."""
    table = good.pivot_table(index="tp", columns="batch", values=THROUGHPUT, aggfunc="max")
    image = axes.imshow(table.to_numpy(float), aspect="auto", origin="lower", cmap="viridis")
    axes.set_yticks(range(len(table.index)), [str(tp) for tp in table.index])
    _thin_ticks(axes, [str(batch) for batch in table.columns])
    figure = axes.get_figure()
    if figure is not None:
        figure.colorbar(image, ax=axes, label=_THROUGHPUT_LABEL)
    dress(axes, "Best strategy by tp and batch", "batch of one dp group", "tp")
    axes.grid(visible=False)


def _thin_ticks(axes: Axes, labels: Sequence[str], most: int = 16) -> None:
    """Every k-th label, so that no two overlap."""
    step = -(-len(labels) // most)
    places = range(0, len(labels), step)
    axes.set_xticks(list(places), [labels[place] for place in places])
