"""What an average step of continuous batching holds: decoding requests and pieces of prompts.

The symbols are those of `shardplan.costmodel.serving`: r, q, d, e, s, u, f.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array

__all__ = ["ServingInput", "Shares", "computed_prompt", "step_shares"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingInput:
    """One layout's grid: `batch` and `chunk` broadcast; the rest is common to all.

    Of a fleet's points every array is `[points]`; their dtypes are the fleet's.
    """

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
class Shares:
    """How an average step is made up; arrays of the grid."""

    slots: Array
    decoding: Array
    beside: Array
    room: Array
    pieces: Array
    piece: Array
    mixed: Array
    prompt: Array


def computed_prompt(input_len: ArrayLike, prefix_hit: ArrayLike) -> Array:
    """Tokens of a prompt that the prefix cache does not hold."""
    return np.maximum(np.ceil(as_array(input_len) * (1.0 - as_array(prefix_hit))), 1.0)


def step_shares(given: ServingInput, prefill_first: bool) -> Shares:
    """The average step of an engine's steady state (the formulas of `serving`)."""
    prompt = computed_prompt(given.input_len, given.prefix_hit)
    later = as_array(given.output_len) - 1.0
    chunk = np.maximum(given.chunk, 1.0)
    slots = given.batch
    if given.in_flight is not None:
        slots = np.minimum(slots, as_array(given.in_flight))
    if prefill_first:
        zero = np.zeros(np.broadcast_shapes(slots.shape, chunk.shape))
        piece = np.minimum(chunk, prompt) + zero
        pieces = np.ceil(prompt / piece)
        return Shares(
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
    return Shares(
        slots=slots,
        decoding=per_step * later,
        beside=beside,
        room=room,
        pieces=pieces,
        piece=piece,
        mixed=np.where(later > 0.0, np.minimum(others * prompt / piece, 1.0), 1.0),
        prompt=prompt,
    )
