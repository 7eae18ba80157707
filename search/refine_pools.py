"""Deployments of pools, simulated with the workload, and the one that does best there.

As `refine_simulated`, with the engines of both pools and the link between them. Where cards are to
be few, deployments of as many cards (or as much cost) are a tier: its best are simulated, and those
of the next tier only where none of these keeps every limit. A search keeps the fewest instances of
a pair alone, so that further tiers also hold the same pairs with more of either role.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from itertools import groupby, product

import numpy as np

from shardplan.costmodel.simulate.deploy import Instance
from shardplan.costmodel.simulate.fleet import Fleet, Pools
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg import DisaggOutcome
from shardplan.search.disagg_combine import Combination, described
from shardplan.search.disagg_options import Options
from shardplan.search.disagg_question import most_beside
from shardplan.search.disagg_request import Sides
from shardplan.search.disagg_space import Pool, Role
from shardplan.search.evaluate import LayoutScorer, Question, acceptance_of
from shardplan.search.refine_simulated import Refined, Tier, distinct, halving, refined
from shardplan.search.runner import Aim, Runner
from shardplan.search.simulate import deployed
from shardplan.search.simulate_demand import planned_demand

__all__ = ["refine_pools"]

_DIGITS = 9
"""Of a sum of prices."""
_SHARES = (1.0, 1.1, 1.25, 1.5, 2.0)
"""Of the fewest instances, which have nothing to spare for bursts."""


def refine_pools(sides: Sides, outcome: DisaggOutcome, best: Combination) -> Refined[Combination]:
    """The best of `request.refine_simulated` deployments; `best` is the first of them.

    Raises `InputError` where no deployment can hold the requests of the workload.
    """
    question, request = outcome.question, sides.decode.request
    work, flight = request.workload, question.demand.in_flight
    demand = planned_demand(sides.decode.workload_file, work)
    engines = _Engines(outcome)

    def runner_of(one: Combination, place: int) -> Runner:
        return Runner.of(
            place=place,
            aim=Aim(question.limits, request.objective, work),
            fleet=lambda: engines.fleet(one),
            demand=demand,
            in_flight=max(round(flight or one.columns["concurrency"]), 1),
            columns=one.columns,
            acceptance=acceptance_of(question.decode.spec, work),
        )

    return refined(_tiers(outcome, best, request.refine_simulated), runner_of)


def _tiers(outcome: DisaggOutcome, best: Combination, count: int) -> Iterator[Tier[Combination]]:
    """`count` deployments; of the fewest cards, then of more."""
    first, last = outcome.prefill.options, outcome.decode.options

    def kind(one: Combination) -> Hashable:
        return (
            first.way(one.prefill),
            first.choice(one.prefill),
            halving(int(first.columns["chunk"][one.prefill])),
            last.way(one.decode),
            last.choice(one.decode),
            int(last.columns["slots"][one.decode]),
            one.prefill_instances,
            one.decode_instances,
        )

    def spent(one: Combination) -> float:
        return round(one.columns["spent"], _DIGITS)

    able = [one for one in outcome.kept if one.feasible]
    if outcome.question.objective != "cards":
        yield spent(best), distinct([best], able, kind, count)
        return
    fewest = distinct([best], (one for one in able if spent(one) <= spent(best)), kind, count)
    yield spent(best), fewest
    some = distinct(fewest, able, kind, count)
    more = [one for one in (*able, *_grown(outcome, some)) if spent(one) > spent(best)]
    more.sort(key=lambda one: (spent(one), -one.columns["objective"]))
    for cost, tier in groupby(more, spent):
        yield cost, distinct([], tier, kind, count)


def _grown(outcome: DisaggOutcome, some: Iterable[Combination]) -> Iterator[Combination]:
    """The same pairs with more instances, as far as there are cards and limits allow."""
    question, tables = outcome.question, (outcome.prefill.options, outcome.decode.options)
    for one in some:
        cards = (
            float(tables[0].columns["cards"][one.prefill]),
            tables[1].columns["cards"][one.decode],
        )
        for x, y in product(_more(one.prefill_instances), _more(one.decode_instances)):
            fits = x * cards[0] <= question.prefill.cards
            if fits and y <= most_beside(question, cards[1], np.array(x), cards[0]):
                found = described(question, tables, (one.prefill, one.decode), (x, y))
                if found.feasible:
                    yield found


def _more(count: int) -> list[int]:
    """As many, and some more, up to twice."""
    return sorted({math.ceil(count * share) for share in _SHARES})


class _Engines:
    """Instances of both pools; those of one layout share their graphs."""

    def __init__(self, outcome: DisaggOutcome) -> None:
        self._outcome = outcome
        self._scorers: dict[tuple[Role, Parallelism], LayoutScorer] = {}

    def fleet(self, one: Combination) -> Fleet:
        """All that a deployment has."""
        outcome, question = self._outcome, self._outcome.question
        return Fleet(
            serve=self._instance(question.decode, outcome.decode.options, one.decode),
            pools=Pools(
                prefill=self._instance(question.prefill, outcome.prefill.options, one.prefill),
                prefill_instances=one.prefill_instances,
                decode_instances=one.decode_instances,
                link=question.link,
            ),
        )

    def _instance(self, pool: Pool, options: Options, index: int) -> Instance:
        par, question = options.way(index), self._outcome.question
        scorer = self._scorers.get((pool.role, par))
        if scorer is None:
            asked = Question(
                spec=pool.spec,
                cluster=pool.cluster,
                engine=pool.engine,
                workload=question.decode.workload,
                limits=question.limits,
                objective=question.objective,
                cards=par.ranks,
            )
            scorer = self._scorers[pool.role, par] = LayoutScorer(asked, par)
        slots, chunk = (int(options.columns[name][index]) for name in ("slots", "chunk"))
        return deployed(scorer, options.choice(index), slots, chunk)
