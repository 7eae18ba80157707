"""The queue of prompts before x prefill instances: how full their steps are, and how long it takes.

An instance runs steps of up to n prompts a group, K of all its groups: T_1 seconds where no group
has more than one, T_n where all are full, on a line between. Of arrivals at R a second a step finds
those that came while the one before it ran, m a group,

    m = R T(m) / (x K / n), from 1 to n
      = r (e - q) / (1 - r q)     r = R / M, M = x K / T_n, e = n T_1 / T_n, q = (n - e) / (n - 1)

so that steps of few prompts are short ones: T = T(m). A prompt goes through the pipeline in
S T / T_n, S that of a full step.

Wait. Of arrivals that come at random, with services that are alike, the share that waits and the
wait of these are taken as (Sakasegawa 1977 for the share, half of the wait of M/M/c, as M/D/1 has
it)

    r = R / mu    P(wait) = r^s, s = sqrt(2 (x + 1)) - 1    wait exponential, 1 / (2 mu (1 - r))

on average w(mu) = r^s / (2 mu (1 - r)); a share q waits longer than

    w_q(mu) = ln(r^s / q) / (2 mu (1 - r)), or 0

Where a step takes K > 1 a prompt also waits for the step that runs, half of it on average and all
of it at most, and taking one a step is no faster:

    wait = min(w(x / T_1), T / 2 + w(M))        of all but q: w_q(x / T_1), or T_n + w_q(M)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array

Late = Callable[[Array], Array]
__all__ = [
    "BEYOND",
    "Filled",
    "Queue",
    "filled",
    "largest_share",
    "waits_in",
]

BEYOND = 0.01
"""Share of requests that a 99th percentile leaves out."""
_ALMOST = 1.0 - 1e-12
_TURNS, _ROUNDS = 3, 30
"""Looks for a share before those that are found are left alone, and how often."""
_SAME = 1e-10


class Queue(NamedTuple):
    """x prefill instances behind one queue; arrays broadcast."""

    prompts_per_s: Array
    """Of all instances, with full steps (M)."""
    singly_per_s: Array
    """Were each step to take one (x / T_1)."""
    power: Array
    """s: of the utilisation, the share of prompts that wait."""
    one_s: Array
    """A step of one prompt a group at most (T_1)."""
    more_s: Array
    """What each other prompt of a group adds to a step."""
    prompts: Array
    """Of a group in a full step (n)."""
    filling_s: Array
    """(e - q) / M."""
    slope_s: Array
    """q / M."""

    @classmethod
    def of(
        cls, instances: ArrayLike, prompts_per_s: Array, busy_s: Array, one_s: Array, prompts: Array
    ) -> Queue:
        """Of x instances, M, T_n, T_1 and n."""
        others = np.maximum(prompts - 1.0, 1.0)
        gain = prompts * one_s / busy_s
        slope = np.where(prompts > 1.0, (prompts - gain) / others, 0.0)
        count = as_array(instances)
        return cls(
            prompts_per_s=prompts_per_s,
            singly_per_s=count / one_s,
            power=np.sqrt(2.0 * (count + 1.0)) - 1.0,
            one_s=one_s,
            more_s=(busy_s - one_s) / others,
            prompts=prompts,
            filling_s=(gain - slope) / prompts_per_s,
            slope_s=slope / prompts_per_s,
        )


class Filled(NamedTuple):
    """The steps that arrivals at a rate find."""

    prompts: Array
    """Of a group (m)."""
    step_s: Array
    """T."""


def filled(queue: Queue, rate: Array) -> Filled:
    """How full steps are at a rate below capacity."""
    left = np.maximum(1.0 - rate * queue.slope_s, 1e-12)
    count = np.minimum(np.maximum(rate * queue.filling_s / left, 1.0), queue.prompts)
    return Filled(count, queue.one_s + (count - 1.0) * queue.more_s)


class _Line(NamedTuple):
    """One way to see the queue, at a rate: as if below capacity, and where it is."""

    logs: Array
    """ln P(wait)."""
    each_s: Array
    """Mean wait of those that wait; inf at and above capacity."""


def _line(queue: Queue, rate: Array, capacity: Array) -> _Line:
    with np.errstate(divide="ignore"):
        logs = queue.power * np.log(rate / capacity)
        each_s = np.where(rate < capacity, 0.5 / np.maximum(capacity - rate, 1e-300), np.inf)
    return _Line(logs, each_s)


def _longer(one: _Line, beyond: float | None) -> Array:
    """Seconds on average, or of all but a share `beyond`."""
    if beyond is None:
        return np.asarray(np.exp(np.minimum(one.logs, 0.0)) * one.each_s)
    found = np.maximum(one.logs - math.log(beyond), 0.0)
    return np.where(found > 0.0, found, 0.0) * np.where(found > 0.0, one.each_s, 0.0)


def waits_in(
    queue: Queue, rate: Array, busy_s: Array, beyond: float | None = None
) -> tuple[Array, Array]:
    """Mean seconds that prompts wait, or what all but a share `beyond` wait at most.

    In steps of one a group, and in full ones, which take `busy_s`. inf at and above capacity.
    """
    singly = _longer(_line(queue, rate, queue.singly_per_s), beyond)
    shared = _longer(_line(queue, rate, queue.prompts_per_s), beyond)
    return singly, (0.5 if beyond is None else 1.0) * busy_s + shared


class _Bracket(NamedTuple):
    """Shares below and above where a function goes through 0, and its values there."""

    low: Array
    high: Array
    below: Array
    above: Array
    side: NDArray[np.int8]
    """Which end moved last: 1 the upper one, -1 the lower one."""

    def narrowed(self, late: Callable[[Array], Array]) -> _Bracket:
        """By false position; the value of an end that stays is halved (Illinois)."""
        low, high, below, above, side = self
        gap = above - below
        middle = high - above * (high - low) / np.where(gap > 0.0, gap, 1.0)
        inside = (middle > low) & (middle < high)
        middle = np.where(inside, middle, (low + high) / 2.0)
        value = late(middle)
        up = value > 0.0
        return _Bracket(
            np.where(up, low, middle),
            np.where(up, middle, high),
            np.where(up, np.where(side == 1, below / 2.0, below), value),
            np.where(up, value, np.where(side == -1, above / 2.0, above)),
            np.where(up, 1, -1).astype(np.int8),
        )

    @property
    def wide(self) -> NDArray[np.bool_]:
        """Where the ends are not yet the same."""
        return np.asarray((self.high - self.low > _SAME * self.high) & (self.below < 0.0))

    def some(self, where: NDArray[np.intp]) -> _Bracket:
        """Those at some places."""
        low, high, below, above = (one[where] for one in self[:4])
        return _Bracket(low, high, below, above, self.side[where])


def largest_share(late_of: Callable[[NDArray[np.intp]], Late], top: Array) -> Array:
    """The largest numbers up to `top` `[n]`, below 1, at which a function is not above 0.

    `late_of` gives the function of some places of `[n]`. It goes through 0 once, upwards, between 0
    and `top`; where it is nowhere above 0 the result is `top`, where nowhere below 0.
    """
    places = np.arange(top.size)
    high, late = np.minimum(top, _ALMOST), late_of(places)
    low = np.zeros_like(high)
    now = _Bracket(low, high, late(low), late(high), np.zeros(high.shape, dtype=np.int8))
    found = np.where(now.below > 0.0, 0.0, high)
    places = np.flatnonzero((now.below <= 0.0) & (now.above > 0.0))
    now = now.some(places)
    for _ in range(_ROUNDS):
        late = late_of(places)
        for _ in range(_TURNS):
            now = now.narrowed(late)
        found[places] = now.low
        left = np.flatnonzero(now.wide)
        if not left.size:
            break
        places, now = places[left], now.some(left)
    return found
