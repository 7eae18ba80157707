"""The best strategies of a search, simulated with its workload, and the one that does best there.

    steady state -> best N -> simulated briefly -> best quarter -> simulated for long -> plan

The steady state knows means of lengths and Poisson arrivals; the simulator serves bursts, spread
lengths, shared prefixes and a cache that runs full. Strategies that keep every limit and serve what
comes stand before others; then the larger objective there: output tokens a second, or 1 / the mean
time of a request. At a rate all serve what is offered, so that those that do keep the order of the
steady state. The same seed gives the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from shardplan.costmodel.simulate.deploy import Instance, units_of
from shardplan.costmodel.simulate.events import Simulation
from shardplan.costmodel.simulate.prices import StepTypes
from shardplan.costmodel.simulate.record import Recorder
from shardplan.costmodel.simulate.workload import Demand, requests
from shardplan.search.evaluate import LayoutScorer, Question, acceptance_of, context_tokens
from shardplan.search.kept import Kept, Outcome, feasible_of
from shardplan.search.plan import Plan
from shardplan.search.request import Resolved
from shardplan.search.simulate_demand import planned_demand

__all__ = ["Refined", "refine_simulated"]

_SHORT, _LONG = 500, 4000
"""Requests of either simulation."""
_ROUNDS = 4
"""Of a closed loop at least: requests over those in flight."""
_KEPT = 4
"""One of so many is simulated for long."""
_LATE = 1.05
"""A run at a rate that ends so much later than its last request was due has a queue that grows."""


class Run(NamedTuple):
    """What a simulation says of a strategy, in seconds and their inverse."""

    ttft_s: float
    ttft_p99_s: float
    tpot_s: float
    tpot_p99_s: float
    end_to_end_s: float
    output_tokens_per_s: float
    served: bool
    """Whether the queue did not grow."""


class Refined(NamedTuple):
    """The strategy to deploy, and its run."""

    best: Kept
    run: Run
    tried: int
    """Strategies that were simulated."""
    holds: bool
    """Whether the chosen one keeps every limit there."""

    def told(self, plan: Plan) -> Plan:
        """The plan of the strategy with a note; the gap of its certificate is its own."""
        proof = plan.certificate
        if proof.bound is not None:
            gap = max(proof.bound / self.best.columns["objective"] - 1.0, 0.0)
            proof = proof.model_copy(update={"gap": gap})
        notes = (*plan.notes, _note(plan, self))
        return plan.model_copy(update={"certificate": proof, "notes": notes})


def refine_simulated(
    resolved: Resolved, question: Question, outcome: Outcome, best: Kept
) -> Refined:
    """The best of `request.refine_simulated` strategies; `best` is the first of them."""
    count = resolved.request.refine_simulated
    others = [one for one in feasible_of(outcome.kept)[: count + 1] if one is not best]
    tried = [best, *others][:count]
    few = _ranked(resolved, question, tried, _SHORT)[: -(-len(tried) // _KEPT)]
    found = _ranked(resolved, question, [one for one, _ in few], _LONG)
    chosen, run = found[0]
    return Refined(chosen, run, len(tried), keeps(question, run))


def _ranked(
    resolved: Resolved, question: Question, tried: Sequence[Kept], count: int
) -> list[tuple[Kept, Run]]:
    """The strategies with their runs, the best first."""
    runs = [(one, simulated(resolved, question, one, count)) for one in tried]
    return sorted(runs, key=lambda pair: _key(question, pair[1]))


def _key(question: Question, run: Run) -> tuple[bool, float]:
    """Sorting key; the sort is stable."""
    if question.objective == "latency":
        return not keeps(question, run), run.end_to_end_s
    if question.workload.request_rate is not None and run.served:
        return not keeps(question, run), 0.0
    return not keeps(question, run), -run.output_tokens_per_s


def keeps(question: Question, run: Run) -> bool:
    """Whether every limit is kept and what comes is served."""
    limits = question.limits.model_dump()
    return run.served and all(
        most is None or getattr(run, name) <= most for name, most in limits.items()
    )


def _demand(resolved: Resolved, question: Question, one: Kept, count: int) -> Demand:
    """The workload, of so many requests; as many in flight as there are slots, unless it says."""
    work, flight = question.workload, None
    if work.request_rate is None:
        flight = min(one.batch * one.parallel.dp, work.concurrency or one.batch * one.parallel.dp)
    return replace(
        planned_demand(resolved.workload_file, work),
        rate=work.request_rate,
        concurrency=flight,
        count=max(count, _ROUNDS * (flight or 0)),
    )


def simulated(resolved: Resolved, question: Question, one: Kept, count: int) -> Run:
    """A strategy under the workload, request by request."""
    scorer, choice = LayoutScorer(question, one.parallel), one.choice
    demand = _demand(resolved, question, one, count)
    instance = Instance(
        model=scorer.model_for(choice),
        ledger=scorer.ledger,
        types=StepTypes(choice.weight_dtype, choice.kv_dtype, choice.attention),
        slots=one.batch,
        chunk=one.chunk,
        context=context_tokens(question.workload),
        max_context=question.spec.max_context or 0,
    )
    recorder = Recorder(warmup=count // 10)
    run = Simulation(
        requests(demand, question.spec.max_context or 0),
        recorder,
        closed=demand.concurrency,
        depth=one.parallel.mtp,
        acceptance=acceptance_of(question.spec, question.workload),
        seed=demand.seed,
    )
    units = units_of(
        instance,
        run,
        prefix_hit=demand.prefix_hit,
        shares_prefixes=demand.shares_prefixes,
    )
    recorder.blocks = sum(engine.blocks.total for unit in units for engine in unit.engines)
    run.serve_with(units, "least-load")
    run.run()
    told = recorder.figures()
    due_s = 0.0 if demand.rate is None else count / demand.rate
    spare_s = due_s * (_LATE - 1.0) + 2.0 * one.columns["end_to_end_s"]
    return Run(
        ttft_s=told["ttft_s"]["mean"],
        ttft_p99_s=told["ttft_s"]["p99"],
        tpot_s=told["tpot_s"]["mean"],
        tpot_p99_s=told["tpot_s"]["p99"],
        end_to_end_s=told["end_to_end_s"]["mean"],
        output_tokens_per_s=told["output_tokens_per_s"],
        served=demand.rate is None or run.now_s <= due_s + spare_s,
    )


def _note(plan: Plan, refined: Refined) -> str:
    told, run = plan.performance, refined.run
    held = "keeps every limit there" if refined.holds else "misses a limit there, as all of them do"
    return (
        f"refined: the best {refined.tried} strategies were simulated with the workload and the "
        f"best of these for longer; the one that does best {held}: TTFT {run.ttft_s * 1e3:.4g} ms, "
        f"p99 {run.ttft_p99_s * 1e3:.4g} ms; TPOT {run.tpot_s * 1e3:.4g} ms, p99 "
        f"{run.tpot_p99_s * 1e3:.4g} ms; {run.output_tokens_per_s:,.4g} output tokens/s (steady "
        f"state: {told.ttft_s * 1e3:.4g} ms, {told.tpot_s * 1e3:.4g} ms, "
        f"{told.output_tokens_per_s:,.4g} output tokens/s)"
    )
