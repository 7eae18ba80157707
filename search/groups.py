"""A trial table by any of its columns: what is feasible and what is best in each group.

Columns of many different numbers (times, rates, bytes) are cut into `BINS` groups of about as many
rows each; all others have a group a value. Of several columns the combinations that some row has
are the groups. A cell without a number (of refused rows) has a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shardplan.models.errors import UnknownNameError
from shardplan.search.analyze import THROUGHPUT, Row, row_at, value_name
from shardplan.search.runs import RUN, best_of, best_place
from shardplan.search.trials import NUMBER_COLUMNS, TRIAL_COLUMNS

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = ["BINS", "GroupRow", "by_columns"]

BINS = 10
MOST_VALUES = 32
"""Different numbers of a column from which on it is cut."""
Codes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """The rows that have some values in common."""

    values: tuple[str, ...]
    """Of the columns, as a reader says them."""
    trials: int
    feasible: int
    best: Row | None
    """None where nothing of it is feasible."""
    loss: float | None
    """Of its best objective against the best of all; None likewise."""
    median_throughput: float | None
    """Output tokens a second and card, over its feasible rows."""
    least_tpot_s: float | None
    least_ttft_s: float | None


def by_columns(frame: DataFrame, columns: Sequence[str]) -> list[GroupRow]:
    """Groups of a table, the best first, those with nothing feasible last.

    `InputError` for a name that is no column.
    """
    known = [*TRIAL_COLUMNS, *([RUN] if RUN in frame else [])]
    for name in columns:
        if name not in known:
            raise UnknownNameError("column", name[:100], known)
    coded = [_codes(frame[name]) for name in dict.fromkeys(columns)]
    groups, members = _combined([codes for codes, _ in coded])
    feasible = frame["feasible"].to_numpy(bool)
    top = best_place(frame)
    best = None if top is None else float(frame["objective"].iloc[top])
    order = np.argsort(members, kind="stable")
    ends = np.cumsum(np.bincount(members, minlength=len(groups)))
    rows = []
    for place, end in enumerate(ends.tolist()):
        inside = order[(ends[place - 1] if place else 0) : end]
        values = tuple(names[code] for code, (_, names) in zip(groups[place], coded, strict=True))
        rows.append(_group(frame, values, inside, feasible, best))
    objectives = [-np.inf if row.loss is None else -row.loss for row in rows]
    return [rows[place] for place in np.argsort(-np.array(objectives), kind="stable").tolist()]


def _group(
    frame: DataFrame,
    values: tuple[str, ...],
    inside: Codes,
    feasible: NDArray[np.bool_],
    best: float | None,
) -> GroupRow:
    good = inside[feasible[inside]]
    if not len(good) or best is None:
        return GroupRow(
            values=values,
            trials=len(inside),
            feasible=0,
            best=None,
            loss=None,
            median_throughput=None,
            least_tpot_s=None,
            least_ttft_s=None,
        )
    place = best_of(frame, good)
    own = float(frame["objective"].iloc[place])
    return GroupRow(
        values=values,
        trials=len(inside),
        feasible=len(good),
        best=row_at(frame, place),
        loss=(best - own) / abs(best) if best else 0.0,
        median_throughput=float(np.median(frame[THROUGHPUT].to_numpy(float)[good])),
        least_tpot_s=float(frame["tpot_s"].to_numpy(float)[good].min()),
        least_ttft_s=float(frame["ttft_s"].to_numpy(float)[good].min()),
    )


def _codes(column: Series[Any]) -> tuple[Codes, list[str]]:
    """A whole number for each cell, and what each number stands for; values ascending."""
    if column.name in NUMBER_COLUMNS:
        return _number_codes(column.to_numpy(float))
    codes, values = column.factorize(sort=True)
    return codes.astype(np.int64), [value_name(_plain(value)) for value in values]


def _plain(value: object) -> bool | int | str:
    plain = value.item() if isinstance(value, np.generic) else value
    return plain if isinstance(plain, bool | int | str) else str(plain)


def _number_codes(numbers: NDArray[np.float64]) -> tuple[Codes, list[str]]:
    """A group a number where they are few, else parts of about as many rows; none last."""
    there = np.isfinite(numbers)
    different = np.unique(numbers[there])
    if len(different) <= MOST_VALUES:
        codes = np.searchsorted(different, numbers)
        names = [f"{value:.6g}" for value in different.tolist()]
    else:
        cuts = np.quantile(numbers[there], np.arange(1, BINS) / BINS, method="inverted_cdf")
        edges = np.unique([*cuts.tolist(), float(different[-1])])
        codes = np.searchsorted(edges, numbers)
        lows = [float(different[0]), *edges[:-1].tolist()]
        names = [f"{low:.4g} to {high:.4g}" for low, high in zip(lows, edges, strict=True)]
    return np.where(there, codes, len(names)).astype(np.int64), [*names, "no number"]


def _combined(columns: Sequence[Codes]) -> tuple[list[tuple[int, ...]], Codes]:
    """(codes of each group, the group of each row) of the combinations that there are."""
    members = columns[0]
    present, members = np.unique(members, return_inverse=True)
    groups: list[tuple[int, ...]] = [(code,) for code in present.tolist()]
    for codes in columns[1:]:
        width = int(codes.max(initial=0)) + 1
        present, members = np.unique(members * width + codes, return_inverse=True)
        groups = [(*groups[one // width], one % width) for one in present.tolist()]
    return groups, members
