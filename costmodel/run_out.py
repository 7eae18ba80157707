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
law (bisection; r rises with b); makespan = N / R + latency. At or above it the slots are full and
the queue grows: makespan = N / r + latency, wait = N / 2 (1 / r - 1 / R).

Percentiles (99th):
    TTFT   wait of a queue with an exponential tail: mean wait * ln 100, at most (b - 1) prompts;
           with N given, the 99th percentile of the first b prompts if that is longer
    TPOT   mixed steps among a request's O - 1 are binomial with share f:
           t_d + min(f + z sqrt(f (1 - f) / (O - 1)), 1) (t_m - t_d)       z = 2.33, bound t_m
           where prompts go first, those met are Poisson, each adding its prefill T_p to the mean
           TPOT t:     t + z sqrt((t - t_d) T_p / (O - 1))

Left out: length distributions, client and tokenizer time, preemption.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.serving import Serving, ServingInput, serve, step_seconds
from shardplan.costmodel.step import StepModel

__all__ = ["Run", "run_out"]

_NORMAL_P99 = 2.326
_TAIL = 0.01
_TAIL_P99 = math.log(1.0 / _TAIL)
_BISECTIONS = 16
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a benchmark client reports; rates are of the whole deployment."""

    served: Serving
    """The steady state at the slots in use."""
    slots: Array
    """Slots of one dp group in use."""
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
    later: Array


def _at(model: StepModel, given: ServingInput, slots: Array) -> Serving:
    """The steady state with other slots in use; requests beyond `given.batch` keep waiting."""
    return serve(model, replace(given, batch=slots, in_flight=None))


def _slots_for_rate(model: StepModel, case: _Case, most: Array) -> tuple[Array, Bools]:
    """(slots at which a dp group serves what is offered, whether even `most` do not)."""
    offered = case.rate * model.groups
    if not np.isfinite(offered).any():
        return most, np.ones(most.shape, dtype=np.bool_)
    saturated = _at(model, case.given, most).requests_per_s <= offered
    low, high = np.ones_like(most), most.copy()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        enough = _at(model, case.given, middle).requests_per_s >= offered
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(saturated, most, high), saturated


def _chunk(case: _Case) -> Array:
    return np.minimum(np.maximum(case.given.chunk, 1.0), case.prompt)


def _rest_s(model: StepModel, case: _Case, slots: Array) -> Array:
    """Seconds of the last wave of a closed-loop run, where it is not a full one."""
    finite = np.where(np.isfinite(case.prompts), case.prompts, 0.0)
    rest = finite - np.floor(finite / slots) * slots
    if not (rest > 0.0).any():
        return np.zeros_like(slots)
    served = _at(model, case.given, np.maximum(rest, 1.0))
    return np.where(rest > 0.0, np.maximum(rest, 1.0) * model.groups / served.requests_per_s, 0.0)


def _burst_s(model: StepModel, case: _Case, slots: Array) -> tuple[Array, Array]:
    """(prompts that start at once, seconds in which full prefill steps take one of them)."""
    given = case.given
    first = np.minimum(slots, case.prompts)
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
    )
    slowest = functools.reduce(np.maximum, model.step_s(stages, "prefill"))
    return first, (slowest + model.host_s("prefill")) * case.prompt / tokens


def _makespan_s(
    model: StepModel, case: _Case, served: Serving, slots: Array, saturated: Bools
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


def _ttft(
    model: StepModel, case: _Case, served: Serving, slots: Array, saturated: Bools
) -> tuple[Array, Array]:
    """(mean, 99th percentile)."""
    waiting = np.zeros_like(slots)
    if case.given.in_flight is not None:
        beyond = np.maximum(as_array(case.given.in_flight) - slots, 0.0)
        waiting = np.where(saturated, beyond * model.groups / served.requests_per_s, 0.0)
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
    first, one_s = _burst_s(model, case, slots)
    closed = finite & ~np.isfinite(case.rate)
    share = np.where(closed, first / prompts, 0.0)
    burst = (first + 1.0) / 2.0 * one_s
    mean = (1.0 - share) * mean + share * np.maximum(burst, served.prefill_s)
    last = 1.0 - _TAIL / np.maximum(share, _TAIL)
    late = np.where(share > _TAIL, last * first * one_s, 0.0)
    return mean, np.maximum(np.maximum(worst, late), mean)


def _tpot_p99(model: StepModel, case: _Case, served: Serving) -> Array:
    steps = np.maximum(case.later, 1.0)
    decode = served.decode_step_s
    if model.engine.prefill_first:
        extra = np.maximum(served.tpot_s - decode, 0.0)
        found = decode + extra + _NORMAL_P99 * np.sqrt(extra * served.prefill_s / steps)
    else:
        share = served.mixed_share
        most = np.minimum(share + _NORMAL_P99 * np.sqrt(share * (1.0 - share) / steps), 1.0)
        found = decode + most * np.maximum(served.mixed_step_s - decode, 0.0)
    return np.where(case.later > 0.0, np.maximum(found, served.tpot_s), 0.0)


def run_out(
    model: StepModel,
    given: ServingInput,
    *,
    request_rate: ArrayLike = math.inf,
    num_prompts: ArrayLike = math.inf,
) -> Run:
    """What a client measures on one layout; all arrays `[rows]`.

    `given.batch` are the slots of a dp group, `given.in_flight` the client's requests of one;
    `request_rate` (requests a second) and `num_prompts` are of the whole deployment, infinity for
    closed loop and for the steady state.
    """
    shape = np.broadcast_shapes(given.batch.shape, np.shape(request_rate), np.shape(num_prompts))
    prompts = np.broadcast_to(np.ceil(as_array(num_prompts) / model.groups), shape)
    hit = 1.0 - as_array(given.prefix_hit)
    case = _Case(
        given=given,
        prompts=prompts,
        rate=np.broadcast_to(as_array(request_rate) / model.groups, shape),
        prompt=np.maximum(np.ceil(as_array(given.input_len) * hit), 1.0),
        later=as_array(given.output_len) - 1.0,
    )
    most = np.broadcast_to(given.batch, shape)
    if given.in_flight is not None:
        most = np.minimum(most, as_array(given.in_flight))
    most = np.maximum(np.minimum(most, prompts), 1.0)
    slots, saturated = _slots_for_rate(model, case, most)
    served = _filled(_at(model, given, slots), shape)
    mean, worst = _ttft(model, case, served, slots, saturated)
    span = _makespan_s(model, case, served, slots, saturated)
    steady = np.minimum(served.requests_per_s, case.rate * model.groups)
    total = np.broadcast_to(as_array(num_prompts), shape)
    requests = np.where(np.isfinite(total), np.where(np.isfinite(total), total, 1.0) / span, steady)
    return Run(
        served=served,
        slots=slots,
        ttft_mean_s=mean,
        ttft_p99_s=worst,
        tpot_mean_s=served.tpot_s,
        tpot_p99_s=_tpot_p99(model, case, served),
        output_tokens_per_s=requests * as_array(given.output_len),
        requests_per_s=requests,
    )


def _filled(served: Serving, shape: tuple[int, ...]) -> Serving:
    """Every array in the shape of the rows."""
    return Serving(
        **{one.name: np.broadcast_to(getattr(served, one.name), shape) for one in fields(Serving)}
    )
