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

A request takes a step of T(m) seconds with m of them in slots, so many that decode. Steps are
T(m) apart, and a request is in more of those that many share: of times (E over these)

    seconds of a step   1 / E[1 / T(m)]      of a request's step   E[m] / E[m / T(m)]

with the number in flight taken as gamma distributed, at the places and with the weights of Gauss
and Hermite for five. Its variance is that of clusters over 1 - e where T ~ m^e about the mean: a
request more makes all stay longer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array

__all__ = ["WEIGHTS", "Met", "Occupancy", "met", "numbers_of", "occupancy"]

_NEVER = -60.0
"""Log of odds that leave no trace."""
_PLACES = np.array([0.0021386, 0.0876094, 0.5, 0.9123906, 0.9978614])
"""How many of a normal distribution are below the roots of the Hermite polynomial of degree 5."""
WEIGHTS = np.array([0.0112574, 0.2220759, 0.5333333, 0.2220759, 0.0112574])
_SCALED = 4
"""Times that numbers are brought to their mean: those beyond the slots wait outside."""
_MOST_LONGER = 0.5
"""Elasticity of a decode step over the requests in it that is followed."""
_LEAST = 1e-3
"""Shape of a gamma distribution that is mostly none."""


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


def numbers_of(mean: Array, uneven: Array, slots: Array) -> Array:
    """Requests in slots at a time, `[rows, WEIGHTS]`: `mean` of them, those in flight gamma
    distributed."""
    from scipy.special import gammaincinv  # slow to import

    shape = np.maximum(mean / uneven, _LEAST)[:, None]
    found = gammaincinv(shape, _PLACES)
    for _ in range(_SCALED):
        found *= (mean / np.maximum(_mean(found), 1e-300))[:, None]
        found = np.minimum(found, slots[:, None])
    return np.asarray(found)


class Met(NamedTuple):
    """Steps and what a request meets of them; arrays `[rows]`."""

    mean: Array
    """Requests in slots."""
    step_s: Array
    """Of a step."""
    more_s: Array
    """What a request's steps are longer."""
    longer: Array
    """Elasticity of a step over the requests in it: that of a line through the numbers."""


def met(numbers: Array, seconds: Array) -> Met:
    """`seconds` of a step of each of the `numbers`, both `[rows, WEIGHTS]`."""
    mean, mean_s = _mean(numbers), _mean(seconds)
    step_s = 1.0 / _mean(1.0 / seconds)
    own_s = mean / np.maximum(_mean(numbers / seconds), 1e-300)
    apart = numbers - mean[:, None]
    rise = _mean(apart * (seconds - mean_s[:, None])) / np.maximum(_mean(apart**2), 1e-12)
    longer = np.clip(rise * mean / mean_s, 0.0, _MOST_LONGER)
    return Met(mean, step_s, np.maximum(own_s - step_s, 0.0), longer)


def _mean(values: Array) -> Array:
    """Of `[rows, WEIGHTS]`; of a row the same to the bit, whatever others there are."""
    return np.asarray((values * WEIGHTS).sum(axis=1))


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
