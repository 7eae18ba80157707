"""Files of a search: plan.json, trials.csv, pareto.csv, report.html and timing.json.

All are written whole or not at all, and the folder is checked before a search starts. The same
inputs, seed and version give the same bytes in all but timing.json.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.models.errors import InputError
from shardplan.models.parallel import balanced_stages
from shardplan.search.evaluate import LIMITS
from shardplan.search.kept import Kept, Outcome
from shardplan.search.plan import write_atomically
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
        handle, name = tempfile.mkstemp(dir=out)
        os.close(handle)
        os.unlink(name)
        for made in missing:
            made.rmdir()
    except OSError as error:
        raise InputError("`--out` cannot be written", got=f"{out}: {error.strerror}") from None


def trial_table(outcome: Outcome, kept: Iterable[Kept], engine: str) -> TrialTable:
    """Remembered strategies as a table, best first, columns of `TRIAL_COLUMNS`."""
    from shardplan.search.trials import LATER_COLUMNS, TRIAL_COLUMNS

    rows = []
    for place, one in enumerate(kept, start=1):
        par, choice = one.parallel, one.choice
        rows.append(
            {
                **LATER_COLUMNS,
                **one.columns,
                "rank": place if one.feasible else 0,
                "feasible": one.feasible,
                "limit": "" if one.feasible else LIMITS[one.limit],
                **{item.name: getattr(par, item.name) for item in fields(par)},
                **{item.name: getattr(choice, item.name) for item in fields(choice)},
                "stage_layers": ",".join(map(str, balanced_stages(outcome.space.spec, par))),
                "order": "-".join(par.order),
                "batch": one.batch,
                "chunk": one.chunk,
                "engine": engine,
            }
        )
    return TrialTable.of_rows(TRIAL_COLUMNS, rows)


def write_result(result: SearchResult, out: Path, *, force: bool = False) -> list[Path]:
    """Write every file of a search into `out`; returns their paths."""
    from shardplan.search.report import write_report
    from shardplan.search.trials import write_trials

    check_out(out, force=force)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / name for name in FILES]
    result.plan.save(paths[0])
    write_trials(paths[1], result.trial_table)
    write_trials(paths[2], result.pareto_table)
    write_report(result.plan, result.trial_table, paths[3])
    write_atomically(paths[4], json.dumps(result.timing, indent=2, sort_keys=True) + "\n")
    return paths
