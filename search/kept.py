"""What a search remembers: strategies worth keeping, and what became of the others.

Of every grid the best strategies are kept, the Pareto points of throughput and TPOT, and a few
refused ones; of every limit the strategy that misses it by the least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.models.parallel import Parallelism
from shardplan.search.evaluate import LIMITS, Scores
from shardplan.search.space import Choice, Space

__all__ = [
    "Kept",
    "Outcome",
    "Tally",
    "count_refused",
    "keep_best",
    "note_nearest",
    "pareto_mask",
    "rank_key",
]

KEPT_PER_GRID = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One strategy that is remembered: where it stands and every column of its score."""

    parallel: Parallelism
    choice: Choice
    batch: int
    chunk: int
    limit: int
    columns: Mapping[str, float]

    @property
    def feasible(self) -> bool:
        """Whether it satisfies every limit."""
        return self.limit < 0


@dataclass(slots=True)
class Tally:
    """What happened to the strategies that were looked at."""

    evaluated: int = 0
    pruned_by: Counter[str] = field(default_factory=Counter)
    infeasible: Counter[str] = field(default_factory=Counter)
    nearest: dict[str, Kept] = field(default_factory=dict)
    """By limit, the strategy that breaks only it by the least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one search over one space."""

    space: Space
    best: Kept | None
    kept: tuple[Kept, ...]
    """Best first; feasible before infeasible."""
    tally: Tally
    bound: float | None
    """No strategy of the space has a larger objective; None where the engine proves none."""
    wall_s: float

    @property
    def complete(self) -> bool:
        """Whether the best strategy is proven best, or that there is none."""
        if self.best is None:
            return self.bound == -np.inf
        return self.bound is not None and self.bound <= self.best.columns["objective"]


def pareto_mask(gain: Array, cost: Array) -> NDArray[np.bool_]:
    """Points that no other beats in both: more `gain` and less `cost`. Shapes [n]."""
    order = np.lexsort((-gain, cost))
    best = np.maximum.accumulate(gain[order])
    before = np.concatenate([[-np.inf], best[:-1]])
    mask = np.zeros(gain.shape, dtype=bool)
    mask[order] = gain[order] > before
    return mask


def rank_key(one: Kept) -> tuple[bool, float, float]:
    """Sorting key: feasible first, larger objective, less memory; the sort is stable."""
    return not one.feasible, -one.columns["objective"], one.columns["memory_bytes"]


def _positions(scores: Scores) -> NDArray[np.int64]:
    """Flat grid positions worth keeping: the best, the Pareto points, a few refused ones."""
    feasible = scores.feasible.ravel()
    objective = scores.columns["objective"].ravel()
    where = np.flatnonzero(feasible)
    if not where.size:
        refused = np.flatnonzero(~feasible)
        return refused[np.argsort(-objective[refused], kind="stable")[:2]]
    memory = scores.columns["memory_bytes"].ravel()
    top = where[np.lexsort((memory[where], -objective[where]))[:KEPT_PER_GRID]]
    front = pareto_mask(
        scores.columns["output_tokens_per_s"].ravel()[where],
        scores.columns["tpot_s"].ravel()[where],
    )
    kept = np.zeros(objective.size, dtype=bool)
    kept[top] = True
    kept[where[front]] = True
    return np.flatnonzero(kept)


def keep_best(
    scores: Scores, par: Parallelism, choice: Choice, batch: Array, chunk: Array
) -> list[Kept]:
    """The strategies of one grid that are worth remembering."""
    at = np.unravel_index(_positions(scores), scores.limit.shape)
    batches, chunks = (np.broadcast_to(g, scores.limit.shape)[at].tolist() for g in (batch, chunk))
    names = tuple(scores.columns)
    rows = zip(*(values[at].tolist() for values in scores.columns.values()), strict=True)
    return [
        Kept(
            parallel=par,
            choice=choice,
            batch=int(slots),
            chunk=int(tokens),
            limit=limit,
            columns=dict(zip(names, row, strict=True)),
        )
        for slots, tokens, limit, row in zip(
            batches, chunks, scores.limit[at].tolist(), rows, strict=True
        )
    ]


def count_refused(tally: Tally, scores: Scores) -> None:
    """Count what was priced, and what was refused by each limit."""
    tally.evaluated += scores.limit.size
    counts = np.bincount(scores.limit.ravel() + 1, minlength=len(LIMITS) + 1)[1:]
    for name, count in zip(LIMITS, counts.tolist(), strict=True):
        if count:
            tally.infeasible[name] += count


_DISTANCE: Mapping[str, tuple[str, float]] = {
    "memory": ("memory_bytes", 1.0),
    "ttft": ("ttft_s", 1.0),
    "tpot": ("tpot_s", 1.0),
    "rate": ("requests_per_s", -1.0),
}
"""Column by which a limit is missed, and its sign (smaller is nearer)."""


def note_nearest(
    tally: Tally, scores: Scores, par: Parallelism, choice: Choice, grid: tuple[Array, Array]
) -> None:
    """Remember, for each limit, the strategy of this grid that misses it by the least so far."""
    limit = scores.limit
    for name, (column, sign) in _DISTANCE.items():
        missed = np.flatnonzero(limit.ravel() == LIMITS.index(name))
        if not missed.size:
            continue
        values = scores.columns[column].ravel() * sign
        at = int(missed[np.argmin(values[missed])])
        known = tally.nearest.get(name)
        if known is not None and values[at] >= known.columns[column] * sign:
            continue
        one = Scores(
            columns={n: v.ravel()[at : at + 1] for n, v in scores.columns.items()},
            limit=limit.ravel()[at : at + 1],
        )
        batch, chunk = (np.broadcast_to(g, limit.shape).ravel()[at : at + 1] for g in grid)
        tally.nearest[name] = keep_best(one, par, choice, batch, chunk)[0]
