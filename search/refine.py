"""Other cuts of the layers: best first, until none can beat what is found.

A layout is priced with its layers cut evenly. Of another cut only three numbers matter at a grid
point: the slowest stage of a decode step, that of a mixed step, and the fullest stage (`cuts`).
Latency is a monotone function of step times and scales with them, so if no cut makes any step
shorter than f times what it is,

    objective of any cut <= objective of the even cut / f,      and likewise TTFT >= f TTFT, ...

    f = least over both steps of  (stages of equal length) / (slowest stage)          at first,
        least over both steps of  (smallest slowest stage of any cut that fits) / ...  if needed

Points of all layouts wait in one queue by this bound. The first is taken: its f is made exact, or
every cut that no other beats at it is priced, at all open points of its layout at once. When the
first bound is no larger than the best objective found, no cut of any layout is better.
"""

from __future__ import annotations

import functools
import heapq
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.serving import Steps
from shardplan.costmodel.step import StepModel
from shardplan.models.graph import Phase
from shardplan.models.parallel import balanced_stages
from shardplan.search.cuts import front, least, row_max
from shardplan.search.evaluate import LayoutScorer, Question, Scores, context_tokens
from shardplan.search.space import Choice
from shardplan.search.stage_costs import BYTES, DECODE, MIXED, PointRows, TemplateCosts

if TYPE_CHECKING:
    from shardplan.search.exact import Hunt

__all__ = ["Open", "Slack", "fits_some_cut", "most_where", "open_points", "refine_cuts"]

_ROUNDING = 1.0 - 1e-9
"""Sums are made in another order than prices: a bound gives that much way."""
_PHASES: tuple[Phase, Phase] = ("decode", "prefill")


@dataclass(slots=True)
class Slack:
    """How much shorter the steps of a grid could be with equal stages."""

    model: StepModel
    even: Array = field(default_factory=lambda: np.ones(()))
    """Share of a step's time that equal stages would take."""
    free: Array = field(default_factory=lambda: np.ones(()))
    """The same with collectives that take no time, too."""

    def watch(self, steps: Steps) -> None:
        """Note the shares of each step, the smaller of both kinds."""
        gap = self.model.engine.launch_gap_s
        for stages, phase in zip(steps, _PHASES, strict=True):
            launch = self.model.launch_floor_s(phase)
            slowest = functools.reduce(np.maximum, self.model.step_s(stages, phase))
            longest = slowest * len(stages)
            busy = sum((one.total_s + gap * one.kernels for one in stages), np.zeros(()))
            wire = sum((one.collective_s for one in stages), np.zeros(()))
            floor = launch * sum(one.kernels for one in stages)
            even = np.maximum(busy, floor) / longest
            free = np.maximum(busy - wire, floor) / longest
            self.even = np.minimum(self.even, even * _ROUNDING)
            self.free = np.minimum(self.free, free * _ROUNDING)


@dataclass(kw_only=True)
class Open:
    """Grid points `[n]` of one layout and choice of which another cut may be better."""

    scorer: LayoutScorer
    choice: Choice
    batch: Array
    chunk: Array
    columns: dict[str, Array]
    """objective, ttft_s, tpot_s, requests_per_s of the even cut."""
    bound: Array
    even: tuple[int, ...]
    done: set[tuple[int, ...]] = field(default_factory=set)
    """Cuts that were priced at all points, beside the even one."""

    @functools.cached_property
    def costs(self) -> TemplateCosts:
        """What each template costs at the points."""
        scorer, choice = self.scorer, self.choice
        return TemplateCosts.of(
            scorer.model_for(choice),
            scorer.ledger,
            scorer.serving_input(choice, self.batch, self.chunk),
            scorer.common_bytes(choice, self.batch, self.chunk),
        )

    def within(self, question: Question, share: Array | float, at: slice | int) -> Array:
        """Whether the limits may hold at points, were every time `share` of what it is."""
        limits, work = question.limits, question.workload
        ttft, tpot = (self.columns[name][at] for name in ("ttft_s", "tpot_s"))
        rate = self.columns["requests_per_s"][at]
        return np.asarray(
            (ttft * share <= (limits.ttft_s or math.inf))
            & (tpot * share <= (limits.tpot_s or math.inf))
            & (rate >= (work.request_rate or 0.0) * share)
        )

    def best_share(self, point: PointRows, engine_first: bool) -> float:
        """The least share of the step times that any cut that fits takes; inf where none fits."""
        limits = (math.inf, math.inf, point.room_bytes)
        share = 1.0
        for row in (DECODE, MIXED):
            cut = least(point.rows, limits, row)
            if cut is None:
                return math.inf
            share = min(share, row_max(point.rows[row], cut) / row_max(point.rows[row], self.even))
            if engine_first:
                share = min(share, point.rows[row].even_share(self.even))
        return share * _ROUNDING


def open_points(
    scorer: LayoutScorer,
    choice: Choice,
    scores: Scores,
    grid: tuple[Array, Array],
    even: Array,
    best: float,
) -> Open | None:
    """The points of a priced grid of which another cut may beat `best`; None without any."""
    shape = scores.limit.shape
    bound = _bound(scorer, choice, scores, grid, even)
    batch, chunk = (np.broadcast_to(one, shape) for one in grid)
    at = np.flatnonzero(bound > best)
    if not at.size:
        return None
    names = ("objective", "ttft_s", "tpot_s", "requests_per_s")
    found = Open(
        scorer=scorer,
        choice=choice,
        batch=batch.ravel()[at],
        chunk=chunk.ravel()[at],
        columns={name: scores.columns[name].ravel()[at] for name in names},
        bound=bound.ravel()[at],
        even=balanced_stages(scorer.question.spec, scorer.parallel),
    )
    able = found.within(scorer.question, np.broadcast_to(even, shape).ravel()[at], slice(None))
    return _only(found, np.flatnonzero(able))


def _bound(
    scorer: LayoutScorer,
    choice: Choice,
    scores: Scores,
    grid: tuple[Array, Array],
    share: Array,
) -> Array:
    """Objective of each point, were its steps `share` of what they are; -inf where none may be.

    A step must hold its slots' tokens, a request the model's context, the cards the mean stage.
    """
    question, (batch, chunk) = scorer.question, grid
    longest = question.spec.max_context or math.inf
    fits = scorer.even_bytes(choice, batch, chunk) <= scorer.ledger.capacity_bytes
    holds = chunk >= batch * (1 + scorer.parallel.mtp)
    able = fits & holds & (context_tokens(question.workload) <= longest)
    return np.where(able, scores.columns["objective"] / share, -math.inf)


def most_where(
    scorer: LayoutScorer,
    choice: Choice,
    scores: Scores,
    grid: tuple[Array, Array],
    share: Array,
) -> float:
    """The largest objective of a grid whose steps take `share` of what they do."""
    return float(_bound(scorer, choice, scores, grid, share).max())


def _only(one: Open, at: NDArray[np.intp]) -> Open | None:
    """The same with some of its points."""
    if not at.size:
        return None
    return Open(
        scorer=one.scorer,
        choice=one.choice,
        batch=one.batch[at],
        chunk=one.chunk[at],
        columns={name: values[at] for name, values in one.columns.items()},
        bound=one.bound[at],
        even=one.even,
    )


def fits_some_cut(scorer: LayoutScorer, choice: Choice, batch: Array, chunk: Array) -> bool:
    """Whether any cut of the layers fits the smallest point `[1]` of a grid."""
    costs = TemplateCosts.of(
        scorer.model_for(choice),
        scorer.ledger,
        scorer.serving_input(choice, batch, chunk),
        scorer.common_bytes(choice, batch, chunk),
    )
    point = costs.rows(0)
    return least(point.rows, (math.inf, math.inf, point.room_bytes), BYTES) is not None


def refine_cuts(hunt: Hunt) -> None:
    """Price other cuts where they may be better, best first; see the module."""
    grids = [_only(one, np.flatnonzero(one.bound > hunt.best)) for one in hunt.open]
    queue = [
        (-float(bound), place, at, False)
        for place, one in enumerate(grids)
        if one is not None
        for at, bound in enumerate(one.bound)
    ]
    heapq.heapify(queue)
    while queue and -queue[0][0] > hunt.best:
        if hunt.late:
            hunt.unreached = max(hunt.unreached, -queue[0][0])
            return
        _, place, at, tight = heapq.heappop(queue)
        one = grids[place]
        if one is None:
            continue
        point = one.costs.rows(at)
        if tight:
            _price_front(hunt, one, point, at)
            continue
        share = one.best_share(point, hunt.question.engine.prefill_first)
        if share < math.inf and one.within(hunt.question, share, at):
            heapq.heappush(queue, (-float(one.columns["objective"][at]) / share, place, at, True))


def _price_front(hunt: Hunt, one: Open, point: PointRows, at: int) -> None:
    """Price the cuts that no other beats at one point, at all open points of its grid."""
    for cut in front(point.rows, (math.inf, math.inf, point.room_bytes), DECODE, MIXED):
        if cut == one.even or cut in one.done:
            continue
        one.done.add(cut)
        hunt.price(one.scorer.recut(cut), one.choice, one.batch, one.chunk, None)
        hunt.tally.pruned_by["cut"] -= one.batch.size
    floors = any(len(point.rows[row].parts) > 1 for row in (DECODE, MIXED))
    if floors and hunt.question.engine.prefill_first:
        share = min(point.rows[row].even_share(one.even) for row in (DECODE, MIXED))
        hunt.unreached = max(hunt.unreached, float(one.columns["objective"][at]) / share)
