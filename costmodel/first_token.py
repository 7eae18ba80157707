"""How TTFT is spread over requests, from the steps that their engine is in (`arrivals`).

Random arrivals: a request comes in a step of M prompts with probability p(M) T(M) / sum p T,
anywhere in it (U even):

    TTFT = (1 - U) T(M) + floor(a / (G c)) T(c) + T(last)
           a = G max(M - c, 0) + Poisson(l U T(M)) prompts before it; `last` its own step's, those
           that come behind it counted by their mean

With no other in flight it finds no step that runs: T(1). One that finds every slot taken waits
exponentially (`occupancy`) and then computes its prompt.

Closed loops: it comes as a step ends, with others, `others` of each group on average (Poisson). The
fullest group has M with it: P(up to M) = P(own others < M) P(others of another group <= M)^(G - 1).

Percentiles are those of values with weights, a line between neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shardplan.costmodel.arrivals import Arrivals, Waits, seconds_of
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.occupancy import Occupancy

__all__ = ["QUANTILES", "Values", "closed_values", "even", "joined", "open_values", "percentiles"]

QUANTILES = (0.5, 0.9, 0.99)
_PARTS = 8
"""Places within a step."""
_AHEAD = 10
"""Prompts that come with one; the last stands for more."""
_LATE = 32


class Values(NamedTuple):
    """Seconds and how often they are; `[rows, values]`, the weights of a row sum to 1."""

    seconds: Array
    weights: Array

    @property
    def mean(self) -> Array:
        """Mean seconds `[rows]`."""
        return np.asarray((self.seconds * self.weights).sum(axis=1))


def even(count: int = _LATE) -> Array:
    """Middles of equal parts of (0, 1)."""
    return (np.arange(count) + 0.5) / count


def joined(*parts: tuple[Array, Array]) -> Values:
    """Seconds `[rows, n]` of each part, and the part's share `[rows]` or weights `[rows, n]`."""
    weights = [
        share if share.ndim > 1 else np.repeat(share[:, None], own.shape[1], 1) / own.shape[1]
        for own, share in parts
    ]
    return Values(np.concatenate([own for own, _ in parts], 1), np.concatenate(weights, 1))


def _poisson(mean: Array) -> Array:
    """Probabilities of 0, 1, ... `[..., _AHEAD]`; the last is that of all beyond."""
    factors = np.ones((*mean.shape, _AHEAD))
    factors[..., 1:] = mean[..., None] / np.arange(1.0, _AHEAD)
    odds = np.exp(-mean)[..., None] * np.cumprod(factors, axis=-1)
    odds[..., -1] += np.maximum(1.0 - odds.sum(axis=-1), 0.0)
    return np.asarray(odds)


def _served_s(one: Arrivals, ahead: Array, behind: Array, *, coming: bool) -> Array:
    """Seconds of the steps up to a prompt's own, with prompts before and behind it, `[rows, ...]`.

    `coming`: more come behind it while those before it are computed.
    """
    wide = (slice(None), *(None,) * (ahead.ndim - 1))
    groups, most = one.groups[wide], one.at_once[wide]
    full = np.floor(ahead / (groups * most))
    rest = ahead - full * groups * most + 1.0
    whole_s = full * (one.first_s + (one.at_once - 1.0) * one.more_s)[wide]
    if coming:
        behind = behind + one.rate[wide] * whole_s
    own = np.maximum(np.ceil(rest / groups), (rest + behind) / groups)
    return whole_s + seconds_of(one, own)


def _left(one: Arrivals, states: int) -> Array:
    """Prompts of all groups that a step of each state leaves waiting `[rows, states]`."""
    return np.maximum(np.arange(float(states)) - one.at_once[:, None], 0.0) * one.groups[:, None]


def open_values(one: Arrivals, state: Waits, filled: Occupancy, alone: Array) -> Values:
    """TTFT of random arrivals; `alone`: how often nothing else is in flight `[rows]`."""
    part = even(_PARTS)
    odds = _poisson(one.rate[:, None, None] * state.seconds[:, :, None] * part)
    weights = (state.share * state.seconds)[:, :, None, None] / _PARTS * odds
    ahead = _left(one, state.share.shape[1])[:, :, None, None] + np.arange(float(_AHEAD))
    later_s = state.seconds[:, :, None] * (1.0 - part)
    last_s = np.where(np.arange(later_s.shape[1]) > 0, one.last_s[:, None], 0.0)[..., None]
    later_s = np.where(later_s > last_s, later_s - last_s, later_s)[..., None]
    behind = one.rate[:, None, None, None] * later_s
    seconds = later_s + _served_s(one, ahead + 0.0 * later_s, behind, coming=True)
    weights = weights.reshape(one.rate.size, -1)
    weights = weights / weights.sum(axis=1, keepdims=True)
    found = 1.0 - filled.waiting
    late = filled.wait_s[:, None] * -np.log(even())
    first = one.first_s[:, None]
    every = joined(
        (seconds.reshape(weights.shape), weights * ((1.0 - alone) * found)[:, None]),
        (late + first, filled.waiting),
        (first, alone * found),
    )
    ends = (every.seconds + rest[:, None] for rest in (one.rest_s, one.late_s))
    if not one.late.any():
        return Values(next(ends), every.weights)
    late = one.late[:, None]
    seconds = np.concatenate([*ends], axis=1)
    return Values(seconds, np.concatenate([every.weights * (1.0 - late), every.weights * late], 1))


def closed_values(one: Arrivals, others: Array, slots: Array, mean_s: Array) -> Values:
    """TTFT of requests that come as others end, in groups of so many `slots`.

    What the mean has beyond these all of them have: the wait where prompts do not fit their steps.
    """
    own = np.cumsum(_poisson(others * (slots - 1.0) / slots), axis=1)
    every = np.cumsum(_poisson(others), axis=1)
    upto = np.concatenate([own[:, :1] * 0.0, own[:, :-1]], axis=1)
    upto = upto * every ** (one.groups[:, None] - 1.0)
    upto[:, -1] = 1.0
    number = np.broadcast_to(np.arange(float(_AHEAD)), upto.shape)
    ahead = np.floor((number - 1.0) / 2.0)
    alone = one._replace(groups=np.ones_like(one.groups))
    seconds = _served_s(alone, np.maximum(ahead, 0.0), number - 1.0 - ahead, coming=False)
    found = Values(seconds, np.diff(upto, axis=1, prepend=0.0))
    return found._replace(seconds=seconds + np.maximum(mean_s - found.mean, 0.0)[:, None])


def percentiles(values: Values) -> tuple[Array, ...]:
    """`QUANTILES` of each row, `[rows]` each."""
    order = np.argsort(values.seconds, axis=1, kind="stable")
    seconds = np.take_along_axis(values.seconds, order, axis=1)
    reached = np.cumsum(np.take_along_axis(values.weights, order, axis=1), axis=1)
    rows, last = np.arange(reached.shape[0]), reached.shape[1] - 1
    found = []
    for q in QUANTILES:
        next_ = np.minimum((reached <= q).sum(axis=1), last)
        before = np.maximum(next_ - 1, 0)
        low, high = reached[rows, before], reached[rows, next_]
        rise = seconds[rows, next_] - seconds[rows, before]
        share = (q - low) / np.where(high > low, high - low, 1.0)
        found.append(seconds[rows, before] + np.clip(share, 0.0, 1.0) * rise)
    return tuple(found)
