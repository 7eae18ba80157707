"""Files of a search: plan.json, trials.csv, pareto.csv, report.html and timing.json.

All are written whole or not at all, and the folder is checked before a search starts. The same
inputs, seed and version give the same bytes in all but timing.json.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError
from shardplan.models.parallel import balanced_stages
from shardplan.search.evaluate import LIMITS
from shardplan.search.kept import Kept, KeptGrid, Outcome, column_of, each_of
from shardplan.search.trial_table import TrialTable

if TYPE_CHECKING:
    from shardplan.search.api import SearchResult

__all__ = ["FILES", "MOST_ROWS", "check_out", "trial_table", "write_result"]

FILES = ("plan.json", "trials.csv", "pareto.csv", "report.html", "timing.json")
MOST_ROWS = 2000
"""Rows of trials.csv; the best ones where more were remembered."""


def check_out(out: Path, *, force: bool = False) -> None:
    """`InputError` unless results can be written into `out`: new, empty, or `force`."""
    if out.exists() and not out.is_dir():
        raise InputError("`--out` is a folder", got=str(out))
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(
            "`--out` is a new or empty folder", got=str(out), hint="name another or add --force"
        )
    missing = [p for p in (out, *out.resolve().parents) if not p.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        for made in missing:
            made.rmdir()
    except OSError as error:
        raise InputError("`--out` cannot be written", got=f"{out}: {error.strerror}") from None


def trial_table(outcome: Outcome, kept: Sequence[Kept], engine: str) -> TrialTable:
    """Remembered strategies as a table, best first, columns of `TRIAL_COLUMNS`."""
    from shardplan.search.trials import LATER_COLUMNS, NUMBER_COLUMNS, TRIAL_COLUMNS

    limits = column_of(kept, "limit").astype(int).tolist()
    columns: dict[str, list[Any]] = {name: [] for name in TRIAL_COLUMNS}
    columns |= {name: [value] * len(kept) for name, value in LATER_COLUMNS.items()}
    columns |= {name: column_of(kept, name).tolist() for name in NUMBER_COLUMNS}
    for name in ("batch", "chunk"):
        columns[name] = column_of(kept, name).astype(int).tolist()
    columns["rank"] = [place if limit < 0 else 0 for place, limit in enumerate(limits, start=1)]
    columns["feasible"] = [limit < 0 for limit in limits]
    columns["limit"] = ["" if limit < 0 else LIMITS[limit] for limit in limits]
    columns["engine"] = [engine] * len(kept)
    for name, values in _zipped(each_of(kept, functools.partial(_strategy_cells, outcome))):
        columns[name] = values
    return TrialTable({name: columns[name] for name in TRIAL_COLUMNS})


def _strategy_cells(outcome: Outcome, one: Kept | KeptGrid) -> dict[str, Any]:
    """What the layout, cut and choice of a strategy say in a row of the table."""
    par, choice = one.parallel, one.choice
    return {
        **{item.name: getattr(par, item.name) for item in fields(par)},
        **{item.name: getattr(choice, item.name) for item in fields(choice)},
        "stage_layers": ",".join(map(str, balanced_stages(outcome.space.spec, par))),
        "order": "-".join(par.order),
    }


def _zipped(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Rows of the same names as columns."""
    for name in rows[0] if rows else ():
        yield name, [row[name] for row in rows]


def write_result(
    result: SearchResult, out: Path, *, force: bool = False, **files: str | None
) -> list[Path]:
    """Write every file of a search into `out`; returns their paths.

    `files`: as of `write_report`.
    """
    from shardplan.search.report import write_report
    from shardplan.search.trials import write_trials

    check_out(out, force=force)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / name for name in FILES]
    result.plan.save(paths[0])
    write_trials(paths[1], result.trial_table)
    write_trials(paths[2], result.pareto_table)
    write_report(result.plan, result.trial_table, paths[3], **files)
    write_atomically(paths[4], json.dumps(result.timing, indent=2, sort_keys=True) + "\n")
    return paths
