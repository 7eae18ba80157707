"""Prices of steps as tables, so that a simulated step costs a few look-ups.

One `StepPrices` is one layout under one choice of dtypes, priced by its `StepModel`: the same rows
and formulas as the steady state (`costmodel.steps`), for a step of D decoding sequences at mean
context c, each with w = 1 + k tokens, beside m pieces of prompts of P tokens in all:

    decode step   rows(D w) + logits(D w) + attention(D, c) + drafts(D, c)
    mixed step    rows(D w cp + P) + logits(D + m) + prompts(m, P / m, prefix) + attention(D, c)

    prefix = sum of p_i (x_i + p_i / 2) over P, less P / (2 m)    pieces of p_i tokens after x_i

which keeps the attended pairs of the step, and is the prefix itself where pieces are alike.

    rows, logits, drafts   looked up at whole tokens and sequences: exact
    attention, decode      whole D; straight lines between knots of the mean context
    attention, prompts     straight lines between knots of m, P / m and prefix

What the lines are off by is measured in results/benchmarks/simulate.md and bounded by a test.
Stages that are alike share a table; a stage takes the larger of its kernels' time and the host's
launches, as in `StepModel.step_s`.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array, ArrayLike
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.optable import Group
from shardplan.models.graph import Phase

__all__ = ["Priced", "StepPrices", "StepTypes", "knots"]

_FINE, _FINEST = 128, 16
"""Knots of contexts, and of prompts, stand this far apart at least."""
_GROWTH, _PROMPT_GROWTH = 1.04, 1.1
_MOST_KEPT = 1 << 16
"""Prompt prices that are remembered."""


class Priced(Protocol):
    """What is made into tables: the `StepModel` of one layout."""

    @property
    def engine(self) -> EngineProfile:
        """The engine whose steps are priced."""

    @property
    def context_ranks(self) -> int:
        """Ranks that share a context."""

    @property
    def mtp(self) -> int:
        """Tokens predicted ahead in a decode step."""

    def parts(self, group: Group, load: Load) -> list[Parts]:
        """Per stage, the rows of one group under a load; stages that are alike share an object."""

    def launch_floor_s(self, phase: Phase) -> float:
        """Seconds that the host needs to launch a kernel; 0 where a captured graph is replayed."""

    def host_s(self, phase: Phase) -> float:
        """Host time of a step that the device waits for."""


class StepTypes(NamedTuple):
    """What prices depend on beside the layout."""

    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    attention: AttentionKernel = "flash"


def knots(most: float, finest: float, growth: float, first: float = 0.0) -> list[float]:
    """Numbers from `first` to `most`, each `finest` or a share (`growth` - 1) above the last."""
    found = [first]
    while found[-1] < most:
        found.append(min(max(found[-1] + finest, float(math.floor(found[-1] * growth))), most))
    return found if len(found) > 1 else [first, first + 1.0]


class _Line:
    """Places between knots: (index of the knot below, share of the way to the next)."""

    __slots__ = ("at", "last", "widths")

    def __init__(self, at: Sequence[float]) -> None:
        self.at = list(at)
        self.last = len(at) - 2
        self.widths = [1.0 / (b - a) for a, b in itertools.pairwise(at)]

    def place(self, value: float) -> tuple[int, float]:
        """Beyond the last knot the last line goes on."""
        below = min(max(bisect_right(self.at, value) - 1, 0), self.last)
        return below, (value - self.at[below]) * self.widths[below]


class StepPrices:
    """Seconds of steps of one layout; `slots` sequences and `chunk` tokens a microbatch at most.

    `longest`: tokens of the longest context. Seconds are those of one dp group's engine; groups
    that step together are priced by the largest load among them, as padded batches are.
    """

    def __init__(
        self, model: Priced, types: StepTypes, *, slots: int, chunk: int, longest: int
    ) -> None:
        self.model, self.types = model, types
        self.width = 1 + model.mtp
        self.slots, self.chunk, self.longest = slots, chunk, longest
        self.context_ranks = model.context_ranks
        self.decode_host_s = float(model.host_s("decode"))
        self.prompt_host_s = float(model.host_s("prefill"))
        self._different()
        self._tables()
        self._prompts: dict[tuple[int, float, float], list[float]] = {}

    def _different(self) -> None:
        """Which stages are alike: an index into the tables for every stage."""
        loads = (
            self._row_load("decode", np.ones(())),
            self._attention_load("decode", 1.0, 1.0, 1.0),
        )
        groups: tuple[tuple[Group, Load], ...] = (
            ("token", loads[0]),
            ("logits", loads[0]),
            ("attention", loads[1]),
        )
        found = [self.model.parts(group, load) for group, load in groups]
        kinds = [tuple(id(one) for one in stage) for stage in zip(*found, strict=True)]
        alone = list(dict.fromkeys(kinds))
        self.which = [alone.index(kind) for kind in kinds]
        self._first = [kinds.index(kind) for kind in alone]
        self.kinds = range(len(alone))

    def _parts(self, group: Group, load: Load) -> list[Parts]:
        """Parts of each different stage."""
        stages = self.model.parts(group, load)
        return [stages[place] for place in self._first]

    def _busy(self, parts: list[Parts], shape: tuple[int, ...]) -> list[Array]:
        """Seconds that each different stage is busy, gaps between kernels with them."""
        gap = self.model.engine.launch_gap_s
        return [np.broadcast_to(one.total_s + gap * one.kernels, shape) for one in parts]

    def _row_load(self, phase: Phase, tokens: Array) -> Load:
        dtype = self.types.weight_dtype
        return Load.of(phase, self.model.engine, tokens=tokens, weight_dtype=dtype)

    def _attention_load(
        self, phase: Phase, batch: ArrayLike, new: ArrayLike, prefix: ArrayLike
    ) -> Load:
        return Load.of(
            phase,
            self.model.engine,
            batch=batch,
            new=new,
            prefix=prefix,
            kv_dtype=self.types.kv_dtype,
            attention=self.types.attention,
        )

    def _rows(
        self, phase: Phase, groups: Sequence[tuple[Group, Array]]
    ) -> tuple[list[list[float]], list[float]]:
        """(seconds of each different stage at each place, its kernels) of groups of rows."""
        shape = groups[0][1].shape
        seconds = [np.zeros(shape) for _ in self.kinds]
        kernels = [0.0 for _ in self.kinds]
        for group, tokens in groups:
            parts = self._parts(group, self._row_load(phase, np.maximum(tokens, 1.0)))
            for kind, busy in enumerate(self._busy(parts, shape)):
                seconds[kind] += busy
                kernels[kind] += parts[kind].kernels
        found = [[float(value) for value in one] for one in seconds]
        return found, kernels

    def _tables(self) -> None:
        model, ahead = self.model, self.width - 1
        many = np.arange(self.slots + 1, dtype=np.float64)
        groups: list[tuple[Group, Array]] = [
            ("token", many * self.width),
            ("logits", many * self.width),
        ]
        groups += [("draft_logits", many)] if ahead else []
        groups += [("draft", many)] if ahead > 1 else []
        self._decode, decode_kernels = self._rows("decode", groups)
        most = self.chunk + self.slots * self.width * self.context_ranks
        self._token, kernels = self._rows("prefill", [("token", np.arange(most + 1.0))])
        self._logits, more = self._rows("prefill", [("logits", np.arange(most + 1.0))])
        self._drafts, further = [[0.0] * (most + 1) for _ in self.kinds], [0.0 for _ in self.kinds]
        if ahead:
            self._drafts, further = self._rows("prefill", [("draft_logits", np.arange(most + 1.0))])
        self._cached_table()
        self._prompt_table()
        one = np.ones(())
        prompts = self._parts("attention", self._attention_load("prefill", one, one, one))
        own = [parts.kernels for parts in prompts]
        beside = [sum(parts.kernels for parts in some) for some in self._cached_parts(one, one)]
        launch = model.launch_floor_s("decode")
        self._decode_floor = [launch * (a + b) for a, b in zip(decode_kernels, beside, strict=True)]
        launch = model.launch_floor_s("prefill")
        sums = zip(kernels, more, further, own, strict=True)
        self._prompt_floor = [launch * sum(some) for some in sums]
        self._beside_floor = [launch * some for some in beside]

    def _cached_parts(self, sequences: Array, context: Array) -> list[tuple[Parts, ...]]:
        """Attention of decoding sequences and of drafts after the first, per different stage."""
        load = self._attention_load("decode", sequences, float(self.width), context)
        found = [self._parts("attention", load)]
        if self.width > 2:  # noqa: PLR2004  drafts after the first
            after = self._attention_load("decode", sequences, 1.0, context + self.width)
            found.append(self._parts("draft_attention", after))
        return list(zip(*found, strict=True))

    def cached_seconds(self, sequences: Array, context: Array) -> list[Array]:
        """Attention of `sequences` at a mean context, per different stage; as the formulas say."""
        shape = np.broadcast_shapes(sequences.shape, context.shape)
        parts = self._cached_parts(np.maximum(sequences, 1.0), context)
        gap = self.model.engine.launch_gap_s
        return [
            sum((one.total_s + gap * one.kernels for one in some), np.zeros(shape))
            for some in parts
        ]

    def _cached_table(self) -> None:
        at = knots(float(self.longest), _FINE, _GROWTH)
        self._context = _Line(at)
        many = np.arange(self.slots + 1, dtype=np.float64)[:, None]
        found = self.cached_seconds(many, np.asarray(at)[None, :])
        self._cached: list[list[list[float]]] = [one.tolist() for one in found]

    def prompt_seconds(self, many: Array, new: Array, prefix: Array) -> list[Array]:
        """Attention of `many` pieces of `new` tokens after `prefix`, as the formulas say."""
        shape = np.broadcast_shapes(many.shape, new.shape, prefix.shape)
        load = self._attention_load("prefill", many, new, prefix)
        return self._busy(self._parts("attention", load), shape)

    def _prompt_table(self) -> None:
        most = float(min(self.slots, self.chunk))
        many = knots(most, 1.0, _PROMPT_GROWTH, 1.0)
        new = knots(float(self.chunk), _FINEST, _PROMPT_GROWTH, 1.0)
        prefix = knots(float(self.longest), _FINE, _PROMPT_GROWTH)
        self._many, self._new, self._prefix = _Line(many), _Line(new), _Line(prefix)
        self._prompt: dict[int, list[list[list[float]]]] = {}

    def _prompt_plane(self, at: int) -> list[list[list[float]]]:
        """Attention of as many pieces as a knot says: `[stages][new][prefix]`, made when wanted."""
        found = self._prompt.get(at)
        if found is None:
            new, prefix = np.asarray(self._new.at)[:, None], np.asarray(self._prefix.at)[None, :]
            planes = self.prompt_seconds(np.asarray(self._many.at[at]), new, prefix)
            found = self._prompt[at] = [one.tolist() for one in planes]
        return found

    def cached(self, kind: int, sequences: int, context: float) -> float:
        """Attention of decoding sequences on a stage of this kind; 0 where there are none."""
        if not sequences:
            return 0.0
        row = self._cached[kind][sequences]
        below, share = self._context.place(context)
        low = row[below]
        return low + (row[below + 1] - low) * share

    def prompts(self, many: int, tokens: int, pairs: float) -> list[float]:
        """Attention of `many` pieces of `tokens` in all; `pairs`: sum of p_i (x_i + p_i / 2)."""
        key = (many, tokens, pairs)
        found = self._prompts.get(key)
        if found is None:
            new = tokens / many
            prefix = max(pairs / tokens - new / 2.0, 0.0)
            corners = [
                (self._prompt_plane(a), b, c, share_a * share_b * share_c)
                for a, share_a in _ends(self._many.place(float(many)))
                if share_a
                for b, share_b in _ends(self._new.place(new))
                for c, share_c in _ends(self._prefix.place(prefix))
            ]
            found = [
                sum(plane[kind][b][c] * share for plane, b, c, share in corners)
                for kind in self.kinds
            ]
            if len(self._prompts) > _MOST_KEPT:
                self._prompts.clear()
            self._prompts[key] = found
        return found

    def decode_s(self, padded: int, attention_s: Sequence[float]) -> list[float]:
        """Seconds of each different stage for `padded` sequences whose attention takes so long."""
        return [
            max(self._decode[kind][padded] + attention_s[kind], self._decode_floor[kind])
            for kind in self.kinds
        ]

    def mixed_s(
        self, prompt: int, decoding: int, many: int, attention_s: Sequence[float], *, beside: bool
    ) -> list[float]:
        """The same of a step of `prompt` tokens of `many` pieces, beside `decoding` sequences.

        `attention_s`: of both together; `beside`: any of the engines has decoding sequences.
        """
        own = decoding * self.width * self.context_ranks
        return [
            max(
                self._token[kind][own + prompt]
                + self._logits[kind][own + many]
                + self._drafts[kind][decoding + many]
                + attention_s[kind],
                self._prompt_floor[kind] + (self._beside_floor[kind] if beside else 0.0),
            )
            for kind in self.kinds
        ]


def _ends(place: tuple[int, float]) -> tuple[tuple[int, float], tuple[int, float]]:
    below, share = place
    return (below, 1.0 - share), (below + 1, share)
