"""`shardplan analyze`: what the trials of one search or several say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardplan.search.cli_common import Json, note, print_json, stdout_console

__all__ = ["analyze"]


def analyze(
    trials: Annotated[list[Path], typer.Argument(help="trials.csv of one search or several.")],
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder for PNG plots.")] = None,
    json: Json = False,
) -> None:
    """Say what each dimension of a search is worth, from its tables."""
    from shardplan.search.analyze import summarise, to_json
    from shardplan.search.trials import read_all_trials

    frame = read_all_trials(trials)
    summary = summarise(frame)
    if plots is not None:
        from shardplan.search.analyze_plots import draw_plots

        for path in draw_plots(frame, plots):
            note(f"wrote {path}")
    if json:
        print_json(to_json(summary))
        return
    from shardplan.search.analyze_tables import render_summary

    render_summary(summary, stdout_console())
