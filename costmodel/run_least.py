"""What requests see at least: bounds from below on `run_out`, free once a grid of slots is priced.

Closed loop, all slots in use:

    TPOT p99   follows from the steady state alone, so that the bound is the value
    TTFT p99   no percentile above the median is below the mean (`run_spread.Spread`)

At R requests a second of a dp group a request is among x others, and steps are those of a closed
loop of x slots, which the grid has. Steps take no less time for more sequences or tokens, and half
the tokens take at least half as long; d is a decode step of x sequences, f a step with a prompt
beside them, F a prompt alone: f, or where it fills more than one step of c tokens at least as many
as I / c. With l prompts a second of all groups that step together

    pure steps     s <= b / (1 - a + b)    one without prompts comes after one in which none came:
                                           a = exp(-l d) after its like, b = exp(-l F) after others
    step           t >= s d + (1 - s) f    prompts first: t >= d + (1 - a) / b F
    TPOT p99       s d + (1 - s) f with the share 1 - s of `run_spread` at that percentile, which
                   grows with it, or what prompts add there; that of all slots where all are in use
    latency        L >= front + rest + F + n t,      rest: half of what a step takes that is met,
                                                     the longer the oftener
    x              N = R L (Little's law), that of the smallest batch at least: from each batch up
                   to the next one, as long as R L reaches it. N varies, by V N at most, and so do
                   the steps: those of N - sqrt(V N) are taken, N no more than the slots
    TTFT           front + F, for every request computes its own prompt; beyond that those that do
                   not find all idle have the rest of a step before them where a slot is free, of
                   which 13 / 16 are left to one in eight, else the wait for a slot, 1 / (2 (r - R))
                   at least on average (`occupancy`), r the capacity; the less of both, or where
                   one in two finds a slot half of the first

A slot is free for one of two at least where there are `_APART` deviations more than those at which
a closed loop serves `_SPARE` R, more than random arrivals of R fill (Cantelli), if prompts take no
more than `_PROMPTS` of the time. Where a prompt may need more than one step, which are shorter the
more they are, t is d alone. Of requests of one token nothing is told.

That steps take no less for more sequences, and how far Little's law is reached, is checked, not
proven: of a hundred thousand drawn strategies a bound at a rate was above the value by 1.2 % at
most, so a twentieth of each is given way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, as_array
from shardplan.costmodel.pace import Timed
from shardplan.costmodel.run_case import Bools
from shardplan.costmodel.run_spread import LATE, closed_tpot_p99_s
from shardplan.costmodel.step_mix import ServingInput
from shardplan.costmodel.steps import mix_of

__all__ = ["Least", "least_at_rate", "least_closed"]

_ROUNDING = 1.0 - 1e-9
_SURE = 0.95
"""Of the bounds at a rate what is used: some of what they rest on is only checked."""
_CLOSE = 0.98
"""Of Little's law what the turns of `run_slots` reach at least."""
_UNEVEN = 31.25
"""Variance over mean of the requests in flight at most: 1.25 / (1 - 0.8)^2 of `arrivals`."""
_SPARE = 1.5
_APART = 5.0**0.5
_PROMPTS = 0.4
"""Share of time for prompts, one after another, up to which that holds."""
_LEFT = 13.0 / 16.0
_SEEN = 0.0101
"""Share of requests that are no sooner than a 99th percentile."""
_WAIT, _LONG_WAIT = 0.48, 1.5
"""Mean wait for a slot over 1 / (r - R), and what one in 32 waits longer than."""


class Least(NamedTuple):
    """Seconds, no more than those of a run; arrays of the grid's shape."""

    ttft_mean_s: Array
    ttft_p99_s: Array
    tpot_p99_s: Array


def least_closed(model: Pricer, given: ServingInput, timed: Timed) -> Least:
    """Of a closed loop, in its steady state."""
    ttft_s = timed.ttft_s * _ROUNDING
    return Least(ttft_s, ttft_s, closed_tpot_p99_s(model, given, timed) * _ROUNDING)


class _Steps(NamedTuple):
    """Of as many requests as a grid has slots `[slots, chunks]`, at a rate; seconds."""

    front_s: Array
    decode_s: Array
    prompt_s: Array
    step_s: Array
    """Of a request's average step."""
    late_step_s: Array
    """The same of the 99th percentile of requests."""
    rest_s: Array
    """Of the step that a request meets, on average."""
    busy: Array
    """Share of time in steps with prompts."""
    longest_s: Array
    """Of one engine step with a prompt."""
    whole: Bools
    """Whether a prompt needs no more than one step, or prompts go first."""


def least_at_rate(
    model: Pricer, given: ServingInput, timed: Timed, request_rate: float, left: float
) -> Least:
    """Of random arrivals on a grid of slots `[n, 1]`, ascending, and step sizes `[1, m]`.

    `request_rate` of all, which what is `left` of the dp groups serves at each point that is read;
    `given` has no other number in flight.
    """
    groups, slots = float(as_array(model.groups)), given.batch[:, 0]
    rate = request_rate / (groups * left)
    steps = _steps(model, given, timed, rate)
    least_s = steps.front_s + steps.rest_s + steps.prompt_s
    idle_s = steps.front_s + steps.decode_s / 2.0 + steps.prompt_s
    idle_s = idle_s + given.decode_steps * steps.decode_s
    whole = steps.whole[:-1] & steps.whole[1:]
    latency_s = np.where(whole, (least_s + given.decode_steps * steps.step_s)[:-1], idle_s[:-1])
    columns = np.arange(idle_s.shape[1])
    reached = np.cumprod(rate * latency_s >= slots[1:, None], axis=0).sum(axis=0)
    flight = np.maximum(rate * idle_s[reached, columns], np.where(reached, slots[reached], 0.0))
    flight = flight * _CLOSE
    own = np.minimum(flight, slots[:, None])
    among = np.maximum(own - np.sqrt(_UNEVEN / groups * own), 1.0)
    place = np.searchsorted(slots, among, side="right") - 1
    at = _Steps(*(one[np.maximum(place, 0), columns] for one in steps))
    whole = steps.whole
    other = 1.0 - np.exp(-own * groups * left)
    free = _free(model, timed, slots, steps, rate)
    spare = np.maximum(timed.requests_per_s * left - request_rate, 1e-12)
    rest_s = np.where(whole, at.rest_s, at.decode_s / 2.0)
    wait_s = np.where(free, 0.5 * rest_s, np.minimum(rest_s, _WAIT / spare))
    mean_s = at.front_s + at.prompt_s + other * wait_s
    often = whole & (0.5 * other * at.busy / 8.0 >= _SEEN)
    longest_s = np.where(often, at.longest_s, at.decode_s)
    late_s = np.where(free, _LEFT * longest_s, np.minimum(_LEFT * longest_s, _LONG_WAIT / spare))
    late_s = at.front_s + at.prompt_s + np.where(0.5 * other / 8.0 >= _SEEN, late_s, 0.0)
    step_s = np.where(whole, at.late_step_s, at.decode_s)
    tpot_s = np.minimum(given.steps_per_token * step_s, timed.tpot_s)
    known = np.where((place >= 0) & (given.decode_steps > 0.0), _SURE, 0.0)
    return Least(mean_s * known, np.maximum(mean_s, late_s) * known, tpot_s * known)


def _steps(model: Pricer, given: ServingInput, timed: Timed, rate: float) -> _Steps:
    shape = timed.end_to_end_s.shape
    shares, together = mix_of(model, given).shares, rate * float(as_array(model.locked))

    def wide(values: Array) -> Array:
        return np.broadcast_to(values, shape)

    decode_s, piece, pieces = wide(timed.decode_s), wide(shares.piece), wide(shares.pieces)
    first, mixed_s, prompt = model.engine.prefill_first, wide(timed.mixed_s), wide(shares.prompt)
    whole_s = wide(timed.pace.prefill_s)
    alone_s = whole_s * np.minimum(prompt / (piece * pieces), 1.0)
    many_s = mixed_s * np.maximum(prompt / np.maximum(given.chunk, 1.0), 1.0)
    prompt_s = np.where((pieces > 1.0) & (not first), np.minimum(many_s, alone_s), alone_s)
    prompt_s = np.maximum(prompt_s, prompt_s[:1])
    longest_s = mixed_s * np.minimum(piece[:1] / piece, 1.0)
    longest_s = prompt_s if first else np.where(pieces > 1.0, longest_s, prompt_s)
    longer = longest_s > decode_s
    again, other = np.exp(-together * decode_s), np.exp(-together * prompt_s)
    pure = np.where(longer, other / (1.0 - again + other), 1.0)
    mean_s = np.where(longer, pure * decode_s + (1.0 - pure) * longest_s, longest_s)
    busy = (1.0 - pure) * longest_s / mean_s
    least_s, later = np.minimum(decode_s, longest_s), np.maximum(given.decode_steps, 1.0)
    if first:
        step_s = mean_s / pure
        late_s = step_s + LATE * np.sqrt((1.0 - pure) / pure * prompt_s * prompt_s / later)
    else:
        step_s, share = mean_s, 1.0 - pure
        most = np.minimum(share + LATE * np.sqrt(share * pure / later), 1.0)
        late_s = mean_s + np.where(pieces > 1.0, 0.0, (most - share) * (longest_s - least_s))
    return _Steps(
        front_s=wide(timed.front_s),
        decode_s=least_s,
        prompt_s=prompt_s,
        step_s=step_s,
        late_step_s=late_s,
        rest_s=((1.0 - busy) * least_s + busy * longest_s) / 2.0,
        busy=busy,
        longest_s=longest_s,
        whole=wide(shares.room) >= prompt if not first else np.ones(shape, dtype=bool),
    )


def _free(model: Pricer, timed: Timed, slots: Array, steps: _Steps, rate: float) -> Bools:
    """Whether one of two requests at least finds a free slot."""
    groups, columns = float(as_array(model.groups)), np.arange(steps.step_s.shape[1])
    enough = timed.requests_per_s >= _SPARE * rate * groups
    enough &= rate * float(as_array(model.locked)) * steps.prompt_s <= _PROMPTS
    place = np.argmax(enough, axis=0)
    prompt_s = steps.prompt_s[place, columns]
    again = np.minimum(rate * float(as_array(model.locked)) * prompt_s, 0.8)
    most = slots[place]
    spread = np.sqrt(most * 1.25 / (1.0 - again) ** 2 / groups)
    return np.asarray(enough.any(axis=0) & (slots[:, None] >= most + _APART * spread))
