"""The exact search: every strategy of the space, priced or provably not needed.

For every legal layout (applied once) and every choice that its switches allow, in a fixed order:
  1. a bound: if one slot with the smallest step does not fit, no grid point of it does (memory
     grows with batch and chunk), so its whole grid is pruned unpriced (`memory`);
  2. otherwise the whole grid is priced at once (`LayoutScorer.score`).
The best feasible strategy is the optimum of the space: bound equals objective and the gap is 0.
With a time limit the layouts not reached are counted as neither evaluated nor pruned, the bound
is unknown and so is the gap.

Ties are broken by less memory, then by the order of the space, never by changing a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.step import Parts
from shardplan.models.parallel import Parallelism
from shardplan.search.evaluate import LIMITS, LayoutScorer, Question, Scores
from shardplan.search.space import Choice, Space

__all__ = ["Kept", "Outcome", "Tally", "keep_best", "pareto_mask", "search_exact"]

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
    complete: bool
    wall_s: float


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
    return np.union1d(top, where[front])


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


def search_exact(
    question: Question,
    space: Space,
    *,
    time_limit_s: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Every strategy of `space`; the optimum, with what is needed to prove and explain it."""
    start = time.perf_counter()
    batch = np.array(space.batches, dtype=np.float64)[:, None]
    chunk = np.array(space.chunks, dtype=np.float64)[None, :]
    tally, kept = Tally(), []
    memo: Memo[Parts] = Memo()
    complete = True
    for index, par in enumerate(space.layouts):
        if time_limit_s is not None and time.perf_counter() - start > time_limit_s:
            complete = False
            break
        memo.make_room()
        scorer = LayoutScorer(question, par, memo)
        for choice in space.choices:
            rule = space.broken_switch(par, choice)
            if rule is not None:
                tally.pruned_by[f"rule {rule}"] += batch.size * chunk.size
                continue
            if scorer.least_bytes(choice) > scorer.ledger.capacity_bytes:
                tally.pruned_by["memory"] += batch.size * chunk.size
                _note_too_big(tally, scorer, choice, space)
                continue
            scores = scorer.score(choice, batch, chunk)
            tally.evaluated += scores.limit.size
            counts = np.bincount(scores.limit.ravel() + 1, minlength=len(LIMITS) + 1)[1:]
            for name, count in zip(LIMITS, counts.tolist(), strict=True):
                if count:
                    tally.infeasible[name] += count
            note_nearest(tally, scores, par, choice, (batch, chunk))
            kept += keep_best(scores, par, choice, batch, chunk)
        if progress is not None:
            progress(index + 1, len(space.layouts))
    for rule, layouts in space.broken.items():
        tally.pruned_by[f"rule {rule}"] += layouts * space.per_layout
    kept.sort(key=rank_key)
    best = kept[0] if kept and kept[0].feasible else None
    return Outcome(
        space=space,
        best=best,
        kept=tuple(kept),
        tally=tally,
        complete=complete,
        wall_s=time.perf_counter() - start,
    )


def _note_too_big(tally: Tally, scorer: LayoutScorer, choice: Choice, space: Space) -> None:
    """Remember the layout that misses the memory by the least, priced at its smallest point."""
    known = tally.nearest.get("memory")
    least = scorer.least_bytes(choice)
    if known is not None and known.columns["memory_bytes"] <= least:
        return
    batch = np.array([float(space.batches[0])])
    chunk = np.array([float(space.chunks[0])])
    scores = scorer.score(choice, batch, chunk)
    tally.nearest["memory"] = keep_best(scores, scorer.parallel, choice, batch, chunk)[0]
