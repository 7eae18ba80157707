"""Pools of prefill and decode instances at a rate of random arrivals, percentiles and all.

The queue of prompts and the steps that they find are those of `disagg_queue`, a transfer that of
`disagg_serve`. Decode instances have fewer sequences than slots: v a group, of G groups in all,

    v G = R (1 + n) t(v)

by Little's law, t a line between the sizes that are told. What a request meets beside itself is one
more than are there on average (arrivals at random). It waits for a slot where all are taken
(`occupancy`), for the step that runs (evenly within t; an instance of w requests is idle with
probability exp(-w)), and has its first token a step later:

    TTFT    wait for a turn + service + transfer + wait for a slot + step that runs + t
    TPOT    n t / (O - 1), spread by dt/dv sqrt(2/3 N) / G, N in flight: a request's own mean of the
            number in flight over its time varies by 2/3 as much as the number

Waits for a turn are exponential of those that wait; where steps take several prompts they come on
top of what is left of the step that runs (evenly).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shardplan.costmodel.disagg_queue import Queue, filled, waits_in
from shardplan.costmodel.disagg_serve import Pools, passed
from shardplan.costmodel.first_token import Values, even, percentiles
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.occupancy import Occupancy, occupancy
from shardplan.costmodel.run_spread import NORMAL, OWN

__all__ = ["DecodeSteps", "PoolsRun", "run_pools"]

_PARTS = 24
_TURNS = 60


class DecodeSteps(NamedTuple):
    """How long decode steps take."""

    sequences: Array
    """Of a group, rising to all slots, `[n]`."""
    step_s: Array
    instances: int
    groups: int
    """Of all instances."""
    passes: float
    """Of a request (1 + n)."""
    per_token: float
    """n / (O - 1); 0 where there is no second token."""

    def at(self, sequences: float) -> float:
        """Seconds of a step."""
        return float(np.interp(sequences, self.sequences, self.step_s))

    def slope(self, sequences: float) -> float:
        """Seconds that one more sequence of a group adds."""
        high = min(sequences + 1.0, float(self.sequences[-1]))
        low = max(high - 2.0, float(self.sequences[0]))
        return (self.at(high) - self.at(low)) / (high - low) if high > low else 0.0

    def held(self, rate: float) -> float:
        """Sequences of a group at a rate, all slots at most."""
        low, high = 0.0, float(self.sequences[-1])
        for _ in range(_TURNS):
            middle = (low + high) / 2.0
            few = middle * self.groups < rate * self.passes * self.at(middle)
            low, high = (middle, high) if few else (low, middle)
        return high

    def occupied(self, rate: float) -> Occupancy:
        """How often all slots are taken at a rate."""
        most = float(self.sequences[-1])
        slots, capacity = most * self.groups, most * self.groups / (self.passes * self.at(most))
        given = (rate, capacity, slots, self.held(rate) * self.groups, 1.0)
        return occupancy(*(np.array([one]) for one in given))


class PoolsRun(NamedTuple):
    """Mean, median, 90th and 99th percentile, in seconds; the number in flight."""

    ttft_s: tuple[float, float, float, float]
    tpot_s: tuple[float, float, float, float]
    end_to_end_s: float
    in_flight: float


def run_pools(pools: Pools, steps: DecodeSteps, rate: float) -> PoolsRun:
    """One deployment at a rate that it serves.

    Of a rate that decode instances do not serve the wait for a slot is that of full ones.
    """
    full = steps.occupied(rate)
    held = min(steps.held(rate) + 1.0 / steps.groups, float(steps.sequences[-1]))
    step_s, spread = steps.at(held), steps.slope(held)
    runs = 1.0 - np.exp(-held * steps.groups / steps.instances)
    queue = pools.queue
    found = filled(queue, np.asarray(rate))
    base = sum(passed(pools, found)) + step_s
    parts = (
        *_turns(queue, rate, float(found.step_s)),
        _exponential(float(full.waiting[0]), float(full.wait_s[0])),
        _evenly(float(runs), step_s),
    )
    ttft = _summed(float(np.max(base)), parts)
    deviation = spread * np.sqrt(OWN * held * steps.groups) / steps.groups
    tpot = [steps.per_token * (step_s + quantile * deviation) for quantile in NORMAL]
    later_s = (steps.passes - 1.0) * step_s
    mean, end = float(ttft.mean[0]), float(ttft.mean[0]) + later_s
    p50, p90, p99 = (float(one[0]) for one in percentiles(ttft))
    return PoolsRun(
        (mean, p50, max(p90, p50), max(p99, mean)),
        (tpot[0], *tpot),
        end,
        rate * end,
    )


def _turns(queue: Queue, rate: float, step_s: float) -> tuple[Values, ...]:
    """What prompts wait for their turn: the lesser of both ways to see the queue."""
    singly, shared = waits_in(queue, np.asarray(rate), np.asarray(step_s))
    if singly <= shared:
        return (_waiting(queue, rate, float(queue.singly_per_s)),)
    return _waiting(queue, rate, float(queue.prompts_per_s)), _evenly(1.0, step_s)


def _waiting(queue: Queue, rate: float, capacity: float) -> Values:
    used = min(rate / capacity, 1.0 - 1e-9)
    return _exponential(used ** float(queue.power), 0.5 / (capacity * (1.0 - used)))


def _exponential(share: float, mean_s: float) -> Values:
    """0, but for a share whose mean is told."""
    places = -np.log1p(-even(_PARTS))
    places *= 1.0 / places.mean()
    seconds = np.concatenate([[0.0], mean_s * places])
    weights = np.concatenate([[1.0 - share], np.full(_PARTS, share / _PARTS)])
    return Values(seconds[None, :], weights[None, :])


def _evenly(share: float, most_s: float) -> Values:
    """0, but for a share that is evenly spread."""
    seconds = np.concatenate([[0.0], most_s * even(_PARTS)])
    weights = np.concatenate([[1.0 - share], np.full(_PARTS, share / _PARTS)])
    return Values(seconds[None, :], weights[None, :])


def _summed(base_s: float, parts: tuple[Values, ...]) -> Values:
    """The sum of times that have nothing to do with one another."""
    seconds, weights = np.full(1, base_s), np.ones(1)
    for part in parts:
        seconds = (seconds[:, None] + part.seconds[0]).ravel()
        weights = (weights[:, None] * part.weights[0]).ravel()
        some = weights > 0.0
        seconds, weights = seconds[some], weights[some]
    return Values(seconds[None, :], weights[None, :])
