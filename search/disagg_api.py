"""Searches with `serving` disagg or auto: pools apart, or whichever way of serving is better."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from shardplan import __version__
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.search.disagg import search_disagg
from shardplan.search.disagg_beside import quantized_outcomes
from shardplan.search.disagg_failure import nothing_disaggregated
from shardplan.search.disagg_plan import build_disagg_plan, disagg_front, disagg_table
from shardplan.search.disagg_request import disagg_question, resolve_sides
from shardplan.search.evaluate import context_tokens
from shardplan.search.failure import context_message
from shardplan.search.plan import Plan, ServingRow
from shardplan.search.request import Asked, Resolved, without_limits

if TYPE_CHECKING:
    from shardplan.search.api import SearchResult

__all__ = ["better_serving", "search_disaggregated"]


def search_disaggregated(asked: Asked, resolved: Resolved, *, top: int) -> SearchResult:
    """The best deployment of prefill and decode pools.

    Raises `InfeasibleError` when none satisfies the question, saying which pool binds.
    """
    from shardplan.search.api import SearchResult

    start = time.perf_counter()
    sides = resolve_sides(asked, resolved)
    work, longest = resolved.request.workload, resolved.spec.max_context
    if longest and context_tokens(work) > longest:
        raise context_message(work, longest)
    outcome = search_disagg(disagg_question(sides))
    if outcome.best is None and resolved.soft_limits:
        sides = replace(sides, decode=without_limits(sides.decode))
        outcome = search_disagg(disagg_question(sides))
    searched = time.perf_counter()
    if outcome.best is None:
        raise nothing_disaggregated(outcome)
    quantized = quantized_outcomes(sides, outcome)
    beside = time.perf_counter()
    plan = build_disagg_plan(
        sides, outcome, outcome.best, quantized=quantized, top=top, version=__version__
    )
    proven = time.perf_counter()
    return SearchResult(
        plan=plan,
        trial_table=disagg_table(outcome, outcome.kept),
        pareto_table=disagg_table(outcome, disagg_front(outcome)),
        timing={
            "search_s": searched - start,
            "quantization_s": beside - searched,
            "proof_s": proven - beside,
            "total_s": time.perf_counter() - start,
            "strategies_per_s": outcome.tally.evaluated / max(searched - start, 1e-9),
        },
    )


def _cards(plan: Plan) -> int:
    """Cards in use."""
    if plan.pools:
        return sum(pool.instances * pool.strategy.ranks for pool in plan.pools)
    return plan.strategy.ranks


def _worth(plan: Plan) -> tuple[bool, float, float]:
    """Larger is better: limits kept, the objective (fewer cards as less negative), throughput."""
    kept = any(plan.request.limits.model_dump().values())
    value = plan.performance.output_tokens_per_s
    if plan.request.objective == "cards":
        return kept, -float(_cards(plan)), value
    if plan.request.objective == "latency":
        return kept, 1.0 / plan.performance.end_to_end_s, value
    return kept, value, value


def _row(
    serving: str, found: SearchResult | InfeasibleError | InputError, best: Plan
) -> ServingRow:
    if isinstance(found, InfeasibleError | InputError):
        return ServingRow(
            serving=serving,  # type: ignore[arg-type]  # agg or disagg
            words=f"nothing: {found}",
            objective=None,
            gain=None,
            cards=0,
            ttft_s=None,
            tpot_s=None,
        )
    plan = found.plan
    words = f"{plan.strategy.parallelism().describe()}, batch {plan.strategy.batch}"
    if plan.pools:
        words = " + ".join(
            f"{pool.instances} {pool.role} x ({pool.strategy.parallelism().describe()})"
            for pool in plan.pools
        )
    objective, own = (abs(_worth(one)[1]) for one in (plan, best))
    fewer = plan.request.objective == "cards"
    return ServingRow(
        serving=serving,  # type: ignore[arg-type]  # agg or disagg
        words=words,
        objective=objective,
        gain=own / objective if fewer else objective / own,
        cards=_cards(plan),
        ttft_s=plan.performance.ttft_s,
        tpot_s=plan.performance.tpot_s,
    )


def better_serving(
    aggregated: Callable[[], SearchResult], disaggregated: Callable[[], SearchResult]
) -> SearchResult:
    """The better of both searches, with both told in its plan.

    Raises what the aggregated search raises when neither finds anything.
    """
    found: dict[str, SearchResult | InfeasibleError | InputError] = {}
    for serving, run in (("agg", aggregated), ("disagg", disaggregated)):
        try:
            found[serving] = run()
        except (InfeasibleError, InputError) as error:
            found[serving] = error
    results = [one for one in found.values() if not isinstance(one, InfeasibleError | InputError)]
    if not results:
        first = found["agg"]
        assert isinstance(first, Exception)
        raise first
    best = max(results, key=lambda one: _worth(one.plan))
    rows = tuple(_row(serving, one, best.plan) for serving, one in found.items())
    said = "disaggregated" if best.plan.pools else "aggregated"
    note = f"both ways of serving were searched: {said} serving is the better one here"
    if best.plan.request.prefill_cards is not None:
        note += "; the aggregated plan has the cards of the decode cluster only"
    plan = best.plan.model_copy(update={"servings": rows, "notes": (*best.plan.notes, note)})
    total = sum(one.timing["total_s"] for one in results)
    return replace(best, plan=plan, timing={**best.timing, "total_s": total})
