"""`shardplan analyze`: what the trials of one search or several say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.models.errors import InputError
from shardplan.search.cli_common import Json, note, number, print_json, stdout_console

if TYPE_CHECKING:
    from shardplan.search.runs import Run

__all__ = ["analyze"]

_TOLERANCE = 1.0


def analyze(
    trials: Annotated[
        list[Path],
        typer.Argument(
            help="trials.csv (or .parquet, or a run's folder) of one search or several."
        ),
    ],
    by: Annotated[
        str | None,
        typer.Option("--by", help="Groups by columns with commas, as tp,batch; run too."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="A base run: what became worse since.")
    ] = None,
    tolerance: Annotated[
        float | None, number("--tolerance", "Of --against: changes up to X % are the same; 1.")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder for PNG plots.")] = None,
    json: Json = False,
) -> None:
    """What trials say: best, front, groups, runs side by side."""
    _check(trials, by, against, tolerance)
    from shardplan.search.runs import read_runs

    runs = read_runs([*([against] if against is not None else []), *trials])
    if against is not None:
        _compare(runs, _TOLERANCE if tolerance is None else tolerance, plots, json)
    elif by is not None:
        _groups(runs, [name.strip() for name in by.split(",")], plots, json)
    else:
        _summary(runs, plots, json)


def _check(
    trials: list[Path], by: str | None, against: Path | None, tolerance: float | None
) -> None:
    """`InputError` for options that do not go together."""
    if against is not None and (by is not None or len(trials) != 1):
        raise InputError(
            "`--against` compares one run with one base",
            got=f"{len(trials)} runs, by={by}",
            hint="shardplan analyze NEW --against BASE",
        )
    if tolerance is not None and (against is None or not 0 <= tolerance <= 1000):  # noqa: PLR2004
        raise InputError(
            "`--tolerance` is from 0 to 1000 %, beside --against",
            got=f"tolerance={tolerance:g}",
            hint="try 1",
        )


def _summary(runs: list[Run], plots: Path | None, as_json: bool) -> None:
    from shardplan.search.analyze import summarise, to_json
    from shardplan.search.runs import as_one, side_by_side

    beside = side_by_side(runs)
    frame = runs[0].frame if len(runs) == 1 else as_one(runs)
    summary = summarise(frame)
    if plots is not None:
        from shardplan.search.analyze_plots import draw_plots
        from shardplan.search.analyze_runs_plots import draw_runs

        _wrote(draw_plots(frame, plots))
        if len(runs) > 1:
            _wrote(draw_runs(runs, plots))
    if as_json:
        print_json({**to_json(summary), "runs": [asdict(one) for one in beside]})
        return
    from shardplan.search.analyze_runs_tables import render_runs
    from shardplan.search.analyze_tables import render_summary

    if len(runs) > 1:
        render_runs(beside, stdout_console())
    render_summary(summary, stdout_console())


def _groups(runs: list[Run], columns: list[str], plots: Path | None, as_json: bool) -> None:
    from shardplan.search.groups import by_columns
    from shardplan.search.runs import as_one

    groups = by_columns(as_one(runs), columns)
    if plots is not None:
        from shardplan.search.analyze_runs_plots import draw_groups

        _wrote(draw_groups(columns, groups, plots))
    if as_json:
        print_json({"by": columns, "groups": [asdict(one) for one in groups]})
        return
    from shardplan.search.analyze_runs_tables import render_groups

    render_groups(columns, groups, stdout_console())


def _compare(runs: list[Run], tolerance: float, plots: Path | None, as_json: bool) -> None:
    from shardplan.search.regressions import compare

    base, now = runs
    found = compare(base, now, tolerance / 100.0)
    if plots is not None:
        from shardplan.search.analyze_runs_plots import draw_runs

        _wrote(draw_runs(runs, plots))
    if as_json:
        told: dict[str, Any] = asdict(found)
        print_json({**told, "regressed": found.regressed})
        return
    from shardplan.search.analyze_runs_tables import render_comparison

    render_comparison(found, stdout_console())


def _wrote(paths: list[Path]) -> None:
    for path in paths:
        note(f"wrote {path}")
