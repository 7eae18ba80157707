"""Other cuts of the layers: best first, until none can beat what is found.

A layout is priced with its layers cut evenly. Of another cut only three numbers matter at a grid
point: the slowest stage of a decode step, that of a mixed step, and the fullest stage (`cuts`).
Latency, TTFT and TPOT grow with the first two and scale with all times, so

    objective of any cut <= objective of the even cut / share      share: equal stages / slowest
    objective of any cut <= objective at the least slowest stages of any cut, both at once

The first bound is at hand when a grid has been priced, the second takes the exact least of every
point. Grids wait in one queue by the largest bound of their points: a grid whose bound is loose is
given the second; else, at its best point, the cuts that no other beats there are priced, at all
open points of the grid. When the largest bound is no larger than the best objective found, no cut
of any layout is better.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.pace import Span, serve_spans
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.steps import Steps
from shardplan.models.graph import Phase
from shardplan.models.parallel import balanced_stages
from shardplan.search.cuts import front, least, least_of_many
from shardplan.search.evaluate import LayoutScorer, Scores, context_tokens
from shardplan.search.seen import may_hold, mean_limits
from shardplan.search.space import Choice
from shardplan.search.stage_costs import BYTES, DECODE, MIXED, TemplateCosts

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
        kinds = (steps.decode, steps.decode_at), (steps.mixed, steps.mixed_at)
        for (stages, points), phase in zip(kinds, _PHASES, strict=True):
            launch = self.model.launch_floor_s(phase)
            slowest = functools.reduce(np.maximum, self.model.step_s(stages, phase))
            longest = slowest * len(stages)
            busy = sum((one.total_s + gap * one.kernels for one in stages), np.zeros(()))
            wire = sum((one.collective_s for one in stages), np.zeros(()))
            floor = launch * sum(one.kernels for one in stages)
            even = np.maximum(busy, floor) / longest * _ROUNDING
            free = np.maximum(busy - wire, floor) / longest * _ROUNDING
            if points is not None:
                even, free = points.spread(even), points.spread(free)
            self.even = np.minimum(self.even, even)
            self.free = np.minimum(self.free, free)


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
    tight: bool = False
    """The bound is that of the least slowest stages."""

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

    def within(self, share: Array) -> NDArray[np.bool_]:
        """Whether the limits may hold, were every time `share` of what it is."""
        columns = self.columns
        return keeps_limits(
            self.scorer,
            columns["ttft_s"] * share,
            columns["tpot_s"] * share,
            columns["requests_per_s"] / share,
        )

    def tightened(self, best: float) -> Open | None:
        """The points that may beat `best` with the least slowest stages of any cut."""
        rough = self._with_steps(best, self._even_span)
        found = None if rough is None else rough._with_steps(best, rough._least_span)
        if found is not None:
            found.tight = True
        return found

    def _with_steps(self, best: float, step: Callable[[int], Span]) -> Open | None:
        """The points that may beat `best` and keep the limits, were steps these; their bounds."""
        scorer = self.scorer
        given = scorer.serving_input(self.choice, self.batch, self.chunk)
        timed = serve_spans(scorer.model_for(self.choice), given, step(DECODE), step(MIXED))
        limits = keeps_limits(scorer, timed.ttft_s, timed.tpot_s, timed.requests_per_s)
        bound = scorer.objective(timed.end_to_end_s, timed.requests_per_s) / _ROUNDING
        found = _only(self, np.flatnonzero((bound > best) & limits))
        if found is not None:
            found.bound = bound[(bound > best) & limits]
        return found

    def _total(self, row: int) -> Array:
        """Seconds of all stages at least, however the layers are cut."""
        return self.costs.total(row) * _ROUNDING

    def _even_span(self, row: int) -> Span:
        """A step whose stages are equal."""
        total = self._total(row)
        return Span(total, total / len(self.even))

    def _least_span(self, row: int) -> Span:
        """The least that the slowest stage takes, of any cut, at every point."""
        parts = self.costs.seconds(row, self.batch.size)
        first, now = 0, np.zeros(self.batch.size)
        for index, count in enumerate(self.even):
            last = first + count
            for each, ends in parts:
                now = np.maximum(now, each[:, first:last].sum(axis=1) + ends[:, index])
            first = last
        return Span(self._total(row), least_of_many(parts, now) * _ROUNDING)


def keeps_limits(
    scorer: LayoutScorer, ttft_s: Array, tpot_s: Array, rate: Array
) -> NDArray[np.bool_]:
    """Whether times and rate keep the limits of a question, in some order of the ranks."""
    question = scorer.question
    most_ttft_s, most_tpot_s = mean_limits(question)
    left = question.share_left(scorer.parallel, best=True)
    return np.asarray(
        (ttft_s * _ROUNDING <= most_ttft_s)
        & (tpot_s * _ROUNDING <= most_tpot_s)
        & (rate * left >= (question.workload.request_rate or 0.0) * _ROUNDING)
    )


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
    able = may_hold(scorer, choice, grid, scores.steady, even)
    at = np.flatnonzero((bound > best) & able)
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
    kept = found.within(np.broadcast_to(even, shape).ravel()[at])
    return _only(found, np.flatnonzero(kept))


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
        done=one.done,
        tight=one.tight,
    )


def fits_some_cut(scorer: LayoutScorer, choice: Choice, batch: Array, chunk: Array) -> bool:
    """Whether any cut of the layers fits the smallest point `[1]` of a grid."""
    if float(scorer.even_bytes(choice, batch, chunk)[0]) > scorer.ledger.capacity_bytes:
        return False
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
    grids = dict(enumerate(hunt.open))
    queue = [(-float(one.bound.max()), place) for place, one in grids.items()]
    heapq.heapify(queue)
    while queue and -queue[0][0] > hunt.best_over(-math.inf):
        if hunt.late:
            hunt.unreached = max(hunt.unreached, -queue[0][0])
            return
        _, place = heapq.heappop(queue)
        one = grids.pop(place)
        if one.tight:
            at = int(np.argmax(one.bound))
            _price_front(hunt, one, at)
            one.bound[at] = -math.inf
        left = _only(one, np.flatnonzero(one.bound > hunt.best))
        if left is not None and not left.tight:
            left = left.tightened(hunt.best)
        if left is not None:
            grids[place] = left
            heapq.heappush(queue, (-float(left.bound.max()), place))


def _price_front(hunt: Hunt, one: Open, at: int) -> None:
    """Price the cuts that no other beats at one point, at all open points of its grid."""
    point = one.costs.rows(at)
    for cut in front(point.rows, (math.inf, math.inf, point.room_bytes), DECODE, MIXED):
        if cut == one.even or cut in one.done:
            continue
        one.done.add(cut)
        hunt.price(one.scorer.recut(cut), one.choice, one.batch, one.chunk, None)
        hunt.tally.pruned_by["cut"] -= one.batch.size
    floors = any(len(point.rows[row].parts) > 1 for row in (DECODE, MIXED))
    if floors and hunt.question.engine.prefill_first:
        # Launch floors make the sum over stages depend on the cut, which the front leaves out.
        hunt.unreached = max(hunt.unreached, float(one.bound[at]))
