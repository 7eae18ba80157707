"""What an average step of continuous batching holds: decoding requests and pieces of prompts.

The symbols are those of `shardplan.costmodel.serving`: r, q, d, e, s, u, f, k, a, E, n.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.memo import FEW_POINTS

__all__ = ["ServingInput", "Shares", "computed_prompt", "step_shares", "tokens_per_step"]

_MOST_AT_ONCE = 48
"""Prompts of a group that begin with one step: the mean of the most of groups counts no more."""

_HARDLY = 1e-9
"""So many prompts as seldom as that are not met."""
_PARTS = 8.0
"""Of an octave: prompts of one step are priced in so many numbers of them."""
_ROWS = 16.0
"""Pieces of prompts are priced in these many tokens, the rows of a tile of the cube: far fewer
sizes to price; the share of mixed steps is that of the priced size, so that no token is lost."""


def tokens_per_step(depth: ArrayLike, acceptance: ArrayLike) -> Array:
    """Mean tokens that a sequence gains in a decode step: 1 + a + a^2 + ... + a^k.

    `depth` k tokens are predicted ahead; each is kept with probability `acceptance` a where those
    before it were, and the step's own token comes on top.
    """
    k, a = as_array(depth), as_array(acceptance)
    below = np.where(a < 1.0, a, 0.0)
    return np.where(a < 1.0, (1.0 - below ** (k + 1.0)) / (1.0 - below), k + 1.0)


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
    mtp: ArrayLike = 0.0
    """Tokens predicted ahead in each decode step (k)."""
    acceptance: ArrayLike = 0.0
    """Probability that one of them is kept where those before it were (a)."""

    @property
    def key(self) -> tuple[Hashable, ...] | None:
        """What the average step depends on, as a key; None of few points or of varying work."""
        work = (
            self.input_len,
            self.output_len,
            self.prefix_hit,
            0.0 if self.in_flight is None else self.in_flight,
            self.mtp,
            self.acceptance,
        )
        shape = np.broadcast_shapes(self.batch.shape, self.chunk.shape)
        if math.prod(shape) < FEW_POINTS or any(as_array(one).ndim for one in work):
            return None
        grid = [(one.shape, one.tobytes()) for one in (self.batch, self.chunk)]
        return (*grid, self.in_flight is None, *map(float, work))

    @property
    def width(self) -> Array:
        """Tokens of a sequence that a decode step verifies: 1 + k."""
        return np.asarray(1.0 + as_array(self.mtp))

    @property
    def decode_steps(self) -> Array:
        """Decode steps that a request needs after its first token (n)."""
        later = as_array(self.output_len) - 1.0
        each = tokens_per_step(self.mtp, self.acceptance)
        return np.maximum(later / each, np.minimum(later, 1.0))

    @property
    def steps_per_token(self) -> Array:
        """Decode steps of a request over the tokens that they give it; 1 where there are none."""
        later = as_array(self.output_len) - 1.0
        return np.where(later > 0.0, self.decode_steps / np.maximum(later, 1.0), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How an average step is made up, in sequences and prompt tokens; arrays of the grid."""

    slots: Array
    """Slots that are scheduled together."""
    apart: Array
    """Schedules of a dp group: the microbatches of a pipeline that mixes prompts with decoding."""
    decoding: Array
    """Sequences of one microbatch that decode in an average step."""
    beside: Array
    """Those that decode beside a prompt."""
    room: Array
    pieces: Array
    piece: Array
    mixed: Array
    """Share of the steps of a request that carry prompts of others of its schedule."""
    elsewhere: Array
    """Share of those that carry prompts of another schedule."""
    prompt: Array
    together: Array
    """Schedules whose steps hold one another up: groups that share experts, times microbatches."""
    met: Array
    """Stops of decoding for prompts that a request meets, where prompts go first."""
    ahead: Array
    """Such stops that a prompt waits for."""


def computed_prompt(input_len: ArrayLike, prefix_hit: ArrayLike) -> Array:
    """Tokens of a prompt that the prefix cache does not hold."""
    return np.maximum(np.ceil(as_array(input_len) * (1.0 - as_array(prefix_hit))), 1.0)


def step_shares(
    given: ServingInput, engine: EngineProfile, stages: ArrayLike = 1, locked: ArrayLike = 1
) -> Shares:
    """The average step of an engine's steady state (the formulas of `serving`).

    `stages` of a pipeline run as many microbatches at once; `locked` groups step together.
    """
    turns, locked = as_array(stages), as_array(locked)
    prompt = computed_prompt(given.input_len, given.prefix_hit)
    later, width = given.decode_steps, given.width
    chunk = np.maximum(given.chunk, 1.0)
    slots = given.batch
    if given.in_flight is not None:
        slots = np.minimum(slots, as_array(given.in_flight))
    if engine.prefill_first:
        return _prompts_first(given, engine, slots, turns, locked)
    apart = np.clip(turns, 1.0, np.maximum(slots, 1.0))
    slots = slots / apart
    wanted, most = slots / (later + np.ceil(prompt / chunk)), chunk / (prompt + later * width)
    per_step = np.minimum(wanted, most)
    others = np.minimum(wanted * (1.0 - 1.0 / np.maximum(slots, 1.0)), most)
    beside = others * later
    room = np.maximum(chunk - beside * width, 1.0)
    whole = np.ceil(prompt / room)
    shared = np.where(whole > 1.0, others * (whole - prompt / room), 0.0)
    pieces = whole / (1.0 + shared)
    piece = np.minimum(room, np.maximum(prompt / pieces, prompt * others))
    sixteens = np.maximum(np.round(piece / _ROWS), 1.0) * _ROWS
    piece = np.where(whole > 1.0, np.minimum(room, sixteens), piece)
    mixed = np.minimum(others * prompt / piece, 1.0)
    elsewhere = np.minimum(mixed + pieces / (pieces + later), 1.0)
    if np.any(locked > 1.0):
        some = _Fed(prompt, room, pieces, others, per_step).of_fullest(locked)
        near = np.where(beside > 0.0, np.round(_parts(np.maximum(np.ceil(beside), 1.0))), 0.0)
        full = np.maximum(np.floor(chunk - near * width), 1.0)
        unit = np.where(whole > 1.0, full, prompt)
        piece = np.where(locked > 1.0, np.minimum(full, unit * _parts(some.piece / unit)), piece)
        beside = np.where(locked > 1.0, near, beside)
        mixed = np.where(locked > 1.0, some.mixed, mixed)
        elsewhere = np.where(locked > 1.0, some.elsewhere, elsewhere)
    return Shares(
        slots=slots,
        apart=apart,
        decoding=per_step * later,
        beside=beside,
        room=room,
        pieces=pieces,
        piece=piece,
        mixed=np.where(later > 0.0, mixed, 1.0),
        elsewhere=elsewhere,
        prompt=prompt,
        together=locked * apart,
        met=np.zeros(()),
        ahead=np.zeros(()),
    )


def _parts(numbers: Array) -> Array:
    """Numbers to the nearest part of an octave: far fewer of them to price."""
    return np.asarray(np.exp2(np.round(np.log2(numbers) * _PARTS) / _PARTS))


class _Fullest(NamedTuple):
    """Of groups that step together; arrays of the grid."""

    piece: Array
    """Prompt tokens of the fullest group in a step that has any."""
    mixed: Array
    elsewhere: Array


class _Fed(NamedTuple):
    """Prompts of a group where decoding goes on beside them; arrays of the grid."""

    prompt: Array
    room: Array
    pieces: Array
    own: Array
    """Prompts that begin with a step of the group of a request, its own left out."""
    each: Array
    """Those of another group."""

    def of_fullest(self, groups: Array) -> _Fullest:
        """Steps as long as those of the fullest of `groups`."""
        short, long = self._short(groups), self._long(groups)
        return _Fullest(
            *(np.where(self.prompt > self.room, b, a) for a, b in zip(short, long, strict=True))
        )

    def _short(self, groups: Array) -> _Fullest:
        """Of whole prompts, as many as begin with a step (Poisson) and fit.

        What does not fit goes into a step of its own, unless another group has prompts in that.
        """
        own, each, room = self.own, self.each, self.room
        term_own, term = np.exp(-own), np.exp(-each)
        below_own, below = term_own, term
        tokens, kept, cut, own_cut = np.zeros((4, *np.broadcast_shapes(own.shape, room.shape)))
        fed = 1.0 - below_own * below ** (groups - 1.0)
        for number in range(1, _MOST_AT_ONCE):
            reached = 1.0 - below_own * below ** (groups - 1.0)
            fits = np.clip(room - (number - 1.0) * self.prompt, 0.0, self.prompt)
            some = fits < self.prompt
            cut = np.maximum(cut, np.where(some, 1.0 - below, 0.0))
            own_cut = np.maximum(own_cut, np.where(some, 1.0 - below_own, 0.0))
            if not fits.any() or reached.max() < _HARDLY:
                break
            tokens, kept = tokens + reached * fits, kept + (1.0 - below) * fits
            term_own, term = term_own * own / number, term * each / number
            below_own, below = below_own + term_own, below + term
        rest = np.clip((each * self.prompt - kept) / np.maximum(cut, 1e-12), 0.0, room)
        share, others = 1.0 - np.exp(-own) * (1.0 - own_cut), 1.0 - np.exp(-each) * (1.0 - cut)
        mixed = 1.0 - (1.0 - share) * (1.0 - others) ** (groups - 1.0)
        piece = (tokens + (mixed - fed) * rest) / np.maximum(mixed, 1e-12)
        least = np.minimum(np.where(cut > _HARDLY, 1.0, self.prompt), room)
        return _Fullest(np.maximum(np.maximum(piece, own * self.prompt), least), share, others)

    def _long(self, groups: Array) -> _Fullest:
        """Of pieces that fill a step, and of rests of prompts where no group has such."""
        rest = self.prompt - np.floor(self.prompt / self.room) * self.room
        own, full_own = self._steps(self.own, rest)
        each, full = self._steps(self.each, rest)
        any_ = 1.0 - (1.0 - own) * (1.0 - each) ** (groups - 1.0)
        whole = 1.0 - (1.0 - full_own) * (1.0 - full) ** (groups - 1.0)
        share = np.minimum(whole / np.maximum(any_, 1e-12), 1.0)
        return _Fullest(share * self.room + (1.0 - share) * rest, own, each)

    def _steps(self, begun: Array, rest: Array) -> tuple[Array, Array]:
        """Shares of a group's steps: that have prompt tokens, and that are full of them."""
        some = np.minimum(begun * self.pieces, 1.0)
        full = (begun * self.prompt - some * rest) / np.maximum(self.room - rest, 1e-9)
        return some, np.clip(full, 0.0, some)


def _prompts_first(
    given: ServingInput, engine: EngineProfile, slots: Array, turns: Array, locked: Array
) -> Shares:
    """The same where decoding stops for prompts."""
    chunk, prompt = np.maximum(given.chunk, 1.0), computed_prompt(given.input_len, given.prefix_hit)
    zero = np.zeros(np.broadcast_shapes(slots.shape, chunk.shape))
    alone = np.minimum(chunk, prompt) + zero
    held = np.clip(np.floor(chunk / prompt), 1.0, engine.max_prefill_seqs) + zero
    stops = _stops(slots, given.decode_steps, locked, held)
    at_once = np.minimum(_parts(stops.at_once), held)
    return Shares(
        slots=slots,
        apart=np.ones(()),
        decoding=slots / turns + zero,
        beside=zero,
        room=alone,
        pieces=np.ceil(prompt / alone),
        piece=np.where(at_once > 1.0, at_once * prompt, alone),
        mixed=zero,
        elsewhere=zero,
        prompt=prompt,
        together=locked,
        met=stops.met / at_once,
        ahead=stops.ahead,
    )


class _Stops(NamedTuple):
    """Where prompts go first; arrays of the grid."""

    met: Array
    """Prompts, one after another, that a request meets while it waits or decodes."""
    at_once: Array
    """Of those that one step holds, on average."""
    ahead: Array
    """Steps with prompts before a request's own, and half of what its own is longer than these."""


def _stops(slots: Array, steps: Array, groups: Array, held: Array) -> _Stops:
    """Of requests of so many decode `steps`, beside `held` other prompts of a step at most.

    Those that begin with one decode step are Poisson. Of a group alone a request meets each of the
    other slots once; of `groups` that step together those of one step fall together: as many as
    begin with it in the fullest group.
    """
    later, others = np.maximum(steps, 1.0), np.maximum(slots - 1.0, 0.0)
    own, each = others / later, slots / later
    begin, stops, ahead, square = (np.zeros(held.shape) for _ in range(4))
    term_own, term = np.exp(-own), np.exp(-each)
    below_own, below = term_own, term
    for number in range(1, _MOST_AT_ONCE):
        reached = 1.0 - below_own * below ** (groups - 1.0)
        place = np.mod(number - 1.0, held)
        begin, square = begin + reached, square + reached * (2.0 * place + 1.0)
        stops = stops + reached * (place == 0.0)
        ahead = ahead + (1.0 - below_own) * np.floor((number - 1.0) / held)
        term_own, term = term_own * own / number, term * each / number
        below_own, below = below_own + term_own, below + term
    at_once = np.clip(begin / np.maximum(stops, 1e-12), 1.0, held)
    own_step = np.maximum(square / np.maximum(begin, 1e-12), at_once)
    ahead = ahead / np.maximum(own, 1e-12) + (own_step / at_once - 1.0) / 2.0
    met = np.where(groups > 1.0, np.maximum(begin * later, slots - 1.0), slots - 1.0)
    many = (own > _MOST_AT_ONCE / 2.0) | (steps <= 0.0)  # of so many those that step are even
    half = np.where(steps > 0.0, 2.0, 1.0)
    even = np.maximum(own - (held - 1.0), 0.0) / (half * held)
    few = slots < 1.0
    return _Stops(
        met=met,
        at_once=np.where(many, np.minimum(held, np.maximum(own, 1.0)), at_once),
        ahead=np.where(few, (slots - 1.0) / (2.0 * later), np.where(many, even, ahead)),
    )
