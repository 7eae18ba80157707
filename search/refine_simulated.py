"""The best strategies of a search, simulated with its workload, and the one that does best there.

    steady state -> best N -> simulated in stages (`staged`), judged by limits first (`runner`)
                 -> the best -> plan

The steady state knows means of lengths and Poisson arrivals; the simulator serves bursts, spread
lengths, shared prefixes and a cache that runs full. Of strategies that differ in little but the
step size one is simulated for all. Candidates come in tiers of equal cost where
cards are to be few: a tier is looked at where none of those before it keeps every limit. The same
seed gives the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

from shardplan.costmodel.simulate.fleet import Fleet
from shardplan.models.parallel import Parallelism
from shardplan.search.evaluate import LayoutScorer, Question, acceptance_of
from shardplan.search.kept import Kept, Outcome, feasible_of
from shardplan.search.plan import Plan
from shardplan.search.plan_refinement import Refinement, SimulatedRun
from shardplan.search.request import Resolved
from shardplan.search.runner import Aim, Runner
from shardplan.search.simulate import deployed
from shardplan.search.simulate_demand import planned_demand
from shardplan.search.staged import race

__all__ = ["Found", "Refined", "Tier", "distinct", "halving", "refine_simulated", "refined"]

_MOST_TIERS = 8
"""Of as many strategies as the first."""
_One = TypeVar("_One")
Tier = tuple[float, Sequence[_One]]
"""What its strategies cost, and these, best first."""


class Refined(NamedTuple, Generic[_One]):
    """The strategy to deploy, and what the simulator told."""

    best: _One
    told: Refinement
    objective: float
    """Of the steady state."""
    dearer: float
    """Cost over that of the first tier, less 1, where cards are to be few."""

    def with_plan(self, plan: Plan) -> Plan:
        """The plan of the strategy, what was found in it; the gap of its certificate is its own."""
        proof = plan.certificate
        if self.dearer > 0.0:
            proof = proof.model_copy(update={"gap": self.dearer})
        elif proof.bound is not None:
            gap = max(proof.bound / self.objective - 1.0, 0.0)
            proof = proof.model_copy(update={"gap": gap})
        notes = (*plan.notes, _note(plan, self))
        return plan.model_copy(
            update={"certificate": proof, "simulated": self.told, "notes": notes}
        )


def distinct(
    first: Iterable[_One], others: Iterable[_One], kind: Callable[[_One], Hashable], count: int
) -> list[_One]:
    """The first `count`, one of each kind: what else differs is too little to simulate apart."""
    found: dict[Hashable, _One] = {}
    for one in chain(first, others):
        found.setdefault(kind(one), one)
        if len(found) == count:
            break
    return list(found.values())


def halving(tokens: int) -> int:
    """Step sizes of a kind: up to twice one another."""
    return tokens.bit_length()


def _kind(one: Kept) -> Hashable:
    return one.parallel, one.choice, one.batch, halving(one.chunk)


def refined(
    tiers: Iterable[Tier[_One]],
    runner_of: Callable[[_One, int], Runner],
) -> Refined[_One]:
    """The best of the first tier that has one which keeps every limit, else the nearest to it.

    Raises what the steady state's first choice was refused for where no strategy can serve.
    """
    seen: list[Runner] = []
    best: tuple[float, int, float, _One] | None = None
    pruned, least, most = 0, 1.0, 0
    for cost, tier in tiers:
        least, most = (least, most) if seen else (cost, _MOST_TIERS * len(tier))
        some = [runner_of(one, place) for place, one in enumerate(tier, start=1)]
        found = race(some)
        pruned += found.pruned
        if best is None or found.value > best[0]:
            best = found.value, len(seen) + found.best, cost / least - 1.0, tier[found.best]
        seen += some
        if found.value > 0.0 or len(seen) >= most:
            break
    assert best is not None  # there is a tier
    _, place, dearer, chosen = best
    one, first = seen[place], seen[0]
    if one.run is None:
        assert first.refusal is not None  # none could serve
        raise first.refusal
    told = Refinement(
        tried=len(seen),
        pruned=pruned,
        requests=sum(each.done for each in seen),
        chosen=place + 1,
        holds=one.holds,
        run=one.run,
        first=first.run,
        first_holds=first.holds,
    )
    return Refined(chosen, told, one.objective, dearer)


class Found(NamedTuple):
    """A strategy and the searches that found it, in the last of them."""

    question: Question
    outcomes: list[Outcome]
    kept: Kept


def refine_simulated(
    resolved: Resolved,
    question: Question,
    outcomes: list[Outcome],
    best: Kept,
    further: Callable[[list[Outcome]], list[Outcome]],
) -> Refined[Found]:
    """The best of `request.refine_simulated` strategies; `best` is the first of them.

    `further` adds searches of more cards, as far as there are: they are looked at where cards are
    to be few and all of fewer miss a limit.
    Raises `InputError` where no strategy can hold the requests of the workload.
    """
    count, work = resolved.request.refine_simulated, question.workload
    demand = planned_demand(resolved.workload_file, work)
    scorers: dict[tuple[int, Parallelism], LayoutScorer] = {}

    def tiers() -> Iterator[Tier[Found]]:
        asked, found = question, outcomes
        first: Kept | None = best
        while first is not None:
            some = distinct([first], feasible_of(found[-1].kept), _kind, count)
            yield float(asked.cards), [Found(asked, found, one) for one in some]
            before, found = len(found), further(found)
            if len(found) == before:
                return
            asked = replace(question, cards=found[-1].space.cards)
            first = found[-1].best

    def fleet_of(one: Found) -> Fleet:
        kept, key = one.kept, (one.question.cards, one.kept.parallel)
        if key not in scorers:
            scorers[key] = LayoutScorer(one.question, kept.parallel)
        return Fleet(serve=deployed(scorers[key], kept.choice, kept.batch, kept.chunk))

    def runner_of(one: Found, place: int) -> Runner:
        return Runner.of(
            place=place,
            aim=Aim(question.limits, question.objective, work),
            fleet=lambda: fleet_of(one),
            demand=demand,
            in_flight=work.concurrency or one.kept.batch * one.kept.parallel.dp,
            columns=one.kept.columns,
            acceptance=acceptance_of(question.spec, work),
        )

    return refined(tiers(), runner_of)


def _note(plan: Plan, found: Refined[Any]) -> str:
    """What was simulated and found, and what the steady state says of it."""
    steady, told, rated = plan.performance, found.told, plan.at_rate
    held = "keeps every limit there"
    if not told.holds:
        held = "misses a limit there, as all of them do (a larger --refine-simulated tries more)"
    means = (steady.ttft_s, steady.tpot_s)
    if rated is not None:
        means = (rated.ttft.mean_s, rated.tpot.mean_s)
    text = (
        f"refined: the best {told.tried} strategies were simulated with the workload, most of them "
        f"briefly; the one that does best, the steady state's number {told.chosen}, {held}: "
        f"{_seen(told.run)} (steady state: TTFT {means[0] * 1e3:.4g} ms, TPOT "
        f"{means[1] * 1e3:.4g} ms, {steady.output_tokens_per_s:,.4g} output tokens/s at most)"
    )
    if found.dearer:
        text += "; with fewer or cheaper cards all of them miss a limit there"
    if told.chosen == 1:
        return text
    if told.first is None:
        return f"{text}; its first cannot hold a request of the workload"
    held = "keeps every limit" if told.first_holds else "misses a limit"
    return f"{text}; its first {held} there: {_seen(told.first)}"


def _seen(run: SimulatedRun) -> str:
    return (
        f"TTFT {run.ttft_s * 1e3:.4g} ms, p99 {run.ttft_p99_s * 1e3:.4g} ms; TPOT "
        f"{run.tpot_s * 1e3:.4g} ms, p99 {run.tpot_p99_s * 1e3:.4g} ms; "
        f"{run.output_tokens_per_s:,.4g} output tokens/s"
    )
