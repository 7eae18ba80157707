"""Steady-state continuous batching: from step times to TTFT, TPOT and throughput.

One dp group has `b` slots and steps of at most `c` tokens; a request has I prompt tokens (less
those found in the prefix cache) and O output tokens. A decode step verifies 1 + k tokens of a
sequence, k of them predicted ahead and each kept with probability a where those before it were:

    E  = 1 + a + a^2 + ... + a^k          tokens that a decode step gives a sequence
    n  = (O - 1) / E                      decode steps of a request, at least one where O > 1

With k = 0 (nothing predicted) E = 1 and n = O - 1. Chunked prefill, prefill mixed with decode:

    r  = min(b / (n + ceil(I / c)), c / (I + (1 + k) n))     requests that finish a step
    q  = the same with b - 1 for b: those of the other slots, which a request meets
    d  = r n                              sequences decoding in an average step
    e  = q n                              those that decode beside a prompt
    x  = I / (c - (1 + k) e)              steps that a prompt fills
    s  = ceil(x) / (1 + q (ceil(x) - x)) where x > 1, else 1       steps that prefill one prompt:
                                          the rest of one shares its step with the next
    u  = min(c - (1 + k) e, max(I / s, q I))      prompt tokens of a step that has any
    f  = min(1, q I / u)                  share of a request's steps that carry prompt tokens
    h  = 1 - (1 - f) (1 - F)^(g - 1)      the same of g schedules that wait for one another (groups
         F = min(1, f + s / (s + n))      that share experts, times microbatches): a prompt of
                                          another makes the step of all a mixed one; to the others
                                          a request's own prompt counts, too
    t  = h mixed(e, u) + (1 - h) decode(d)             mean step
    TTFT = front + wait + s mixed                  front: `request_host_s` + `request_steps` t
    latency = TTFT + n t                           mean, of a request
    TPOT = t n / (O - 1)    throughput = b O / latency (Little's law)

Groups that share experts wait for the fullest of them, with M prompts that begin with a step (those
of each group Poisson: of mean q the request's own, r the others), or with pieces of long ones:
    x <= 1   u = E[min(M I, c - (1 + k) e); M > 0] / P(M > 0)      f = 1 - exp(-q), F = 1 - exp(-r)
             what does not fit makes a step of its own: 1 - f and 1 - F times P(M I of a group fit),
             and those steps count in u with what is left over
    x > 1    f = min(1, q s) of a group's steps have a piece, v = (q I - f y) / (c - (1 + k) e - y)
             a full one, y = I - floor(x) (c - (1 + k) e) the rest of a prompt (F, V: r for q)
             u: full with probability (1 - (1 - v) (1 - V)^(g - 1)) / h, else y

where wait = R - D of a closed loop of b requests around a server that takes D = I / (c - e) mixed a
prompt, with Z the rest of a request's time. Mean-value analysis with deterministic service,
R = D (1 + (b - 1) / b (Q - U / 2)) with Q = b R / (Z + R) and U = b D / (Z + R), solved for R and
never below the server's own limit:
    R = max((g + sqrt(g^2 + 4 D Z - 2 D^2 (b - 1))) / 2, g),   g = b D - Z

Prefill first (an engine that stops decoding for prompts): requests end where decode steps do, and
those that come with one step begin in one prefill, j of them on average, as far as c tokens hold
them. A prompt waits for half of those that came with it and do not fit beside it; a request meets
every other prompt once, while it waits or while it decodes:
    wait = ((b - 1) / max(2 n, 1) - (j - 1) / 2) prefill(j I) / j
    t    = decode(b) + (m prefill(j I) / j - wait) / n        TPOT as above
    j    = m / (n (1 - exp(-g b / n)))                        at least 1, at most floor(c / I), in
                                                              eighths of an octave
with m = b - 1 other prompts. Those of g groups that share experts stop all g, and the prompts that
come with one step stop it once: m = n E[the most of any group], each Poisson of mean b / n.

A step that predicts ahead also runs the prediction layer k times: once over all its tokens, prompt
tokens with them, and k - 1 times over one token of each sequence that decodes.

A pipeline of p stages runs p microbatches at once, each scheduled by itself with b / p slots and c
tokens a step (at most as many microbatches as slots): the formulas hold with b / p for b and
g p for g (a step with prompts of one microbatch holds up the others at every stage), their
rate p times over, and a step takes max(sum of stages, p * slowest stage). Where prompts come first,
a prompt of several chunks flows through all stages with (chunks - 1) bubbles of the slowest.
Ranks that share a context (c) split a prompt's tokens and each compute the decoding ones, so that a
mixed step's e + u tokens count as c e + u of those that are split.
With `offered` requests a second, slots fill by Little's law: b = rate * latency.

Left out: length distributions, bursts, preemption, the start and end of a run (`run_out` adds
them for a closed-loop benchmark of a given number of prompts); of tokens predicted ahead, how
acceptance differs with their position and the request, and those of a last step beyond O.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, as_array
from shardplan.costmodel.load import Parts
from shardplan.costmodel.memo import Points
from shardplan.costmodel.pace import Timed, stage_times, timed
from shardplan.costmodel.step_mix import ServingInput, step_shares
from shardplan.costmodel.steps import Mix, Steps, mix_of, steps_of

__all__ = [
    "Serving",
    "ServingInput",
    "Steady",
    "replay",
    "serve",
    "steady",
    "steady_steps",
]

Weighed = Callable[[Array], None]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Means in steady state; arrays of the grid's shape. Rates are of the whole deployment."""

    ttft_s: Array
    tpot_s: Array
    end_to_end_s: Array
    requests_per_s: Array
    output_tokens_per_s: Array
    concurrency: Array
    prefill_s: Array
    """One prompt alone, all its chunks."""
    decode_step_s: Array
    mixed_step_s: Array
    mixed_share: Array
    """Mixed steps in an average step."""
    pure_share: Array
    """Decode steps in an average step."""
    wait_s: Array
    front_s: Array
    """Of a first token's way through the front end."""
    compute_s: Array
    memory_s: Array
    collective_s: Array
    overhead_s: Array
    """The four: of one average step."""


def replay(model: Pricer, given: ServingInput, served: Serving, weigh: Weighed) -> None:
    """Price the steps of a steady state again, for whoever watches the model.

    `weigh` is told, before each part of them, how often an average step runs it.
    """
    mix = Mix(step_shares(given, model.engine, model.stages, model.locked))
    beside = served.mixed_share * (np.ceil(mix.shares.beside) > 0.0)
    often = {"decode": served.pure_share, "mixed": served.mixed_share, "beside": beside}
    steps_of(model, given, mix, lambda part: weigh(often[part]))


def steady_steps(model: Pricer, given: ServingInput) -> tuple[list[Parts], list[Parts]]:
    """(decode step, mixed step) of the steady state, per stage of the model, over the grid."""
    steps = steps_of(model, given, mix_of(model, given), lambda _: None)
    decode = [one.at(steps.decode_at) for one in steps.decode]
    return decode, [one.at(steps.mixed_at) for one in steps.mixed]


class Steady(NamedTuple):
    """The steady state of a grid: what requests see, and the steps that it is made of."""

    timed: Timed
    steps: Steps

    def mean_parts(self, at: Indices | None = None) -> Parts:
        """Parts of an average step: the stages a token passes, weighted by how often they run.

        `at`: at flat places `[n]` of the grid's shape (that of the times) alone.
        """
        steps, pace = self.steps, self.timed.pace
        shape = self.timed.end_to_end_s.shape
        one = _placed(functools.reduce(Parts.plus, steps.decode), steps.decode_at, shape, at)
        two = _placed(functools.reduce(Parts.plus, steps.mixed), steps.mixed_at, shape, at)
        pure, mixed = (
            share if at is None else np.broadcast_to(share, shape).ravel()[at]
            for share in (pace.pure, pace.mixed)
        )
        a, b, c, d = (pure * own + mixed * other for own, other in zip(one, two, strict=True))
        return Parts(a, b, c, d, 0.0)


def _placed(
    parts: Parts, points: Points | None, shape: tuple[int, ...], at: Indices | None
) -> list[Array]:
    """Seconds of parts over the grid, or at flat places of its shape."""
    seconds = parts.seconds
    if at is None:
        return [one if points is None else points.spread(one) for one in seconds]
    if points is not None and all(one.ndim <= 1 for one in seconds):
        inside = points.inverse.ravel()[at % points.inverse.size]
        return [one[inside] if one.ndim else one for one in seconds]
    whole = (one if points is None else points.spread(one) for one in seconds)
    return [np.broadcast_to(one, shape).ravel()[at] for one in whole]


def steady(
    model: Pricer, given: ServingInput, watch: Callable[[Steps], None] | None = None
) -> Steady:
    """Steady state of one layout over a grid of slots and step sizes.

    `watch` is shown the steps that it is made of.
    """
    mix = mix_of(model, given)
    steps = steps_of(model, given, mix, lambda _: None)
    if watch is not None:
        watch(steps)
    decode = stage_times(model, steps.decode, "decode").at(steps.decode_at)
    mixed = stage_times(model, steps.mixed, "prefill").at(steps.mixed_at)
    return Steady(timed(model, given, mix.shares, decode, mixed, mix.kept), steps)


def serve(model: Pricer, given: ServingInput) -> Serving:
    """All that is known of a steady state over a grid of slots and step sizes."""
    state = steady(model, given)
    found, means = state.timed, state.mean_parts()
    pace, rate = found.pace, found.requests_per_s
    return Serving(
        ttft_s=found.ttft_s,
        tpot_s=found.tpot_s,
        end_to_end_s=found.end_to_end_s,
        requests_per_s=rate,
        output_tokens_per_s=rate * as_array(given.output_len),
        concurrency=rate * found.end_to_end_s,
        prefill_s=pace.prefill_s,
        decode_step_s=found.decode_s,
        mixed_step_s=found.mixed_s,
        mixed_share=pace.mixed,
        pure_share=pace.pure,
        wait_s=found.ttft_s - pace.prefill_s,
        front_s=found.front_s,
        compute_s=means.compute_s,
        memory_s=means.memory_s,
        collective_s=means.collective_s,
        overhead_s=pace.step_s - means.compute_s - means.memory_s - means.collective_s,
    )
