"""What a search remembers: strategies worth keeping, and what became of the others.

Of every grid the best strategies are kept, the Pareto points of throughput and TPOT, and a few
refused ones; of every limit the strategy that misses it by the least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.models.parallel import Parallelism
from shardplan.search.evaluate import LIMITS, Scores
from shardplan.search.seen import AT_RATE
from shardplan.search.space import Choice, Space

__all__ = [
    "QUEUE",
    "Kept",
    "KeptGrid",
    "KeptTable",
    "Outcome",
    "Tally",
    "column_of",
    "count_refused",
    "each_of",
    "feasible_of",
    "first_of_each",
    "keep_best",
    "kept_at",
    "note_nearest",
    "note_one",
    "pareto_mask",
    "rank_key",
]

KEPT_PER_GRID = 24
QUEUE = "queue"
Indices = NDArray[np.int64]
_Value = TypeVar("_Value")


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


class KeptGrid(NamedTuple):
    """Strategies of one grid that are remembered, in its order; arrays `[strategies]`."""

    parallel: Parallelism
    choice: Choice
    batch: Array
    chunk: Array
    limit: NDArray[np.int8]
    columns: Mapping[str, Array]

    def one(self, place: int) -> Kept:
        """One of them."""
        return Kept(
            parallel=self.parallel,
            choice=self.choice,
            batch=int(self.batch[place]),
            chunk=int(self.chunk[place]),
            limit=int(self.limit[place]),
            columns={name: float(values[place]) for name, values in self.columns.items()},
        )


class KeptTable(Sequence[Kept]):
    """Remembered strategies of many grids, the best first; each is made when it is asked for."""

    def __init__(self, grids: Sequence[KeptGrid], grid: Indices, place: Indices) -> None:
        self._grids, self._grid, self._place = grids, grid, place
        self._made: dict[int, Kept] = {}

    @classmethod
    def ranked(cls, grids: Sequence[KeptGrid], turns: Sequence[int]) -> KeptTable:
        """By `rank_key`, then by the `turns` of their grids, then as they come."""
        sizes = [one.limit.size for one in grids]
        grid = np.repeat(np.arange(len(grids)), sizes)
        place = np.concatenate([np.arange(size) for size in sizes] or [np.zeros(0, dtype=np.int64)])
        table = cls(grids, grid, place)
        keys = (np.asarray(turns, dtype=np.int64)[grid], table.column("memory_bytes"))
        order = np.lexsort((*keys, -table.column("objective"), ~table.feasible))
        return cls(grids, grid[order], place[order])

    def __len__(self) -> int:
        return self._grid.size

    @overload
    def __getitem__(self, at: int) -> Kept: ...
    @overload
    def __getitem__(self, at: slice) -> KeptTable: ...
    def __getitem__(self, at: int | slice) -> Kept | KeptTable:
        if isinstance(at, slice):
            return KeptTable(self._grids, self._grid[at], self._place[at])
        index = range(len(self))[at]
        if index not in self._made:
            self._made[index] = self._grids[self._grid[index]].one(self._place[index])
        return self._made[index]

    @property
    def feasible(self) -> NDArray[np.bool_]:
        """Which of them satisfy every limit."""
        return np.asarray(self._gather([one.limit for one in self._grids]) < 0)

    def column(self, name: str) -> Array:
        """One column of all, in their order; `batch`, `chunk` and `limit` too."""
        own = name in KeptGrid._fields
        return self._gather([getattr(g, name) if own else g.columns[name] for g in self._grids])

    def each(self, what: Callable[[KeptGrid], _Value]) -> list[_Value]:
        """`what` is the same of all of a grid, of each, in their order."""
        used, where = np.unique(self._grid, return_inverse=True)
        values = [what(self._grids[grid]) for grid in used]
        return [values[at] for at in where.tolist()]

    def _gather(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        if not parts:
            return np.zeros(0)
        start = np.cumsum([0, *(one.size for one in parts)])
        return np.asarray(np.concatenate(parts)[start[self._grid] + self._place])

    def firsts(self) -> Iterator[Kept]:
        """The first of every grid: nothing of its layout, cut and choice stands before it."""
        for at in np.sort(np.unique(self._grid, return_index=True)[1]).tolist():
            yield self[at]


def first_of_each(kept: Sequence[Kept]) -> Iterator[Kept]:
    """The first of every layout, cut and choice, and perhaps further ones, in order."""
    return kept.firsts() if isinstance(kept, KeptTable) else iter(kept)


def feasible_of(kept: Sequence[Kept]) -> Sequence[Kept]:
    """Those that satisfy every limit: they stand first."""
    if isinstance(kept, KeptTable):
        return kept[: int(np.count_nonzero(kept.feasible))]
    return [one for one in kept if one.feasible]


def column_of(kept: Sequence[Kept], name: str) -> Array:
    """One column of remembered strategies; `batch`, `chunk` and `limit` too."""
    if isinstance(kept, KeptTable):
        return kept.column(name)
    own = name in KeptGrid._fields
    return np.array([getattr(one, name) if own else one.columns[name] for one in kept])


def each_of(kept: Sequence[Kept], what: Callable[[Kept | KeptGrid], _Value]) -> list[_Value]:
    """Of every strategy something that its layout, cut and choice decide."""
    return kept.each(what) if isinstance(kept, KeptTable) else [what(one) for one in kept]


@dataclass(slots=True)
class Tally:
    """What happened to the strategies that were looked at."""

    applied: int = 0
    """Layouts that were applied to the graph."""
    evaluated: int = 0
    pruned_by: Counter[str] = field(default_factory=Counter)
    infeasible: Counter[str] = field(default_factory=Counter)
    nearest: dict[str, Kept] = field(default_factory=dict)
    """By limit, the strategy that breaks only it by the least; `QUEUE`: of TTFT, at a rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one search over one space."""

    space: Space
    best: Kept | None
    kept: Sequence[Kept]
    """Best first; feasible before infeasible."""
    tally: Tally
    bound: float | None
    """No strategy of the space has a larger objective; None where the engine proves none."""
    wall_s: float
    refused: Mapping[tuple[Parallelism, Choice], tuple[Array, Array]] = field(default_factory=dict)
    """Slots and step sizes of strategies that break only a limit that is dear to price."""

    @property
    def complete(self) -> bool:
        """Whether the best strategy is proven best, or that there is none."""
        if self.best is None:
            return self.bound == -np.inf
        return self.bound is not None and self.bound <= self.best.columns["objective"]


def pareto_mask(gain: Array, cost: Array) -> NDArray[np.bool_]:
    """Points that no other beats in both: more `gain` and less `cost`. Shapes [n].

    Of equal points the first stands for all.
    """
    rough = np.argsort(cost)
    best = np.maximum.accumulate(gain[rough])
    able = np.sort(rough[gain[rough] >= best])  # the front, equal points, and few others
    order = able[np.lexsort((-gain[able], cost[able]))]
    best = np.maximum.accumulate(gain[order])
    before = np.concatenate([[-np.inf], best[:-1]])
    mask = np.zeros(gain.shape, dtype=bool)
    mask[order] = gain[order] > before
    return mask


def rank_key(one: Kept) -> tuple[bool, float, float]:
    """Sorting key: feasible first, larger objective, less memory; the sort is stable."""
    return not one.feasible, -one.columns["objective"], one.columns["memory_bytes"]


def _positions(scores: Scores, known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Flat grid positions worth keeping: the best, the Pareto points, a few refused ones."""
    feasible = scores.feasible.ravel()
    objective = scores.columns["objective"].ravel()
    where = np.flatnonzero(feasible & known)
    if not where.size:
        refused = np.flatnonzero(~feasible)
        return refused[np.argsort(-objective[refused], kind="stable")[:2]]
    front = pareto_mask(
        scores.columns["output_tokens_per_s"].ravel()[where],
        scores.columns["tpot_s"].ravel()[where],
    )
    kept = np.zeros(objective.size, dtype=bool)
    kept[_top(objective, scores.columns["memory_bytes"].ravel(), where, KEPT_PER_GRID)] = True
    kept[where[front]] = True
    return np.flatnonzero(kept)


def _top(
    objective: Array, memory: Array, where: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """The best of the points `where`; of equal ones those of less memory, then the first."""
    if where.size > count:
        own = objective[where]
        least = np.partition(own, where.size - count)[where.size - count]
        where = where[own >= least]
    return where[np.lexsort((memory[where], -objective[where]))[:count]]


def kept_at(
    scores: Scores,
    par: Parallelism,
    choice: Choice,
    batch: Array,
    chunk: Array,
    at: NDArray[np.int64],
) -> KeptGrid:
    """The strategies at flat positions of a grid."""
    shape = scores.limit.shape
    batches, chunks = (np.broadcast_to(one, shape).ravel()[at] for one in (batch, chunk))
    return KeptGrid(
        parallel=par,
        choice=choice,
        batch=batches,
        chunk=chunks,
        limit=scores.limit.ravel()[at],
        columns=scores.at(at),
    )


def keep_best(
    scores: Scores,
    par: Parallelism,
    choice: Choice,
    batch: Array,
    chunk: Array,
    known: NDArray[np.bool_] | None = None,
) -> KeptGrid:
    """The strategies of one grid that are worth remembering.

    `known`, flat: which are judged to the end; others are not kept. None: all.
    """
    known = np.ones(scores.limit.size, dtype=bool) if known is None else known
    return kept_at(scores, par, choice, batch, chunk, _positions(scores, known))


def count_refused(tally: Tally, scores: Scores, unjudged: int = 0) -> None:
    """Count what was priced, and what was refused by each limit; `unjudged`: not to the end."""
    tally.evaluated += scores.limit.size - unjudged
    counts = np.bincount(scores.limit.ravel() + 1, minlength=len(LIMITS) + 1)[1:]
    for name, count in zip(LIMITS, counts.tolist(), strict=True):
        if count:
            tally.infeasible[name] += count


_DISTANCE: Mapping[str, tuple[str, float]] = {
    "memory": ("memory_bytes", 1.0),
    "ttft": ("ttft_s", 1.0),
    QUEUE: (AT_RATE, 1.0),
    "tpot": ("tpot_s", 1.0),
    "ttft_p99": ("ttft_p99_s", 1.0),
    "tpot_p99": ("tpot_p99_s", 1.0),
    "rate": ("requests_per_s", -1.0),
}
"""Column by which a limit is missed, and its sign (smaller is nearer)."""


def _queued(columns: Mapping[str, Any]) -> Any:
    """Whether TTFT was priced at the rate: if it is too long it is so there."""
    return ~np.isnan(columns.get(AT_RATE, np.full(np.shape(columns["ttft_s"]), np.nan)))


def _far(name: str, columns: Mapping[str, Any]) -> Any:
    """By how much a limit is missed: smaller is nearer."""
    column, sign = _DISTANCE[name]
    return columns[column] * sign


def note_nearest(
    tally: Tally,
    scores: Scores,
    par: Parallelism,
    choice: Choice,
    grid: tuple[Array, Array],
    among: NDArray[np.bool_] | None = None,
) -> None:
    """Remember, for each limit, the strategy of this grid that misses it by the least so far.

    `among`, flat: those whose columns tell by how much. None: all.
    """
    limit = scores.limit.ravel() if among is None else np.where(among, scores.limit.ravel(), -1)
    for name in (each for each in _DISTANCE if each in LIMITS):
        missed = np.flatnonzero(limit == LIMITS.index(name))
        if not missed.size:
            continue
        values = _far(name, scores.columns).ravel()
        at = int(missed[np.argmin(values[missed])])
        known = tally.nearest.get(name)
        if known is not None and values[at] >= _far(name, known.columns):
            continue
        note_one(tally, kept_at(scores, par, choice, *grid, np.array([at])).one(0))


def note_one(tally: Tally, one: Kept) -> None:
    """Remember a refused strategy where none misses the same limit by less."""
    name = LIMITS[one.limit]
    if name == "ttft" and _queued(one.columns):
        name = QUEUE
    known = tally.nearest.get(name)
    if name not in _DISTANCE:
        return
    if known is None or _far(name, one.columns) < _far(name, known.columns):
        tally.nearest[name] = one
