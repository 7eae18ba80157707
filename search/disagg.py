"""The exact search over prefill and decode pools: every pair of instances, every count of each.

    price either pool -> drop what is dominated -> pairs -> counts -> the best deployment

The certificate counts combinations: a strategy of either pool and both counts. Each is ruled out
by the first of: a rule, the memory or a limit of its prefill instance; the same of its decode
instance; a rule of the pair; a dominated option; counts that others stand for. The rest is priced.
Every step keeps the best objective that satisfies the limits (`disagg_pools`, `disagg_combine`),
so the best of what is priced is the optimum of the space and the gap is 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.ledger import Ledger
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg_combine import Combination, DisaggQuestion, DisaggTally, combine
from shardplan.search.disagg_dominance import undominated, worth_another_look
from shardplan.search.disagg_pools import Options, Priced, price_pool
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
    wall_s: float


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

    def by_key(self) -> NDArray[np.int64]:
        """Options by instance size and key; `[sizes, keys]`."""
        found = np.zeros((len(self.pool.sizes), len(self.keys)), dtype=np.int64)
        sizes = np.searchsorted(self.pool.sizes, self.priced.options.columns["cards"])
        np.add.at(found, (sizes, self.key_of()), 1)
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
    question: DisaggQuestion, rule: PairRule = first_broken_pair_rule
) -> DisaggOutcome:
    """Every deployment of the space, priced or provably not needed."""
    start = time.perf_counter()
    pools = question.prefill, question.decode
    (keys, ones), (others, two) = map(_keys, pools)
    broken = pair_table(*pools, (ones, two), rule)
    legal = np.asarray(broken == "")
    limits = question.limits
    alike = (
        pools[0].cluster.device == pools[1].cluster.device and pools[0].engine == pools[1].engine
    )
    ledgers: dict[Parallelism, Ledger] = {}
    sides = (
        _Side(
            pools[0],
            keys,
            price_pool(pools[0], _partnerless(keys, broken), limits.ttft_s or np.inf, ledgers),
        ),
        _Side(
            pools[1],
            others,
            price_pool(
                pools[1],
                _partnerless(others, broken.T),
                limits.tpot_s or np.inf,
                ledgers if alike else None,
            ),
        ),
    )
    tally = DisaggTally()
    kept: list[Combination] = []
    if all(side.priced.options.size for side in sides):
        before = [side.by_key() for side in sides]
        _leave_out(question, sides, legal)
        after = [side.by_key() for side in sides]
        options = [side.priced.options for side in sides]
        allowed = legal[sides[0].key_of()][:, sides[1].key_of()]
        kept = combine(question, options[0], options[1], allowed, tally)
        _count_pairs(question, broken, before, after, tally)
    _count_left_out(question, sides, tally)
    return DisaggOutcome(
        question=question,
        prefill=sides[0].priced,
        decode=sides[1].priced,
        best=kept[0] if kept and kept[0].feasible else None,
        kept=tuple(kept),
        space_size=sum(
            weight * sides[0].priced.total[one] * sides[1].priced.total[two]
            for one, two, weight in _weights(question)
        ),
        tally=tally,
        wall_s=time.perf_counter() - start,
    )


def _leave_out(
    question: DisaggQuestion, sides: tuple[_Side, _Side], legal: NDArray[np.bool_]
) -> None:
    """Leave each pool the options that no other may take the place of."""
    full = [side.priced.options for side in sides]
    kept = [
        undominated(side.priced.options, side.pool.role, side.key_of(), partners)
        for side, partners in zip(sides, (legal, legal.T), strict=True)
    ]
    _keep(sides, full, kept)
    demand = question.demand
    if demand.in_flight is None or demand.ttft_s is None:
        return
    allowed = legal[sides[0].key_of()][:, sides[1].key_of()]
    first, second = (side.priced.options for side in sides)
    found = combine(question, first, second, allowed, DisaggTally())
    again = worth_another_look(question, first, full[1], found[0] if found else None)
    _keep(sides, full, [kept[0], np.union1d(kept[1], np.flatnonzero(again))])


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
    after: list[NDArray[np.int64]],
    tally: DisaggTally,
) -> None:
    """Combinations of fitting instances: illegal pairs, dominated ones, counts not priced."""
    sizes = len(question.prefill.sizes), len(question.decode.sizes)
    weight = np.array([one[2] for one in _weights(question)], dtype=object).reshape(sizes)

    def pairs(of: list[NDArray[np.int64]], mask: NDArray[np.bool_]) -> int:
        """Combinations whose keys the mask holds."""
        return int((weight * (of[0] @ mask.astype(np.int64) @ of[1].T).astype(object)).sum())

    legal = np.asarray(broken == "")
    for rule in sorted({str(one) for one in broken[~legal].tolist()}):
        count = pairs(before, np.asarray(broken == rule))
        if count:
            tally.pruned_by[f"rule {rule}"] += count
    allowed, kept = pairs(before, legal), pairs(after, legal)
    tally.pruned_by["dominated instance"] += allowed - kept
    tally.pruned_by["counts that others stand for"] += kept - tally.evaluated
