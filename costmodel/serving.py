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
    h  = 1 - (1 - f) (1 - F)^(g - 1)      the same of g groups that share experts: a prompt of
         F = min(1, f + s / (s + O - 1))  another makes the step of all a mixed one; to the others
                                          a request's own prompt counts, too
    t  = h mixed(e, u) + (1 - h) decode(d)             mean step
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
Ranks that share a context (c) split a prompt's tokens and each compute the decoding ones, so that a
mixed step's e + u tokens count as c e + u of those that are split.
With `offered` requests a second, slots fill by Little's law: b = rate * latency.

Left out: length distributions, bursts, preemption, the start and end of a run (`run_out` adds
them for a closed-loop benchmark of a given number of prompts).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.forward import Pricer, forward_loads
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.step_mix import ServingInput, Shares, step_shares
from shardplan.models.graph import Phase

__all__ = ["Serving", "ServingInput", "replay", "serve", "step_seconds"]

Weigh = Callable[[str], None]
Weighed = Callable[[Array], None]


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
    compute_s: Array
    memory_s: Array
    collective_s: Array
    overhead_s: Array
    """The four: of one average step."""


def _flow(model: Pricer, stages: list[Parts], phase: Phase, chunks: ArrayLike) -> Array:
    """Seconds for `chunks` equal pieces through the pipeline, host time included."""
    times = model.step_s(stages, phase)
    total = sum(times, np.zeros(()))
    slowest = times[0]
    for one in times[1:]:
        slowest = np.maximum(slowest, one)
    return total + (as_array(chunks) - 1.0) * slowest + model.host_s(phase) * as_array(chunks)


def _rotate(model: Pricer, stages: list[Parts], phase: Phase) -> Array:
    """Seconds of one token of every slot when p microbatches share p stages."""
    times = model.step_s(stages, phase)
    total = sum(times, np.zeros(()))
    slowest = times[0]
    for one in times[1:]:
        slowest = np.maximum(slowest, one)
    return np.maximum(total, slowest * model.stages) + model.host_s(phase)


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
    model: Pricer,
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


def _decode_stages(model: Pricer, given: ServingInput, sequences: Array) -> list[Parts]:
    """A decode step of `sequences` of one microbatch at the mean context."""
    engine = model.engine
    token = Load.of("decode", engine, tokens=sequences, weight_dtype=given.weight_dtype)
    return _sum(
        model.parts("token", token),
        model.parts("attention", _cached(model, given, sequences)),
        model.parts("logits", token),
    )


def _cached(model: Pricer, given: ServingInput, sequences: Array) -> Load:
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


def _prompt_stages(
    model: Pricer, given: ServingInput, shares: Shares, sequences: Array
) -> list[Parts]:
    """A step of `sequences` decoding beside one piece of a prompt, but for their attention."""
    engine = model.engine
    piece, prompt = shares.piece, shares.prompt
    kept = as_array(given.input_len) - prompt
    every = sequences * as_array(model.context_ranks) + piece
    tokens = Load.of("prefill", engine, tokens=every, weight_dtype=given.weight_dtype)
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
    return _sum(
        model.parts("token", tokens), model.parts("attention", chunk), model.parts("logits", rows)
    )


def _beside_stages(model: Pricer, given: ServingInput, sequences: Array) -> list[Parts]:
    """Attention of `sequences` that decode beside a prompt; launches where there are none."""
    beside = model.parts("attention", _cached(model, given, np.maximum(sequences, 1.0)))
    return _where(sequences > 0.0, beside)


def _steps(
    model: Pricer, given: ServingInput, shares: Shares, weigh: Weigh
) -> tuple[list[Parts], list[Parts]]:
    """(decode step, mixed step) of a steady state; `weigh` is told what is priced next."""
    stages = as_array(model.stages)
    weigh("decode")
    decode = _decode_stages(model, given, np.maximum(np.ceil(shares.decoding / stages), 1.0))
    sequences = np.ceil(shares.beside / stages)
    weigh("mixed")
    prompt = _prompt_stages(model, given, shares, sequences)
    if model.engine.prefill_first:
        return decode, prompt
    weigh("beside")
    return decode, _sum(prompt, _beside_stages(model, given, sequences))


def replay(model: Pricer, given: ServingInput, served: Serving, weigh: Weighed) -> None:
    """Price the steps of a steady state again, for whoever watches the model.

    `weigh` is told, before each part of them, how often an average step runs it.
    """
    shares = step_shares(given, model.engine.prefill_first)
    beside = served.mixed_share * (np.ceil(shares.beside / as_array(model.stages)) > 0.0)
    often = {"decode": served.pure_share, "mixed": served.mixed_share, "beside": beside}
    _steps(model, given, shares, lambda part: weigh(often[part]))


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


def _chunked(shares: Shares, later: Array, decode_s: Array, mixed_s: Array, locked: Array) -> _Pace:
    """Prompts share steps with decoding requests, of all groups that step together."""
    prefill_s = shares.pieces * mixed_s
    own = np.minimum(shares.mixed + shares.pieces / (shares.pieces + later), 1.0)
    pure = (1.0 - shares.mixed) * (1.0 - own) ** (locked - 1.0)
    step_s = (1.0 - pure) * mixed_s + pure * decode_s
    service_s = shares.prompt / shares.room * mixed_s
    wait_s = _wait(service_s, prefill_s - service_s + later * step_s, shares.slots)
    return _Pace(prefill_s, wait_s, step_s, 1.0 - pure, pure)


def _prompts_first(shares: Shares, later: Array, decode_s: Array, prefill_s: Array) -> _Pace:
    """A prompt stops decoding until it is done."""
    others_s = (shares.slots - 1.0) * prefill_s
    wait_s = others_s / np.maximum(2.0 * later, 1.0)
    met = (others_s - wait_s) / (np.maximum(later, 1.0) * prefill_s) * shares.pieces
    mixed, pure = np.where(later > 0.0, met, 1.0), np.where(later > 0.0, 1.0, 0.0)
    step_s = mixed * (prefill_s / shares.pieces) + pure * decode_s
    return _Pace(prefill_s, wait_s, step_s, mixed, pure)


def serve(model: Pricer, given: ServingInput) -> Serving:
    """Steady state of one layout over a grid of slots and step sizes."""
    engine = model.engine
    shares = step_shares(given, engine.prefill_first)
    decode, mixed = _steps(model, given, shares, lambda _: None)
    decode_s = _rotate(model, decode, "decode")
    mixed_s = _rotate(model, mixed, "prefill")
    later = as_array(given.output_len) - 1.0
    if engine.prefill_first:
        pace = _prompts_first(
            shares, later, decode_s, _flow(model, mixed, "prefill", shares.pieces)
        )
    else:
        pace = _chunked(shares, later, decode_s, mixed_s, as_array(model.locked))
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
        pure_share=pace.pure,
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
