"""Searches with `serving` disagg or auto: pools apart, or whichever way of serving is better."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from shardplan import __version__
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.search.costs import cost_of
from shardplan.search.disagg import search_disagg
from shardplan.search.disagg_beside import quantized_outcomes, time_left
from shardplan.search.disagg_failure import nothing_disaggregated
from shardplan.search.disagg_plan import build_disagg_plan, disagg_front, disagg_table
from shardplan.search.disagg_request import disagg_question, resolve_sides
from shardplan.search.disagg_robust import study_pools
from shardplan.search.evaluate import context_tokens
from shardplan.search.failure import context_message
from shardplan.search.plan import Plan, ServingRow
from shardplan.search.request import Asked, Resolved, without_limits
from shardplan.search.robust_plan import with_study

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
    limit_s = resolved.time_limit_s
    outcome = search_disagg(disagg_question(sides), time_limit_s=limit_s)
    late = limit_s is not None and not outcome.complete
    if outcome.best is None and resolved.soft_limits and not late:
        sides = replace(sides, decode=without_limits(sides.decode))
        limit_s = time_left(limit_s, [outcome])
        outcome = search_disagg(disagg_question(sides), time_limit_s=limit_s)
    searched = time.perf_counter()
    if outcome.best is None:
        raise nothing_disaggregated(outcome, resolved.time_limit_s)
    quantized = quantized_outcomes(sides, outcome, time_left(limit_s, [outcome]))
    beside = time.perf_counter()
    best, robustness = study_pools(outcome, robust=resolved.request.robust)
    studied = time.perf_counter()
    refined = None
    if resolved.request.refine_simulated:
        from shardplan.search.refine_pools import refine_pools

        refined = refine_pools(sides, outcome, best)
        best = refined.best
    simulated = time.perf_counter()
    plan = build_disagg_plan(
        sides, outcome, best, quantized=quantized, top=top, version=__version__
    )
    plan = with_study(plan, robustness)
    if refined is not None:
        plan = refined.with_plan(plan)
    proven = time.perf_counter()
    if resolved.prices is not None:
        plan = plan.model_copy(update={"cost": cost_of(plan, resolved.prices)})
    return SearchResult(
        plan=plan,
        trial_table=disagg_table(outcome, outcome.kept),
        pareto_table=disagg_table(outcome, disagg_front(outcome)),
        timing={
            "search_s": searched - start,
            "quantization_s": beside - searched,
            "robustness_s": studied - beside,
            "refined_s": simulated - studied,
            "proof_s": proven - simulated,
            "total_s": time.perf_counter() - start,
            "strategies_per_s": outcome.tally.evaluated / max(searched - start, 1e-9),
        },
    )


_DEAR_S = 60.0
"""Of a search of both ways of serving, for the aggregated one where percentiles are limited."""


class _Worth(NamedTuple):
    """How good a plan is; larger is better."""

    holds: bool
    """In the simulator, where it was asked."""
    kept: bool
    """Limits that were assumed."""
    value: float
    """The objective (less is less negative); of a run where one was made and it was no rate's."""
    tokens: float


def _worth(plan: Plan) -> _Worth:
    told, seen = plan.simulated, plan.performance
    kept = any(plan.request.limits.model_dump().values())
    latency_s, tokens = seen.end_to_end_s, seen.output_tokens_per_s
    if told is not None:
        latency_s = told.run.end_to_end_s
        if plan.request.workload.request_rate is None:
            tokens = told.run.output_tokens_per_s
    value = tokens
    if plan.request.objective == "cards":
        value = -float(plan.cards)
    elif plan.request.objective == "cost" and plan.cost is not None:
        value = -plan.cost.per_million_tokens
    elif plan.request.objective == "latency":
        value = 1.0 / latency_s
    return _Worth(told is None or told.holds, kept, value, tokens)


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
    objective, own = (abs(_worth(one).value) for one in (plan, best))
    fewer = plan.request.objective in ("cards", "cost")
    return ServingRow(
        serving=serving,  # type: ignore[arg-type]  # agg or disagg
        words=words,
        objective=objective,
        gain=own / objective if fewer else objective / own,
        cards=plan.cards,
        ttft_s=plan.performance.ttft_s,
        tpot_s=plan.performance.tpot_s,
    )


def better_serving(
    resolved: Resolved,
    aggregated: Callable[[Resolved], SearchResult],
    disaggregated: Callable[[Resolved], SearchResult],
) -> SearchResult:
    """The better of both searches, with both told in its plan.

    Of a time limit the aggregated search, which comes first, may take half, the other what is left;
    where none is given and percentiles are limited the aggregated one takes `_DEAR_S` at most.
    Raises what the aggregated search raises when neither finds anything.
    """
    found: dict[str, SearchResult | InfeasibleError | InputError] = {}
    start, limit_s = time.perf_counter(), resolved.time_limit_s
    left_s = None if limit_s is None else limit_s / 2.0
    if limit_s is None and resolved.request.limits.has_tails:
        left_s = _DEAR_S
    for serving, run in (("agg", aggregated), ("disagg", disaggregated)):
        try:
            found[serving] = run(replace(resolved, time_limit_s=left_s))
        except (InfeasibleError, InputError) as error:
            found[serving] = error
        left_s = None
        if limit_s is not None:
            left_s = max(limit_s - (time.perf_counter() - start), 0.0)
    results = [one for one in found.values() if not isinstance(one, InfeasibleError | InputError)]
    if not results:
        first = found["agg"]
        assert isinstance(first, Exception)
        raise first
    best = max(results, key=lambda one: _worth(one.plan))
    rows = tuple(_row(serving, one, best.plan) for serving, one in found.items())
    plan = best.plan.model_copy(
        update={"servings": rows, "notes": (*best.plan.notes, _said(resolved, found, best.plan))}
    )
    total = sum(one.timing["total_s"] for one in results)
    return replace(best, plan=plan, timing={**best.timing, "total_s": total})


def _said(
    resolved: Resolved,
    found: Mapping[str, SearchResult | InfeasibleError | InputError],
    best: Plan,
) -> str:
    """Which way of serving is the better one, and what that does not say."""
    said = "disaggregated" if best.pools else "aggregated"
    note = f"both ways of serving were searched: {said} serving is the better one here"
    if best.simulated is not None:
        note += " (in the simulator, limits first)"
    if best.request.prefill_cards is not None:
        note += "; the aggregated plan has the cards of the decode cluster only"
    if resolved.time_limit_s is None:
        if resolved.request.limits.has_tails:
            note += (
                f"; percentiles of aggregated serving are dear to price: it was searched for "
                f"{_DEAR_S:g} s at most (--time-limit gives more)"
            )
        return note
    for serving, one in found.items():
        if isinstance(one, InfeasibleError | InputError):
            note += f"; {serving}: {one}"
        elif one.plan.certificate.gap != 0:
            note += f"; {serving} was not searched to its end"
    return f"{note}; both shared the time limit of {resolved.time_limit_s:g} s"
