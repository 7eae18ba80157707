"""Which counts of the instances of two pools are priced, and how they do.

For given x (prefill instances) the rate does not fall and no time rises with y (decode
instances), so where the rate or the latency is the objective only the largest y that the cards
allow is priced. Of equal objectives the fewest cards win, so y is then cut to what the rate needs.
For the objective `cards` only the smallest y that serves what is asked is priced: fewer break a
limit, more are more cards. Without a limit that is one instance. A limit on
the 99th percentile of TTFT bounds the rate of random arrivals, which y raises alike; in a closed
loop the percentile less the mean has no y in it (`costmodel.disagg_serve`).

With that y, more prefill instances let prompts allow more, and everything else no more. So where
throughput is the objective two counts x are priced: the fewest with which prompts do not bind, and
one less. Not where instances may be lost, whose limits count with fewer, nor where a percentile is
limited in a closed loop.

Of those two the one of which prompts bind is dear: its rate is looked for. It is left out where it
cannot be better than the other, or than so many pairs that all that is kept of the search has a
larger objective, and one of them no higher TPOT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.disagg_tail import slots_for
from shardplan.costmodel.kernels.base import Array
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
from shardplan.search.kept import pareto_mask

__all__ = ["MOST_KEPT", "Counted", "DisaggTally", "Known", "Pairs", "counted", "two_counts"]

_SLACK = 1e-9
_LATE = tuple(POOL_LIMITS.index(name) for name in ("ttft", "ttft_p99"))
MOST_KEPT = 2000
"""Pairs that are kept, the best ones, beside the Pareto front."""
_AT_ONCE = 200_000
Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]
Pairs = tuple[Mapping[str, Array], Mapping[str, Array]]
"""Columns of both options of each pair, `[pairs]`."""


@dataclass(slots=True)
class DisaggTally:
    """What happened to the combinations."""

    evaluated: int = 0
    pruned_by: Counter[str] = field(default_factory=Counter)
    infeasible: Counter[str] = field(default_factory=Counter)
    unreached: Counts = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Prefill options that the time limit left out."""
    late: float = -np.inf
    """Largest objective of what breaks the TTFT limit."""


class Counted(NamedTuple):
    """Counts of each pair and how they do, `[x, pairs]`."""

    x: Counts
    y: Counts
    objective: Array
    used: Array
    """Cards, by their price; inf where the counts do not fit."""
    feasible: Mask


@dataclass(slots=True)
class Known:
    """What is found so far."""

    objective: Array = field(default_factory=lambda: np.zeros(0))
    """Of the best `MOST_KEPT` pairs."""
    front: tuple[Array, Array] = field(default_factory=lambda: (np.zeros(0), np.zeros(0)))
    """Objectives and TPOT that no other beats, the fastest TPOT first."""

    def add(self, objective: Array, tpot_s: Array) -> None:
        """Pairs that satisfy every limit."""
        every = np.concatenate([self.objective, objective])
        if every.size > MOST_KEPT:
            every = np.partition(every, -MOST_KEPT)[-MOST_KEPT:]
        self.objective = every
        gain, cost = (
            np.concatenate(both) for both in zip(self.front, (objective, tpot_s), strict=True)
        )
        at = np.flatnonzero(pareto_mask(gain, cost))
        at = at[np.argsort(cost[at], kind="stable")]
        self.front = gain[at], cost[at]

    def needed(self, tpot_s: Array) -> Array:
        """A pair with this TPOT is told of only where its objective is as large."""
        if self.objective.size < MOST_KEPT:
            return np.zeros(tpot_s.shape)
        gain, cost = self.front
        best = np.concatenate([[0.0], np.maximum.accumulate(gain)])
        beaten = best[np.searchsorted(cost, tpot_s, side="right")]
        return np.asarray(np.minimum(beaten, self.objective.min()))


def _enough(question: DisaggQuestion, decode: Mapping[str, Array], rate: Array) -> Counts:
    """The fewest decode instances that serve a rate."""
    slots = rate / decode["rate"]
    if question.finds_slots:
        seconds = decode["step_s"] + decode["later_s"]
        slots = slots_for(rate * seconds) / (decode["rate"] * seconds)
    links = rate * decode["bytes"] / (decode["cards"] * question.link.bytes_per_s)
    return np.asarray(np.maximum(np.ceil(np.maximum(slots, links) - _SLACK), 1), dtype=np.int64)


def _needed(question: DisaggQuestion, decode: Mapping[str, Array]) -> Array:
    """The rate below which a limit is broken, whatever the counts."""
    work, demand = question.decode.workload, question.demand
    need = np.full(decode["rate"].shape, work.request_rate or 0.0)
    if demand.in_flight is None or demand.mean_ttft_s is None:
        return need
    longest = demand.mean_ttft_s + decode["later_s"]
    return np.asarray(np.maximum(need, demand.in_flight / longest))


def _needed_by_tail(question: DisaggQuestion, pools: Pairs, x: Counts) -> Array:
    """The same of the 99th percentile of TTFT in a closed loop, with x prefill instances.

    What it has beyond the mean is the same with any number of decode instances.
    """
    demand, decode = question.demand, pools[1]
    if demand.in_flight is None or demand.ttft_p99_s is None:
        return np.zeros(())
    service, _ = deployments(question, pools, x, np.ones_like(x))
    beyond = np.asarray(service.ttft_p99_s) - service.ttft_s
    longest = demand.ttft_p99_s * (1.0 + _SLACK) - beyond + decode["later_s"]
    with np.errstate(divide="ignore"):
        return np.where(longest > 0.0, demand.in_flight / np.maximum(longest, 1e-300), 1e300)


def _crossing(question: DisaggQuestion, pools: Pairs, most: Counts, known: Known) -> Counts:
    """The fewest prefill instances with which prompts do not bind, and one less; `[2, pairs]`.

    By bisection; beyond `most`, or what leaves no decode instance, where they always do.
    """
    low = np.zeros(most.shape, dtype=np.int64)
    high = most + 1
    while (high - low > 1).any():
        x = np.maximum((low + high) // 2, 1)
        y = np.maximum(_most_beside(question, pools, x), 1)
        binds, moves = prefill_binds(question, pools, x, y), high - low > 1
        low, high = np.where(moves & binds, x, low), np.where(moves & ~binds, x, high)
    x = np.clip(high, 1, np.maximum(most, 1))
    y = np.maximum(_most_beside(question, pools, x), 1)
    rest = np.where(high > most, 0.0, rate_beside(question, pools, x, y))
    needed = known.needed(pools[1]["tpot_s"]) / question.decode.workload.output_len
    able = low * pools[0]["rate"] * (1.0 + _SLACK) > np.maximum(rest, needed)
    return np.stack([np.where(able, low, 0), high])


def _most_beside(question: DisaggQuestion, pools: Pairs, x: Counts) -> Counts:
    return most_beside(question, pools[1]["cards"], x, pools[0]["cards"])


def _counts_of(question: DisaggQuestion, pools: Pairs, x: Counts, tally: DisaggTally) -> Counted:
    """How `x` prefill instances, `[x, pairs]` or `[x, 1]`, of each pair do; 0 stands for none."""
    prefill, decode = pools
    fits = x > 0
    x = np.where(fits, x, np.maximum(x.max(axis=0), 1))
    most = _most_beside(question, pools, x)
    y = np.maximum(most, 1)
    gone = (
        question.lost(question.prefill, prefill["cards"]),
        question.lost(question.decode, decode["cards"]),
    )
    if question.objective == "cards":
        need = _needed(question, decode)
        need = np.maximum(need, _needed_by_tail(question, pools, np.maximum(x - gone[0], 1)))
        y = np.broadcast_to(_enough(question, decode, need) + gone[1], most.shape)
    fits = fits & (y <= most) & (x > gone[0]) & (y > gone[1])
    fits &= x * prefill["cards"] <= question.prefill.cards
    service, _ = deployments(question, pools, x, y)
    broken = broken_limits(question, service, pools, x, y)
    tally.evaluated += int(fits.sum())
    objective, late = objective_of(question, service), fits & np.isin(broken, _LATE)
    tally.late = max(tally.late, float(objective[late].max(initial=-np.inf)))
    for index, name in enumerate(POOL_LIMITS[1:], start=1):
        tally.infeasible[name] += int((fits & (broken == index)).sum())
    if question.objective != "cards":
        y = np.minimum(y, _enough(question, decode, service.requests_per_s))
    used = np.where(fits, question.spent(x * prefill["cards"], y * decode["cards"]), np.inf)
    return Counted(np.broadcast_to(x, y.shape), y, objective, used, fits & (broken == 0))


def two_counts(question: DisaggQuestion) -> bool:
    """Whether the counts where prompts cease to bind are all that matter; see the module."""
    percentile = question.demand.in_flight is not None and question.demand.ttft_p99_s is not None
    return question.objective == "throughput" and question.spare is None and not percentile


def counted(
    question: DisaggQuestion, pools: Pairs, tally: DisaggTally, known: Known
) -> Iterator[Counted]:
    """The counts of each pair that matter, some at a time."""
    taken = pools[1]["cards"] if question.shared else 0.0
    left = np.floor((question.prefill.cards - taken) / pools[0]["cards"])
    most = np.maximum(left, 0).astype(np.int64)
    if two_counts(question):
        yield _counts_of(question, pools, _crossing(question, pools, most, known), tally)
        return
    last, step = int(most.max(initial=0)), max(_AT_ONCE // most.size, 1)
    for start in range(1, last + 1, step):
        x = np.arange(start, min(start + step, last + 1), dtype=np.int64)[:, None]
        yield _counts_of(question, pools, x, tally)
