"""Steps of an engine whose requests come at random: how many prompts wait as each begins.

A schedule (a group, or the G groups and microbatches that step together) takes l requests a second.
Its steps decode alone in d seconds, or carry the prompts that came during the step before: with
M prompts in the fullest group, at most c of them a step, they take

    T(0) = d     T(M) = first + (min(M, c) - 1) more

Prompts are spread evenly over the groups, so n of them are ceil(n / G) in the fullest. What waits
as a step begins is a Markov chain

    M' = max(M - c, 0) + ceil(Poisson(l T(M)) / G)

with the steady state p over steps. Where prompts go first only steps without any decode, else all
do:

    step seconds a token of a request = sum p T / (share of the steps that decode)

A prompt that fills more than one step (c = 1) is taken as one long step of `steps` steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array

__all__ = ["NEVER", "STATES", "Arrivals", "Waits", "seconds_of", "waits"]

Indices = NDArray[np.int64]
STATES = 20
"""Prompts that wait in the fullest group, one less at most."""
_FEW = 7
NEVER = 1e-13
"""A state with so small a share of steps is not met."""
_MOST_SUMMED = 100.0
"""Mean of a Poisson distribution whose first terms are summed: of larger ones they vanish."""
_SUMMED = 16.0
"""Of groups no more: a term each."""
_ROWS = 512
"""Rows that are solved at once: what that takes of memory."""


class Arrivals(NamedTuple):
    """What comes to schedules that step together and how long their steps take; arrays `[rows]`."""

    rate: Array
    """Requests a second of all of them."""
    groups: Array
    decode_s: Array
    first_s: Array
    more_s: Array
    at_once: Array
    """Prompts of a group that a step holds at most."""
    steps: Array
    """Steps that a prompt longer than one takes; 1 of others."""
    rest_s: Array
    """Until such a prompt is done, over the time that it keeps others waiting."""
    prompts_first: bool

    def take(self, rows: Indices) -> Arrivals:
        """Some rows."""
        columns: dict[str, Any] = {
            name: one[rows] for name, one in self._asdict().items() if isinstance(one, np.ndarray)
        }
        return self._replace(**columns)


class Waits(NamedTuple):
    """The steady state of the steps, by the prompts that each begins with; `[rows, states]`."""

    share: Array
    """Of steps."""
    seconds: Array
    """Of a step."""
    step_s: Array
    """Mean seconds a token of a decoding request `[rows]`."""

    def take(self, rows: Indices, states: int = STATES) -> Waits:
        """Some rows, and their first states."""
        return Waits(self.share[rows, :states], self.seconds[rows, :states], self.step_s[rows])


def seconds_of(one: Arrivals, prompts: Array) -> Array:
    """Seconds of steps with so many prompts in the fullest group, `[rows, ...]`."""
    shape = (slice(None), *(None,) * (prompts.ndim - 1))
    held = np.minimum(prompts, one.at_once[shape])
    mixed = one.first_s[shape] + np.maximum(held - 1.0, 0.0) * one.more_s[shape]
    return np.where(prompts > 0.0, mixed, one.decode_s[shape])


def waits(one: Arrivals) -> Waits:
    """The steady state of the chain of steps.

    Few prompts wait in most: rows are solved over the first `_FEW` states, and over all where the
    last of those is met.
    """
    rows, states = one.rate.size, np.arange(float(STATES))
    seconds = seconds_of(one, np.broadcast_to(states, (rows, STATES)))
    coming = one.rate[:, None] * seconds
    left = np.maximum(states - one.at_once[:, None], 0.0)
    share = np.zeros((rows, STATES))
    unsolved = np.arange(rows)
    for count in (_FEW, STATES):
        for start in range(0, unsolved.size, _ROWS):
            part = unsolved[start : start + _ROWS]
            chain = _chain(coming[part, :count], left[part, :count], one.groups[part])
            share[part, :count] = _stationary(chain)
        unsolved = unsolved[share[unsolved, _FEW - 1] > NEVER]
    total = (share * seconds).sum(axis=-1)
    mixed = 0.0 if one.prompts_first else one.steps * (1.0 - share[:, 0])
    decoding = share[:, 0] + mixed
    return Waits(share, seconds, total / np.maximum(decoding, 1e-9))


def _chain(coming: Array, left: Array, groups: Array) -> Array:
    """Probabilities `[rows, states, states]` of the prompts that the next step begins with.

    `coming`: mean number that come during a step, `left`: those that it leaves waiting.
    """
    states = coming.shape[1]
    new = np.arange(states) - left[:, :, None]
    upto = np.take_along_axis(_upto(coming, groups), np.maximum(new, 0.0).astype(np.int64), axis=2)
    reached = np.where(new >= 0.0, upto, 0.0)
    reached[..., -1] = 1.0
    found: Array = np.diff(reached, axis=-1, prepend=0.0)
    return found


def _upto(coming: Array, groups: Array) -> Array:
    """Probabilities `[rows, states, states]` of 0, 1, ... prompts of each group or fewer."""
    most = coming.shape[1]
    found = np.empty((*coming.shape, most))
    whole = (groups <= _SUMMED) & (groups == np.floor(groups))
    summed = whole & (coming.max(axis=1) <= _MOST_SUMMED)
    for count in np.unique(groups[summed]):
        rows = np.flatnonzero(summed & (groups == count))
        found[rows] = _sums(coming[rows], int(count), most)
    others = np.flatnonzero(~summed)
    if others.size:
        from scipy.special import pdtr  # slow to import

        numbers = np.arange(float(most)) * groups[others, None, None]
        found[others] = pdtr(numbers, coming[others, :, None])
    return found


def _sums(coming: Array, groups: int, most: int) -> Array:
    """The same by the sums of the terms themselves."""
    factors = np.ones((*coming.shape, (most - 1) * groups + 1))
    np.divide(coming[..., None], np.arange(1.0, factors.shape[-1]), out=factors[..., 1:])
    np.cumprod(factors, axis=-1, out=factors)
    np.cumsum(factors, axis=-1, out=factors)
    found: Array = np.exp(-coming)[..., None] * factors[..., ::groups]
    return found


def _stationary(chain: Array) -> Array:
    """The shares `[rows, states]` that the chain leaves as they are."""
    rows, count, _ = chain.shape
    system = np.swapaxes(chain, 1, 2) - np.eye(count)
    system[:, -1, :] = 1.0
    right = np.zeros((rows, count, 1))
    right[:, -1] = 1.0
    return np.asarray(np.maximum(np.linalg.solve(system, right)[..., 0], 0.0))
