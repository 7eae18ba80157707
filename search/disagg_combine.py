"""Pairs of options: every deployment of two pools, evaluated side by side (`disagg_counts`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.disagg_serve import Pools, Service
from shardplan.costmodel.kernels.base import Array
from shardplan.search.disagg_counts import (
    MOST_KEPT,
    Counted,
    DisaggTally,
    Known,
    counted,
    two_counts,
)
from shardplan.search.disagg_options import Options
from shardplan.search.disagg_question import (
    POOL_LIMITS,
    DisaggQuestion,
    broken_limits,
    deployments,
    objective_of,
)
from shardplan.search.kept import pareto_mask

__all__ = ["Combination", "combine", "described"]

_SLACK = 1e-9
_TOGETHER = 20_000
"""Pairs that are priced at once, where few counts of each are."""
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


def _first_best(question: DisaggQuestion, found: Counted) -> tuple[Counts, Mask]:
    """(row of the best counts, whether any fits) of each column."""
    objective, used, feasible = found.objective, found.used, found.feasible
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


def _best_of(
    found: Counted, at: tuple[Counts, Counts], pair: tuple[Counts, Counts], tpot_s: Array
) -> _Best:
    """Those at rows and columns; `pair`: options of each column."""
    return _Best(
        prefill=pair[0][at[1]],
        decode=pair[1][at[1]],
        x=found.x[at],
        y=found.y[at],
        objective=found.objective[at],
        used=found.used[at],
        feasible=found.feasible[at],
        tpot_s=tpot_s[at[1]],
    )


def _blocks(question: DisaggQuestion, order: Counts, allowed: Mask) -> Iterator[tuple[int, Counts]]:
    """(place, prefill options) whose pairs are priced at once."""
    pairs = np.cumsum(allowed[order].sum(axis=1))
    each = np.arange(order.size)
    if two_counts(question):
        each = pairs // _TOGETHER
    for start in np.flatnonzero(np.diff(each, prepend=-1)).tolist():
        yield start, order[each == each[start]]


def _pairs(
    question: DisaggQuestion,
    prefill: Options,
    decode: Options,
    allowed: Mask,
    tally: DisaggTally,
    until_s: float,
) -> Iterator[_Best]:
    """The best counts of each legal pair, some prefill options at a time, fast ones first."""
    order, known = np.argsort(prefill.columns["slow_s"], kind="stable"), Known()
    for turn, block in _blocks(question, order, allowed):
        if time.perf_counter() > until_s:
            tally.unreached = order[turn:]
            return
        row, partners = np.nonzero(allowed[block])
        first = block[row]
        if not first.size:
            continue
        pools = (
            {name: column[first] for name, column in prefill.columns.items()},
            {name: column[partners] for name, column in decode.columns.items()},
        )
        for found in counted(question, pools, tally, known):
            row, fits = _first_best(question, found)
            if not fits.any():
                continue
            column = np.flatnonzero(fits)
            best = _best_of(found, (row[column], column), (first, partners), pools[1]["tpot_s"])
            known.add(best.objective[best.feasible], best.tpot_s[best.feasible])
            yield best


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
    order = near[np.lexsort([key[near] for key in keys])][:MOST_KEPT]
    able = np.flatnonzero(best.feasible)
    front = able[pareto_mask(best.objective[able], best.tpot_s[able])]
    front = front[~np.isin(front, order)]
    kept = np.concatenate([order, front[np.argsort(first[front], kind="stable")]])
    return _described(question, prefill, decode, _Best(*(column[kept] for column in best)))


def _among_first(values: Array) -> Counts:
    """Places of the smallest values, ties included: all that a sorted table can begin with."""
    if values.size <= MOST_KEPT:
        return np.arange(values.size)
    return np.flatnonzero(values <= np.partition(values, MOST_KEPT)[MOST_KEPT])


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
        "prefill_step_s": service.passed.service_s,
        "decode_step_s": given.step_s,
        "mixed_step_s": 0.0 * rate,
        "mixed_share": 0.0 * rate,
        "wait_s": service.wait_s,
        "transfer_s": service.passed.transfer_s,
        "prefill_used": rate / given.prefill_per_s,
        "decode_used": rate / given.decode_per_s,
        "transfer_used": rate / given.transfer_per_s,
        "bound": service.bound.astype(np.float64),
        "cards": used,
        "spent": question.spent(best.x * prefill["cards"], best.y * decode["cards"]),
        "prefill_cards": best.x * prefill["cards"],
        "decode_cards": best.y * decode["cards"],
    }
