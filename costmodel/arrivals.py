"""Steps of an engine whose requests come at random: how many prompts wait as each begins.

A schedule (a group, or the G groups and microbatches that step together) takes l requests a second.
Its steps decode alone in d seconds, or carry the prompts that came during the step before: with
M prompts in the fullest group, at most c of them a step, they take

    T(0) = d     T(M) = first + (min(M, c) - 1) more

What waits as a step begins is a Markov chain

    M' = max(M - c, 0) + new(l T(M))

with the steady state p over steps. Of n prompts that come during a step the fullest group gets

    groups        ceil(n / G) where they are spread evenly, the most of G independent Poisson
                  numbers where as chance has it; who goes to the group with the least in flight is
                  of the latter kind with a chance of (1 - 1 / G) min(1, t / T)^2: two that come
                  during T meet in a group where both take the places of requests that ended with
                  the last step (ends come t apart, as many as prompts); others are spread
    microbatches  all that come go with the next of them: the most of independent ones
    replicas      that requests go to by turns: each R-th, floor((Poisson(R l T) + u) / R)

Where prompts go first only steps without any prompt decode, else all do:

    t = sum p T / (share of the steps that decode)           step seconds a token of a request

The steps after a request's own prompt are not like any: more came during that long step than
during others. With w steps of a state that decode (0 or 1, or a prompt's own number) and h the
sums of T - w t over all steps from a state on, h = T - w t + P h, n tokens take

    n t + h(after the step of a prompt) - h(after the last step)

Requests that come because of one (those that meet the stop it makes, and so on) are a branching
process; with r of them at once the number that decodes together, Poisson clusters of these (Borel's
distribution), has

    variance / mean = 1 / (1 - r)^2

A prompt that leaves no room for another (c = 1) is taken as one long step of `steps` steps
(`long_prompts`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array

__all__ = ["NEVER", "STATES", "Arrivals", "Waits", "seconds_of", "unevenness", "waits"]

Indices = NDArray[np.int64]
STATES = 20
"""Prompts that wait in the fullest group, one less at most."""
_FEW = 7
NEVER = 1e-13
"""A state with so small a share of steps is not met."""
_MOST_SUMMED = 100.0
"""Mean of a Poisson distribution whose first terms are summed: of larger ones they vanish."""
_MOST_AGAIN = 0.8
"""Requests that come because of one at most: slots, and queues that grow, bound clusters."""
_MOST_TURNS = 8
"""Replicas from which on the stream of each is as regular as it matters."""
_EMPTIED = 1e-13
"""Share of steps after which nothing waits, whatever was there."""
_SUMMED = 16.0
"""Of groups no more: a term each."""
_ROWS = 512
"""Rows that are solved at once: what that takes of memory."""


class Arrivals(NamedTuple):
    """What comes to schedules that step together and how long their steps take; arrays `[rows]`."""

    rate: Array
    """Requests a second of all of them."""
    groups: Array
    lanes: Array
    """Microbatches among these: prompts that come go with the next of them."""
    replicas: Array
    """Schedules that do not step together, which requests go to by turns."""
    decode_s: Array
    """Of a step without prompts of the schedule."""
    bare_s: Array
    """Of one without any."""
    bare: Array
    """How often the former are such."""
    first_s: Array
    more_s: Array
    at_once: Array
    """Prompts of a group that a step holds at most."""
    steps: Array
    """Steps that a prompt longer than one takes; 1 of others."""
    last_s: Array
    """Of the last step of such a prompt, which does not keep others waiting."""
    rest_s: Array
    """Until it is done, over the time that it takes, where no other comes behind it."""
    late_s: Array
    """The same where another does."""
    late: Array
    """How often that is."""
    step_s: Array
    """Between two decode steps of a request, those that are ahead of it and stops included."""
    prompts_first: bool

    @property
    def _columns(self) -> dict[str, Array]:
        return {k: one for k, one in self._asdict().items() if isinstance(one, np.ndarray)}

    def take(self, rows: Indices) -> Arrivals:
        """Some rows."""
        columns: dict[str, Any] = {name: one[rows] for name, one in self._columns.items()}
        return self._replace(**columns)

    def where(self, rows: NDArray[np.bool_], others: Arrivals) -> Arrivals:
        """The others in these rows."""
        pairs = zip(self._columns.items(), others._columns.values(), strict=True)
        columns: dict[str, Any] = {name: np.where(rows, b, a) for (name, a), b in pairs}
        return self._replace(**columns)


class Waits(NamedTuple):
    """The steady state of the steps, by the prompts that each begins with; `[rows, states]`."""

    share: Array
    """Of steps."""
    seconds: Array
    """Of a step."""
    step_s: Array
    """Mean seconds a token of a decoding request `[rows]`."""
    begun_s: Array
    """What the steps after a prompt take beyond that, in all `[rows]`."""

    def pure(self, one: Arrivals) -> Array:
        """Share of the steps that carry no prompt `[rows]`."""
        own = self.share[:, 0]
        return np.asarray(one.bare * own / (own + one.steps * (1.0 - own)))

    def left_s(self, one: Arrivals) -> Array:
        """Mean of a step, times what is left of it to a prompt that comes, until its own `[rows]`.

        Half of it; the last step of one that takes several is its own, unless it comes in that.
        """
        whole = (self.share * self.seconds**2).sum(axis=1)
        last_s = np.minimum(one.last_s[:, None], self.seconds[:, 1:])
        earlier = self.share[:, 1:] * last_s * (self.seconds[:, 1:] - last_s)
        return np.asarray(whole / 2.0 - earlier.sum(axis=1))

    def take(self, rows: Indices, states: int = STATES) -> Waits:
        """Some rows, and their first states."""
        few = self.share[rows, :states], self.seconds[rows, :states]
        return Waits(*few, self.step_s[rows], self.begun_s[rows])


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
    step_s, begun_s = np.zeros(rows), np.zeros(rows)
    unsolved = np.arange(rows)
    for count in (_FEW, STATES):
        for start in range(0, unsolved.size, _ROWS):
            part = unsolved[start : start + _ROWS]
            chain = _chain(coming[part, :count], left[part, :count], one.take(part))
            share[part, :count] = _stationary(chain)
            given = share[part, :count], seconds[part, :count]
            step_s[part], begun_s[part] = _pace(one.take(part), chain, *given)
        unsolved = unsolved[share[unsolved, _FEW - 1] > NEVER]
    return Waits(share, seconds, step_s, begun_s)


def _pace(one: Arrivals, chain: Array, share: Array, seconds: Array) -> tuple[Array, Array]:
    """(t, h after the step of a prompt less h after a last step) `[rows]`."""
    steps = np.ones(share.shape)
    steps[:, 1:] = 0.0 if one.prompts_first else one.steps[:, None]
    step_s = (share * seconds).sum(axis=1) / np.maximum((share * steps).sum(axis=1), 1e-9)
    last = chain[:, 0] if one.prompts_first else share
    system = np.eye(share.shape[1]) - chain + last[:, None, :]  # of all h that with h(last) = 0
    more = np.linalg.solve(system, (seconds - step_s[:, None] * steps)[..., None])
    with_it = share * np.minimum(np.arange(float(share.shape[1])), one.at_once[:, None])
    with_it /= np.maximum(with_it.sum(axis=1, keepdims=True), 1e-300)
    return step_s, np.asarray((with_it[:, None, :] @ chain @ more)[:, 0, 0])


def unevenness(one: Arrivals, state: Waits) -> Array:
    """Variance over mean of the requests that decode together `[rows]`.

    A request that comes with no other adds a step, or makes one longer; others share its step.
    Where groups compute prompts apart, r is all that makes steps longer than bare ones.
    """
    decoded_s = 0.0 if one.prompts_first else one.steps * one.decode_s
    alone_s = np.maximum(one.first_s - decoded_s, 0.0)
    shared_s = np.where(one.at_once > 1.0, one.more_s / one.groups, alone_s)
    met = state.share * state.seconds
    first = (met * np.exp(-one.rate[:, None] * state.seconds)).sum(axis=1) / met.sum(axis=1)
    again = one.rate * (first * alone_s + (1.0 - first) * shared_s)
    again = np.where(one.bare < 1.0, 1.0 - one.bare_s / state.step_s, again)
    return np.asarray(1.0 / (1.0 - np.minimum(again, _MOST_AGAIN)) ** 2)


def _chain(coming: Array, left: Array, one: Arrivals) -> Array:
    """Probabilities `[rows, states, states]` of the prompts that the next step begins with.

    `coming`: mean number that come during a step, `left`: those that it leaves waiting.
    """
    states = coming.shape[1]
    new = np.arange(states) - left[:, :, None]
    upto = np.take_along_axis(_upto(coming, one), np.maximum(new, 0.0).astype(np.int64), axis=2)
    reached = np.where(new >= 0.0, upto, 0.0)
    reached[..., -1] = 1.0
    found: Array = np.diff(reached, axis=-1, prepend=0.0) * (1.0 - _EMPTIED)
    found[..., 0] += _EMPTIED  # a queue that never ends and one that never begins are one chain
    return found


def _upto(coming: Array, one: Arrivals) -> Array:
    """Probabilities `[rows, states, states]` of 0, 1, ... prompts or fewer in the fullest group."""
    ended = (one.rate * one.step_s)[:, None] / np.maximum(coming, 1e-300)
    chance = (1.0 - 1.0 / one.groups[:, None]) * np.minimum(ended, 1.0) ** 2
    found = np.empty((*coming.shape, coming.shape[1]))
    turns = np.minimum(one.replicas, _MOST_TURNS)
    kinds, which = np.unique(np.stack([one.groups, one.lanes, turns]), axis=1, return_inverse=True)
    for place, (groups, lanes, replicas) in enumerate(kinds.T.tolist()):
        rows = np.flatnonzero(which.ravel() == place)
        own = coming[rows] / lanes
        reached = (
            _by_turns(own, replicas)
            if replicas > 1.0
            else _fullest(own, groups / lanes, chance[rows])
        )
        found[rows] = reached**lanes
    return found


def _by_turns(coming: Array, replicas: float) -> Array:
    """The same of one of `replicas` that requests go to by turns."""
    from scipy.special import pdtr  # slow to import

    last = replicas * (np.arange(float(coming.shape[1])) + 1.0) - 1.0
    every = replicas * coming[..., None]
    found = [pdtr(last - place, every) for place in range(int(replicas))]
    return np.asarray(np.mean(found, axis=0))


def _fullest(coming: Array, groups: float, chance: Array) -> Array:
    """The same of `groups`: between spread evenly and as chance has it."""
    even = _at_most(coming, groups)
    if groups <= 1.0:
        return even
    return np.asarray(even + (_at_most(coming / groups, 1.0) ** groups - even) * chance[..., None])


def _at_most(coming: Array, each: float) -> Array:
    """Probabilities `[..., states]` of 0, `each`, 2 `each`, ... prompts or fewer."""
    most = coming.shape[1]
    if each <= _SUMMED and each == np.floor(each) and coming.max(initial=0.0) <= _MOST_SUMMED:
        return _sums(coming, int(each), most)
    from scipy.special import pdtr  # slow to import

    return np.asarray(pdtr(np.arange(float(most)) * each, coming[..., None]))


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
