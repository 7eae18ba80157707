"""One strategy at an asked rate: what its requests see, and the most that it serves within limits.

Random arrivals wait for a slot where all are taken (`costmodel.run_out`). The most that is served
within the limits is the largest rate at which means and percentiles keep them, narrowed down; where
nothing limits the queue it is what all slots serve.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.run_out import Run, run_out
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.plan_at_rate import AtRate, SpreadTimes
from shardplan.search.space import Choice

__all__ = ["Point", "at_rate", "keeps_limits", "most_within", "run_at"]

_TRIED = 24
"""Rates tried at once between two."""
_TURNS = 3
_NAMES = ("mean_s", "p50_s", "p90_s", "p99_s")


class Point(NamedTuple):
    """A strategy ready to be asked."""

    scorer: LayoutScorer
    choice: Choice
    batch: int
    chunk: int


def run_at(one: Point, rates: Array, left: float = 1.0) -> Run:
    """What clients measure at rates `[n]` in requests a second; `left`: share of the replicas."""
    grid = (np.full(rates.shape, float(size)) for size in (one.batch, one.chunk))
    given = one.scorer.serving_input(one.choice, *grid)
    return run_out(one.scorer.model_for(one.choice), given, request_rate=rates, left=left)


def keeps_limits(one: Point, run: Run) -> NDArray[np.bool_]:
    """Whether each row of a run keeps every limit on time."""
    limits = one.scorer.question.limits
    most = {
        "ttft_mean_s": limits.ttft_s,
        "tpot_mean_s": limits.tpot_s,
        "ttft_p99_s": limits.ttft_p99_s,
        "tpot_p99_s": limits.tpot_p99_s,
    }
    held = np.ones(run.slots.shape, dtype=bool)
    for name, limit in most.items():
        if limit is not None:
            held &= getattr(run, name) <= limit
    return held


def most_within(one: Point, rate: float, left: float = 1.0) -> float:
    """Most requests a second within the limits, of the replicas that are left.

    `rate`, which counts as it is where it keeps them; 0 where no rate that was tried does.
    """
    limits = one.scorer.question.limits
    first = run_at(one, np.array([rate]), left)
    top = float(first.capacity_requests_per_s[0])
    if limits.ttft_s is None and not limits.has_tails:
        return top
    holds = bool(keeps_limits(one, first)[0]) and rate < top
    low, high = (rate, top) if holds else (0.0, min(rate, top))
    for _ in range(_TURNS):
        rates = low + (high - low) * np.arange(1.0, _TRIED + 1.0) / (_TRIED + 1.0)
        broken = np.flatnonzero(~keeps_limits(one, run_at(one, rates, left)))
        ends = np.concatenate([[low], rates, [high]])
        place = int(broken[0]) if broken.size else _TRIED
        low, high = float(ends[place]), float(ends[place + 1])
    return low


def at_rate(one: Point) -> AtRate | None:
    """What requests see at the rate of the question; None where none is asked."""
    rate = one.scorer.question.workload.request_rate
    if rate is None:
        return None
    run = run_at(one, np.array([rate]))
    latency = float(run.served.end_to_end_s[0] + run.ttft_mean_s[0] - run.served.ttft_s[0])
    spreads = {
        what: SpreadTimes(**{name: float(getattr(run, f"{what}_{name}")[0]) for name in _NAMES})
        for what in ("ttft", "tpot")
    }
    return AtRate(
        requests_per_s=rate,
        used=rate / float(run.capacity_requests_per_s[0]),
        concurrency=rate * latency,
        end_to_end_s=latency,
        **spreads,
    )
