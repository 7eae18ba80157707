"""A steady state whose requests come at random: the steps they meet, and how long they stay.

The step of b prompt tokens beside e decoding sequences is taken for a line A + B b, through one
prompt (or one full step) and two. With x = I / room the steps that a prompt of I tokens fills:

    x <= 1   a step holds floor(1 / x) prompts; first = A + B I, more = B I
    x > 1/2  prompts follow one another, the rest of one beside the begin of the next
             (`long_prompts`)

Prompts first: whole prompts, at most `max_prefill_seqs` a step; first = the prompt alone.

    latency = front + E[T^2] / (2 E[T]) + first + n (t + p m) + h

of a request: half-way into the step it meets, its prompt, n steps of t seconds, of which a share p
decodes alone and takes m more for a request than on average (`occupancy`), and h, what those after
a prompt take beyond (`arrivals`), less what of the next prompt lies in the last step of its own.
Of groups that do not step together others get some of the requests that come meanwhile: h / groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shardplan.costmodel.arrivals import Arrivals, Waits, unevenness, waits
from shardplan.costmodel.bulk import Fleet
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.long_prompts import Line, bare_steps, pieces_of
from shardplan.costmodel.occupancy import Met
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
    in_step: Array
    """The same of those in one step, as long as their number makes it."""


def _line(model: Pricer, given: ServingInput, shares: Shares, ends: tuple[Array, Array]) -> Line:
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
    return Line(first - token_s * one, token_s)


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
    held, long = np.minimum(prompt, room), at_once == 1.0
    rest = prompt - (np.ceil(fills) - 1.0) * room
    other = np.where((fills > 1.0) & (rest < held / 2.0) & (not first), rest, held / 2.0)
    line = _line(model, given, shares, (held, np.where(long, other, 2.0 * held)))
    locked, groups = wide(model.locked), wide(shares.together)
    alone_s, decode_s = line.fixed_s + line.token_s * prompt, wide(served.decode_step_s)
    one = Arrivals(
        rate=rate * locked,
        groups=groups,
        lanes=groups / locked,
        replicas=wide(model.groups) / locked,
        decode_s=decode_s,
        bare_s=decode_s,
        bare=np.ones(shape),
        first_s=np.where(fills > 1.0, wide(served.prefill_s), alone_s),
        more_s=line.token_s * prompt,
        at_once=at_once,
        steps=np.ones(shape),
        last_s=np.zeros(shape),
        rest_s=np.zeros(shape),
        late_s=np.zeros(shape),
        late=np.zeros(shape),
        step_s=wide(served.tpot_s / given.steps_per_token),
        prompts_first=first,
    )
    if first or not long.any():
        return one
    each = rate * locked / groups
    beyond = fills > 1.0
    pieces = pieces_of(
        line, prompt, room, (each, wide(model.groups)), np.where(beyond, locked, 1.0)
    )
    step_s, bare = bare_steps(pieces, decode_s, each, locked)
    one = one.where(
        long,
        one._replace(
            first_s=pieces.first_s,
            steps=pieces.steps,
            last_s=pieces.last_s,
            rest_s=np.maximum(pieces.alone_s - pieces.first_s, 0.0),
            late_s=np.maximum(pieces.full_s - pieces.first_s, 0.0),
            late=pieces.shared,
        ),
    )
    apart = one._replace(
        rate=rate, groups=one.lanes, replicas=wide(model.groups), decode_s=step_s, bare=bare
    )
    return one.where(beyond, apart)


def open_state(model: Pricer, given: ServingInput, served: Serving, rate: Array, step: Met) -> Open:
    """The steady state of `rate` requests a second of one dp group on `given`'s mean in flight."""
    one = arrivals_of(model, given, served, rate)
    state = waits(one)
    mean = (state.share * state.seconds).sum(axis=1)
    half_s = state.left_s(one) / mean
    late_s = (1.0 - one.late) * one.rest_s + one.late * one.late_s
    first_s = half_s + one.first_s + late_s
    begun_s = state.begun_s / one.replicas - one.late * (one.late_s - one.rest_s)
    begun_s = np.where(given.decode_steps > 0.0, begun_s, 0.0)
    pure = np.where(one.prompts_first, 1.0, state.pure(one))
    later_s = given.decode_steps * (state.step_s + pure * step.more_s) + begun_s
    latency_s = served.front_s + first_s + later_s
    uneven = unevenness(one, state)
    return Open(one, state, latency_s, later_s, uneven, uneven / (1.0 - step.longer))
