"""Prompts that leave no room for another in a step: their pieces, and whose steps they share.

A step of b prompt tokens takes A + B b. With room for c of them a prompt of I tokens fills
x = I / c steps; the rest of one lies beside the begin of the next where one waits. That is so for
a share w = min(rate (x A + B I), 1) of prompts, as many as come while steps are full; of those
that do not fill one, where the next of its group comes while it is computed. One takes

    steps     s = ceil(x) - w (ceil(x) - x)               of its group
    seconds   first = s A + B I                           that others wait for
    until it is done   ceil(x) A + B I, with probability w ceil(x) (A + B c): its last step is full

One that comes before its last step waits for those before that one alone. Of G groups that step
together each computes its prompts by itself, and a step is as long as that of the fullest: full,
if that of another is,

    v = 1 - (1 - w)^(G - 1)        B (I + v (s c - I)) for B I, of the other two alike

and a group without prompts decodes in bare steps or in those of the prompts of others, by the time
p that none has some: 1 / (p / d + (1 - p) s / first). With u = rate first of its time a group has
prompts; they go to groups without where there are such (the queue M/M/G: all idle for Erlang's p0,
p = p0 / (1 - u)), but by chance, p = (1 - u)^(G - 1), where a request of a group ends while its
prompt is computed: a share 1 - exp(-u), as many end as come.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shardplan.costmodel.kernels.base import Array

__all__ = ["Line", "Pieces", "bare_steps", "pieces_of"]

_MOST_BUSY = 0.99


class Line(NamedTuple):
    """A step's seconds over its prompt tokens."""

    fixed_s: Array
    token_s: Array


class Pieces(NamedTuple):
    """Of a prompt; arrays `[rows]`."""

    steps: Array
    first_s: Array
    last_s: Array
    """Of its last step where no other prompt shares that."""
    alone_s: Array
    """Until it is done where none does."""
    full_s: Array
    """Until it is done where another does."""
    shared: Array
    """How often that is."""


def pieces_of(
    line: Line, prompt: Array, room: Array, came: tuple[Array, Array], groups: Array
) -> Pieces:
    """Of prompts that `came` at a rate to each of so many groups, `groups` of them together."""
    from scipy.special import pdtrc  # slow to import

    (fixed, token), (rate, turns) = line, came
    fills, whole = prompt / room, np.ceil(prompt / room)
    shared = np.minimum(rate * (fills * fixed + token * prompt), 1.0)
    next_ = pdtrc(turns - 1.0, turns * rate * (fixed + token * prompt))
    shared = np.where(fills > 1.0, shared, next_)
    others = 1.0 - (1.0 - shared) ** (groups - 1.0)
    steps = whole - shared * (whole - fills)
    rest = prompt - (whole - 1.0) * room

    def seconds(count: Array, tokens: Array) -> Array:
        return count * fixed + token * (tokens + others * (count * room - tokens))

    return Pieces(
        steps=steps,
        first_s=seconds(steps, prompt),
        last_s=seconds(np.ones_like(rest), rest),
        alone_s=seconds(whole, prompt),
        full_s=whole * (fixed + token * room),
        shared=shared,
    )


def bare_steps(own: Pieces, decode_s: Array, rate: Array, groups: Array) -> tuple[Array, Array]:
    """(seconds of a step of a group without prompts, how often no other group has some)."""
    from scipy.special import gammaincc, gammaln  # slow to import

    busy = np.minimum(rate * own.first_s, _MOST_BUSY)
    some = groups * busy
    all_busy = np.exp(groups * np.log(np.maximum(some, 1e-300)) - some - gammaln(groups + 1.0))
    even = np.exp(-some) / (gammaincc(groups, some) + all_busy / (1.0 - busy)) / (1.0 - busy)
    chance = (1.0 - busy) ** (groups - 1.0)
    none = even + (1.0 - np.exp(-busy)) * (chance - even)
    seconds = 1.0 / (none / decode_s + (1.0 - none) * own.steps / own.first_s)
    return seconds, none * seconds / decode_s
