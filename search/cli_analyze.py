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
_REGRESSED = 3
"""As of `lint`: the answer is no. 1 would be a bug, 2 tables that cannot be compared."""


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
    fail_on_regression: Annotated[
        bool,
        typer.Option("--fail-on-regression", help="Of --against: exit with 3 where any is worse."),
    ] = False,
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder for PNG plots.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File for all trials as one (.csv, .parquet).")
    ] = None,
    json: Json = False,
) -> None:
    """What trials say: best, front, groups, runs side by side."""
    _check(trials, by, against, tolerance, fails=fail_on_regression)
    if out is not None and against is not None:
        raise InputError("`--out` is of trials, without `--against`", hint="leave one of them out")
    from shardplan.search.runs import read_runs

    if out is not None:
        from shardplan.search.parquet_out import check_table_out

        check_table_out(out)
    runs = read_runs([*([against] if against is not None else []), *trials])
    if out is not None:
        _write(runs, out)
    if against is not None:
        worse = _compare(runs, _TOLERANCE if tolerance is None else tolerance, plots, json)
        if worse and fail_on_regression:
            raise typer.Exit(_REGRESSED)
    elif by is not None:
        _groups(runs, list(dict.fromkeys(map(str.strip, by.split(",")))), plots, json)
    else:
        _summary(runs, plots, json)


def _check(
    trials: list[Path],
    by: str | None,
    against: Path | None,
    tolerance: float | None,
    *,
    fails: bool,
) -> None:
    """`InputError` for options that do not go together."""
    if against is not None and (by is not None or len(trials) != 1):
        raise InputError(
            "`--against` compares one run with one base",
            got=f"{len(trials)} runs, by={by}",
            hint="shardplan analyze NEW --against BASE",
        )
    if fails and against is None:
        raise InputError(
            "`--fail-on-regression` goes with `--against`",
            hint="shardplan analyze NEW --against BASE --fail-on-regression",
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


def _compare(runs: list[Run], tolerance: float, plots: Path | None, as_json: bool) -> bool:
    """Tell what became worse; whether anything did."""
    from shardplan.search.regressions import compare

    base, now = runs
    found = compare(base, now, tolerance / 100.0)
    if plots is not None:
        from shardplan.search.analyze_runs_plots import draw_runs

        _wrote(draw_runs(runs, plots))
    if as_json:
        told: dict[str, Any] = asdict(found)
        print_json({**told, "regressed": found.regressed})
        return found.regressed
    from shardplan.search.analyze_runs_tables import render_comparison

    render_comparison(found, stdout_console())
    return found.regressed


def _write(runs: list[Run], path: Path) -> None:
    """All trials as one table; which run they are of is not a column of it."""
    from shardplan.search.parquet_out import write_table
    from shardplan.search.runs import as_one
    from shardplan.search.trials import trials_csv

    write_table(path, trials_csv(as_one(runs)))
    _wrote([path])


def _wrote(paths: list[Path]) -> None:
    for path in paths:
        note(f"wrote {path}")
