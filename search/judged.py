"""Which strategies are judged by limits that are dear to price (`search.seen`): those that matter.

Of a priced grid the strategies that keep every other limit are open: what requests see of them is
not known, but what it is at least is. Where that breaks a limit they are refused unjudged. All that
decides between the others is known, so that the best are judged first:

  best       where an open one may beat what the search has found, the best ones are judged until
             one holds, or none of those left can beat it: the same best as if all were judged
  firsts     the best of each of so many layouts, and of every choice, likewise
  strategies so many of the best, likewise
  front      open ones that no one which holds beats in throughput and TPOT, front behind front,
             until there are none: the same Pareto front as if all were judged

Open ones that are left are not needed. They are not kept, and count as pruned, by `queue`. Where
nothing holds none are left, and the nearest miss is told (`nearest`): the strategy whose worst
limit is missed by the smallest factor, as if all were judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.models.parallel import Parallelism
from shardplan.search.evaluate import LIMITS, LayoutScorer, Scores
from shardplan.search.kept import Kept, kept_at, pareto_mask
from shardplan.search.plan_request import Request
from shardplan.search.robust import FULL, QUICK
from shardplan.search.seen import Sight, missed, seen, seen_at_least, seen_names, too_slow
from shardplan.search.space import Choice

__all__ = ["Judge", "Pending", "Wanted", "wanted_of"]

_FIRST, _MOST, _TOGETHER = 8, 512, 2048
"""Strategies of a grid that are judged at once: at first, and later; of all grids, later."""
_APART = 8
"""Grids of which each is priced by its own model; more are stacked."""
Indices = NDArray[np.int64]


class Wanted(NamedTuple):
    """What a search tells of strategies beside the best."""

    layouts: int = 5
    """Whose best strategies are told."""
    strategies: int = 1
    """The best of all."""
    front: bool = True
    """The Pareto front, too."""


def wanted_of(request: Request, top: int) -> Wanted:
    """What a question tells: `top` layouts beside the best, and what is studied or simulated."""
    contenders = FULL.contenders if request.robust else QUICK.contenders
    return Wanted(max(top, contenders, Wanted().layouts) + 1, request.refine_simulated + 1)


@dataclass(slots=True, kw_only=True)
class Pending:
    """A priced grid; what is found is written into its scores."""

    scorer: LayoutScorer
    choice: Choice
    batch: Array
    """As the grid has it, and its step sizes; they broadcast."""
    chunk: Array
    scores: Scores
    open: NDArray[np.bool_]
    """Flat: which strategies are not judged."""
    far: Array
    """Flat: by which factor the worst of these limits is missed at least; NaN where another is."""
    best: float = -math.inf
    """Largest objective of those that hold."""

    @classmethod
    def of(
        cls, scorer: LayoutScorer, choice: Choice, grid: tuple[Array, Array], scores: Scores
    ) -> Pending:
        """Of scores without what is dear."""
        question, open_ = scorer.question, scores.feasible.ravel().copy()
        opened = scores.opened(seen_names(question))
        least = seen_at_least(scorer, choice, grid, scores.steady)
        wide = {
            name: np.broadcast_to(one, scores.limit.shape).ravel() for name, one in least.items()
        }
        far = np.maximum.reduce([*missed(question, wide).values()])
        slow = {name: one & open_ for name, one in too_slow(question, wide).items()}
        _refuse(opened.limit.reshape(-1), slow)
        return cls(
            scorer=scorer,
            choice=choice,
            batch=grid[0],
            chunk=grid[1],
            scores=opened,
            open=np.logical_and.reduce([open_, *(~one for one in slow.values())]),
            far=np.where(open_, far, np.nan),
        )

    def column(self, name: str) -> Array:
        """Of all strategies, flat."""
        return self.scores.columns[name].reshape(-1)

    @property
    def holds(self) -> NDArray[np.bool_]:
        """Flat: which strategies are known to keep every limit."""
        return np.asarray((self.scores.limit.reshape(-1) < 0) & ~self.open)

    @property
    def refused(self) -> tuple[Array, Array]:
        """Slots and step sizes of those that break one of these limits alone."""
        sight = self.sight(np.flatnonzero(self.missing))
        return sight.batch, sight.chunk

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Flat: which strategies break one of these limits alone."""
        return np.asarray(~np.isnan(self.far) & ~self.open & ~self.holds)

    @property
    def most(self) -> float:
        """No strategy that may hold has a larger objective."""
        return max(self.best, float(self.column("objective")[self.open].max(initial=-math.inf)))

    def sight(self, places: Indices) -> Sight:
        """Strategies at flat places of the grid."""
        shape, grid = self.scores.limit.shape, (self.batch, self.chunk)
        slots, tokens = (np.broadcast_to(one, shape).ravel()[places] for one in grid)
        return Sight(self.scorer, self.choice, slots, tokens)

    def seek(self, above: float, until_s: float = math.inf) -> None:
        """Find the best that holds, where that has an objective above a number.

        `until_s`: reading of `time.perf_counter` after which nothing else is judged.
        """
        objective, memory = self.column("objective"), self.column("memory_bytes")
        able = np.flatnonzero(self.open & (objective > max(above, self.best)))
        able = able[np.lexsort((memory[able], -objective[able]))]
        size = _FIRST
        while able.size and objective[able[0]] > self.best and time.perf_counter() < until_s:
            _judge([(self, able[:size])])
            able, size = able[size:], min(2 * size, _MOST)


def _judge(asked: Sequence[tuple[Pending, Indices]]) -> None:
    """Write what requests see of strategies at flat places, and which limit that breaks."""
    sights = [one.sight(places) for one, places in asked]
    apart = len(asked) <= _APART
    found = [told for one in sights for told in seen([one])] if apart else seen(sights)
    for (one, places), columns in zip(asked, found, strict=True):
        limit = one.scores.limit.reshape(-1)
        for name, values in columns.items():
            one.column(name)[places] = values
        question, own = one.scorer.question, limit[places]
        _refuse(own, too_slow(question, columns))
        limit[places] = own
        one.far[places] = np.maximum.reduce([*missed(question, columns).values()])
        one.open[places] = False
        held = places[limit[places] < 0]
        one.best = max(one.best, float(one.column("objective")[held].max(initial=-math.inf)))


def _refuse(limit: NDArray[np.int8], slow: Mapping[str, NDArray[np.bool_]]) -> None:
    """Write the first limit that each of `[n]` strategies breaks."""
    for name in reversed([each for each in LIMITS if each in slow]):
        limit[slow[name]] = LIMITS.index(name)


@dataclass(slots=True)
class Judge:
    """What a search has found to hold."""

    wanted: Wanted
    until_s: float = math.inf
    """Reading of `time.perf_counter` after which what is left stays open."""
    layouts: dict[Parallelism, float] = field(default_factory=dict)
    """The largest objective of each, however its layers are cut."""
    choices: dict[Choice, float] = field(default_factory=dict)
    objectives: Array = field(default_factory=lambda: np.zeros(0))
    """Of the best strategies."""
    front: tuple[Array, Array] = field(default_factory=lambda: (np.zeros(0), np.zeros(0)))
    """Throughput and TPOT that no other beats."""
    missing: list[tuple[Sight, Array]] = field(default_factory=list)
    """Strategies that break these limits alone, and `Pending.far` of each, until one holds."""

    def settle(self, grids: Sequence[Pending]) -> None:
        """Judge all that is told of some grids."""
        for one in sorted(grids, key=lambda each: -each.most):
            known = min(_nth(self.layouts.values(), self.wanted.layouts), self._of(one.choice))
            one.seek(known, self.until_s)
            layout = replace(one.scorer.parallel, stage_layers=())
            self.layouts[layout] = max(self.layouts.get(layout, -math.inf), one.best)
            self.choices[one.choice] = max(self._of(one.choice), one.best)
        if self.wanted.strategies > 1:
            self._settle_best(grids)
        if self.wanted.front:
            self._settle_front(grids)
        self._note_missing(grids)

    def _note_missing(self, grids: Sequence[Pending]) -> None:
        if any(best > -math.inf for best in self.choices.values()):
            self.missing.clear()
            return
        for one in grids:
            places = np.flatnonzero(one.missing)
            if places.size:
                self.missing.append((one.sight(places), one.far[places]))

    def nearest(self) -> tuple[str, Kept] | None:
        """(column, strategy) of the nearest miss, where nothing holds: which limit it misses most.

        Judged in the order of what they miss at least, until none left can miss by less.
        """
        least = np.concatenate([far for _, far in self.missing] or [np.zeros(0)])
        grid = np.repeat(np.arange(len(self.missing)), [far.size for _, far in self.missing])
        place = np.concatenate([np.arange(far.size) for _, far in self.missing] or [grid])
        order, size, best, found = np.argsort(least, kind="stable"), _FIRST, math.inf, None
        while order.size and least[order[0]] < best and not (found and self.late):
            now = order[:size]
            asked = [(at, place[now[grid[now] == at]]) for at in np.unique(grid[now]).tolist()]
            sights = [_some(self.missing[at][0], places) for at, places in asked]
            for sight, columns in zip(sights, seen(sights), strict=True):
                told = missed(sight.scorer.question, columns)
                far = np.maximum.reduce([*told.values()])
                one = int(np.argmin(far))
                if far[one] < best:
                    best = float(far[one])
                    found = max(told, key=lambda name: told[name][one]), sight, one
            order, size = order[size:], min(2 * size, _TOGETHER)
        return None if found is None else (found[0], _kept(_some(found[1], np.array([found[2]]))))

    @property
    def late(self) -> bool:
        """Whether the time has passed."""
        return time.perf_counter() >= self.until_s

    def _of(self, choice: Choice) -> float:
        return self.choices.get(choice, -math.inf)

    def _settle_best(self, grids: Sequence[Pending]) -> None:
        count = self.wanted.strategies
        for one in sorted(grids, key=lambda each: -each.most):
            objective = one.column("objective")
            held = objective[one.holds]
            while True:
                every = np.concatenate([self.objectives, held])
                able = np.flatnonzero(one.open & (objective > _nth(every, count)))
                if not able.size or self.late:
                    break
                _judge([(one, able[np.argsort(-objective[able], kind="stable")[:count]])])
                held = objective[one.holds]
            self.objectives = np.sort(every)[::-1][:count]

    def _settle_front(self, grids: Sequence[Pending]) -> None:
        layers = 1
        while True:
            self._extend_front(grids)
            left = [_unbeaten(one, self.front) for one in grids]
            which = np.repeat(np.arange(len(grids)), [one.size for one in left])
            if not which.size or self.late:
                return
            place = np.concatenate(left)
            gain, cost = (
                np.concatenate([one.column(name)[at] for one, at in zip(grids, left, strict=True)])
                for name in _TRADED
            )
            first = _fronts(gain, cost, layers)
            _judge(
                [
                    (one, place[first & (which == at)])
                    for at, one in enumerate(grids)
                    if (first & (which == at)).any()
                ]
            )
            layers *= 4

    def _extend_front(self, grids: Sequence[Pending]) -> None:
        held = [tuple(one.column(name)[one.holds] for name in _TRADED) for one in grids]
        gain, cost = (np.concatenate(parts) for parts in zip(self.front, *held, strict=True))
        first = pareto_mask(gain, cost)
        self.front = gain[first], cost[first]


def _some(sight: Sight, places: Indices) -> Sight:
    return sight._replace(batch=sight.batch[places], chunk=sight.chunk[places])


def _kept(one: Sight) -> Kept:
    """The only strategy, as a search remembers it."""
    scores = one.scorer.score(one.choice, one.batch, one.chunk)
    grid = one.batch, one.chunk
    return kept_at(scores, one.scorer.parallel, one.choice, *grid, np.zeros(1, dtype=np.int64)).one(
        0
    )


_TRADED = ("output_tokens_per_s", "tpot_s")


def _nth(values: Iterable[float], count: int) -> float:
    """The `count`-th largest; -inf of fewer."""
    found = sorted(values, reverse=True)
    return float(found[count - 1]) if len(found) >= count else -math.inf


def _unbeaten(one: Pending, front: tuple[Array, Array]) -> Indices:
    """Open strategies that nothing of a front beats or equals in both."""
    able = np.flatnonzero(one.open)
    gain, cost = (one.column(name)[able] for name in _TRADED)
    order = np.argsort(front[1], kind="stable")
    best = np.concatenate([[-math.inf], np.maximum.accumulate(front[0][order])])
    return able[gain > best[np.searchsorted(front[1][order], cost, side="right")]]


def _fronts(gain: Array, cost: Array, layers: int) -> NDArray[np.bool_]:
    """The points that none beats, those that only these beat, and so on."""
    found, left = np.zeros(gain.size, dtype=bool), np.arange(gain.size)
    for _ in range(layers):
        first = pareto_mask(gain[left], cost[left])
        found[left[first]] = True
        left = left[~first]
    return found
