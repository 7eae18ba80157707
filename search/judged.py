"""Which strategies are judged by limits that are dear to price (`search.seen`): those that matter.

Of a priced grid the strategies that keep every other limit are open: what requests see of them is
not known. All that decides between strategies is known, though, so that the best are judged first:

  best       where an open one may beat what the search has found, the best ones are judged until
             one holds, or none of those left can beat it: the same best as if all were judged
  firsts     the best of each of so many layouts, and of every choice, likewise
  strategies so many of the best, likewise
  front      open ones that no one which holds beats in throughput and TPOT, front behind front,
             until there are none: the same Pareto front as if all were judged

Open ones that are left are not needed. They are not kept, and count as pruned, by `queue`. Where
nothing holds all are judged, so that the nearest miss of each limit is known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.models.parallel import Parallelism
from shardplan.search.evaluate import LIMITS, LayoutScorer, Question, Scores
from shardplan.search.kept import pareto_mask
from shardplan.search.plan_request import Request
from shardplan.search.robust import FULL, QUICK
from shardplan.search.seen import Sight, seen, seen_names, too_slow
from shardplan.search.space import Choice

__all__ = ["Judge", "Pending", "Wanted", "wanted_of"]

_FIRST, _MOST = 8, 512
"""Strategies of a grid that are judged at once: at first, and later."""
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
    best: float = -math.inf
    """Largest objective of those that hold."""

    @classmethod
    def of(
        cls, scorer: LayoutScorer, choice: Choice, grid: tuple[Array, Array], scores: Scores
    ) -> Pending:
        """Of scores without what is dear."""
        return cls(
            scorer=scorer,
            choice=choice,
            batch=grid[0],
            chunk=grid[1],
            scores=scores.opened(seen_names(scorer.question)),
            open=scores.feasible.ravel().copy(),
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
        """Slots and step sizes of those that were judged and broke a limit."""
        told = ~np.isnan(np.stack([self.column(name) for name in seen_names(self._question)]))
        sight = self.sight(np.flatnonzero(told.any(axis=0) & ~self.holds))
        return sight.batch, sight.chunk

    @property
    def _question(self) -> Question:
        return self.scorer.question

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
        slow = too_slow(one.scorer.question, columns)
        for name in reversed([each for each in LIMITS if each in slow]):
            limit[places[slow[name]]] = LIMITS.index(name)
        one.open[places] = False
        held = places[limit[places] < 0]
        one.best = max(one.best, float(one.column("objective")[held].max(initial=-math.inf)))


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
