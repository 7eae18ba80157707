"""How TTFT and TPOT are spread over the requests of prefill and decode pools.

Prompts wait for their turn (`disagg_queue`).

Decode. A cache that is there waits for a step of the others to end, evenly within t, and then for
its own: 1.5 t at the median, 2 t at most. With A = service + transfer + t (`disagg`):

    TTFT of all but q = A + max(wait + t / 2, (1 - q) t)     never below the mean above the median

Slots. n in flight on average in S slots, a Poisson number of them, 99 of 100 find one free where
n + z sqrt(n) <= S, z = 2.326; with (steps) t seconds each that is a rate. A limit on the 99th
percentile of TTFT asks for this and for a queue that keeps the limit; one on the mean, of requests
that come at a rate that is asked, for this beside its own queue, so that few wait for a slot.

Closed. C in flight: the rate at which all are (`disagg`) has the queue of arrivals at random, of
(C - 1) / (K x) steps at most; what its percentile has beyond the mean all TTFT have beyond theirs.

TPOT is that of full slots, which no request's exceeds.
"""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.disagg_queue import BEYOND
from shardplan.costmodel.kernels.base import Array

__all__ = ["most_in_slots", "slots_for", "ttft_beyond_s"]

_Z = 2.326


def ttft_beyond_s(first_s: Array, step_s: Array, waited_s: Array, beyond: float = BEYOND) -> Array:
    """TTFT of all but a share `beyond`; `first_s`: A, `waited_s`: of `wait_s`."""
    return first_s + np.maximum(waited_s + step_s / 2.0, (1.0 - beyond) * step_s)


def slots_for(in_flight: Array) -> Array:
    """Slots of which 99 of 100 requests find one free, with so many in flight on average."""
    return np.asarray(in_flight + _Z * np.sqrt(in_flight))


def most_in_slots(slots: Array) -> Array:
    """The most in flight on average of which that is so: the inverse of `slots_for`."""
    return np.asarray(((np.sqrt(_Z * _Z + 4.0 * slots) - _Z) / 2.0) ** 2)
