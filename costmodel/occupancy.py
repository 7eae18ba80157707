"""Requests in flight where they come at random: how often every slot is taken, and the wait then.

S slots of a deployment serve r(S) requests a second, n of them r(n) = l (n / N)^g with N those in
flight on average (Little's law) at l requests a second, g = ln(r(S) / l) / ln(S / N). A machine
that shares itself among its requests at a rate that depends on their number has n of them with
probability

    p(n) ~ prod over j up to n of l / r(j) = N^(g n) / n!^g

whatever their lengths (Cohen 1979, "The multiple phase service network with generalized processor
sharing"), and N / g is the variance of n. Beyond S the queue falls by l / r(S) a request. A request
that finds S taken waits, exponentially, for

    1 / 2 / (r(S) - l)        (Kingman), as those that are alike end at regular times
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array

__all__ = ["Occupancy", "occupancy"]

_BENDS = (0.05, 4.0)
"""Of g: what slots near those in flight, or far beyond, would make of it."""
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


def occupancy(rate: Array, capacity: Array, slots: Array, in_flight: Array) -> Occupancy:
    """Of deployments `[rows]`: `rate` of `capacity` requests a second, slots in all.

    `in_flight`: the mean; where that is no less than all slots each request waits for one.
    """
    room = np.maximum(slots / np.maximum(in_flight, 1e-9), 1.0 + 1e-6)
    spare = np.maximum(capacity / rate, 1.0 + 1e-9)
    bend = np.clip(np.log(spare) / np.log(room), *_BENDS)
    share, rows = np.zeros(room.shape), np.flatnonzero(_met(slots, in_flight, bend))
    given = (slots[rows], in_flight[rows], bend[rows], spare[rows])
    share[rows] = [_full(*row) for row in zip(*given, strict=True)]
    excess = np.maximum(capacity - rate, 1e-12)
    share = np.where(in_flight < slots, share, 1.0)
    return Occupancy(share, 0.5 / excess, in_flight / bend)


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
