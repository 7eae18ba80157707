"""How TTFT and TPOT are spread over the requests of prefill and decode pools.

Prompts. x instances take prompts from one queue, K of them every `busy` seconds. Of arrivals at l a
second that come at random, with services that are alike, the share that waits and the wait of these
are taken as (Sakasegawa 1977 for the share, half of the wait of M/M/c, as M/D/1 has it)

    r = l / mu    P(wait) = r^s, s = sqrt(2 (x + 1)) - 1    wait exponential, 1 / (2 mu (1 - r))

so that a share q waits longer than  w(mu) = ln(r^s / q) / (2 mu (1 - r)), or 0. Where a step takes
K > 1, a prompt also waits for the step that runs, and taking one a step is no faster:

    wait = min(w(x / busy), busy + w(K x / busy))

Decode. A cache that is there waits for a step of the others to end, evenly within t, and then for
its own: 1.5 t at the median, 2 t at most. With A = service + transfer + t (`disagg`):

    TTFT of all but q = A + max(wait + t / 2, (1 - q) t)     never below the mean above the median

Slots. n in flight on average in S slots, a Poisson number of them, 99 of 100 find one free where
n + z sqrt(n) <= S, z = 2.326; with (steps) t seconds each that is a rate. A limit on the 99th
percentile of TTFT asks for this and for a queue that keeps the limit: the most requests a second is
    rho mu, of  s ln rho + 2 mu w rho = 2 mu w + ln q         (w: what the limit leaves for waiting)

Closed. C in flight: the rate at which all are (`disagg`) has the queue above, of (C - 1) / (K x)
steps at most; what its percentile has beyond the mean all TTFT have beyond theirs.

TPOT is that of full slots, which no request's exceeds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array

__all__ = ["BEYOND", "Queue", "most_in_slots", "most_rate", "slots_for", "ttft_beyond_s", "wait_s"]

BEYOND = 0.01
"""Share of requests that a 99th percentile leaves out."""
_Z = 2.326
_TURNS = 12
"""Newton's steps: they double the digits."""


class Queue(NamedTuple):
    """x prefill instances behind one queue; arrays broadcast."""

    instances: ArrayLike
    prompts_per_s: Array
    """Of all instances."""
    busy_s: Array

    @property
    def singly_per_s(self) -> Array:
        """Prompts a second, were each step to take one."""
        return np.asarray(self.instances / self.busy_s)

    @property
    def power(self) -> Array:
        """s: of the utilisation, the share of prompts that wait."""
        return np.sqrt(2.0 * (as_array(self.instances) + 1.0)) - 1.0


def _one_wait_s(rate: Array, capacity: Array, power: Array, beyond: float) -> Array:
    """w(mu): inf at and above capacity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        used = rate / capacity
        waited = np.maximum(power * np.log(used) - np.log(beyond), 0.0)
        found = waited / (2.0 * capacity * (1.0 - used))
    return np.where(used < 1.0, np.nan_to_num(found, nan=0.0), np.inf)


def wait_s(queue: Queue, rate: Array, beyond: float = BEYOND) -> Array:
    """Seconds that all but a share `beyond` of the prompts wait at most, at a rate."""
    alone = _one_wait_s(rate, queue.singly_per_s, queue.power, beyond)
    shared = _one_wait_s(rate, queue.prompts_per_s, queue.power, beyond)
    return np.minimum(alone, queue.busy_s + shared)


def ttft_beyond_s(first_s: Array, step_s: Array, waited_s: Array, beyond: float = BEYOND) -> Array:
    """TTFT of all but a share `beyond`; `first_s`: A, `waited_s`: of `wait_s`."""
    return first_s + np.maximum(waited_s + step_s / 2.0, (1.0 - beyond) * step_s)


def _filled(room: Array, power: Array, beyond: float) -> Array:
    """rho of  s ln rho + room rho = room + ln q, by Newton's steps from above in ln rho."""
    target = room + np.log(beyond)
    logs = np.zeros(np.broadcast_shapes(room.shape, power.shape))
    for _ in range(_TURNS):
        part = room * np.exp(logs)
        logs = logs - (power * logs + part - target) / (power + part)
    return np.exp(np.minimum(logs, 0.0))


def most_rate(queue: Queue, left_s: Array, step_s: Array, beyond: float = BEYOND) -> Array:
    """The most requests a second whose TTFT is beyond A by `left_s` at most, but for a share.

    0 where even a request that does not wait is later.
    """
    able = left_s >= (1.0 - beyond) * step_s
    room = np.maximum(left_s - step_s / 2.0, 0.0)
    one, all_of_them = queue.singly_per_s, queue.prompts_per_s
    alone = one * _filled(2.0 * one * room, queue.power, beyond)
    rest = room - queue.busy_s
    shared = all_of_them * _filled(2.0 * all_of_them * np.maximum(rest, 0.0), queue.power, beyond)
    return np.where(able, np.maximum(alone, np.where(rest >= 0.0, shared, 0.0)), 0.0)


def slots_for(in_flight: Array) -> Array:
    """Slots of which 99 of 100 requests find one free, with so many in flight on average."""
    return np.asarray(in_flight + _Z * np.sqrt(in_flight))


def most_in_slots(slots: Array) -> Array:
    """The most in flight on average of which that is so: the inverse of `slots_for`."""
    return np.asarray(((np.sqrt(_Z * _Z + 4.0 * slots) - _Z) / 2.0) ** 2)
