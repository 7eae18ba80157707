"""Steady-state continuous batching: from step times to TTFT, TPOT and throughput.

One dp group has `b` slots and steps of at most `c` tokens; a request has I prompt tokens (less
those found in the prefix cache) and O output tokens. Chunked prefill, prefill mixed with decode:

    r  = min(b / (O - 1 + ceil(I / c)), c / (I + O - 1))     requests that finish a step
    q  = the same with b - 1 for b: those of the other slots, which a request meets
    d  = r (O - 1)                        sequences decoding in an average step
    e  = q (O - 1)                        those that decode beside a prompt
    s  = ceil(I / (c - e))                steps that prefill one prompt
    u  = min(c - e, max(I / s, q I))      prompt tokens of a step that has any
    f  = min(1, q I / u)                  share of a request's steps that carry prompt tokens
    t  = f mixed(e, u) + (1 - f) decode(d)             mean step
    TPOT = t        TTFT = wait + s mixed        throughput = b O / latency (Little's law)

where wait = R - D of a closed loop of b requests around a server that takes D = I / (c - e) mixed a
prompt, with Z the rest of a request's time. Mean-value analysis with deterministic service,
R = D (1 + (b - 1) / b (Q - U / 2)) with Q = b R / (Z + R) and U = b D / (Z + R), solved for R and
never below the server's own limit:
    R = max((g + sqrt(g^2 + 4 D Z - 2 D^2 (b - 1))) / 2, g),   g = b D - Z

Prefill first (an engine that stops decoding for a prompt): requests end where decode steps do, so
a prompt waits for half of those that came at the same step, and a request meets every other
prompt once, while it waits or while it decodes:
    wait = (b - 1) prefill(I) / max(2 (O - 1), 1)
    TPOT = decode(b) + ((b - 1) prefill(I) - wait) / (O - 1)

A pipeline of p stages runs p microbatches of slots at once: a step takes
max(sum of stages, p * slowest stage at b / p); a prompt of several chunks flows through it with
(chunks - 1) bubbles of the slowest stage.
With `offered` requests a second, slots fill by Little's law: b = rate * latency.

Left out: length distributions, bursts, preemption, the start and end of a run (`run_out` adds
them for a closed-loop benchmark of a given number of prompts).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.forward import forward_loads
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.step import Load, Parts, StepModel
from shardplan.models.graph import Phase

__all__ = ["Serving", "ServingInput", "serve", "step_seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingInput:
    """One layout's grid: `batch` and `chunk` broadcast; the rest is common to all."""

    batch: Array
    """Slots of one dp group."""
    chunk: Array
    """Tokens of one step of one dp group."""
    input_len: ArrayLike
    output_len: ArrayLike
    prefix_hit: ArrayLike = 0.0
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    attention: AttentionKernel = "flash"
    in_flight: ArrayLike | None = None
    """Requests in flight of one dp group; None: as many as there are slots."""


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
    wait_s: Array
    compute_s: Array
    memory_s: Array
    collective_s: Array
    overhead_s: Array
    """The four: of one average step."""


def _flow(model: StepModel, stages: list[Parts], phase: Phase, chunks: ArrayLike) -> Array:
    """Seconds for `chunks` equal pieces through the pipeline, host time included."""
    times = model.step_s(stages, phase)
    total = sum(times, np.zeros(()))
    slowest = times[0]
    for one in times[1:]:
        slowest = np.maximum(slowest, one)
    return total + (as_array(chunks) - 1.0) * slowest + model.host_s(phase) * as_array(chunks)


def _rotate(model: StepModel, stages: list[Parts], phase: Phase) -> Array:
    """Seconds of one token of every slot when p microbatches share p stages."""
    times = model.step_s(stages, phase)
    total = sum(times, np.zeros(()))
    slowest = times[0]
    for one in times[1:]:
        slowest = np.maximum(slowest, one)
    return np.maximum(total, slowest * len(times)) + model.host_s(phase)


def _sum(*groups: list[Parts]) -> list[Parts]:
    """Stage by stage; stages that share their parts share the sum."""
    sums: dict[tuple[int, ...], Parts] = {}
    out = []
    for parts in zip(*groups, strict=True):
        key = tuple(map(id, parts))
        if key not in sums:
            sums[key] = functools.reduce(Parts.plus, parts)
        out.append(sums[key])
    return out


def step_seconds(
    model: StepModel,
    phase: Phase,
    *,
    batch: ArrayLike,
    new: ArrayLike,
    prefix: ArrayLike,
    weight_dtype: str,
    kv_dtype: str,
    attention: AttentionKernel,
) -> tuple[Array, list[Parts]]:
    """(seconds, parts per stage) of one forward pass of `batch` sequences of one dp group."""
    loads = forward_loads(
        phase,
        model.engine,
        batch=batch,
        new=new,
        prefix=prefix,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        attention=attention,
    )
    stages = _sum(*(model.parts(group, load) for group, load in loads.items()))
    return _flow(model, stages, phase, 1.0), stages


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shares:
    """How an average step is made up; arrays of the grid."""

    slots: Array
    decoding: Array
    beside: Array
    room: Array
    pieces: Array
    piece: Array
    mixed: Array
    prompt: Array


def _shares(given: ServingInput, prefill_first: bool) -> _Shares:
    prompt = np.maximum(
        np.ceil(as_array(given.input_len) * (1.0 - as_array(given.prefix_hit))), 1.0
    )
    later = as_array(given.output_len) - 1.0
    chunk = np.maximum(given.chunk, 1.0)
    slots = given.batch
    if given.in_flight is not None:
        slots = np.minimum(slots, as_array(given.in_flight))
    if prefill_first:
        zero = np.zeros(np.broadcast_shapes(slots.shape, chunk.shape))
        piece = np.minimum(chunk, prompt) + zero
        pieces = np.ceil(prompt / piece)
        return _Shares(
            slots=slots,
            decoding=slots + zero,
            beside=zero,
            room=piece,
            pieces=pieces,
            piece=piece,
            mixed=zero,
            prompt=prompt,
        )
    wanted, most = slots / (later + np.ceil(prompt / chunk)), chunk / (prompt + later)
    per_step = np.minimum(wanted, most)
    others = np.minimum(wanted * (1.0 - 1.0 / np.maximum(slots, 1.0)), most)
    beside = others * later
    room = np.maximum(chunk - beside, 1.0)
    pieces = np.ceil(prompt / room)
    piece = np.minimum(room, np.maximum(prompt / pieces, prompt * others))
    return _Shares(
        slots=slots,
        decoding=per_step * later,
        beside=beside,
        room=room,
        pieces=pieces,
        piece=piece,
        mixed=np.where(later > 0.0, np.minimum(others * prompt / piece, 1.0), 1.0),
        prompt=prompt,
    )


def _decode_stages(model: StepModel, given: ServingInput, sequences: Array) -> list[Parts]:
    """A decode step of `sequences` of one microbatch at the mean context."""
    engine = model.engine
    token = Load.of("decode", engine, tokens=sequences, weight_dtype=given.weight_dtype)
    return _sum(
        model.parts("token", token),
        model.parts("attention", _cached(model, given, sequences)),
        model.parts("logits", token),
    )


def _cached(model: StepModel, given: ServingInput, sequences: Array) -> Load:
    """One new token of each sequence at the mean context."""
    return Load.of(
        "decode",
        model.engine,
        batch=sequences,
        new=1.0,
        prefix=as_array(given.input_len) + as_array(given.output_len) / 2.0,
        kv_dtype=given.kv_dtype,
        attention=given.attention,
    )


def _mixed_stages(
    model: StepModel, given: ServingInput, shares: _Shares, sequences: Array
) -> list[Parts]:
    """A step of `sequences` decoding beside one piece of a prompt."""
    engine = model.engine
    piece, prompt = shares.piece, shares.prompt
    kept = as_array(given.input_len) - prompt
    tokens = Load.of("prefill", engine, tokens=sequences + piece, weight_dtype=given.weight_dtype)
    many, new = np.maximum(piece / prompt, 1.0), np.minimum(piece, prompt)
    chunk = Load.of(
        "prefill",
        engine,
        batch=many,
        new=new,
        prefix=kept + (prompt - new) / 2.0,
        kv_dtype=given.kv_dtype,
        attention=given.attention,
    )
    rows = Load.of("prefill", engine, tokens=sequences + many, weight_dtype=given.weight_dtype)
    parts = _sum(
        model.parts("token", tokens), model.parts("attention", chunk), model.parts("logits", rows)
    )
    if engine.prefill_first:
        return parts
    beside = model.parts("attention", _cached(model, given, np.maximum(sequences, 1.0)))
    return _sum(parts, _where(sequences > 0.0, beside))


def _where(present: NDArray[np.bool_], stages: list[Parts]) -> list[Parts]:
    """The parts where they are present; their launches everywhere."""
    known = {
        id(parts): Parts(
            parts.compute_s * present,
            parts.memory_s * present,
            parts.collective_s * present,
            parts.overhead_s * present,
            parts.kernels,
        )
        for parts in stages
    }
    return [known[id(parts)] for parts in stages]


class _Pace(NamedTuple):
    """Seconds of one prompt, of its wait and of a request's average step, and what that holds."""

    prefill_s: Array
    wait_s: Array
    step_s: Array
    mixed: Array
    """Mixed steps in an average step."""
    pure: Array
    """Decode steps in an average step; none where nothing is decoded."""


def _chunked(shares: _Shares, later: Array, decode_s: Array, mixed_s: Array) -> _Pace:
    """Prompts share steps with decoding requests."""
    prefill_s = shares.pieces * mixed_s
    pure = 1.0 - shares.mixed
    step_s = shares.mixed * mixed_s + pure * decode_s
    service_s = shares.prompt / shares.room * mixed_s
    wait_s = _wait(service_s, prefill_s - service_s + later * step_s, shares.slots)
    return _Pace(prefill_s, wait_s, step_s, shares.mixed, pure)


def _prompts_first(shares: _Shares, later: Array, decode_s: Array, prefill_s: Array) -> _Pace:
    """A prompt stops decoding until it is done."""
    others_s = (shares.slots - 1.0) * prefill_s
    wait_s = others_s / np.maximum(2.0 * later, 1.0)
    met = (others_s - wait_s) / (np.maximum(later, 1.0) * prefill_s) * shares.pieces
    mixed, pure = np.where(later > 0.0, met, 1.0), np.where(later > 0.0, 1.0, 0.0)
    step_s = mixed * (prefill_s / shares.pieces) + pure * decode_s
    return _Pace(prefill_s, wait_s, step_s, mixed, pure)


def serve(model: StepModel, given: ServingInput) -> Serving:
    """Steady state of one layout over a grid of slots and step sizes."""
    engine, stages = model.engine, len(model.graphs["decode"].stages)
    shares = _shares(given, engine.prefill_first)
    decode = _decode_stages(model, given, np.maximum(np.ceil(shares.decoding / stages), 1.0))
    alone = np.ceil(shares.beside / stages)
    mixed = _mixed_stages(model, given, shares, alone)
    decode_s = _rotate(model, decode, "decode")
    mixed_s = _rotate(model, mixed, "prefill")
    later = as_array(given.output_len) - 1.0
    if engine.prefill_first:
        pace = _prompts_first(
            shares, later, decode_s, _flow(model, mixed, "prefill", shares.pieces)
        )
    else:
        pace = _chunked(shares, later, decode_s, mixed_s)
    prefill_s, wait_s, step_s = pace.prefill_s, pace.wait_s, pace.step_s
    latency = wait_s + prefill_s + later * step_s
    each = shares.slots / latency
    outside = _outside_s(given, each)
    ttft_s, latency = wait_s + prefill_s + outside, latency + outside
    rate = model.groups * each
    means = _mean_parts(decode, mixed, pace)
    return Serving(
        ttft_s=ttft_s,
        tpot_s=np.where(later > 0, step_s, 0.0),
        end_to_end_s=latency,
        requests_per_s=rate,
        output_tokens_per_s=rate * as_array(given.output_len),
        concurrency=rate * latency,
        prefill_s=prefill_s,
        decode_step_s=decode_s,
        mixed_step_s=mixed_s,
        mixed_share=pace.mixed,
        wait_s=wait_s + outside,
        compute_s=means.compute_s,
        memory_s=means.memory_s,
        collective_s=means.collective_s,
        overhead_s=step_s - means.compute_s - means.memory_s - means.collective_s,
    )


def _wait(service_s: Array, rest_s: Array, slots: Array) -> Array:
    """Mean wait of a prompt behind the others', of a closed loop of `slots` requests."""
    ahead = slots * service_s - rest_s
    inside = ahead * ahead + service_s * (4.0 * rest_s - 2.0 * service_s * (slots - 1.0))
    stay = np.maximum((ahead + np.sqrt(np.maximum(inside, 0.0))) / 2.0, ahead)
    return np.maximum(stay - service_s, 0.0)


def _outside_s(given: ServingInput, rate: Array) -> Array:
    """Mean wait of a request for a slot, where more are in flight than slots (Little's law)."""
    if given.in_flight is None:
        return np.zeros(())
    return np.maximum(as_array(given.in_flight) - given.batch, 0.0) / rate


def _mean_parts(decode: list[Parts], mixed: list[Parts], pace: _Pace) -> Parts:
    """Parts of an average step: the stages a token passes, weighted by how often they run."""
    one, two = decode[0], mixed[0]
    for parts in decode[1:]:
        one = one.plus(parts)
    for parts in mixed[1:]:
        two = two.plus(parts)

    def blend(a: Array, b: Array) -> Array:
        return np.asarray(pace.pure * a + pace.mixed * b)

    return Parts(
        blend(one.compute_s, two.compute_s),
        blend(one.memory_s, two.memory_s),
        blend(one.collective_s, two.collective_s),
        blend(one.overhead_s, two.overhead_s),
        0.0,
    )
