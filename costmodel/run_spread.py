"""Means and percentiles of TTFT and TPOT over the requests of a run.

Of random arrivals below capacity both come from the steps that they meet (`first_token`) and from
how the number in flight varies (`occupancy`), var its variance in one dp group:

    TPOT    t + z sqrt(var_steps / n + (dt/db)^2 2/3 var)      z = 0, 1.28, 2.33; dt/db a line from
            the slots in use to all; a request's own mean of the number in flight over its time
            varies by 2/3 as much as the number, where lengths are alike

else TTFT is that of the closed loop, with the first b of n prompts, or the queue that grows, as
`run_out` has them, and var is 0. Steps:

    mixed ones among a request's n are binomial with share f, at most all:
           t_d + min(f + z sqrt(f (1 - f) / n), 1) (t_m - t_d)
    where prompts go first, those met are Poisson, each adding its prefill T_p to the mean step t:
           t + z sqrt((t - t_d) T_p / n)

No percentile above the median is below the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from shardplan.costmodel.arrivals import NEVER, STATES, Arrivals, Waits
from shardplan.costmodel.bulk import Indices
from shardplan.costmodel.first_token import (
    Values,
    closed_values,
    even,
    joined,
    open_values,
    percentiles,
)
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, as_array
from shardplan.costmodel.occupancy import Occupancy, occupancy
from shardplan.costmodel.open_loop import Open, arrivals_of
from shardplan.costmodel.pace import Timed
from shardplan.costmodel.run_case import Bools, Case, some_rows
from shardplan.costmodel.run_slots import AtRate, Slots
from shardplan.costmodel.serving import Serving, ServingInput
from shardplan.costmodel.steps import mix_of, step_seconds

__all__ = [
    "LATE",
    "NORMAL",
    "OWN",
    "Spread",
    "closed_tpot_p99_s",
    "outside_s",
    "tpot_spread",
    "ttft_spread",
]

LATE = 2.326
NORMAL = (0.0, 1.2816, LATE)
"""Quantiles of a normal distribution: 50, 90, 99 %."""
OWN = 2.0 / 3.0
"""Variance of a request's own mean of the number in flight over that of the number."""
_WIDTHS = (3, 5, 8, STATES)


class Spread(NamedTuple):
    """Seconds, `[rows]`."""

    mean_s: Array
    p50_s: Array
    p90_s: Array
    p99_s: Array

    @classmethod
    def of(cls, mean_s: Array, found: tuple[Array, ...]) -> Spread:
        """Of percentiles that may be below the mean."""
        p50_s, p90_s, p99_s = found
        high = np.maximum(p90_s, np.maximum(mean_s, p50_s))
        return cls(mean_s, p50_s, high, np.maximum(p99_s, high))

    @classmethod
    def told(cls, mean_s: Array, values: Values, tails: bool) -> Spread:
        """Of values; `tails`: their percentiles, too."""
        none = np.full(mean_s.shape, np.nan)
        return cls.of(mean_s, percentiles(values)) if tails else cls(mean_s, none, none, none)

    def named(self, what: str) -> dict[str, Array]:
        """By name: `ttft_mean_s`, `ttft_p50_s`, ..."""
        return {f"{what}_{name}": values for name, values in self._asdict().items()}

    def later(self, seconds: Array) -> Spread:
        """All of them so much longer."""
        return Spread(*(one + seconds for one in self))


def outside_s(
    model: Pricer, case: Case, served: Serving, slots: Array, saturated: Bools
) -> tuple[Array, Array]:
    """Seconds that a request spends outside the slots in use: before its first token, and after."""
    none = np.zeros_like(slots)
    if case.given.in_flight is None:
        return none, none
    each_s = np.where(saturated, model.groups / served.requests_per_s, 0.0)
    beyond = np.maximum(as_array(case.given.in_flight) - slots, 0.0)
    if not model.engine.preempts:
        return beyond * each_s, none
    stalled = np.minimum(np.maximum(case.allowed - slots, 0.0), beyond)
    prompt, later = as_array(case.given.input_len), as_array(case.given.output_len) / 2.0
    after = stalled * (later / (prompt + later))
    return (beyond - after) * each_s, after * each_s


def _burst_s(model: Pricer, case: Case, first: Array) -> Array:
    """Seconds in which full prefill steps take one of the `first` prompts that start at once."""
    given = case.given
    tokens = np.minimum(np.maximum(given.chunk, 1.0), first * case.prompt)
    new = np.minimum(case.prompt, tokens)
    kept = as_array(given.input_len) - case.prompt
    _, stages = step_seconds(
        model,
        "prefill",
        batch=tokens / new,
        new=new,
        prefix=kept + (case.prompt - new) / 2.0,
        weight_dtype=given.weight_dtype,
        kv_dtype=given.kv_dtype,
        attention=given.attention,
        mtp=given.mtp,
    )
    slowest = functools.reduce(np.maximum, model.step_s(stages, "prefill"))
    return np.asarray((slowest + model.host_s("prefill")) * case.prompt / tokens)


def _closed(model: Pricer, case: Case, slots: Slots, waiting: Array) -> tuple[Array, Values]:
    """(mean, values) of a closed loop, or of one that more is offered than it serves.

    `waiting` seconds lie before the slots.
    """
    served, used = slots.served, slots.used
    finite, closed = np.isfinite(case.prompts), ~np.isfinite(case.rate)
    each = served.requests_per_s / model.groups
    prompts = np.where(finite, case.prompts, 1.0)
    grown = np.where(
        finite & slots.saturated & ~closed,
        np.maximum(prompts * (1.0 / each - 1.0 / case.rate), 0.0),
        0.0,
    )
    waiting = np.maximum(waiting, grown / 2.0)
    first = np.minimum(used, case.prompts)
    share = np.where(closed & finite, first / prompts, 0.0)
    one_s, rows = np.zeros_like(used), np.flatnonzero(closed & finite)
    if rows.size:
        one_s[rows] = _burst_s(*some_rows(model, case, rows), first[rows])
    burst = np.maximum((first + 1.0) / 2.0 * one_s, served.prefill_s)
    mean = (1.0 - share) * (served.ttft_s + waiting) + share * burst
    start = np.maximum(even() * (first * one_s)[:, None], served.prefill_s[:, None])
    queued = served.ttft_s[:, None] + even() * grown[:, None]
    steady = _steady(model, case, slots)
    seconds = steady.seconds + waiting[:, None]
    now = ((1.0 - share) * (grown == 0.0))[:, None]
    values = joined(
        (seconds, steady.weights * now), (queued, np.where(grown > 0.0, 1.0, 0.0)), (start, share)
    )
    return mean, values


def _steady(model: Pricer, case: Case, slots: Slots) -> Values:
    """TTFT of a closed loop in its steady state."""
    served = slots.served
    shares = mix_of(model, case.given).shares
    one = arrivals_of(model, case.given, served, served.requests_per_s / model.groups)
    turns = case.steps + np.maximum(np.ceil(shares.prompt / shares.room), 1.0)
    others = np.broadcast_to(shares.slots / turns, case.prompts.shape)
    own = np.broadcast_to(np.maximum(shares.slots, 1.0), others.shape)
    found = closed_values(one, others, own, served.ttft_s - served.front_s)
    return found._replace(seconds=found.seconds + served.front_s[:, None])


def ttft_spread(
    model: Pricer,
    case: Case,
    slots: Slots,
    most: Array,
    capacity: Array,
    waiting: Array,
    tails: bool,
) -> tuple[Spread, Array]:
    """(TTFT, the variance of the number in flight in one dp group).

    `most` slots of a dp group serve `capacity` requests a second of all, `waiting` seconds of
    TTFT lie before the slots. Percentiles are NaN without `tails`.
    """
    shape = case.prompts.shape
    columns = np.zeros((4, *shape))
    variance = np.zeros(shape)
    at_rate = slots.at_rate
    rows = np.asarray([], dtype=np.int64) if at_rate is None else at_rate.rows
    others = np.setdiff1d(np.arange(shape[0]), rows)
    if others.size:
        few, own = some_rows(model, case, others)
        mean, values = _closed(few, own, slots.take(others), waiting[others])
        columns[:, others] = Spread.told(mean, values, tails)
    if at_rate is not None:
        groups, left = (
            np.broadcast_to(one, shape)[rows] for one in (as_array(model.groups), case.left)
        )
        groups, served = groups * left, capacity[rows] * left
        filled = _occupancy(case, at_rate, (most[rows], served, groups), rows)
        alone = np.exp(-at_rate.in_flight * groups)
        front_s = slots.served.front_s[rows]
        for some, state in _by_states(at_rate.state, tails):
            values = open_values(*state, filled.take(some), alone[some])
            values = values._replace(seconds=values.seconds + front_s[some, None])
            columns[:, rows[some]] = Spread.told(values.mean, values, tails)
        variance[rows] = filled.variance / groups**2
    return Spread(*columns), variance


def _by_states(state: Open, tails: bool) -> Iterator[tuple[Indices, tuple[Arrivals, Waits]]]:
    """Rows of a state that meet about as many of its steps, and what they meet.

    A mean needs no others; a percentile lies between values whether they are met or not.
    """
    met = STATES - np.argmax(state.waits.share[:, ::-1] > NEVER, axis=1)
    least = 0
    for most in (STATES,) if tails else _WIDTHS:
        rows = np.flatnonzero((met > least) & (met <= most))
        least = most
        if rows.size:
            yield rows, (state.arrivals.take(rows), state.waits.take(rows, most))


class _Met(NamedTuple):
    """Seconds of the steps that requests meet, and the share of those with prompts."""

    tpot_s: Array
    decode_s: Array
    mixed_s: Array
    prefill_s: Array
    mixed: Array


def tpot_spread(
    model: Pricer, case: Case, slots: Slots, full: Serving, most: Array, variance: Array
) -> Spread:
    """TPOT; `full` is the state of `most` slots, `variance` of those in use in one dp group."""
    served = slots.served
    spare = most - slots.used
    slope = np.where(spare > 0.0, (full.tpot_s - served.tpot_s) / np.maximum(spare, 1e-9), 0.0)
    crowd = np.maximum(slope, 0.0) ** 2 * OWN * variance
    met = _Met(
        served.tpot_s,
        served.decode_step_s,
        served.mixed_step_s,
        served.prefill_s,
        served.mixed_share,
    )
    return Spread.of(
        served.tpot_s, tuple(_tpot_at(z, model, case.given, met, crowd) for z in NORMAL)
    )


def closed_tpot_p99_s(model: Pricer, given: ServingInput, timed: Timed) -> Array:
    """99th percentile of TPOT where all slots are in use, from the steady state alone."""
    pace = timed.pace
    met = _Met(timed.tpot_s, timed.decode_s, timed.mixed_s, pace.prefill_s, pace.mixed)
    return np.maximum(_tpot_at(LATE, model, given, met, np.zeros(())), timed.tpot_s)


def _tpot_at(z: float, model: Pricer, given: ServingInput, met: _Met, crowd: Array) -> Array:
    """Seconds z deviations above the mean; `crowd`: variance by the requests in flight."""
    steps, each = np.maximum(given.decode_steps, 1.0), given.steps_per_token
    if model.engine.prefill_first:
        extra = np.maximum(met.tpot_s / each - met.decode_s, 0.0)
        above = z * np.sqrt(extra * met.prefill_s / steps)
    else:
        most = np.minimum(met.mixed + z * np.sqrt(met.mixed * (1.0 - met.mixed) / steps), 1.0)
        above = (most - met.mixed) * np.maximum(met.mixed_s - met.decode_s, 0.0)
    value = met.tpot_s + np.sqrt((above * each) ** 2 + z * z * crowd)
    return np.where(given.decode_steps > 0.0, value, 0.0)


def _occupancy(
    case: Case, at_rate: AtRate, all_slots: tuple[Array, Array, Array], rows: Indices
) -> Occupancy:
    """Of the whole deployment."""
    most, capacity, groups = all_slots
    return occupancy(
        case.rate[rows] * groups,
        capacity,
        most * groups,
        at_rate.in_flight * groups,
        at_rate.state.uneven,
    )
