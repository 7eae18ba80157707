"""The exact search over prefill and decode pools: every pair of instances, every count of each.

    price either pool -> drop what is dominated -> pairs -> counts -> the best deployment

The certificate counts combinations: a strategy of either pool and both counts. Each is ruled out
by the first of: a rule, the memory or a limit of its prefill instance; the same of its decode
instance; a rule of the pair; a dominated option; counts that others stand for. The rest is priced.
Every step keeps the best objective that satisfies the limits (`disagg_pools`, `disagg_combine`),
so the best of what is priced is the optimum of the space and the gap is 0. With a time limit both
pools are priced side by side for most of it, then pairs are evaluated; what is not reached is
bounded (`disagg_bounds`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.ledger import Ledger
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg_bounds import floor_of, most_of, most_unreached
from shardplan.search.disagg_combine import Combination, DisaggQuestion, DisaggTally, combine
from shardplan.search.disagg_dominance import undominated, worth_another_look
from shardplan.search.disagg_options import Options, Priced
from shardplan.search.disagg_pools import PoolPricing
from shardplan.search.disagg_space import (
    PairKey,
    PairRule,
    Pool,
    count_pairs,
    pair_key,
    pair_table,
)
from shardplan.search.legality import first_broken_pair_rule

__all__ = ["DisaggOutcome", "search_disagg"]

Keys = dict[PairKey, int]
_ALL = slice(None)
_PRICING = 0.7
"""Share of a time limit after which no other layout is priced: the rest is for their pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DisaggOutcome:
    """The options that were combined, the best deployments, and the certificate's sums."""

    question: DisaggQuestion
    prefill: Priced
    decode: Priced
    best: Combination | None
    kept: tuple[Combination, ...]
    """Best first, one for each pair of options; feasible before infeasible."""
    space_size: int
    tally: DisaggTally
    unreached: float
    """Most that a deployment can do which the time limit left out, -inf where none was; of the
    objective `cards` minus the fewest cards."""
    wall_s: float

    @property
    def complete(self) -> bool:
        """Whether the best deployment is proven best, or that there is none."""
        if self.best is None:
            return self.unreached == -math.inf
        worth = self.best.worth(self.question.objective)
        if self.question.objective == "cards":  # as many may still serve more
            return self.unreached < worth
        return self.unreached <= worth

    @property
    def bound(self) -> float | None:
        """No deployment has a larger objective; None where fewer cards may do."""
        if self.best is None:
            return None
        if self.question.objective == "cards":
            return self.best.columns["objective"] if self.complete else None
        return max(self.best.columns["objective"], self.unreached)


@dataclass(slots=True)
class _Side:
    """One pool while it is searched."""

    pool: Pool
    keys: Keys
    priced: Priced

    def key_of(self) -> NDArray[np.int64]:
        """Which key of `keys` each option has."""
        options = self.priced.options
        layouts = np.array(
            [self.keys[pair_key(par)] for par in options.layouts] or [0], dtype=np.int64
        )
        return layouts[options.columns["layout"].astype(np.int64)]

    def by_key(self, some: NDArray[np.int64] | slice = _ALL) -> NDArray[np.int64]:
        """Options, all or some, by instance size and key; `[sizes, keys]`."""
        found = np.zeros((len(self.pool.sizes), len(self.keys)), dtype=np.int64)
        sizes = np.searchsorted(self.pool.sizes, self.priced.options.columns["cards"][some])
        np.add.at(found, (sizes, self.key_of()[some]), 1)
        return found


def _keys(pool: Pool) -> tuple[Keys, list[Parallelism]]:
    """Keys of the layouts that are legal alone, and a layout of each."""
    keys: Keys = {}
    layouts = []
    for par, broken in pool.layouts:
        if not broken and pair_key(par) not in keys:
            keys[pair_key(par)] = len(keys)
            layouts.append(par)
    return keys, layouts


def _partnerless(keys: Keys, broken: NDArray[np.object_]) -> Callable[[Parallelism], str | None]:
    """The rule that leaves a layout no partner at all; `broken`: `[own keys, keys of others]`."""
    none = {
        key: str(broken[place][0]) if broken.shape[1] else "pair-none"
        for key, place in keys.items()
        if not (broken[place] == "").any()
    }
    return lambda par: none.get(pair_key(par))


def search_disagg(
    question: DisaggQuestion,
    rule: PairRule = first_broken_pair_rule,
    *,
    time_limit_s: float | None = None,
) -> DisaggOutcome:
    """Every deployment of the space, priced or provably not needed.

    `time_limit_s`: stop then with the best so far and a bound on the rest; what was not reached
    is counted neither as evaluated nor as pruned.
    """
    start = time.perf_counter()
    until_s = math.inf if time_limit_s is None else start + time_limit_s
    pools = question.prefill, question.decode
    (keys, ones), (others, two) = map(_keys, pools)
    broken = pair_table(*pools, (ones, two), rule)
    pricings = _priced(question, (keys, others), broken, start + _PRICING * (until_s - start))
    limits = question.limits
    sides = (
        _Side(pools[0], keys, pricings[0].finish(limits.ttft_s or np.inf)),
        _Side(pools[1], others, pricings[1].finish(limits.tpot_s or np.inf)),
    )
    unreached = most_unreached(question, *(side.priced for side in sides))
    tally = DisaggTally()
    kept: list[Combination] = []
    if all(side.priced.options.size for side in sides):
        before = [side.by_key() for side in sides]
        kept, tally, left = _combined(question, sides, np.asarray(broken == ""), until_s)
        unreached = max(unreached, left)
        _count_pairs(question, broken, before, sides, tally)
    _count_left_out(question, sides, tally)
    best = kept[0] if kept and kept[0].feasible else None
    return DisaggOutcome(
        question=question,
        prefill=sides[0].priced,
        decode=sides[1].priced,
        best=best,
        kept=tuple(kept),
        space_size=sum(
            weight * sides[0].priced.total[one] * sides[1].priced.total[two]
            for one, two, weight in _weights(question)
        ),
        tally=tally,
        unreached=unreached,
        wall_s=time.perf_counter() - start,
    )


def _priced(
    question: DisaggQuestion,
    keys: tuple[Keys, Keys],
    broken: NDArray[np.object_],
    until_s: float,
) -> list[PoolPricing]:
    """Both pools priced, side by side, as far as the time allows."""
    pools = question.prefill, question.decode
    alike = (
        pools[0].cluster.device == pools[1].cluster.device and pools[0].engine == pools[1].engine
    )
    ledgers: dict[Parallelism, Ledger] = {}
    pricings = [
        PoolPricing(pools[0], _partnerless(keys[0], broken), ledgers),
        PoolPricing(pools[1], _partnerless(keys[1], broken.T), ledgers if alike else {}),
    ]
    while time.perf_counter() <= until_s:
        behind = min(pricings, key=lambda one: one.share)
        if behind.share == 1.0:
            break
        behind.step()
    return pricings


def _combined(
    question: DisaggQuestion, sides: tuple[_Side, _Side], legal: NDArray[np.bool_], until_s: float
) -> tuple[list[Combination], DisaggTally, float]:
    """(deployments of options that no other may take the place of, what became of all of them, the
    most that one that was not reached can do)."""
    full = [side.priced.options for side in sides]
    kept = [
        undominated(side.priced.options, side.pool.role, side.key_of(), partners)
        for side, partners in zip(sides, (legal, legal.T), strict=True)
    ]
    found, tally, left = _pairs(question, sides, full, kept, legal, until_s)
    best = found[0] if found else None
    again = worth_another_look(question, sides[0].priced.options, full[1], best)
    more = [kept[0], np.union1d(kept[1], np.flatnonzero(again))]
    if more[1].size == kept[1].size:
        return found, tally, left
    other = _pairs(question, sides, full, more, legal, until_s)
    if not other[1].unreached.size:
        return other
    _keep(sides, full, kept)
    floors = floor_of(sides[0].priced.options, "prefill"), floor_of(full[1].at(again), "decode")
    return found, tally, max(left, most_of(question, *floors))


def _pairs(
    question: DisaggQuestion,
    sides: tuple[_Side, _Side],
    full: list[Options],
    kept: list[NDArray[np.int64]],
    legal: NDArray[np.bool_],
    until_s: float,
) -> tuple[list[Combination], DisaggTally, float]:
    """The same of the options `kept` alone."""
    _keep(sides, full, kept)
    tally = DisaggTally()
    first, second = (side.priced.options for side in sides)
    allowed = legal[sides[0].key_of()][:, sides[1].key_of()]
    found = combine(question, first, second, allowed, tally, until_s)
    left = floor_of(first.at(tally.unreached), "prefill"), floor_of(second, "decode")
    return found, tally, most_of(question, *left)


def _keep(sides: tuple[_Side, _Side], full: list[Options], kept: list[NDArray[np.int64]]) -> None:
    for side, options, index in zip(sides, full, kept, strict=True):
        side.priced.options = options.at(index)


def _weights(question: DisaggQuestion) -> Iterator[tuple[int, int, int]]:
    """(prefill cards, decode cards, counts of both) of every pair of instance sizes."""
    prefill, decode = question.prefill, question.decode
    for one in prefill.sizes:
        for two in decode.sizes:
            if question.shared:
                yield one, two, count_pairs(decode.cards, one, two)
            else:
                yield one, two, (prefill.cards // one) * (decode.cards // two)


def _count_left_out(
    question: DisaggQuestion, sides: tuple[_Side, _Side], tally: DisaggTally
) -> None:
    """Combinations of an instance that was left out alone."""
    first, second = (side.priced for side in sides)
    fine = dict(first.total.items())
    for (size, _), count in first.left_out.items():
        fine[size] -= count
    for one, two, weight in _weights(question):
        for (size, reason), count in first.left_out.items():
            if size == one:
                tally.pruned_by[reason] += weight * count * second.total[two]
        for (size, reason), count in second.left_out.items():
            if size == two:
                tally.pruned_by[reason] += weight * fine.get(one, 0) * count


def _count_pairs(
    question: DisaggQuestion,
    broken: NDArray[np.object_],
    before: list[NDArray[np.int64]],
    sides: tuple[_Side, _Side],
    tally: DisaggTally,
) -> None:
    """Combinations of fitting instances: illegal pairs, dominated ones, counts not priced."""
    sizes = len(question.prefill.sizes), len(question.decode.sizes)
    weight = np.array([one[2] for one in _weights(question)], dtype=object).reshape(sizes)

    def pairs(of: Sequence[NDArray[np.int64]], mask: NDArray[np.bool_]) -> int:
        """Combinations whose keys the mask holds."""
        return int((weight * (of[0] @ mask.astype(np.int64) @ of[1].T).astype(object)).sum())

    legal = np.asarray(broken == "")
    for rule in sorted({str(one) for one in broken[~legal].tolist()}):
        count = pairs(before, np.asarray(broken == rule))
        if count:
            tally.pruned_by[f"rule {rule}"] += count
    after = [side.by_key() for side in sides]
    kept = pairs(after, legal)
    tally.pruned_by["dominated instance"] += pairs(before, legal) - kept
    left = pairs((sides[0].by_key(tally.unreached), after[1]), legal)
    tally.pruned_by["counts that others stand for"] += kept - left - tally.evaluated
