"""A benchmark run on a deployment: a given number of prompts, an offered rate, percentiles.

`shardplan.costmodel.serving` gives the steady state; this adds what a run has beside it. Symbols,
one dp group: b slots, n prompts (N / dp), P prompt tokens, O output tokens, c tokens a step, t_m
and t_d seconds of a mixed and a decode step, r = requests a second in steady state.

Closed loop (all prompts wait at time 0, a new one starts as one ends), n = w b + q, q < b:

    makespan   = w b / r(b) + q / r(q) + late
    late       = max(min(n, b) P / c - ceil(P / c), 0) t_d     the first prompts start one by one,
                 so the last ones end that many decode steps later (not where prompts go first:
                 there they all start together)
    TTFT mean  = (1 - s) steady + s (min(n, b) + 1) / 2 * t_1,     s = min(n, b) / n, with t_1
                 the seconds that full steps of c tokens take for one prompt

Offered rate R below capacity r: slots are the b in [1, slots] with r(b) = R / dp, which is Little's
law (a bracket closed by secants and middles; r rises with b); makespan = N / R + latency. At or
above it the slots are full and the queue grows: makespan = N / r + latency,
wait = N / 2 (1 / r - 1 / R).

Memory that holds b requests where the engine would run more (`allowed`): one that admits a prompt
as soon as its own blocks are free (`preempts`) gives the first token and takes the request back
later. Of the wait for memory, a request of I prompt tokens has had the share I / (I + O / 2) by
then, what it holds at its start of what it holds on average; the rest lengthens its TPOT.

Percentiles (99th):
    TTFT   wait of a queue with an exponential tail: mean wait * ln 100, at most (b - 1) prompts;
           with N given, the 99th percentile of the first b prompts if that is longer
    TPOT   mixed steps among a request's n are binomial with share f:
           t_d + min(f + z sqrt(f (1 - f) / n), 1) (t_m - t_d)       z = 2.33, bound t_m
           where prompts go first, those met are Poisson, each adding its prefill T_p to the mean
           step t:     t + z sqrt((t - t_d) T_p / n)
           times n / (O - 1); n = O - 1 unless tokens are predicted ahead (`serving`)

Left out: length distributions, client and tokenizer time, preemption, how acceptance differs
between requests.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.bulk import Fleet, Indices
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.serving import Serving, ServingInput, serve
from shardplan.costmodel.steps import step_seconds

__all__ = ["Run", "run_out"]

_NORMAL_P99 = 2.326
_TAIL = 0.01
_TAIL_P99 = math.log(1.0 / _TAIL)
_NARROW = 2e-3
"""Width of a narrow bracket, of its high end."""
_CLOSE = 1e-3
"""How much more than what is offered is hardly more."""
_MOST_TURNS = 32
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a benchmark client reports; rates are of the whole deployment."""

    served: Serving
    """The steady state at the slots in use."""
    slots: Array
    """Slots of one dp group in use."""
    capacity_requests_per_s: Array
    """What all slots together serve in steady state."""
    ttft_mean_s: Array
    ttft_p99_s: Array
    tpot_mean_s: Array
    tpot_p99_s: Array
    output_tokens_per_s: Array
    requests_per_s: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Arrays `[rows]` that every formula below needs."""

    given: ServingInput
    prompts: Array
    """Of one dp group; infinity for a steady state."""
    rate: Array
    """Offered to one dp group, requests a second; infinity for closed loop."""
    prompt: Array
    steps: Array
    """Decode steps of a request."""
    allowed: Array
    """Slots that the engine would run if memory held them."""


def _at(model: Pricer, given: ServingInput, slots: Array) -> Serving:
    """The steady state with other slots in use; requests beyond `given.batch` keep waiting."""
    return serve(model, replace(given, batch=slots, in_flight=None))


def _some(model: Pricer, case: _Case, rows: Indices) -> tuple[Pricer, _Case]:
    """The rows alone, of the model too where it is a fleet of points."""
    shape = case.prompts.shape

    def taken(values: ArrayLike) -> Array:
        return np.broadcast_to(as_array(values), shape)[rows]

    given, in_flight = case.given, case.given.in_flight
    few = replace(
        given,
        batch=taken(given.batch),
        chunk=taken(given.chunk),
        input_len=taken(given.input_len),
        output_len=taken(given.output_len),
        prefix_hit=taken(given.prefix_hit),
        in_flight=None if in_flight is None else taken(in_flight),
        mtp=taken(given.mtp),
        acceptance=taken(given.acceptance),
    )
    own = _Case(
        given=few,
        prompts=case.prompts[rows],
        rate=case.rate[rows],
        prompt=taken(case.prompt),
        steps=taken(case.steps),
        allowed=taken(case.allowed),
    )
    return (model.take(rows) if isinstance(model, Fleet) else model), own


def _serve_rate(
    model: Pricer, case: _Case, most: Array, full: Serving
) -> tuple[Array, Bools, Serving]:
    """(slots at which a dp group serves what is offered, whether even `most` do not, the state).

    `full` is the state at `most` slots, `[rows]`.
    """
    offered = case.rate * model.groups
    saturated = full.requests_per_s <= offered
    rows = np.flatnonzero(~saturated)
    if not rows.size:
        return most, saturated, full
    few, own = _some(model, case, rows)
    fewest = _fewest(few, own, most[rows], full.requests_per_s[rows], offered[rows])
    state = _filled(_at(few, own.given, fewest), rows.shape)
    slots = most.copy()
    slots[rows] = fewest
    columns = {one.name: getattr(full, one.name).copy() for one in fields(Serving)}
    for name, values in columns.items():
        values[rows] = getattr(state, name)
    return slots, saturated, Serving(**columns)


def _fewest(model: Pricer, case: _Case, most: Array, reached: Array, offered: Array) -> Array:
    """The fewest slots b that serve `offered` (R), where `most` serve `reached`, which is more.

    One slot is tried first. Then a bracket whose high end serves enough is closed around the root
    of b (R / r(b) - 1), nearly straight in b, by the Illinois rule (a secant; the end that stays
    twice counts half) and every third time by its middle, until it is narrow or its high end
    serves hardly more than R.
    """
    low, high, side = np.zeros_like(most), most.copy(), np.zeros_like(most)
    over, under = np.zeros_like(most), most * (offered / reached - 1.0)
    held, few, own = np.arange(most.size), model, case
    left = np.arange(most.size)
    for turn in range(_MOST_TURNS):
        if 2 * left.size < held.size:  # what stacks the points of a fleet is kept while it serves
            held, (few, own) = left, _some(model, case, left)
        share = np.full(most.shape, 0.5)
        if turn % 3 != 1:
            share = np.clip(over / np.where(over > under, over - under, 1.0), 1e-3, 1.0 - 1e-3)
        tried = low + (high - low) * share if turn else np.ones_like(most)
        served = np.full(most.shape, np.nan)
        served[held] = _at(few, own.given, tried[held]).requests_per_s
        served, slots, rate = served[left], tried[left], offered[left]
        enough, off = served >= rate, slots * (rate / served - 1.0)
        again = np.where(side[left] == np.where(enough, 1.0, -1.0), 0.5, 1.0)
        ends = np.where(enough, (low[left], slots), (slots, high[left]))
        kept = over[left] * again, under[left] * again
        low[left], high[left] = ends
        over[left], under[left] = np.where(enough, (kept[0], off), (off, kept[1]))
        side[left] = np.where(enough, 1.0, -1.0)
        wide = (ends[1] > 1.0) & (ends[1] - ends[0] > _NARROW * ends[1])
        left = left[wide & ~(enough & (served <= rate * (1.0 + _CLOSE)))]
        if not left.size:
            break
    return high


def _chunk(case: _Case) -> Array:
    return np.minimum(np.maximum(case.given.chunk, 1.0), case.prompt)


def _rest_s(model: Pricer, case: _Case, slots: Array) -> Array:
    """Seconds of the last wave of a closed-loop run, where it is not a full one."""
    closed = np.isfinite(case.prompts) & ~np.isfinite(case.rate)
    finite = np.where(closed, case.prompts, 0.0)
    rest = finite - np.floor(finite / slots) * slots
    rows, seconds = np.flatnonzero(rest > 0.0), np.zeros_like(slots)
    if rows.size:
        few, own = _some(model, case, rows)
        wave = np.maximum(rest[rows], 1.0)
        seconds[rows] = wave * few.groups / _at(few, own.given, wave).requests_per_s
    return seconds


def _burst_s(model: Pricer, case: _Case, first: Array) -> Array:
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


def _makespan_s(
    model: Pricer, case: _Case, served: Serving, slots: Array, saturated: Bools
) -> Array:
    """Seconds from the first request to the last token; NaN for a steady state."""
    finite = np.isfinite(case.prompts)
    prompts = np.where(finite, case.prompts, 1.0)
    each = served.requests_per_s / model.groups
    first = np.minimum(slots, prompts)
    late = np.zeros_like(prompts)
    if not model.engine.prefill_first:
        steps = first * case.prompt / np.maximum(case.given.chunk, 1.0)
        late = np.maximum(steps - np.ceil(case.prompt / _chunk(case)), 0.0)
    full = np.floor(prompts / slots) * slots / each
    closed = full + _rest_s(model, case, slots) + late * served.decode_step_s
    spread = np.where(saturated, prompts / each, prompts / case.rate)
    opened = spread + served.end_to_end_s
    span = np.where(np.isfinite(case.rate), opened, closed)
    return np.where(finite, span, np.nan)


def _outside_s(
    model: Pricer, case: _Case, served: Serving, slots: Array, saturated: Bools
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


def _ttft(
    model: Pricer, case: _Case, served: Serving, slots: Array, saturated: Bools, waiting: Array
) -> tuple[Array, Array]:
    """(mean, 99th percentile); `waiting` seconds lie before the first token."""
    finite = np.isfinite(case.prompts)
    each = served.requests_per_s / model.groups
    prompts = np.where(finite, case.prompts, 1.0)
    grown = np.where(
        finite & saturated & np.isfinite(case.rate),
        np.maximum(prompts * (1.0 / each - 1.0 / case.rate), 0.0),
        0.0,
    )
    waiting = np.maximum(waiting, grown / 2.0)
    tail = np.minimum(served.wait_s * _TAIL_P99, np.maximum(slots - 1.0, 0.0) * served.prefill_s)
    mean = served.ttft_s + waiting
    worst = served.prefill_s + np.maximum(tail, served.wait_s) + np.maximum(waiting, grown)
    first = np.minimum(slots, case.prompts)
    closed = finite & ~np.isfinite(case.rate)
    share = np.where(closed, first / prompts, 0.0)
    one_s, rows = np.zeros_like(slots), np.flatnonzero(closed)
    if rows.size:
        one_s[rows] = _burst_s(*_some(model, case, rows), first[rows])
    burst = (first + 1.0) / 2.0 * one_s
    mean = (1.0 - share) * mean + share * np.maximum(burst, served.prefill_s)
    last = 1.0 - _TAIL / np.maximum(share, _TAIL)
    late = np.where(share > _TAIL, last * first * one_s, 0.0)
    return mean, np.maximum(np.maximum(worst, late), mean)


def _tpot_p99(model: Pricer, case: _Case, served: Serving) -> Array:
    steps, each = np.maximum(case.steps, 1.0), case.given.steps_per_token
    decode = served.decode_step_s
    if model.engine.prefill_first:
        extra = np.maximum(served.tpot_s / each - decode, 0.0)
        found = decode + extra + _NORMAL_P99 * np.sqrt(extra * served.prefill_s / steps)
    else:
        share = served.mixed_share
        most = np.minimum(share + _NORMAL_P99 * np.sqrt(share * (1.0 - share) / steps), 1.0)
        found = decode + most * np.maximum(served.mixed_step_s - decode, 0.0)
    return np.where(case.steps > 0.0, np.maximum(found * each, served.tpot_s), 0.0)


def run_out(
    model: Pricer,
    given: ServingInput,
    *,
    request_rate: ArrayLike = math.inf,
    num_prompts: ArrayLike = math.inf,
    allowed: ArrayLike = 0.0,
) -> Run:
    """What a client measures on one layout; all arrays `[rows]`.

    `given.batch` are the slots of a dp group, `given.in_flight` the client's requests of one;
    `request_rate` (requests a second) and `num_prompts` are of the whole deployment, infinity for
    closed loop and for the steady state. `allowed` are the slots that the engine would run if
    memory held them, where those are more.
    """
    shape = np.broadcast_shapes(given.batch.shape, np.shape(request_rate), np.shape(num_prompts))
    prompts = np.broadcast_to(np.ceil(as_array(num_prompts) / model.groups), shape)
    hit = 1.0 - as_array(given.prefix_hit)
    case = _Case(
        given=given,
        prompts=prompts,
        rate=np.broadcast_to(as_array(request_rate) / model.groups, shape),
        prompt=np.maximum(np.ceil(as_array(given.input_len) * hit), 1.0),
        steps=given.decode_steps,
        allowed=as_array(allowed),
    )
    most = np.broadcast_to(given.batch, shape)
    if given.in_flight is not None:
        most = np.minimum(most, as_array(given.in_flight))
    most = np.maximum(np.minimum(most, prompts), 1.0)
    full = _filled(_at(model, given, most), shape)
    slots, saturated, served = _serve_rate(model, case, most, full)
    before_s, after_s = _outside_s(model, case, served, slots, saturated)
    mean, worst = _ttft(model, case, served, slots, saturated, before_s)
    later_s = after_s / np.maximum(as_array(given.output_len) - 1.0, 1.0)
    span = _makespan_s(model, case, served, slots, saturated)
    steady = np.minimum(served.requests_per_s, case.rate * model.groups)
    total = np.broadcast_to(as_array(num_prompts), shape)
    requests = np.where(np.isfinite(total), np.where(np.isfinite(total), total, 1.0) / span, steady)
    return Run(
        served=served,
        slots=slots,
        capacity_requests_per_s=full.requests_per_s,
        ttft_mean_s=mean,
        ttft_p99_s=worst,
        tpot_mean_s=served.tpot_s + later_s,
        tpot_p99_s=_tpot_p99(model, case, served) + later_s,
        output_tokens_per_s=requests * as_array(given.output_len),
        requests_per_s=requests,
    )


def _filled(served: Serving, shape: tuple[int, ...]) -> Serving:
    """Every array in the shape of the rows."""
    return Serving(
        **{one.name: np.broadcast_to(getattr(served, one.name), shape) for one in fields(Serving)}
    )
