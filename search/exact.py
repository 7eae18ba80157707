"""The exact search: every strategy of the space, priced or provably not needed.

Layouts come in the order of a bound that needs no graph (`bounds`), best first, equal ones in the
order of the space. For each, and every choice that its switches allow:

  1. `peak`     where the bound is below what is already found, the layout is left out unapplied;
  2. `memory`   if one slot with the smallest step does not fit however the layers are cut, no
                grid point of it does (memory grows with batch and chunk);
  3. otherwise the whole grid is priced at once (`LayoutScorer.score`), layers cut evenly;
  4. `cut`      other cuts of the layers (`refine`), best first, until none can be better;
  5. `order`    other numberings of the ranks change the price of collectives alone: they are priced
                where free collectives would beat what is found, one of each that cross the same
                tiers;
  6. `queue`    limits that are dear to price are looked at for what may be best or kept (`judged`).

Each left-out strategy is counted under the bound that left it out, so that
    size of the space = evaluated + sum of pruned                  (of a complete search)
and no strategy has an objective above `Outcome.bound`: the best found when the search is complete
(the gap is 0), with a time limit the largest bound of what was not reached.

Ties are broken by less memory, then by the order of the space, never by changing a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from shardplan.costmodel.ahead import price_ahead
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.orders import distinct_orders
from shardplan.models.parallel import Parallelism
from shardplan.search.bounds import most_objective
from shardplan.search.evaluate import LayoutScorer, Question, Scores
from shardplan.search.judged import Judge, Pending, Wanted
from shardplan.search.kept import (
    QUEUE,
    KeptGrid,
    KeptTable,
    Outcome,
    Tally,
    count_refused,
    keep_best,
    note_nearest,
)
from shardplan.search.refine import Open, Slack, fits_some_cut, most_where, open_points, refine_cuts
from shardplan.search.seen import AT_RATE, seen_names
from shardplan.search.space import Choice, Space

__all__ = ["search_exact"]

_TOGETHER = 32
"""Layouts whose rows are priced together, and grids that are judged together."""


@dataclass(slots=True)
class Hunt:
    """One search under way."""

    question: Question
    space: Space
    deadline_s: float
    memo: Memo = field(default_factory=Memo)
    tally: Tally = field(default_factory=Tally)
    kept: list[KeptGrid] = field(default_factory=list)
    best: float = -math.inf
    """Largest objective of a feasible strategy so far."""
    judge: Judge = field(default_factory=lambda: Judge(Wanted()))
    pending: list[Pending] = field(default_factory=list)
    """Grids that are not judged to the end; they come after those of `kept`."""
    refused: dict[tuple[Parallelism, Choice], tuple[Array, Array]] = field(default_factory=dict)
    """Slots and step sizes that break only a limit that is dear to price."""
    open: list[Open] = field(default_factory=list)
    """Grids of which other cuts may still be better."""
    again: list[tuple[float, Parallelism, Choice]] = field(default_factory=list)
    """(bound, layout, choice) of which other orders of the ranks may still be better."""
    too_big: tuple[float, Parallelism, Choice] | None = None
    """(bytes, layout, choice) of what was left out for its memory and misses it by the least."""
    unreached: float = -math.inf
    """Largest bound of what the time limit left out."""

    @property
    def late(self) -> bool:
        """Whether the time limit has passed."""
        return time.perf_counter() > self.deadline_s

    @property
    def grid(self) -> tuple[Array, Array]:
        """All slots [n, 1] and step sizes [1, m]."""
        batch = np.array(self.space.batches, dtype=np.float64)[:, None]
        return batch, np.array(self.space.chunks, dtype=np.float64)[None, :]

    def price(
        self, scorer: LayoutScorer, choice: Choice, batch: Array, chunk: Array, slack: Slack | None
    ) -> Scores:
        """Price arrays of batch and chunk and remember the best of them."""
        watch = None if slack is None else slack.watch
        scores = scorer.score(choice, batch, chunk, watch=watch, dear=False)
        if not seen_names(self.question):
            found = self._keep(scorer, choice, (batch, chunk), scores)
            feasible = found.columns["objective"][found.limit < 0]
            self.best = max(self.best, float(feasible.max(initial=-math.inf)))
            return scores
        self.pending.append(Pending.of(scorer, choice, (batch, chunk), scores))
        if len(self.pending) >= _TOGETHER:
            self.settle()
        return scores

    def best_over(self, bound: float) -> float:
        """The largest objective that holds, looked for where it may be no less than `bound`."""
        while self.pending:
            one = max(self.pending, key=lambda each: each.most)
            if one.most < bound or one.most <= self.best:
                break
            one.seek(self.best, self.deadline_s)
            self.best = max(self.best, one.best)
            if self.late:
                break
        return self.best

    def settle(self) -> None:
        """Judge what is told of the grids that wait for it."""
        self.judge.settle(self.pending)
        for one in self.pending:
            if self.late:  # what is open may be better, and was not looked at
                self.unreached = max(self.unreached, one.most)
            self.best = max(self.best, one.best)
            self.refused[one.scorer.parallel, one.choice] = one.refused
            self._keep(one.scorer, one.choice, (one.batch, one.chunk), one.scores, one)
        self.pending.clear()

    def _keep(
        self,
        scorer: LayoutScorer,
        choice: Choice,
        grid: tuple[Array, Array],
        scores: Scores,
        judged: Pending | None = None,
    ) -> KeptGrid:
        """Remember the best of a grid, and count it; what `judged` leaves open is left out.

        These count as pruned, or where the time limit has passed as not reached.
        """
        left = 0 if judged is None else int(judged.open.sum())
        count_refused(self.tally, scores, left)
        if left and not self.late:
            self.tally.pruned_by["queue"] += left
        among = None if judged is None else ~judged.missing
        note_nearest(self.tally, scores, scorer.parallel, choice, grid, among)
        known = None if judged is None else ~judged.open
        self.kept.append(keep_best(scores, scorer.parallel, choice, *grid, known))
        return self.kept[-1]


def _by_bound(question: Question, space: Space) -> list[tuple[float, Parallelism]]:
    """(bound, layout), the largest bound first; equal ones in the order of the space."""
    dtypes = sorted({choice.weight_dtype for choice in space.choices})
    pairs = [
        (max((most_objective(question, par, one) for one in dtypes), default=-math.inf), par)
        for par in space.layouts
    ]
    return sorted(pairs, key=lambda pair: -pair[0])


def search_exact(
    question: Question,
    space: Space,
    *,
    time_limit_s: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    memo: Memo | None = None,
    wanted: Wanted | None = None,
) -> Outcome:
    """Every strategy of `space`; the optimum, with what is needed to prove and explain it.

    `time_limit_s`: stop then with the best so far and a bound on the rest; what was not reached
    is counted neither as evaluated nor as pruned. `memo`: prices shared with other searches of
    the same machine and engine. `wanted`: what is told beside the optimum, where limits are dear.
    """
    start = time.perf_counter()
    deadline_s = math.inf if time_limit_s is None else start + time_limit_s
    hunt = Hunt(
        question=question,
        space=space,
        deadline_s=deadline_s,
        memo=Memo() if memo is None else memo,
        judge=Judge(wanted or Wanted(), deadline_s),
    )
    layouts = _by_bound(question, space)
    done = 0
    while done < len(layouts) and not hunt.late:
        for bound, task in _prepared(hunt, layouts[done : done + _TOGETHER]):
            if hunt.late:
                break
            if task is None or bound < hunt.best_over(bound):
                hunt.tally.pruned_by["peak"] += space.strategies(layouts[done][1])
            else:
                _layout(hunt, task)
            done += 1
            if progress is not None:
                progress(done, len(layouts))
    if done < len(layouts):
        hunt.unreached = max(hunt.unreached, layouts[done][0])
    _orders(hunt)
    refine_cuts(hunt)
    hunt.settle()
    _note_missed(hunt)
    for rule, count in space.broken_strategies.items():
        hunt.tally.pruned_by[f"rule {rule}"] += count
    return _outcome(hunt, start)


class _Task(NamedTuple):
    """A layout, and its choices that a rule or the memory leaves out, by what does."""

    scorer: LayoutScorer
    left_out: Mapping[Choice, str]


def _prepared(
    hunt: Hunt, layouts: Sequence[tuple[float, Parallelism]]
) -> list[tuple[float, _Task | None]]:
    """(bound, layout ready to be priced) of each; none where the bound leaves it out already."""
    hunt.memo.make_room()
    best = hunt.best_over(layouts[-1][0])
    found = [(bound, None if bound < best else _task(hunt, par)) for bound, par in layouts]
    batch, chunk = hunt.grid
    price_ahead(
        (task.scorer.model_for(choice), task.scorer.serving_input(choice, batch, chunk))
        for choice in hunt.space.choices
        for _, task in found
        if task is not None and choice not in task.left_out
    )
    return found


def _task(hunt: Hunt, par: Parallelism) -> _Task:
    """Apply a layout and see which of its choices are legal and fit."""
    space = hunt.space
    scorer, left_out = LayoutScorer(hunt.question, par, hunt.memo), {}
    hunt.tally.applied += 1
    for choice in space.choices:
        rule = space.broken_switch(par, choice)
        if rule is not None:
            left_out[choice] = f"rule {rule}"
            continue
        needed = scorer.least_bytes(choice)
        if needed > scorer.ledger.capacity_bytes:
            if hunt.too_big is None or needed < hunt.too_big[0]:
                hunt.too_big = needed, par, choice
            uneven = space.cuts_of(par) > 1
            if not uneven or not fits_some_cut(scorer, choice, *np.ones((2, 1))):
                left_out[choice] = "memory"
    return _Task(scorer, left_out)


def _layout(hunt: Hunt, task: _Task) -> None:
    """One layout with all its choices."""
    space, tally, scorer = hunt.space, hunt.tally, task.scorer
    par = scorer.parallel
    cuts, points = space.cuts_of(par), len(space.batches) * len(space.chunks)
    orders = len(space.orders_of(par))
    for choice in space.choices:
        if choice in task.left_out:
            tally.pruned_by[task.left_out[choice]] += cuts * orders * points
            continue
        slack, scores = _grid(hunt, scorer, choice)
        tally.pruned_by["order"] += (orders - 1) * cuts * points
        if orders > 1:
            bound = most_where(scorer, choice, scores, hunt.grid, slack.free)
            hunt.again.append((bound, par, choice))


def _grid(hunt: Hunt, scorer: LayoutScorer, choice: Choice) -> tuple[Slack, Scores]:
    """Price a whole grid; remember where other cuts of the layers may be better."""
    slack = Slack(scorer.model_for(choice))
    scores = hunt.price(scorer, choice, *hunt.grid, slack)
    cuts = hunt.space.cuts_of(scorer.parallel)
    if cuts > 1:
        still = open_points(scorer, choice, scores, hunt.grid, slack.even, hunt.best)
        hunt.open += [] if still is None else [still]
    hunt.tally.pruned_by["cut"] += (cuts - 1) * scores.limit.size
    return slack, scores


def _orders(hunt: Hunt) -> None:
    """Price other orders of the ranks where free collectives would beat what is found."""
    question, space = hunt.question, hunt.space
    for bound, par, choice in sorted(hunt.again, key=lambda one: -one[0]):
        if bound <= hunt.best_over(bound):
            return
        if hunt.late:
            hunt.unreached = max(hunt.unreached, bound)
            return
        legal = set(space.orders_of(par))
        for order in distinct_orders(question.spec, question.cluster, par)[1:]:
            if order in legal:
                scorer = LayoutScorer(question, replace(par, order=order), hunt.memo)
                _, scores = _grid(hunt, scorer, choice)
                hunt.tally.pruned_by["order"] -= space.cuts_of(par) * scores.limit.size


def _outcome(hunt: Hunt, start: float) -> Outcome:
    """The kept strategies in order, and the bound that holds for all."""
    _note_too_big(hunt)
    place = {par: index for index, par in enumerate(hunt.space.layouts)}
    turns = [place[hunt.space.layout_of(one.parallel)] for one in hunt.kept]
    kept = KeptTable.ranked(hunt.kept, turns)
    best = kept[0] if kept and kept[0].feasible else None
    hunt.tally.pruned_by = +hunt.tally.pruned_by
    return Outcome(
        space=hunt.space,
        best=best,
        kept=kept,
        tally=hunt.tally,
        bound=max(hunt.best, hunt.unreached),
        wall_s=time.perf_counter() - start,
        refused=hunt.refused,
    )


def _note_missed(hunt: Hunt) -> None:
    """Remember what misses dear limits alone by the least, where nothing holds."""
    found = None if hunt.best > -math.inf else hunt.judge.nearest()
    if found is not None:
        column, kept = found
        hunt.tally.nearest[QUEUE if column == AT_RATE else column.removesuffix("_s")] = kept


def _note_too_big(hunt: Hunt) -> None:
    """Remember the layout left out that misses the memory by the least, at its smallest point."""
    if hunt.too_big is None:
        return
    least, par, choice = hunt.too_big
    known = hunt.tally.nearest.get("memory")
    if known is not None and known.columns["memory_bytes"] <= least:
        return
    batch = np.array([float(hunt.space.batches[0])])
    chunk = np.array([float(hunt.space.chunks[0])])
    scores = LayoutScorer(hunt.question, par, hunt.memo).score(choice, batch, chunk)
    hunt.tally.nearest["memory"] = keep_best(scores, par, choice, batch, chunk).one(0)
