"""Contenders of a search over pools: pairs of instances, priced again with cost groups scaled.

A contender is one layout and choice of either pool. Its points are

    (step size of prefill, prefill instances, slots of decode)    all that fit their memory

with the decode instances that fill the cards; of many counts of prefill instances some are tried
(`_counts`). For the objective `cards` both counts stay as they are. A factor on a cost group scales
the steps of both pools, one on `TRANSFER` the time and the inverse rate of sending caches.
Left out: instances that others dominate at the prices as they are, on other layouts too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.confidence import fact_band
from shardplan.costmodel.cost_groups import HOST, TRANSFER, ScaledModel
from shardplan.costmodel.disagg import Link, link_kind
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.memo import Memo
from shardplan.models.parallel import Parallelism
from shardplan.search.contender import Answers, Deployed, Tuned
from shardplan.search.disagg import DisaggOutcome
from shardplan.search.disagg_combine import Combination
from shardplan.search.disagg_options import Options
from shardplan.search.disagg_pools import Base, priced_columns, scaled_columns
from shardplan.search.disagg_question import (
    POOL_LIMITS,
    DisaggQuestion,
    broken_limits,
    deployments,
    most_beside,
    objective_of,
    prefill_binds,
    rate_beside,
)
from shardplan.search.disagg_space import Pool
from shardplan.search.disagg_sure import Step, role_bands
from shardplan.search.space import Choice, strategy_info

__all__ = ["LIMITS", "PairContender", "pair_contenders"]

LIMITS = ("ttft", "tpot", "rate")
_BLOCK = 2**16
"""Deployments evaluated at once: arrays that stay in a core's cache."""
_MOST_COUNTS = 48
Counts = NDArray[np.int64]
_Known = tuple[dict[Parallelism, Ledger], Memo]
"""What layouts of one pool share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One pool of a contender, ready to be priced at other times of its cost groups."""

    base: Base
    par: Parallelism
    choice: Choice
    pricer: ScaledModel
    option: int
    """Where the search's table has it."""
    columns: Mapping[str, Array]
    """As prices are, over the pool's whole grid."""
    places: Counts
    """Places of the grid that fit the memory."""
    own: int
    """Place of what the search found."""

    @property
    def pool(self) -> Pool:
        """What it is an instance of."""
        return self.base.pool

    def at(self, factors: Mapping[str, Array], places: Counts) -> dict[str, Array]:
        """Columns `[factors or 1, places]`."""
        groups = {*self.pricer.within, HOST}
        scaled = {name: one[:, None] for name, one in factors.items() if name in groups}
        columns = scaled_columns(self.base, self.par, self.choice, self.pricer.at(scaled))
        size = len(self.pool.grid)
        found = {}
        for name, column in columns.items():
            wide = np.atleast_2d(column)
            found[name] = np.broadcast_to(wide, (wide.shape[0], size))[:, places]
        return found

    def words(self, place: int) -> tuple[int, int]:
        """(slots, tokens of a step) at a place of the grid."""
        return (
            int(np.broadcast_to(self.columns["slots"], len(self.pool.grid))[place]),
            int(np.broadcast_to(self.columns["chunk"], len(self.pool.grid))[place]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairContender:
    """A layout and choice of either pool; the interface is that of `contender.Contender`."""

    question: DisaggQuestion
    kept: Combination
    """Its best deployment as the search found it."""
    prefill: Side
    decode: Side
    x: Counts
    """Prefill instances that are tried `[counts]`."""
    y: Counts
    """Decode instances beside them `[counts]`."""

    @property
    def limits(self) -> tuple[str, ...]:
        """Names of limits."""
        return LIMITS

    @property
    def groups(self) -> set[str]:
        """Cost groups that it spends time in."""
        return {*self.prefill.pricer.within, *self.decode.pricer.within, HOST, TRANSFER}

    def objectives(self, factors: Mapping[str, Array]) -> Array:
        """`[factors, points]`; minus infinity where a limit is broken."""
        return self._objectives(factors)

    def _objectives(self, factors: Mapping[str, Array], *, best: bool = False) -> Array:
        """`best`: those that cannot be the best of a factor count as 0."""
        places = self.prefill.places, self.decode.places
        found = [
            np.where(limit < 0, objective, -np.inf)
            for limit, objective, _ in self._blocks(factors, places, self.x, self.y, best=best)
        ]
        count = len(next(iter(factors.values())))
        return np.concatenate(found).reshape(count, -1)

    def tuned(self, factors: Mapping[str, Array]) -> Tuned:
        """Its best point at each of the factors `[factors]`."""
        demand = self.question.demand
        plain = demand.in_flight is None or demand.mean_ttft_s is None
        best = plain and self.question.objective == "throughput"
        return Tuned.of(self._objectives(factors, best=best))

    def own(self, factors: Mapping[str, Array]) -> Array:
        """Objective `[factors]` of the deployment that the search found, as it is."""
        found = [
            np.where(limit < 0, objective, -np.inf).ravel()
            for limit, objective, _ in self._own(factors)
        ]
        return np.concatenate(found)

    def answers(self, factors: Mapping[str, Array]) -> Answers:
        """Of the deployment that the search found; seconds of a request that nothing delays."""
        blocks = list(self._own(factors))
        return Answers(
            np.concatenate([limit.ravel() for limit, _, _ in blocks]),
            np.concatenate([seconds.ravel() for _, _, seconds in blocks]),
        )

    def deployed(self, point: int | None) -> Deployed:
        """A point as the plan writes it; None: what the search found."""
        if point is None:
            x, y = self.kept.prefill_instances, self.kept.decode_instances
            places = self.prefill.own, self.decode.own
        else:
            (first, second), x, y = self.place_of(point)
            places = first, second
        prefill, decode = (
            strategy_info(side.pool.spec, side.par, side.choice, *side.words(place))
            for side, place in zip((self.prefill, self.decode), places, strict=True)
        )
        return Deployed(decode, prefill, x, y)

    def moved(self, places: tuple[int, int], kept: Combination) -> PairContender:
        """The same pair whose deployment is another one, at these places of the grids."""
        return replace(
            self,
            kept=kept,
            prefill=replace(self.prefill, own=places[0]),
            decode=replace(self.decode, own=places[1]),
        )

    def place_of(self, point: int) -> tuple[tuple[int, int], int, int]:
        """((place of prefill's grid, of decode's), prefill instances, decode instances)."""
        shape = self.prefill.places.size, self.x.size, self.decode.places.size
        one, count, two = np.unravel_index(point, shape)
        places = int(self.prefill.places[one]), int(self.decode.places[two])
        return places, int(self.x[count]), int(self.y[count])

    def bands(self) -> dict[str, tuple[float, float]]:
        """The wider of both pools' band of each cost group, and that of a transfer."""
        found: dict[str, tuple[float, float]] = {TRANSFER: fact_band(link_kind())}
        for side in (self.prefill, self.decode):
            step = Step(
                question=self.question,
                pool=side.pool,
                par=side.par,
                choice=side.choice,
                at=float(side.pool.grid[side.own]),
            )
            for group, (low, high) in role_bands(step).items():
                known = found.get(group, (low, high))
                found[group] = min(low, known[0]), max(high, known[1])
        return found

    def _own(self, factors: Mapping[str, Array]) -> Iterator[tuple[Counts, Array, Array]]:
        places = np.array([self.prefill.own]), np.array([self.decode.own])
        kept = self.kept
        x, y = np.array([kept.prefill_instances]), np.array([kept.decode_instances])
        return self._blocks(factors, places, x, y)

    def _blocks(
        self,
        factors: Mapping[str, Array],
        places: tuple[Counts, Counts],
        x: Counts,
        y: Counts,
        *,
        best: bool = False,
    ) -> Iterator[tuple[Counts, Array, Array]]:
        """(limit, objective, seconds of a request) `[some factors, prefill, counts, decode]`."""
        count = len(next(iter(factors.values())))
        size = max(_BLOCK // max(places[0].size * x.size * places[1].size, 1), 1)
        for start in range(0, count, size):
            some = {name: one[start : start + size] for name, one in factors.items()}
            shape = (min(size, count - start), places[0].size, x.size, places[1].size)
            for_all = self._evaluated(some, places, x, y, best=best)
            limit, objective, seconds = (np.broadcast_to(one, shape) for one in for_all)
            yield limit.astype(np.int64), objective, seconds

    def _evaluated(
        self,
        factors: Mapping[str, Array],
        places: tuple[Counts, Counts],
        x: Counts,
        y: Counts,
        *,
        best: bool,
    ) -> tuple[Array, Array, Array]:
        prefill = {
            name: one[:, :, None, None] for name, one in self.prefill.at(factors, places[0]).items()
        }
        decode = {
            name: one[:, None, None, :] for name, one in self.decode.at(factors, places[1]).items()
        }
        slower = factors.get(TRANSFER, np.ones(1))[:, None, None, None]
        question = replace(self.question, link=_slower(self.question.link, slower))
        pools, counts = (prefill, decode), (x[:, None], y[:, None])
        slow, worth = decode["tpot_s"] > question.most_s[1], None
        if best:
            able = ~prefill_binds(question, pools, *counts) & ~slow
            rest = np.where(able, rate_beside(question, pools, *counts), 0.0)
            worth = rest.max(axis=(1, 2, 3), keepdims=True)
        service, given = deployments(question, pools, *counts, worth)
        broken = broken_limits(question, service, pools, *counts)
        few = POOL_LIMITS.index("rate")
        late = (broken > 0) & (broken != few)
        limit = np.where(late, 0, np.where(slow, 1, np.where(broken == few, 2, -1)))
        seconds = given.alone_s + given.later_s
        return limit, objective_of(question, service), seconds


def _slower(link: Link, factor: Array) -> Link:
    """A link whose transfers take `factor` times their time; arrays stand where numbers were."""
    return replace(
        link,
        bytes_per_s=link.bytes_per_s / factor,  # type: ignore[arg-type]  # broadcasts alike
        latency_s=link.latency_s * factor,  # type: ignore[arg-type]
    )


def pair_contenders(outcome: DisaggOutcome, most: int) -> list[PairContender]:
    """The best deployment and those of up to `most` other pairs of layouts and choices."""
    known: tuple[_Known, _Known] = (({}, Memo()), ({}, Memo()))
    bases: dict[object, Base] = {}
    found: dict[object, PairContender] = {}
    tables = outcome.prefill.options, outcome.decode.options
    cards, best = outcome.question.objective == "cards", outcome.kept[0]
    for one in outcome.kept:
        if not one.feasible or (cards and one.columns["spent"] > best.columns["spent"]):
            continue
        key = tuple(
            (options.layout(place), options.choice(place))
            for options, place in zip(tables, (one.prefill, one.decode), strict=True)
        )
        if key not in found:
            found[key] = _contender(outcome, one, known, bases)
        if len(found) > most:
            break
    return list(found.values())


def _contender(
    outcome: DisaggOutcome,
    kept: Combination,
    known: tuple[_Known, _Known],
    bases: dict[object, Base],
) -> PairContender:
    question = outcome.question
    sides = []
    for pool, options, place, (ledgers, memo) in zip(
        (question.prefill, question.decode),
        (outcome.prefill.options, outcome.decode.options),
        (kept.prefill, kept.decode),
        known,
        strict=True,
    ):
        key = (pool.role, options.layout(place))
        if key not in bases:
            bases[key] = Base(pool, options.layout(place), memo, ledgers)
        sides.append(_side(bases[key], options, place))
    x, y = _counts(question, kept, sides[0].par.ranks, sides[1].par.ranks)
    return PairContender(question=question, kept=kept, prefill=sides[0], decode=sides[1], x=x, y=y)


def _side(base: Base, options: Options, place: int) -> Side:
    par, choice = options.way(place), options.choice(place)
    pool = base.pool
    columns = priced_columns(base, par, choice)
    own = np.flatnonzero(np.array(pool.grid) == _on_grid(pool.role, par, options, place))
    fits = np.broadcast_to(columns["free"] >= 0.0, len(pool.grid))
    return Side(
        base=base,
        par=par,
        choice=choice,
        pricer=ScaledModel.of(base.model(choice), pool.cluster),
        option=place,
        columns=columns,
        places=np.flatnonzero(fits),
        own=int(own[0]),
    )


def _on_grid(role: str, par: Parallelism, options: Options, place: int) -> int:
    """The value of the grid that an option stands for."""
    if role == "prefill":
        return int(options.columns["chunk"][place])
    return int(options.columns["slots"][place])


def _counts(
    question: DisaggQuestion, kept: Combination, prefill: int, decode: int
) -> tuple[Counts, Counts]:
    """(x, y): where there are many counts, `_MOST_COUNTS` evenly and those near the one found."""
    own = kept.prefill_instances
    if question.objective == "cards":
        return np.array([own]), np.array([kept.decode_instances])
    left = decode if question.shared else 0
    most = (question.prefill.cards - left) // prefill
    every = np.unique(np.round(np.linspace(1, most, min(most, _MOST_COUNTS))).astype(np.int64))
    near = np.arange(max(own - 4, 1), min(own + 4, most) + 1)
    x = np.union1d(every, near)
    return x, most_beside(question, np.asarray(float(decode)), x, float(prefill))
