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
    s  = ceil(I / (c - (1 + k) e))        steps that prefill one prompt
    u  = min(c - (1 + k) e, max(I / s, q I))      prompt tokens of a step that has any
    f  = min(1, q I / u)                  share of a request's steps that carry prompt tokens
    h  = 1 - (1 - f) (1 - F)^(g - 1)      the same of g groups that share experts: a prompt of
         F = min(1, f + s / (s + n))      another makes the step of all a mixed one; to the others
                                          a request's own prompt counts, too
    t  = h mixed(e, u) + (1 - h) decode(d)             mean step
    latency = wait + s mixed + n t
    TPOT = t n / (O - 1)    TTFT = wait + s mixed    throughput = b O / latency (Little's law)

where wait = R - D of a closed loop of b requests around a server that takes D = I / (c - e) mixed a
prompt, with Z the rest of a request's time. Mean-value analysis with deterministic service,
R = D (1 + (b - 1) / b (Q - U / 2)) with Q = b R / (Z + R) and U = b D / (Z + R), solved for R and
never below the server's own limit:
    R = max((g + sqrt(g^2 + 4 D Z - 2 D^2 (b - 1))) / 2, g),   g = b D - Z

Prefill first (an engine that stops decoding for a prompt): requests end where decode steps do, so
a prompt waits for half of those that came at the same step, and a request meets every other
prompt once, while it waits or while it decodes:
    wait = (b - 1) prefill(I) / max(2 n, 1)
    t    = decode(b) + ((b - 1) prefill(I) - wait) / n        TPOT as above

A step that predicts ahead also runs the prediction layer k times: once over all its tokens, prompt
tokens with them, and k - 1 times over one token of each sequence that decodes.

A pipeline of p stages runs p microbatches at once, each scheduled by itself with b / p slots and c
tokens a step (at most as many microbatches as slots): the formulas hold with b / p for b, their
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
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.forward import Pricer, forward_loads
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.memo import Points
from shardplan.costmodel.pace import Timed, flow_s, stage_times, timed
from shardplan.costmodel.step_mix import ServingInput, Shares, step_shares
from shardplan.models.graph import Phase

__all__ = [
    "Serving",
    "ServingInput",
    "Steady",
    "Steps",
    "decode_stages",
    "prompt_stages",
    "replay",
    "serve",
    "steady",
    "steady_steps",
    "step_seconds",
]

Weigh = Callable[[str], None]
Weighed = Callable[[Array], None]
Indices = NDArray[np.int64]


class Steps(NamedTuple):
    """A decode step and a mixed step, per stage, at their different points where those are told."""

    decode: list[Parts]
    mixed: list[Parts]
    decode_at: Points | None = None
    mixed_at: Points | None = None


class _Mix(NamedTuple):
    """What the steps of a grid hold, and which of them are different."""

    shares: Shares
    decode_at: Points | None = None
    mixed_at: Points | None = None


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
    mtp: ArrayLike = 0.0,
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
        mtp=mtp,
    )
    stages = _sum(*(model.parts(group, load) for group, load in loads.items()))
    return flow_s(model, stage_times(model, stages, phase), phase, 1.0), stages


def decode_stages(model: Pricer, given: ServingInput, sequences: Array) -> list[Parts]:
    """A decode step of `sequences` of one microbatch at the mean context."""
    dtype = given.weight_dtype
    token = Load.of("decode", model.engine, tokens=sequences * given.width, weight_dtype=dtype)
    return _sum(
        model.parts("token", token),
        model.parts("attention", _cached(model, given, sequences)),
        model.parts("logits", token),
        *_first_draft(model, given, "decode", sequences),
        *_later_drafts(model, given, sequences),
    )


def _first_draft(
    model: Pricer, given: ServingInput, phase: Phase, sequences: Array
) -> list[list[Parts]]:
    """The head of the first draft of `sequences`; its layer is among the token rows."""
    if not np.any(given.mtp):
        return []
    one = Load.of(phase, model.engine, tokens=sequences, weight_dtype=given.weight_dtype)
    return [model.parts("draft_logits", one)]


def _later_drafts(model: Pricer, given: ServingInput, sequences: Array) -> list[list[Parts]]:
    """Every draft of `sequences` after the first."""
    if np.max(as_array(given.mtp)) <= 1.0:
        return []
    one = Load.of("decode", model.engine, tokens=sequences, weight_dtype=given.weight_dtype)
    cached = _cached(model, given, sequences)
    after = replace(cached, new=as_array(1.0), prefix=cached.prefix + cached.new)
    return [model.parts("draft", one), model.parts("draft_attention", after)]


def _cached(model: Pricer, given: ServingInput, sequences: Array) -> Load:
    """The new tokens of each sequence at the mean context."""
    return Load.of(
        "decode",
        model.engine,
        batch=sequences,
        new=given.width,
        prefix=as_array(given.input_len) + as_array(given.output_len) / 2.0,
        kv_dtype=given.kv_dtype,
        attention=given.attention,
    )


def prompt_stages(
    model: Pricer, given: ServingInput, *, piece: Array, prompt: Array, sequences: Array
) -> list[Parts]:
    """A step of `sequences` decoding beside `piece` tokens of prompts, but for their attention.

    `prompt`: tokens of one prompt that are computed; a larger piece holds several prompts.
    """
    engine = model.engine
    kept = as_array(given.input_len) - prompt
    decoding, dtype = sequences * given.width * as_array(model.context_ranks), given.weight_dtype
    tokens = Load.of("prefill", engine, tokens=decoding + piece, weight_dtype=dtype)
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
    rows = Load.of("prefill", engine, tokens=decoding + many, weight_dtype=dtype)
    return _sum(
        model.parts("token", tokens),
        model.parts("attention", chunk),
        model.parts("logits", rows),
        *_first_draft(model, given, "prefill", sequences + many),
    )


def _beside_stages(model: Pricer, given: ServingInput, sequences: Array) -> list[Parts]:
    """What only `sequences` that decode beside a prompt run; launches where there are none."""
    least = np.maximum(sequences, 1.0)
    beside = model.parts("attention", _cached(model, given, least))
    return _where(sequences > 0.0, _sum(beside, *_later_drafts(model, given, least)))


def _mix(model: Pricer, given: ServingInput) -> _Mix:
    """The average step of every grid point; equal ones are told where the model remembers them."""
    first, stages = model.engine.prefill_first, model.stages
    memo, key = model.memo, given.key
    if memo is None or key is None:
        return _Mix(step_shares(given, first, stages))
    key = (*key, first, float(stages))
    found: _Mix | None = memo.mixes.get(key)
    if found is None:
        shares = step_shares(given, first, stages)
        decoding, beside = _sequences(shares)
        decode_at = memo.different((decoding,))
        found = memo.mixes[key] = _Mix(shares, decode_at, memo.different((beside, shares.piece)))
    return found


def _sequences(shares: Shares) -> tuple[Array, Array]:
    """(those of a decode step, those that decode beside a prompt), whole."""
    return np.maximum(np.ceil(shares.decoding), 1.0), np.ceil(shares.beside)


def _steps(model: Pricer, given: ServingInput, mix: _Mix, weigh: Weigh) -> Steps:
    """The steps of a steady state; `weigh` is told what is priced next."""
    decoding, beside = _sequences(mix.shares)
    piece = mix.shares.piece
    if mix.decode_at is not None and mix.mixed_at is not None:
        (decoding,), (beside, piece) = mix.decode_at.arrays, mix.mixed_at.arrays
    weigh("decode")
    decode = decode_stages(model, given, decoding)
    weigh("mixed")
    mixed = prompt_stages(model, given, piece=piece, prompt=mix.shares.prompt, sequences=beside)
    if not model.engine.prefill_first:
        weigh("beside")
        mixed = _sum(mixed, _beside_stages(model, given, beside))
    return Steps(decode, mixed, mix.decode_at, mix.mixed_at)


def replay(model: Pricer, given: ServingInput, served: Serving, weigh: Weighed) -> None:
    """Price the steps of a steady state again, for whoever watches the model.

    `weigh` is told, before each part of them, how often an average step runs it.
    """
    mix = _Mix(step_shares(given, model.engine.prefill_first, model.stages))
    beside = served.mixed_share * (np.ceil(mix.shares.beside) > 0.0)
    often = {"decode": served.pure_share, "mixed": served.mixed_share, "beside": beside}
    _steps(model, given, mix, lambda part: weigh(often[part]))


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


def steady_steps(model: Pricer, given: ServingInput) -> tuple[list[Parts], list[Parts]]:
    """(decode step, mixed step) of the steady state, per stage of the model, over the grid."""
    steps = _steps(model, given, _mix(model, given), lambda _: None)
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
    mix = _mix(model, given)
    steps = _steps(model, given, mix, lambda _: None)
    if watch is not None:
        watch(steps)
    decode = stage_times(model, steps.decode, "decode").at(steps.decode_at)
    mixed = stage_times(model, steps.mixed, "prefill").at(steps.mixed_at)
    return Steady(timed(model, given, mix.shares, decode, mixed), steps)


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
        compute_s=means.compute_s,
        memory_s=means.memory_s,
        collective_s=means.collective_s,
        overhead_s=pace.step_s - means.compute_s - means.memory_s - means.collective_s,
    )
