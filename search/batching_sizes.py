"""Loads of both phases as cells, their prices when padded, and the sizes that cost least.

Prompts. A prompt of L tokens, less those in the prefix cache, runs in pieces of at most c tokens,
the plan's step where the engine splits prompts; piece k attends the k c tokens before it. A cell is
the pieces of one length (in steps of the engine's cache block) and index:

    G(x, j) = sum over k of p(x, k) t(j, k c)       t: seconds of a piece of j tokens after k c

Decoding. A step of x sequences in a graph of j computes j of them; the j - x others have no
context to read, so attention is priced for x. Sizes are whole sequences; with sequence parallelism
such that their tokens divide over tp.

Where nothing is simulated the s slots of a microbatch decode independently of one another, each
with the share d / s of the steady state (`costmodel.serving`): binomial, of steps that decode at
all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.buckets import Sizes, best_sizes, cost_of, doubled, padding_of
from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.pace import stage_times
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.step_mix import ServingInput, step_shares
from shardplan.costmodel.steps import decode_stages, step_seconds
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.plan import MemoryRow, StrategyInfo
from shardplan.search.plan_batching import GraphSizes, OtherSizes
from shardplan.search.space import Choice

__all__ = [
    "Below",
    "Room",
    "decode_loads",
    "decode_sizes",
    "default_sizes",
    "piece_shares",
    "prefill_sizes",
    "steady_running",
]

Below = Callable[[NDArray[np.int64]], Array]
"""Share of prompts that are at most so long."""
_MOST_TOKEN_CELLS, _MOST_BATCH_CELLS = 512, 256
_MOST_GRAPHS = 128
"""Where nothing else limits their number."""
_LESS = 0.9
"""Slots, relative, at which the worth of memory is priced."""
_DEFAULT_PER_SLOT = 2
"""vLLM's default sizes end at so many times the slots (`EngineProfile.graph_sizes`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many graphs may be taken, and what each costs."""

    asked: int | None
    fit: int
    """Graphs that fit into memory, at least one."""
    share: float
    """Of throughput, that a graph's memory would have given as cache."""

    @classmethod
    def of(
        cls,
        memory: Sequence[MemoryRow],
        graph_bytes: float,
        cells: Array,
        seconds: Array,
        asked: int | None,
    ) -> Room:
        """Of the fullest rank; `cells` and `seconds`: what `decode_loads` gives."""
        row = max(memory, key=lambda one: one.total_bytes)
        free = max(row.capacity_bytes - row.total_bytes, 0.0)
        place = max(int(np.searchsorted(cells, _LESS * cells[-1], side="right")) - 1, 0)
        elastic = 1.0
        if cells[place] < cells[-1]:
            grows = math.log(seconds[-1, -1] / seconds[place, place])
            elastic = min(max(1.0 - grows / math.log(cells[-1] / cells[place]), 0.0), 1.0)
        cache = row.kv_cache_bytes + free
        share = elastic * graph_bytes / cache if cache else 0.0
        return cls(asked=asked, fit=max(int(free // graph_bytes), 1), share=share)

    def less(self, graphs: int) -> Room:
        """What is left after some."""
        return replace(self, fit=max(self.fit - graphs, 1))

    @property
    def most(self) -> int:
        """Graphs at most."""
        return min(self.fit, self.asked or _MOST_GRAPHS)

    def bound(self, count: int) -> Literal["price", "graphs", "memory"]:
        """What ended the number of graphs."""
        if count < self.most:
            return "price"
        return "memory" if self.fit < (self.asked or _MOST_GRAPHS) else "graphs"


def _under(model: StepModel, engine: EngineProfile) -> StepModel:
    """The same layout under another engine, none of its prices known yet."""
    return replace(model, engine=engine, memo=Memo(), kept=type(model.kept)())


def _cells(top: int, step: int, most: int) -> tuple[Array, int]:
    """(sizes in steps up to `top`, the step), a step that is doubled until there are few."""
    while -(-top // step) > most:
        step *= 2
    found = np.minimum(step * np.arange(1.0, -(-top // step) + 1.0), float(top))
    return found, step


def piece_shares(below: Below, chunk: int, cells: Array, pieces: int, hit: float) -> Array:
    """Pieces a prompt by cell and index `[m, k]`: whole pieces of `chunk` tokens, and the last."""
    starts = chunk * np.arange(pieces, dtype=np.int64)

    def within(tokens: NDArray[np.int64]) -> Array:
        """Share of prompts of which at most so many tokens are computed."""
        whole = np.floor(tokens / (1.0 - hit) * (1.0 + 1e-12)).astype(np.int64)
        return np.asarray(below(whole))

    ends = within(starts[None, :] + cells.astype(np.int64)[:, None])
    last = np.diff(np.concatenate([within(starts)[None, :], ends]), axis=0)
    last[-1] += 1.0 - ends[-1]
    return last


def prefill_sizes(
    scorer: LayoutScorer,
    way: StrategyInfo,
    below: Below,
    longest: int,
    words: str,
    room: Room,
) -> GraphSizes:
    """Lengths that prompts, or their pieces, are padded to."""
    choice, engine = Choice.of(way), scorer.question.engine
    hit = scorer.question.workload.prefix_hit
    computed = max(math.ceil(longest * (1.0 - hit)), 1)
    chunk = min(way.chunk, computed) if engine.chunked_prefill else computed
    pieces = -(-computed // chunk)
    cells, step = _cells(chunk, engine.kv_block_tokens, _MOST_TOKEN_CELLS)
    shares = piece_shares(below, chunk, cells, pieces, hit)
    before = chunk * np.arange(float(pieces))[:, None]
    each, _ = step_seconds(
        _under(scorer.model_for(choice), replace(engine, prefill_graph=True)),
        "prefill",
        batch=1.0,
        new=cells[None, :],
        prefix=before + (before + cells[None, :]) * hit / (1.0 - hit),
        weight_dtype=way.weight_dtype,
        kv_dtype=way.kv_dtype,
        attention=way.attention,
        mtp=float(way.mtp),
    )
    seconds = shares @ np.broadcast_to(each, (pieces, len(cells)))
    return _chosen("prefill", cells, step, shares.sum(axis=1), seconds, words, room, [])


def decode_loads(scorer: LayoutScorer, way: StrategyInfo) -> tuple[Array, Array]:
    """(batches `[m]` up to the slots, seconds `[m, m]` of a step of one padded to another)."""
    width = 1 + way.mtp
    step = way.tp // math.gcd(way.tp, width) if way.sp else 1
    cells, _ = _cells(way.batch, min(step, way.batch), _MOST_BATCH_CELLS)
    model = scorer.model_for(Choice.of(way))
    return cells, _decode_s(model, scorer, way, cells[:, None], cells[None, :])


def _decode_s(
    model: StepModel, scorer: LayoutScorer, way: StrategyInfo, own: Array, padded: Array
) -> Array:
    """Seconds of decode steps of `own` sequences of a microbatch in graphs of `padded`."""
    given = _given(scorer, way)
    span = stage_times(model, decode_stages(model, given, own, padded), "decode")
    shape = np.broadcast_shapes(own.shape, padded.shape)
    seconds = np.maximum(span.total_s, span.slowest_s * model.stages) + model.host_s("decode")
    return np.asarray(np.broadcast_to(seconds, shape))


def _given(scorer: LayoutScorer, way: StrategyInfo) -> ServingInput:
    one = np.ones(1)
    return scorer.serving_input(Choice.of(way), one * way.batch, one * way.chunk)


def steady_running(
    scorer: LayoutScorer, way: StrategyInfo, used: float | None
) -> tuple[dict[int, float], str]:
    """Binomial batches of the steady state, or of slots of which a share `used` is taken."""
    model = scorer.model_for(Choice.of(way))
    shares = step_shares(_given(scorer, way), model.engine, model.stages)
    slots = max(math.ceil(float(np.max(shares.slots))), 1)
    busy = float(np.max(shares.decoding)) / slots if used is None else used
    words = f"{slots:,} slots that decode independently, {min(busy, 1.0):.0%} of the time"
    if busy >= 1.0:
        return {slots: 1.0}, words
    if busy <= 0.0:
        return {1: 1.0}, words
    logs = [
        math.lgamma(slots + 1)
        - math.lgamma(n + 1)
        - math.lgamma(slots - n + 1)
        + n * math.log(busy)
        + (slots - n) * math.log1p(-busy)
        for n in range(1, slots + 1)
    ]
    found = [math.exp(one) for one in logs]
    total = math.fsum(found)
    if not total:
        return {1: 1.0}, words
    return {n: share / total for n, share in enumerate(found, start=1)}, words


def default_sizes(engine: EngineProfile, slots: int, width: int) -> list[int]:
    """Batches that the engine captures by itself, up to the first that holds all slots."""
    own = sorted({size // width for size in engine.graph_sizes if size >= width})
    own = [size for size in own if size <= max(_DEFAULT_PER_SLOT * slots, 1)]
    return own[: next((n for n, size in enumerate(own, start=1) if size >= slots), len(own))]


def decode_sizes(
    scorer: LayoutScorer,
    way: StrategyInfo,
    cells: Array,
    seconds: Array,
    running: tuple[Mapping[int, float], str],
    room: Room,
) -> GraphSizes:
    """Batches that decode steps are padded to."""
    shares, words = np.zeros(len(cells)), running[1]
    for batch, share in running[0].items():
        shares[min(int(np.searchsorted(cells, batch)), len(cells) - 1)] += share
    weighed = shares[:, None] * seconds
    others = []
    if own := default_sizes(scorer.question.engine, way.batch, 1 + way.mtp):
        others.append(_defaults(scorer, way, cells, shares, weighed, own))
    step = int(cells[0])
    return _chosen("decode", cells, step, shares, weighed, words, room, others)


def _defaults(
    scorer: LayoutScorer,
    way: StrategyInfo,
    cells: Array,
    shares: Array,
    weighed: Array,
    own: list[int],
) -> OtherSizes:
    """The engine's own sizes; steps of more sequences are launched kernel by kernel."""
    held = int(np.searchsorted(cells, own[-1], side="right")) if own[-1] < cells[-1] else len(cells)
    places = tuple(sorted({min(int(np.searchsorted(cells, one)), held - 1) for one in own}))
    inside = cost_of(weighed[:held, :held], places)
    rest, beyond = cells[held:], 0.0
    if len(rest):
        model = scorer.model_for(Choice.of(way))
        eager = _under(model, replace(model.engine, decode_graph=False))
        beyond = float(shares[held:] @ _decode_s(eager, scorer, way, rest, rest))
    return OtherSizes(
        name=f"{scorer.question.engine.name} by itself",
        count=len(own),
        expected_s=inside.expected_s + beyond,
        padding=padding_of(shares, cells, (*places, *range(held, len(cells)))),
    )


def _chosen(
    phase: Literal["prefill", "decode"],
    cells: Array,
    step: int,
    shares: Array,
    seconds: Array,
    words: str,
    room: Room,
    others: list[OtherSizes],
) -> GraphSizes:
    """The best sizes for loads, beside what one might take instead."""
    unpadded = math.fsum(np.diagonal(seconds).tolist())
    price = room.share * unpadded
    best = best_sizes(seconds, most=room.most, price_s=price)

    def other(name: str, sizes: Sizes) -> OtherSizes:
        return OtherSizes(
            name=name,
            count=len(sizes.places),
            expected_s=sizes.expected_s,
            padding=padding_of(shares, cells, sizes.places),
        )

    return GraphSizes(
        phase=phase,
        unit="tokens" if phase == "prefill" else "sequences",
        sizes=tuple(int(cells[place]) for place in best.places),
        expected_s=best.expected_s,
        unpadded_s=unpadded,
        padding=padding_of(shares, cells, best.places),
        step=step,
        most=room.most,
        bound=room.bound(len(best.places)),
        price_s=price,
        loads=words,
        others=(
            *others,
            other("powers of two", cost_of(seconds, doubled(cells))),
            other("one size", cost_of(seconds, (len(cells) - 1,))),
        ),
    )
