"""The steps of a steady state: which rows run over which tokens, decoding or mixed with prompts.

The symbols and formulas are those of `shardplan.costmodel.serving`. A grid of slots and step sizes
holds few different steps; where the pricer remembers, only those are priced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.forward import Pricer, forward_loads
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.memo import Points
from shardplan.costmodel.pace import Kept, flow_s, kept_of, stage_times
from shardplan.costmodel.step_mix import ServingInput, Shares, step_shares
from shardplan.models.graph import Phase

__all__ = [
    "Mix",
    "Steps",
    "chunk_stages",
    "decode_stages",
    "mix_of",
    "prompt_stages",
    "sequences_of",
    "step_seconds",
    "steps_of",
]

Weigh = Callable[[str], None]


class Steps(NamedTuple):
    """A decode step and a mixed step, per stage, at their different points where those are told."""

    decode: list[Parts]
    mixed: list[Parts]
    decode_at: Points | None = None
    mixed_at: Points | None = None


class Mix(NamedTuple):
    """What the steps of a grid hold, and which of them are different."""

    shares: Shares
    decode_at: Points | None = None
    mixed_at: Points | None = None
    kept: Kept | None = None
    """What of the pace is the same for all layouts that run these steps."""


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


def decode_stages(
    model: Pricer, given: ServingInput, sequences: Array, padded: Array | None = None
) -> list[Parts]:
    """A decode step of `sequences` of one microbatch at the mean context.

    `padded`: the sequences of the graph that runs them; those beyond have no context to read.
    """
    dtype, rows = given.weight_dtype, sequences if padded is None else padded
    token = Load.of("decode", model.engine, tokens=rows * given.width, weight_dtype=dtype)
    return _sum(
        model.parts("token", token),
        model.parts("attention", _cached(model, given, sequences)),
        model.parts("logits", token),
        *_first_draft(model, given, "decode", rows),
        *_later_drafts(model, given, sequences, rows),
    )


def _first_draft(
    model: Pricer, given: ServingInput, phase: Phase, sequences: Array
) -> list[list[Parts]]:
    """The head of the first draft of `sequences`; its layer is among the token rows."""
    if not np.any(given.mtp):
        return []
    one = Load.of(phase, model.engine, tokens=sequences, weight_dtype=given.weight_dtype)
    return [model.parts("draft_logits", one)]


def _later_drafts(
    model: Pricer, given: ServingInput, sequences: Array, rows: Array
) -> list[list[Parts]]:
    """Every draft of `sequences` after the first; `rows`: those of the graph that runs them."""
    if np.max(as_array(given.mtp)) <= 1.0:
        return []
    one = Load.of("decode", model.engine, tokens=rows, weight_dtype=given.weight_dtype)
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
    return _where(sequences > 0.0, _sum(beside, *_later_drafts(model, given, least, least)))


def chunk_stages(
    model: Pricer, given: ServingInput, *, piece: Array, prompt: Array, beside: Array
) -> list[Parts]:
    """A step of `piece` prompt tokens and, unless prompts go first, of those that decode beside."""
    stages = prompt_stages(model, given, piece=piece, prompt=prompt, sequences=beside)
    if model.engine.prefill_first:
        return stages
    return _sum(stages, _beside_stages(model, given, beside))


def mix_of(model: Pricer, given: ServingInput) -> Mix:
    """The average step of every grid point; equal ones are told where the model remembers them."""
    engine, stages, locked = model.engine, model.stages, model.locked
    memo, key = model.memo, given.key
    if memo is None or key is None:
        return Mix(step_shares(given, engine, stages, locked))
    key = (*key, engine.prefill_first, engine.max_prefill_seqs, float(stages), float(locked))
    found: Mix | None = memo.mixes.get(key)
    if found is None:
        shares = step_shares(given, engine, stages, locked)
        decoding, beside = sequences_of(shares)
        decode_at = memo.different((decoding,))
        mixed_at = memo.different((beside, shares.piece))
        found = memo.mixes[key] = Mix(shares, decode_at, mixed_at, kept_of(given, shares))
    return found


def sequences_of(shares: Shares) -> tuple[Array, Array]:
    """(those of a decode step, those that decode beside a prompt), whole."""
    return np.maximum(np.ceil(shares.decoding), 1.0), np.ceil(shares.beside)


def steps_of(model: Pricer, given: ServingInput, mix: Mix, weigh: Weigh) -> Steps:
    """The steps of a steady state; `weigh` is told what is priced next."""
    decoding, beside = sequences_of(mix.shares)
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
