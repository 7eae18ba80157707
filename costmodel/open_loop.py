"""A steady state whose requests come at random: the steps they meet, and how long they stay.

The step of b prompt tokens beside e decoding sequences is taken for a line A + B b, through one
prompt (or one full step) and two. With x = I / room the steps that a prompt of I tokens fills:

    x <= 1   a step holds floor(1 / x) prompts; first = A + B I, more = B I
    x > 1    prompts follow one another, the rest of one beside the begin of the next where one
             waits (a share w = min(rate (x A + B I), 1) of them): s = ceil(x) - w (ceil(x) - x)
             steps a prompt, first = s A + B I; its own end comes after
             ceil(x) A + B I + w B (ceil(x) room - I)

Prompts first: whole prompts, at most `max_prefill_seqs` a step; first = the prompt alone.

    latency = front + E[T^2] / (2 E[T]) + first + n t + h      of a request: half-way into the step
                                                               it meets, its prompt, n steps of t
                                                               seconds, and h, what those after a
                                                               prompt take beyond (`arrivals`)

Of groups that do not step together others get some of the requests that come meanwhile: h / groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shardplan.costmodel.arrivals import Arrivals, Waits, unevenness, waits
from shardplan.costmodel.bulk import Fleet
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.pace import flow_s, rotate_s, stage_times
from shardplan.costmodel.serving import Serving, ServingInput
from shardplan.costmodel.step_mix import Shares
from shardplan.costmodel.steps import chunk_stages, mix_of, sequences_of

__all__ = ["Open", "arrivals_of", "open_state"]


class Open(NamedTuple):
    """A steady state at a rate; arrays `[rows]`."""

    arrivals: Arrivals
    waits: Waits
    latency_s: Array
    later_s: Array
    """Of it after the first token."""
    uneven: Array
    """Variance over mean of the requests in flight, were decode steps as long for any of them."""


class _Line(NamedTuple):
    """A step's seconds over its prompt tokens."""

    fixed_s: Array
    token_s: Array


def _line(model: Pricer, given: ServingInput, shares: Shares, ends: tuple[Array, Array]) -> _Line:
    """Through steps of so many prompt tokens."""
    _, beside = sequences_of(shares)

    def seconds(piece: Array) -> Array:
        stages = chunk_stages(model, given, piece=piece, prompt=shares.prompt, beside=beside)
        span = stage_times(model, stages, "prefill")
        if model.engine.prefill_first:
            return flow_s(model, span, "prefill", 1.0)
        return rotate_s(model, span, "prefill")

    one, two = ends
    if isinstance(model, Fleet):  # which has a load a point
        first, second = seconds(one), seconds(two)
    else:
        first, second = seconds(np.stack(ends))
    token_s = np.maximum((second - first) / (two - one), 0.0)
    return _Line(first - token_s * one, token_s)


def arrivals_of(model: Pricer, given: ServingInput, served: Serving, rate: Array) -> Arrivals:
    """What comes to the groups that step together, `rate` requests a second of one dp group.

    `served`: the closed loop of `given`'s slots, all in use.
    """
    shares, shape = mix_of(model, given).shares, rate.shape
    first = model.engine.prefill_first

    def wide(values: ArrayLike) -> Array:
        return np.broadcast_to(as_array(values), shape)

    prompt = wide(shares.prompt)
    room = wide(np.maximum(given.chunk, 1.0) if first else shares.room)
    fills = prompt / room
    most = float(model.engine.max_prefill_seqs) if first else np.inf
    at_once = np.minimum(np.maximum(np.floor(1.0 / fills), 1.0), most)
    held = np.minimum(prompt, room)
    line = _line(model, given, shares, (held, np.where(at_once > 1.0, 2.0 * held, held / 2.0)))
    locked, groups = wide(model.locked), wide(shares.together)
    alone_s = line.fixed_s + line.token_s * prompt
    steps, rest_s = np.ones(shape), np.zeros(shape)
    first_s = np.where(fills > 1.0, wide(served.prefill_s), alone_s)
    if not first:
        whole = np.ceil(fills)
        work_s = fills * line.fixed_s + line.token_s * prompt
        busy = np.minimum(rate * locked / groups * work_s, 1.0)
        shared = busy * (whole - fills)
        long = at_once == 1.0
        steps = np.where(long, whole - shared, 1.0)
        first_s = np.where(long, steps * line.fixed_s + line.token_s * prompt, alone_s)
        own_s = whole * line.fixed_s + line.token_s * (prompt + busy * (whole * room - prompt))
        rest_s = np.where(long, np.maximum(own_s - first_s, 0.0), 0.0)
    return Arrivals(
        rate=rate * locked,
        groups=groups,
        lanes=groups / locked,
        replicas=wide(model.groups) / locked,
        decode_s=wide(served.decode_step_s),
        first_s=first_s,
        more_s=line.token_s * prompt,
        at_once=at_once,
        steps=steps,
        rest_s=rest_s,
        prompts_first=first,
    )


def open_state(model: Pricer, given: ServingInput, served: Serving, rate: Array) -> Open:
    """The steady state of `rate` requests a second of one dp group on `given`'s mean in flight."""
    one = arrivals_of(model, given, served, rate)
    state = waits(one)
    mean, square = ((state.share * state.seconds**k).sum(axis=1) for k in (1, 2))
    first_s = square / (2.0 * mean) + one.first_s + one.rest_s
    begun_s = np.where(given.decode_steps > 0.0, state.begun_s / one.replicas, 0.0)
    later_s = given.decode_steps * state.step_s + begun_s
    latency_s = served.front_s + first_s + later_s
    return Open(one, state, latency_s, later_s, unevenness(one, state))
