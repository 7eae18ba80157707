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
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.ledger import Ledger
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg_bounds import (
    floor_of,
    floors,
    most_later,
    most_of,
    most_unreached,
    peak_floor,
)
from shardplan.search.disagg_combine import Combination
from shardplan.search.disagg_counts import DisaggTally
from shardplan.search.disagg_cuts import Refining, refine_cuts
from shardplan.search.disagg_dominance import Partners
from shardplan.search.disagg_options import Options, Priced
from shardplan.search.disagg_pairs import Both, Found, Tables, combined, hoped
from shardplan.search.disagg_pools import PoolPricing
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.disagg_space import (
    PairKey,
    PairRule,
    Pool,
    count_pairs,
    pair_key,
    pair_table,
)
from shardplan.search.legality import first_broken_pair_rule

__all__ = ["DisaggOutcome", "count_weights", "search_disagg"]

Keys = dict[PairKey, int]
_PRICING, _CUTTING = 0.6, 0.8
"""Shares of a time limit after which no other layout is priced, and none is cut otherwise: the rest
is for their pairs."""


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


def _keys(pool: Pool) -> tuple[Keys, list[Parallelism]]:
    """Keys of the layouts that are legal alone, and a layout of each."""
    keys: Keys = {}
    layouts = []
    for one in pool.layouts:
        if not one.rule and pair_key(one.parallel) not in keys:
            keys[pair_key(one.parallel)] = len(keys)
            layouts.append(one.parallel)
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
    spare_s, legal = until_s - start, np.asarray(broken == "")
    pricings = _priced(question, (keys, others), broken, start + _PRICING * spare_s)
    limits, slots = question.most_s, question.finds_slots
    priced = pricings[0].finish(limits[0]), pricings[1].finish(limits[1])
    partners = (
        Partners(_kinds(keys, pricings[0].legal), legal, slots),
        Partners(_kinds(others, pricings[1].legal), legal.T, slots),
    )
    refining = (
        Refining.of(pricings[0], partners[0], limits[0]),
        Refining.of(pricings[1], partners[1], limits[1]),
    )
    cut_by_s = start + _CUTTING * spare_s
    unreached = most_unreached(question, *priced)
    full = priced[0].options, priced[1].options
    found = combined(question, partners, full, cut_by_s)
    hopes, missed = _refined(question, refining, found, cut_by_s)
    if any(one.built for one in refining):
        every = priced[0].options, priced[1].options
        again = combined(question, partners, every, until_s)
        if not again.tally.unreached.size or again.worth(question) > found.worth(question):
            full, found = every, again
        else:
            hopes = every
    tally = found.tally
    _count_pairs(question, broken, partners, full, found)
    hope = hoped(question, partners, found, hopes, until_s)
    unreached = max(unreached, missed, found.unreached, hope)
    if pricings[1].bases or (question.limits.ttft_p99_s and pricings[0].bases):
        unreached = max(unreached, most_later(question, tally.late))
    _count_left_out(question, priced, tally)
    for one, options in zip(priced, found.options, strict=True):
        one.options = options
    return DisaggOutcome(
        question=question,
        prefill=priced[0],
        decode=priced[1],
        best=found.kept[0] if found.kept and found.kept[0].feasible else None,
        kept=tuple(found.kept),
        space_size=sum(
            weight * priced[0].total[one] * priced[1].total[two]
            for one, two, weight in count_weights(question)
        ),
        tally=tally,
        unreached=unreached,
        wall_s=time.perf_counter() - start,
    )


def _kinds(keys: Keys, layouts: list[Parallelism]) -> NDArray[np.int64]:
    """Which key each layout has."""
    return np.array([keys[pair_key(par)] for par in layouts], dtype=np.int64)


def _refined(
    question: DisaggQuestion,
    refining: tuple[Refining, Refining],
    found: Found,
    until_s: float,
) -> tuple[Tables, float]:
    """Cut the layers of either pool otherwise where that may be better than what is found.

    Returns what no cut is proven to reach, and the most that what was not reached can do.
    """
    own = found.worth(question)
    first, second = (
        floor_of(one.pricing.priced.options, one.role)
        .either(floor_of(one.rough, one.role))
        .either(peak_floor(one.pricing.pool, one.pricing.priced.unreached))
        for one in refining
    )

    def better(most: Array) -> NDArray[np.bool_]:
        """As many cards may still serve more."""
        ties = question.objective == "cards" and own > -math.inf
        return np.asarray(most >= own if ties else most > own)

    refining[0].may_win = lambda some: better(most_of(question, floors(some, "prefill"), second))
    refining[1].may_win = lambda some: better(most_of(question, first, floors(some, "decode")))
    hopes = refine_cuts(refining[0], until_s), refine_cuts(refining[1], until_s)
    missed = (
        most_of(question, refining[0].missed, second),
        most_of(question, first, refining[1].missed),
    )
    return hopes, float(max(missed))


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


def count_weights(question: DisaggQuestion) -> Iterator[tuple[int, int, int]]:
    """(prefill cards, decode cards, counts of both) of every pair of instance sizes."""
    prefill, decode = question.prefill, question.decode
    for one in prefill.sizes:
        for two in decode.sizes:
            if question.shared:
                yield one, two, count_pairs(decode.cards, one, two)
            else:
                yield one, two, (prefill.cards // one) * (decode.cards // two)


def _count_left_out(
    question: DisaggQuestion, priced: tuple[Priced, Priced], tally: DisaggTally
) -> None:
    """Combinations of an instance that was left out alone."""
    first, second = priced
    fine = dict(first.total.items())
    for (size, _), count in first.left_out.items():
        fine[size] -= count
    for one, two, weight in count_weights(question):
        for (size, reason), count in first.left_out.items():
            if size == one:
                tally.pruned_by[reason] += weight * count * second.total[two]
        for (size, reason), count in second.left_out.items():
            if size == two:
                tally.pruned_by[reason] += weight * fine.get(one, 0) * count


def _count_pairs(
    question: DisaggQuestion,
    broken: NDArray[np.object_],
    partners: Both,
    full: Tables,
    found: Found,
) -> None:
    """Combinations of fitting instances: illegal pairs, dominated ones, counts not priced."""
    pools, tally = (question.prefill, question.decode), found.tally
    if not all(one.size for one in full):
        return
    sizes = len(pools[0].sizes), len(pools[1].sizes)
    weight = np.array([one[2] for one in count_weights(question)], dtype=object).reshape(sizes)

    def by_key(options: Options, side: int) -> NDArray[np.int64]:
        """Options by instance size and key; `[sizes, keys]`."""
        counts = np.zeros((sizes[side], broken.shape[side]), dtype=np.int64)
        places = np.searchsorted(pools[side].sizes, options.columns["cards"])
        np.add.at(counts, (places, partners[side].of(options)), 1)
        return counts

    def pairs(one: Options, two: Options, mask: NDArray[np.bool_]) -> int:
        """Combinations whose keys the mask holds."""
        held = by_key(one, 0) @ mask.astype(np.int64) @ by_key(two, 1).T
        return int((weight * held.astype(object)).sum())

    legal = np.asarray(broken == "")
    for rule in sorted({str(one) for one in broken[~legal].tolist()}):
        count = pairs(full[0], full[1], np.asarray(broken == rule))
        if count:
            tally.pruned_by[f"rule {rule}"] += count
    first, second = found.options
    kept = pairs(first, second, legal)
    tally.pruned_by["dominated instance"] += pairs(full[0], full[1], legal) - kept
    left = pairs(first.at(tally.unreached), second, legal)
    tally.pruned_by["counts that others stand for"] += kept - left - tally.evaluated
