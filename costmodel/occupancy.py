"""Requests in flight where they come at random: how often every slot is taken, and the wait then.

N of them are in flight on average (Little's law), with a variance of N V: requests come in clusters
where prompts hold up those that decode (`arrivals.unevenness`). A machine that shares itself among
its requests at a rate that depends on their number has n of them with probability

    p(n) ~ N^(g n) / n!^g,      g = 1 / V,

whatever their lengths (Cohen 1979, "The multiple phase service network with generalized processor
sharing"). Beyond S slots that serve r(S) requests a second the queue falls by l / r(S) a request. A
request that finds S taken waits, exponentially, for

    k / (r(S) - l)      k = (1 + f) / 2,  f = (1 - u) (S - 1) (sqrt(4 + 5 S) - 2) / (16 u S)

with u = l / r(S): the M/D/S queue over the M/M/S queue (Cosmetatos 1976, "Some approximate
equilibrium results for the multi-server queue M/G/r"), as requests that are alike end at regular
times.

A request in a slot is among more than are there on average: with m of them in the slots, its like
are E[m^2] / E[m], n taken as gamma distributed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array

__all__ = ["Occupancy", "crowd_met", "occupancy"]

_NEVER = -60.0
"""Log of odds that leave no trace."""


class Occupancy(NamedTuple):
    """Requests in flight; arrays `[rows]`."""

    waiting: Array
    """Share of requests that find every slot taken."""
    wait_s: Array
    """Their mean wait."""
    variance: Array
    """Of the number in flight."""

    def take(self, rows: NDArray[np.int64]) -> Occupancy:
        """Some rows."""
        return Occupancy(*(one[rows] for one in self))


def occupancy(
    rate: Array, capacity: Array, slots: Array, in_flight: Array, uneven: Array
) -> Occupancy:
    """Of deployments `[rows]`: `rate` of `capacity` requests a second, slots in all.

    `in_flight`: the mean; where that is no less than all slots each request waits for one.
    `uneven`: its variance over the mean.
    """
    spare, bend = np.maximum(capacity / rate, 1.0 + 1e-9), 1.0 / uneven
    share, rows = np.zeros(spare.shape), np.flatnonzero(_met(slots, in_flight, bend))
    given = (slots[rows], in_flight[rows], bend[rows], spare[rows])
    share[rows] = [_full(*row) for row in zip(*given, strict=True)]
    excess = np.maximum(capacity - rate, 1e-12)
    share = np.where(in_flight < slots, share, 1.0)
    return Occupancy(share, _regular(1.0 / spare, slots) / excess, in_flight * uneven)


def _regular(used: Array, slots: Array) -> Array:
    """The M/D/S queue over the M/M/S queue."""
    more = (1.0 - used) * (slots - 1.0) * (np.sqrt(4.0 + 5.0 * slots) - 2.0) / (16.0 * used * slots)
    return np.asarray(np.minimum((1.0 + more) / 2.0, 1.0))


def crowd_met(in_flight: Array, uneven: Array, slots: Array) -> Array:
    """Requests in slots that one of them is among, itself counted, at least one.

    One more than `in_flight`, the mean, where they come and go independently (`uneven` 1).
    """
    from scipy.special import gammainc  # slow to import

    shape, room = in_flight / uneven, slots / uneven
    below, mean, square = (gammainc(shape + more, room) for more in (0.0, 1.0, 2.0))
    first = in_flight * mean + slots * (1.0 - below)
    second = in_flight * (in_flight + uneven) * square + slots**2 * (1.0 - below)
    return np.asarray(np.clip(second / np.maximum(first, 1e-12), 1.0, slots))


def _met(slots: Array, in_flight: Array, bend: Array) -> NDArray[np.bool_]:
    """Whether all slots are ever taken: p(slots) over p of those in flight, both in whole numbers,
    tells more than nothing."""
    usual, most = np.maximum(np.floor(in_flight), 0.0), np.ceil(slots)
    log = np.log(np.maximum(in_flight, 1e-9))
    logs = np.log(np.arange(1.0, max(most.max(initial=0.0), usual.max(initial=0.0)) + 1.0))
    factorial = np.concatenate([[0.0], np.cumsum(logs)])
    between = factorial[most.astype(np.int64)] - factorial[usual.astype(np.int64)]
    odds = bend * ((most - usual) * log - between)
    return np.asarray(odds > _NEVER)


def _full(slots: float, in_flight: float, bend: float, spare: float) -> float:
    """Share of time with every slot taken."""
    numbers = np.arange(1.0, np.ceil(slots) + 1.0)
    steps = bend * (np.log(max(in_flight, 1e-9)) - np.log(numbers))
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    weights = np.exp(logs - logs.max())
    beyond = weights[-1] / (1.0 - 1.0 / spare)
    return float(beyond / (weights[:-1].sum() + beyond))
