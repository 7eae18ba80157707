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

from typing import NamedTuple

import numpy as np

from shardplan.costmodel.kernels.base import Array

__all__ = ["STATES", "Arrivals", "Waits", "seconds_of", "waits"]

STATES = 20
"""Prompts that wait in the fullest group, one less at most."""
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


class Waits(NamedTuple):
    """The steady state of the steps, by the prompts that each begins with; `[rows, states]`."""

    share: Array
    """Of steps."""
    seconds: Array
    """Of a step."""
    step_s: Array
    """Mean seconds a token of a decoding request `[rows]`."""


def seconds_of(one: Arrivals, prompts: Array) -> Array:
    """Seconds of steps with so many prompts in the fullest group, `[rows, ...]`."""
    shape = (slice(None), *(None,) * (prompts.ndim - 1))
    held = np.minimum(prompts, one.at_once[shape])
    mixed = one.first_s[shape] + np.maximum(held - 1.0, 0.0) * one.more_s[shape]
    return np.where(prompts > 0.0, mixed, one.decode_s[shape])


def waits(one: Arrivals) -> Waits:
    """The steady state of the chain of steps."""
    rows, states = one.rate.size, np.arange(float(STATES))
    seconds = seconds_of(one, np.broadcast_to(states, (rows, STATES)))
    coming = one.rate[:, None] * seconds
    left = np.maximum(states - one.at_once[:, None], 0.0)
    share = np.empty((rows, STATES))
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        share[part] = _stationary(_chain(coming[part], left[part], one.groups[part]))
    total = (share * seconds).sum(axis=-1)
    mixed = 0.0 if one.prompts_first else one.steps * (1.0 - share[:, 0])
    decoding = share[:, 0] + mixed
    return Waits(share, seconds, total / np.maximum(decoding, 1e-9))


def _chain(coming: Array, left: Array, groups: Array) -> Array:
    """Probabilities `[rows, states, states]` of the prompts that the next step begins with.

    `coming`: mean number that come during a step, `left`: those that it leaves waiting.
    """
    from scipy.special import pdtr  # slow to import

    new = np.arange(STATES) - left[:, :, None]
    upto = pdtr(np.maximum(new, 0.0) * groups[:, None, None], coming[:, :, None])
    reached = np.where(new >= 0.0, upto, 0.0)
    reached[..., -1] = 1.0
    found: Array = np.diff(reached, axis=-1, prepend=0.0)
    return found


def _stationary(chain: Array) -> Array:
    """The shares `[rows, states]` that the chain leaves as they are."""
    rows, count, _ = chain.shape
    system = np.swapaxes(chain, 1, 2) - np.eye(count)
    system[:, -1, :] = 1.0
    right = np.zeros((rows, count, 1))
    right[:, -1] = 1.0
    return np.asarray(np.maximum(np.linalg.solve(system, right)[..., 0], 0.0))
