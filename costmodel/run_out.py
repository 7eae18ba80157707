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

Offered rate R below capacity r: requests come at random (`open_loop`), slots in use are those of
Little's law (`run_slots`), makespan = N / R + latency. At or above it the slots are full and the
queue grows: makespan = N / r + latency, wait = N / 2 (1 / r - 1 / R).

`run_spread` has the percentiles.

Memory that holds b requests where the engine would run more (`allowed`): one that admits a prompt
as soon as its own blocks are free (`preempts`) gives the first token and takes the request back
later. Of the wait for memory, a request of I prompt tokens has had the share I / (I + O / 2) by
then, what it holds at its start of what it holds on average; the rest lengthens its TPOT.

Left out: length distributions, client and tokenizer time, preemption, how acceptance differs
between requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.run_case import Bools, Case, at_slots, filled, some_rows
from shardplan.costmodel.run_slots import slots_for_rate
from shardplan.costmodel.run_spread import outside_s, tpot_spread, ttft_spread
from shardplan.costmodel.serving import Serving, ServingInput

__all__ = ["Run", "run_out"]


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
    ttft_p50_s: Array
    ttft_p90_s: Array
    ttft_p99_s: Array
    tpot_mean_s: Array
    tpot_p50_s: Array
    tpot_p90_s: Array
    tpot_p99_s: Array
    output_tokens_per_s: Array
    requests_per_s: Array


def _chunk(case: Case) -> Array:
    return np.minimum(np.maximum(case.given.chunk, 1.0), case.prompt)


def _rest_s(model: Pricer, case: Case, slots: Array) -> Array:
    """Seconds of the last wave of a closed-loop run, where it is not a full one."""
    closed = np.isfinite(case.prompts) & ~np.isfinite(case.rate)
    finite = np.where(closed, case.prompts, 0.0)
    rest = finite - np.floor(finite / slots) * slots
    rows, seconds = np.flatnonzero(rest > 0.0), np.zeros_like(slots)
    if rows.size:
        few, own = some_rows(model, case, rows)
        wave = np.maximum(rest[rows], 1.0)
        seconds[rows] = wave * few.groups / at_slots(few, own.given, wave).requests_per_s
    return seconds


def _makespan_s(
    model: Pricer, case: Case, served: Serving, slots: Array, saturated: Bools
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


def run_out(
    model: Pricer,
    given: ServingInput,
    *,
    request_rate: ArrayLike = math.inf,
    num_prompts: ArrayLike = math.inf,
    allowed: ArrayLike = 0.0,
    left: ArrayLike = 1.0,
    tails: bool = True,
) -> Run:
    """What a client measures on one layout; all arrays `[rows]`.

    `given.batch` are the slots of a dp group, `given.in_flight` the client's requests of one;
    `request_rate` (requests a second) and `num_prompts` are of the whole deployment, infinity for
    closed loop and for the steady state. `allowed` are the slots that the engine would run if
    memory held them, where those are more. `left`: the share of the dp groups that serve, the
    others lost. Without `tails` the percentiles of TTFT are NaN, in less time.
    """
    shape = np.broadcast_shapes(given.batch.shape, np.shape(request_rate), np.shape(num_prompts))
    serving = as_array(model.groups) * as_array(left)
    prompts = np.broadcast_to(np.ceil(as_array(num_prompts) / serving), shape)
    hit = 1.0 - as_array(given.prefix_hit)
    case = Case(
        given=given,
        prompts=prompts,
        rate=np.broadcast_to(as_array(request_rate) / serving, shape),
        prompt=np.maximum(np.ceil(as_array(given.input_len) * hit), 1.0),
        steps=given.decode_steps,
        allowed=as_array(allowed),
        left=as_array(left),
    )
    most = np.broadcast_to(given.batch, shape)
    if given.in_flight is not None:
        most = np.minimum(most, as_array(given.in_flight))
    most = np.maximum(np.minimum(most, prompts), 1.0)
    full = filled(at_slots(model, given, most), shape)
    slots = slots_for_rate(model, case, most, full)
    served, used, saturated = slots.served, slots.used, slots.saturated
    before_s, after_s = outside_s(model, case, served, used, saturated)
    ttft, variance = ttft_spread(model, case, slots, most, full.requests_per_s, before_s, tails)
    later_s = after_s / np.maximum(as_array(given.output_len) - 1.0, 1.0)
    span = _makespan_s(model, case, served, used, saturated)
    steady = np.minimum(served.requests_per_s, case.rate * model.groups) * case.left
    total = np.broadcast_to(as_array(num_prompts), shape)
    requests = np.where(np.isfinite(total), np.where(np.isfinite(total), total, 1.0) / span, steady)
    return Run(
        served=served,
        slots=used,
        capacity_requests_per_s=full.requests_per_s * case.left,
        **ttft.named("ttft"),
        **tpot_spread(model, case, slots, full, most, variance).later(later_s).named("tpot"),
        output_tokens_per_s=requests * as_array(given.output_len),
        requests_per_s=requests,
    )
