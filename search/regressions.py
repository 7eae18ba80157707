"""Two runs compared strategy by strategy: what became worse, better, infeasible or feasible.

Strategies are the same where they agree in every dimension of the table, pools with them. Where a
run holds one several times its best row counts. A metric is worse where its change for the worse
is above the tolerance, relative to the base: objective and rates down, times and memory up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardplan.models.errors import InputError
from shardplan.search.analyze import DIMENSIONS, THROUGHPUT, row_at, row_name
from shardplan.search.runs import Run, RunRow, side_by_side
from shardplan.search.trials import POOL_COLUMNS

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["METRICS", "Change", "Comparison", "MetricChange", "compare"]

METRICS: Mapping[str, int] = {
    "objective": 1,
    THROUGHPUT: 1,
    "ttft_s": -1,
    "tpot_s": -1,
    "end_to_end_s": -1,
    "memory_bytes": -1,
}
"""1: better the larger it is."""
KEY = (*DIMENSIONS, "serving", *POOL_COLUMNS)
MOST_SHOWN = 20
Places = NDArray[np.int64]
_WIDEST = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One strategy in both runs."""

    strategy: str
    metric: str
    base: float
    now: float
    worse: float
    """Relative change for the worse; below 0 for the better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricChange:
    """One metric over the strategies that are feasible in both runs."""

    metric: str
    worse: int
    better: int
    same: int
    median: float | None
    """Of the relative changes for the worse; None where there are none to compare."""
    worst: tuple[Change, ...]
    """The largest changes for the worse beyond the tolerance, largest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run against a base."""

    runs: tuple[RunRow, RunRow]
    """The base first."""
    tolerance: float
    both: int
    """Strategies that both runs hold."""
    base_only: int
    now_only: int
    lost: int
    """Feasible in the base and no more."""
    won: int
    """Feasible now and not in the base."""
    lost_by: Mapping[str, int]
    """Those that were lost, by the limit that refuses them, most first."""
    lost_best: tuple[str, ...]
    """The best of the base among them."""
    same_best: bool
    """Whether the best strategy is the same."""
    metrics: tuple[MetricChange, ...]

    @property
    def regressed(self) -> bool:
        """Whether anything is worse."""
        return self.lost > 0 or any(one.worse for one in self.metrics)


def compare(base: Run, now: Run, tolerance: float) -> Comparison:
    """`now` against `base`; `tolerance` is relative, at least 0.

    `InputError` where the runs have no strategy in common.
    """
    old, new, counts = _matched(base.frame, now.frame)
    if not len(old):
        raise InputError(
            "runs that are compared have strategies in common",
            got=f"{base.path} and {now.path} have none",
            hint="without --against they are shown side by side",
        )
    was = base.frame["feasible"].to_numpy(bool)[old]
    holds = now.frame["feasible"].to_numpy(bool)[new]
    lost = was & ~holds
    limits = now.frame["limit"].astype(str).to_numpy()[new[lost]]
    names, many = np.unique(np.where(limits == "", "unknown", limits), return_counts=True)
    by_limit = sorted(zip(names.tolist(), many.tolist(), strict=True), key=lambda one: -one[1])
    first, second = side_by_side([base, now])
    pairs = old[was & holds], new[was & holds]
    return Comparison(
        runs=(first, second),
        tolerance=tolerance,
        both=len(old),
        base_only=counts[0] - len(old),
        now_only=counts[1] - len(old),
        lost=int(lost.sum()),
        won=int((~was & holds).sum()),
        lost_by={str(name): int(count) for name, count in by_limit},
        lost_best=tuple(_best_names(base.frame, old[lost])),
        same_best=_same_best(first, second),
        metrics=tuple(_metric(base.frame, now.frame, pairs, name, tolerance) for name in METRICS),
    )


def _same_best(first: RunRow, second: RunRow) -> bool:
    if first.best is None or second.best is None:
        return first.best is second.best
    return all(first.best[name] == second.best[name] for name in KEY)


def _best_names(frame: DataFrame, places: Places) -> Iterator[str]:
    """Names of the rows of the largest objectives."""
    objective = frame["objective"].to_numpy(float)[places]
    for place in places[np.argsort(-objective, kind="stable")][:MOST_SHOWN].tolist():
        yield row_name(row_at(frame, place))


def _metric(
    base: DataFrame, now: DataFrame, pairs: tuple[Places, Places], name: str, tolerance: float
) -> MetricChange:
    """One metric of the strategies that are feasible in both."""
    before, after = (
        frame[name].to_numpy(float)[places]
        for frame, places in zip((base, now), pairs, strict=True)
    )
    scale = np.where(before == 0.0, 1.0, np.abs(before))
    worse = (before - after) / scale if METRICS[name] > 0 else (after - before) / scale
    order = np.argsort(-worse, kind="stable")[:MOST_SHOWN]
    shown = [place for place in order.tolist() if worse[place] > tolerance]
    down, up = int((worse > tolerance).sum()), int((worse < -tolerance).sum())
    return MetricChange(
        metric=name,
        worse=down,
        better=up,
        same=len(worse) - down - up,
        median=float(np.median(worse)) if len(worse) else None,
        worst=tuple(
            Change(
                strategy=row_name(row_at(now, int(pairs[1][place]))),
                metric=name,
                base=float(before[place]),
                now=float(after[place]),
                worse=float(worse[place]),
            )
            for place in shown
        ),
    )


def _matched(base: DataFrame, now: DataFrame) -> tuple[Places, Places, tuple[int, int]]:
    """Places of the same strategies in both tables, and how many different ones each holds."""
    keys = _keys(base, now)
    found = []
    for frame, key in zip((base, now), (keys[: len(base)], keys[len(base) :]), strict=True):
        best = _best_order(frame)
        different, first = np.unique(key[best], return_index=True)
        found.append((different, best[first]))
    (one, at_one), (two, at_two) = found
    _, here, there = np.intersect1d(one, two, assume_unique=True, return_indices=True)
    return at_one[here], at_two[there], (len(one), len(two))


def _best_order(frame: DataFrame) -> Places:
    """Feasible rows before others, largest objective first."""
    feasible = frame["feasible"].to_numpy(bool)
    objective = np.where(feasible, frame["objective"].to_numpy(float), -np.inf)
    return np.lexsort((frame["rank"].to_numpy(), -objective, ~feasible))


def _keys(base: DataFrame, now: DataFrame) -> Places:
    """A number for each row of one table and then the other; equal where strategies are."""
    import pandas as pd

    keys = np.zeros(len(base) + len(now), dtype=np.int64)
    width = 1
    for name in KEY:
        # categories of two files differ, their words do not
        parts = [frame[name] for frame in (base, now)]
        if isinstance(parts[0].dtype, pd.CategoricalDtype):
            united = pd.api.types.union_categoricals(parts)
            codes, count = united.codes.astype(np.int64), len(united.categories)
        else:
            codes, values = pd.factorize(np.concatenate([part.to_numpy() for part in parts]))
            count = len(values)
        if count < 2:  # noqa: PLR2004
            continue
        if width * count >= _WIDEST:
            present, keys = np.unique(keys, return_inverse=True)
            width = len(present)
        keys, width = keys * count + codes, width * count
    return keys
