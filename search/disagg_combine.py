"""Pairs of options and their counts: every deployment of two pools, evaluated side by side.

Counts. For given x (prefill instances) the rate does not fall and no time rises with y (decode
instances), so where the rate or the latency is the objective only the largest y that the cards
allow is priced. Of equal objectives the fewest cards win, so y is then cut to what the rate needs.
For the objective `cards` only the smallest y that serves what is asked is priced: fewer break a
limit, more are more cards. Without a limit that is one instance. A limit on
the 99th percentile of TTFT bounds the rate of random arrivals, which y raises alike; in a closed
loop the percentile less the mean has no y in it (`costmodel.disagg`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.disagg import Pools, Service
from shardplan.costmodel.disagg_tail import slots_for
from shardplan.costmodel.kernels.base import Array, as_array
from shardplan.search.disagg_options import Options
from shardplan.search.disagg_question import (
    POOL_LIMITS,
    DisaggQuestion,
    broken_limits,
    deployments,
    most_beside,
    objective_of,
)
from shardplan.search.kept import pareto_mask

__all__ = ["Combination", "DisaggTally", "combine", "described"]

_SLACK = 1e-9
_LATE = tuple(POOL_LIMITS.index(name) for name in ("ttft", "ttft_p99"))
_MOST_KEPT = 2000
_AT_ONCE = 200_000
Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One deployment: an option of either pool, counts, and what it does."""

    prefill: int
    decode: int
    prefill_instances: int
    decode_instances: int
    limit: str
    """The limit that it breaks, "" where it breaks none."""
    columns: Mapping[str, float]

    @property
    def feasible(self) -> bool:
        """Whether it satisfies every limit."""
        return not self.limit

    def worth(self, objective: str) -> float:
        """Larger is better: the objective, or fewer cards."""
        return -self.columns["spent"] if objective == "cards" else self.columns["objective"]


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


class _Best(NamedTuple):
    """The best counts of pairs of options; arrays `[pairs]`."""

    prefill: Counts
    decode: Counts
    x: Counts
    y: Counts
    objective: Array
    used: Array
    """Cards, by their price."""
    feasible: Mask
    tpot_s: Array


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


def _needed_by_tail(
    question: DisaggQuestion, pools: tuple[Mapping[str, Array], Mapping[str, Array]], x: Counts
) -> Array:
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


def _counts_of(
    question: DisaggQuestion,
    prefill: Mapping[str, float],
    decode: Mapping[str, Array],
    x: Counts,
    tally: DisaggTally,
) -> tuple[Array, Array, Counts, Mask]:
    """(objective, cards, y, feasible) of `x` prefill instances with each option; `[x, decode]`."""
    most = most_beside(question, decode["cards"], x[:, None], prefill["cards"])
    y = np.maximum(most, 1)
    columns = {name: np.asarray(value) for name, value in prefill.items()}
    gone = (
        question.lost(question.prefill, prefill["cards"]),
        question.lost(question.decode, decode["cards"]),
    )
    if question.objective == "cards":
        need = _needed(question, decode)
        left = np.maximum(x[:, None] - gone[0], 1)
        need = np.maximum(need, _needed_by_tail(question, (columns, decode), left))
        y = np.broadcast_to(_enough(question, decode, need) + gone[1], most.shape)
    fits = (y <= most) & (x[:, None] > gone[0]) & (y > gone[1])
    service, _ = deployments(question, (columns, decode), x[:, None], y)
    broken = broken_limits(question, service, (columns, decode), x[:, None], y)
    tally.evaluated += int(fits.sum())
    objective, late = objective_of(question, service), fits & np.isin(broken, _LATE)
    tally.late = max(tally.late, float(objective[late].max(initial=-np.inf)))
    for index, name in enumerate(POOL_LIMITS[1:], start=1):
        tally.infeasible[name] += int((fits & (broken == index)).sum())
    if question.objective != "cards":
        y = np.minimum(y, _enough(question, decode, service.requests_per_s))
    spent = question.spent(x[:, None] * as_array(prefill["cards"]), y * decode["cards"])
    used = np.where(fits, spent, np.inf)
    return objective, used, y, fits & (broken == 0)


def _first_best(
    question: DisaggQuestion, objective: Array, used: Array, feasible: Mask
) -> tuple[Counts, Mask]:
    """(row of the best counts, whether any fits) of each column."""
    allowed = np.asarray(np.where(feasible.any(axis=0), feasible, np.isfinite(used)))
    if question.objective == "cards":
        fewest = np.where(allowed, used, np.inf)
        ties = fewest == fewest.min(axis=0)
        chosen = np.where(ties, objective, -np.inf).argmax(axis=0)
    else:
        high = np.where(allowed, objective, -np.inf)
        ties = high >= high.max(axis=0) * (1.0 - _SLACK)
        chosen = np.where(ties & allowed, used, np.inf).argmin(axis=0)
    return chosen, np.asarray(allowed.any(axis=0))


def _pairs(
    question: DisaggQuestion,
    prefill: Options,
    decode: Options,
    allowed: Mask,
    tally: DisaggTally,
    until_s: float,
) -> Iterator[_Best]:
    """The best counts of each legal pair, prefill option by prefill option, fast ones first."""
    order = np.argsort(prefill.columns["slow_s"], kind="stable")
    for turn, index in enumerate(order):
        if time.perf_counter() > until_s:
            tally.unreached = order[turn:]
            return
        partners = np.flatnonzero(allowed[index])
        one = {name: float(column[index]) for name, column in prefill.columns.items()}
        if not partners.size:
            continue
        least = decode.columns["cards"][partners].min() if question.shared else 0.0
        most = int((question.prefill.cards - least) // one["cards"])
        step = max(_AT_ONCE // partners.size, 1)
        columns = {name: column[partners] for name, column in decode.columns.items()}
        for start in range(1, most + 1, step):
            x = np.arange(start, min(start + step, most + 1), dtype=np.int64)
            objective, used, y, feasible = _counts_of(question, one, columns, x, tally)
            row, fits = _first_best(question, objective, used, feasible)
            if not fits.any():
                continue
            column = np.arange(partners.size)
            yield _Best(
                prefill=np.full(int(fits.sum()), index),
                decode=partners[fits],
                x=x[row][fits],
                y=y[row, column][fits],
                objective=objective[row, column][fits],
                used=used[row, column][fits],
                feasible=feasible[row, column][fits],
                tpot_s=columns["tpot_s"][fits],
            )


def combine(
    question: DisaggQuestion,
    prefill: Options,
    decode: Options,
    allowed: Mask,
    tally: DisaggTally,
    until_s: float = np.inf,
) -> list[Combination]:
    """The deployments worth remembering, the best first; `allowed`: legal pairs of options.

    `until_s`: reading of `time.perf_counter` after which no other prefill option is begun.
    """
    found = list(_pairs(question, prefill, decode, allowed, tally, until_s))
    if not found:
        return []
    turns = np.argsort(np.concatenate([one.prefill for one in found]), kind="stable")
    columns = zip(*found, strict=True)  # of equal deployments the first one stands
    best = _Best(*(np.concatenate(column)[turns] for column in columns))
    memory = np.maximum(
        prefill.columns["memory"][best.prefill], decode.columns["memory"][best.decode]
    )
    worth = [-best.objective, best.used]
    if question.objective == "cards":
        worth.reverse()
    first = np.where(best.feasible, worth[0], worth[0] + np.abs(worth[0]).max() * 4.0)
    near = _among_first(first)
    keys = (best.decode, best.prefill, memory, worth[1], worth[0], ~best.feasible)
    order = near[np.lexsort([key[near] for key in keys])][:_MOST_KEPT]
    able = np.flatnonzero(best.feasible)
    front = able[pareto_mask(best.objective[able], best.tpot_s[able])]
    front = front[~np.isin(front, order)]
    kept = np.concatenate([order, front[np.argsort(first[front], kind="stable")]])
    return _described(question, prefill, decode, _Best(*(column[kept] for column in best)))


def _among_first(values: Array) -> Counts:
    """Places of the smallest values, ties included: all that a sorted table can begin with."""
    if values.size <= _MOST_KEPT:
        return np.arange(values.size)
    return np.flatnonzero(values <= np.partition(values, _MOST_KEPT)[_MOST_KEPT])


def _described(
    question: DisaggQuestion, prefill: Options, decode: Options, best: _Best
) -> list[Combination]:
    """Every column of the chosen deployments."""
    pools = (prefill.at(best.prefill).columns, decode.at(best.decode).columns)
    service, given = deployments(question, pools, best.x, best.y)
    broken = broken_limits(question, service, pools, best.x, best.y)
    columns = _columns(question, pools, service, given, best)
    names = tuple(columns)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    picks = zip(*(column.tolist() for column in best[:4]), broken.tolist(), strict=True)
    return [
        Combination(
            prefill=one,
            decode=other,
            prefill_instances=x,
            decode_instances=y,
            limit=POOL_LIMITS[limit],
            columns=dict(zip(names, row, strict=True)),
        )
        for (one, other, x, y, limit), row in zip(picks, rows, strict=True)
    ]


def described(
    question: DisaggQuestion,
    options: tuple[Options, Options],
    places: tuple[int, int],
    counts: tuple[int, int],
) -> Combination:
    """One deployment: an option of either pool, by their places, and the counts of instances."""
    one, two, x, y = (np.array([pick], dtype=np.int64) for pick in (*places, *counts))
    nothing = np.zeros(1)
    best = _Best(one, two, x, y, nothing, nothing, nothing > 0.0, nothing)
    return _described(question, *options, best)[0]


def _columns(
    question: DisaggQuestion,
    pools: tuple[Mapping[str, Array], Mapping[str, Array]],
    service: Service,
    given: Pools,
    best: _Best,
) -> dict[str, Array]:
    prefill, decode = pools
    rate = service.requests_per_s
    tokens = rate * question.decode.workload.output_len
    used = best.x * prefill["cards"] + best.y * decode["cards"]
    parts = {name: decode[name] for name in ("compute_s", "memory_s", "collective_s")}
    tail = {} if service.ttft_p99_s is None else {"ttft_p99_s": service.ttft_p99_s}
    return {
        **tail,
        "objective": objective_of(question, service),
        "ttft_s": service.ttft_s,
        "tpot_s": decode["tpot_s"] if question.decode.workload.output_len > 1 else 0.0 * rate,
        "end_to_end_s": service.end_to_end_s,
        "output_tokens_per_s": tokens,
        "output_tokens_per_s_per_card": tokens / used,
        "requests_per_s": rate,
        "memory_bytes": np.maximum(prefill["memory"], decode["memory"]),
        "memory_free_bytes": np.minimum(prefill["free"], decode["free"]),
        **parts,
        "overhead_s": given.step_s - sum(parts.values()),
        "concurrency": rate * service.end_to_end_s,
        "prefill_step_s": given.service_s,
        "decode_step_s": given.step_s,
        "mixed_step_s": 0.0 * rate,
        "mixed_share": 0.0 * rate,
        "wait_s": service.wait_s,
        "transfer_s": given.transfer_s,
        "prefill_used": rate / given.prefill_per_s,
        "decode_used": rate / given.decode_per_s,
        "transfer_used": rate / given.transfer_per_s,
        "bound": service.bound.astype(np.float64),
        "cards": used,
        "spent": question.spent(best.x * prefill["cards"], best.y * decode["cards"]),
        "prefill_cards": best.x * prefill["cards"],
        "decode_cards": best.y * decode["cards"],
    }
