"""Runs side by side: the trial tables of several searches, each under a short name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.models.errors import InputError
from shardplan.search.analyze import Row, row_at
from shardplan.search.trials import PARQUET, columns_of, joined, read_trials

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["RUN", "Run", "RunRow", "as_one", "best_of", "best_place", "read_runs", "side_by_side"]

RUN = "run"
"""The name of the table that a row came from, where several are one."""
TABLE = "trials.csv"


class Run(NamedTuple):
    """One trial table."""

    name: str
    path: Path
    frame: DataFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run beside the first."""

    run: str
    path: str
    trials: int
    feasible: int
    best: Row | None
    """None where nothing is feasible."""
    gain: float | None
    """Objective of its best over the first run's best, less one; None where either has none."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The tables of several runs, CSV or Parquet; a folder stands for the trials.csv in it.

    `InputError` as of `read_trials`, and for a folder without a table.
    """
    if not paths:
        raise InputError("at least one trial table is needed", hint="name a trials.csv")
    files = [_file(path) for path in paths]
    names = _names(files)
    return [Run(name, file, read_trials(file)) for name, file in zip(names, files, strict=True)]


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (TABLE, f"trials{PARQUET}"):
        if (path / name).is_file():
            return path / name
    raise InputError(
        f"the folder of a run holds {TABLE}", got=str(path), hint="name the table itself"
    )


def _names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; numbers where they are the same file."""
    parts = [_parts(file) for file in files]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{place}: {'/'.join(one[-2:])}" for place, one in enumerate(parts, start=1)]


def _parts(file: Path) -> tuple[str, ...]:
    """Names from the root; the usual name of a table says nothing, its folder does."""
    parts = file.resolve().parts[1:]
    return parts[:-1] if len(parts) > 1 and file.stem == "trials" else parts


def as_one(runs: Sequence[Run]) -> DataFrame:
    """All rows, one run after another, with the column `RUN`."""
    import pandas as pd

    parts = [columns_of(run.frame) for run in runs]
    whole = parts[0] if len(runs) == 1 else columns_of(joined(parts))
    codes = np.repeat(np.arange(len(runs)), [len(run.frame) for run in runs])
    names = pd.Index([run.name for run in runs])
    column = pd.Series(pd.Categorical.from_codes(codes, categories=names))
    return pd.DataFrame({**whole, RUN: column}, copy=False)


def side_by_side(runs: Sequence[Run]) -> list[RunRow]:
    """Each run's best against the first run's best."""
    rows: list[RunRow] = []
    first: float | None = None
    for run in runs:
        place = best_place(run.frame)
        best = None if place is None else row_at(run.frame, place)
        own = None if best is None else _number(best["objective"])
        if run is runs[0]:
            first = own
        rows.append(
            RunRow(
                run=run.name,
                path=str(run.path),
                trials=len(run.frame),
                feasible=int(run.frame["feasible"].sum()),
                best=best,
                gain=own / first - 1.0 if own is not None and first else None,
            )
        )
    return rows


def _number(cell: object) -> float | None:
    return float(cell) if isinstance(cell, int | float) else None


def best_place(frame: DataFrame) -> int | None:
    """Place of the feasible row of the largest objective, ties by rank and then by place."""
    good = np.flatnonzero(frame["feasible"].to_numpy(bool))
    return best_of(frame, good) if len(good) else None


def best_of(frame: DataFrame, good: NDArray[np.int64]) -> int:
    """Likewise of the rows at the places `good`, one at least."""
    objective = frame["objective"].to_numpy(float)[good]
    tied = good[objective == objective.max()]
    return int(tied[frame["rank"].to_numpy()[tied].argmin()])
