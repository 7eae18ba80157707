"""Which of a plan's own other strategies a target can express, where it refuses the plan itself.

A plan holds the best strategies beside its own and those that trade throughput for time per token.
The first that the target takes is the nearest plan: the refusal names it and what it keeps of the
throughput. Its files are not written, as its memory and its proof are not in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardplan.models.errors import InputError
from shardplan.search.emit.common import printable
from shardplan.search.plan import Candidate, Plan

__all__ = ["with_nearest"]


def with_nearest(
    error: InputError,
    plan: Plan,
    emitter: Callable[..., Mapping[str, object]],
    options: Mapping[str, Any],
) -> InputError:
    """The error with the nearest expressible strategy in its hint, where the plan holds one."""
    for one in (*plan.alternatives, *plan.pareto):
        other = _with(plan, one)
        if other is None:
            continue
        try:
            emitter(other, **options)
        except InputError:
            continue
        share = one.performance.output_tokens_per_s / plan.performance.output_tokens_per_s
        words = f"of this plan's other strategies it takes {_told(one)}: {share:.0%} of the rate"
        return InputError(error.rule, got=error.got, hint=f"{error.hint}; {words}")
    return error


def _with(plan: Plan, one: Candidate) -> Plan | None:
    """The plan with another of its strategies; None for one of the other way of serving."""
    if bool(plan.pools) is (one.prefill is None):
        return None
    changes: dict[str, Any] = {"strategy": one.strategy, "performance": one.performance}
    if plan.pools and one.prefill is not None:
        sides = {
            "prefill": {"strategy": one.prefill, "instances": one.prefill_instances},
            "decode": {"strategy": one.strategy, "instances": one.decode_instances},
        }
        changes["pools"] = tuple(pool.model_copy(update=sides[pool.role]) for pool in plan.pools)
    return plan.model_copy(update=changes)


def _told(one: Candidate) -> str:
    own = printable(one.strategy.parallelism().describe())
    if one.prefill is None:
        return own
    prefill = printable(one.prefill.parallelism().describe())
    return f"{one.prefill_instances} x {prefill} prefill and {one.decode_instances} x {own} decode"
