"""How fast requests move when steps take so long: TTFT, TPOT and latency of a steady state.

The formulas are those of `shardplan.costmodel.serving`; here they take the seconds of a decode step
and of a mixed one, whoever priced them. TTFT, TPOT and latency grow with both, and scale with
them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.load import Parts
from shardplan.costmodel.memo import Points
from shardplan.costmodel.step_mix import ServingInput, Shares, step_shares
from shardplan.models.graph import Phase

__all__ = [
    "Kept",
    "Pace",
    "Span",
    "Timed",
    "flow_s",
    "kept_of",
    "rotate_s",
    "serve_spans",
    "stage_times",
    "timed",
]


class Span(NamedTuple):
    """Seconds of one step over the stages of a pipeline."""

    total_s: Array
    slowest_s: Array

    def at(self, points: Points | None) -> Span:
        """Spread from the different points over the grid that they stand for, where told."""
        if points is None:
            return self
        return Span(points.spread(self.total_s), points.spread(self.slowest_s))


def stage_times(
    model: Pricer, stages: list[Parts], phase: Phase, runs: Sequence[int] | None = None
) -> Span:
    """All stages together and the slowest, host time left out; `runs`: stages alike of each."""
    times = model.step_s(stages, phase)
    counts = [1] * len(times) if runs is None else runs
    total = sum((one * n for one, n in zip(times, counts, strict=True)), np.zeros(()))
    return Span(total, functools.reduce(np.maximum, times))


def flow_s(model: Pricer, step: Span, phase: Phase, chunks: ArrayLike) -> Array:
    """Seconds for `chunks` equal pieces through the pipeline, host time included."""
    pieces = as_array(chunks)
    return step.total_s + (pieces - 1.0) * step.slowest_s + model.host_s(phase) * pieces


def rotate_s(model: Pricer, step: Span, phase: Phase) -> Array:
    """Seconds of one token of every slot when p microbatches share p stages."""
    return np.maximum(step.total_s, step.slowest_s * model.stages) + model.host_s(phase)


class Pace(NamedTuple):
    """Seconds of one prompt, of its wait and of a request's average step, and what that holds."""

    prefill_s: Array
    wait_s: Array
    step_s: Array
    mixed: Array
    """Mixed steps in an average step."""
    pure: Array
    """Decode steps in an average step; none where nothing is decoded."""


class Kept(NamedTuple):
    """What of a pace depends on what steps hold, not on how long they take."""

    later: Array
    """Decode steps of a request."""
    each: Array
    """Of these over the tokens that they give it."""
    slots: Array
    """Of a dp group."""
    rooms: Array
    """Steps that a prompt fills."""
    mixed: Array
    """Mixed steps in an average step, where prompts share steps with decoding requests."""
    pure: Array
    """Decode steps there."""


def kept_of(given: ServingInput, shares: Shares) -> Kept:
    """Worked out once for all layouts that run the same steps."""
    later = given.decode_steps
    pure = (1.0 - shares.mixed) * (1.0 - shares.elsewhere) ** (shares.together - 1.0)
    return Kept(
        later=later,
        each=given.steps_per_token,
        slots=shares.slots * shares.apart,
        rooms=shares.prompt / shares.room,
        mixed=1.0 - pure,
        pure=pure,
    )


def _chunked(shares: Shares, kept: Kept, decode_s: Array, mixed_s: Array) -> Pace:
    """Prompts share steps with decoding requests, of all groups that step together."""
    prefill_s = shares.pieces * mixed_s
    step_s = kept.mixed * mixed_s + kept.pure * decode_s
    service_s = kept.rooms * mixed_s
    wait_s = _wait(service_s, prefill_s - service_s + kept.later * step_s, shares.slots)
    return Pace(prefill_s, wait_s, step_s, kept.mixed, kept.pure)


def _prompts_first(shares: Shares, later: Array, decode_s: Array, prefill_s: Array) -> Pace:
    """A prompt stops decoding until it is done."""
    others_s = shares.met * prefill_s
    wait_s = shares.ahead * prefill_s
    met = (others_s - wait_s) / (np.maximum(later, 1.0) * prefill_s) * shares.pieces
    mixed, pure = np.where(later > 0.0, met, 1.0), np.where(later > 0.0, 1.0, 0.0)
    step_s = mixed * (prefill_s / shares.pieces) + pure * decode_s
    return Pace(prefill_s, wait_s, step_s, mixed, pure)


class Timed(NamedTuple):
    """What requests see of the two kinds of step."""

    ttft_s: Array
    tpot_s: Array
    end_to_end_s: Array
    requests_per_s: Array
    front_s: Array
    """Of TTFT: between client and scheduler."""
    decode_s: Array
    mixed_s: Array
    pace: Pace


def timed(
    model: Pricer,
    given: ServingInput,
    shares: Shares,
    decode: Span,
    mixed: Span,
    kept: Kept | None = None,
) -> Timed:
    """The steady state whose steps take so long; `kept`: what is known of `shares`."""
    decode_s, mixed_s = rotate_s(model, decode, "decode"), rotate_s(model, mixed, "prefill")
    kept = kept_of(given, shares) if kept is None else kept
    later = kept.later
    if model.engine.prefill_first:
        pace = _prompts_first(
            shares, later, decode_s, flow_s(model, mixed, "prefill", shares.pieces)
        )
    else:
        pace = _chunked(shares, kept, decode_s, mixed_s)
    front_s = model.engine.request_host_s + model.engine.request_steps * pace.step_s
    first_s = front_s + pace.wait_s + pace.prefill_s
    latency = first_s + later * pace.step_s
    each = kept.slots / latency
    outside = _outside_s(given, each)
    return Timed(
        ttft_s=first_s + outside,
        tpot_s=np.where(later > 0, pace.step_s * kept.each, 0.0),
        end_to_end_s=latency + outside,
        requests_per_s=model.groups * each,
        front_s=front_s,
        decode_s=decode_s,
        mixed_s=mixed_s,
        pace=pace,
    )


def serve_spans(model: Pricer, given: ServingInput, decode: Span, mixed: Span) -> Timed:
    """The steady state, were its steps these: all it depends on of how layers are cut.

    TTFT, TPOT and latency grow with every span, and by a factor where all do.
    """
    shares = step_shares(given, model.engine, model.stages, model.locked)
    return timed(model, given, shares, decode, mixed)


def _wait(service_s: Array, rest_s: Array, slots: Array) -> Array:
    """Mean wait of a prompt behind the others', of a closed loop of `slots` requests."""
    ahead = slots * service_s - rest_s
    inside = ahead * ahead
    inside += service_s * (4.0 * rest_s - 2.0 * service_s * (slots - 1.0))
    stay = np.sqrt(np.maximum(inside, 0.0))
    stay += ahead
    stay /= 2.0
    stay = np.maximum(stay, ahead)
    stay -= service_s
    return np.maximum(stay, 0.0)


def _outside_s(given: ServingInput, rate: Array) -> Array:
    """Mean wait of a request for a slot, where more are in flight than slots (Little's law)."""
    if given.in_flight is None:
        return np.zeros(())
    return np.maximum(as_array(given.in_flight) - given.batch, 0.0) / rate
