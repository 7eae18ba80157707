"""Deployments of pools, simulated with the workload, and the one that does best there.

As `refine_simulated`, with the engines of both pools and the link between them. Where cards are to
be few, deployments of as many cards (or as much cost) are a tier: its best are simulated, and those
of the next tier only where none of these keeps every limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice

from shardplan.costmodel.simulate.deploy import Instance
from shardplan.costmodel.simulate.fleet import Fleet, Pools
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg import DisaggOutcome
from shardplan.search.disagg_combine import Combination
from shardplan.search.disagg_options import Options
from shardplan.search.disagg_request import Sides
from shardplan.search.disagg_space import Pool, Role
from shardplan.search.evaluate import LayoutScorer, Question, acceptance_of
from shardplan.search.refine_simulated import Refined, Tier, refined
from shardplan.search.runner import Aim, Runner
from shardplan.search.simulate import deployed
from shardplan.search.simulate_demand import planned_demand

__all__ = ["refine_pools"]

_DIGITS = 9
"""Of a sum of prices."""


def refine_pools(sides: Sides, outcome: DisaggOutcome, best: Combination) -> Refined[Combination]:
    """The best of `request.refine_simulated` deployments; `best` is the first of them.

    Raises `InputError` where no deployment can hold the requests of the workload.
    """
    question, request = outcome.question, sides.decode.request
    work, flight = request.workload, question.demand.in_flight
    demand = planned_demand(sides.decode.workload_file, work)
    engines = _Engines(outcome)

    def runner_of(one: Combination) -> Runner:
        return Runner.of(
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
    others = [one for one in outcome.kept if one.feasible and one is not best]
    if outcome.question.objective != "cards":
        yield best.columns["spent"], [best, *others][:count]
        return

    def spent(one: Combination) -> float:
        return round(one.columns["spent"], _DIGITS)

    first = [one for one in others if spent(one) <= spent(best)]
    yield spent(best), [best, *first][:count]
    more = sorted((one for one in others if spent(one) > spent(best)), key=spent)
    for cost, tier in groupby(more, spent):
        yield cost, list(islice(tier, count))


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
