"""Auto batching as part of a search: the plan that was found, with its graph sizes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from shardplan.search.batching import Deployed, Wanted, plan_batching
from shardplan.search.disagg_request import resolve_sides
from shardplan.search.plan import Plan
from shardplan.search.request import Asked, Resolved

if TYPE_CHECKING:
    from shardplan.search.api import SearchResult

__all__ = ["deployed", "with_batching"]

_MIB = 2.0**20


def deployed(plan: Plan, asked: Asked, resolved: Resolved) -> tuple[Deployed, Deployed]:
    """(what prefills, what decodes) of a plan; the same of one without pools."""
    spec, engine = resolved.spec, resolved.engine
    if not plan.pools:
        one = Deployed.of(plan, spec, engine, resolved.cluster, plan.strategy, plan.memory)
        return one, one
    sides = resolve_sides(asked, resolved)
    pools = {pool.role: pool for pool in plan.pools}
    prefill, decode = (
        Deployed.of(plan, spec, engine, side.cluster, pool.strategy, pool.memory)
        for side, pool in ((sides.prefill, pools["prefill"]), (sides.decode, pools["decode"]))
    )
    return prefill, decode


def with_batching(found: SearchResult, asked: Asked, resolved: Resolved) -> SearchResult:
    """The result with graph sizes in its plan. `InputError` for a bad file of lengths."""
    start = time.perf_counter()
    wanted = Wanted(
        lengths=asked.lengths,
        graph_bytes=None if asked.graph_mib is None else asked.graph_mib * _MIB,
        max_graphs=asked.max_graphs,
    )
    part = plan_batching(found.plan, *deployed(found.plan, asked, resolved), wanted)
    spent = time.perf_counter() - start
    timing = {**found.timing, "batching_s": spent}
    timing["total_s"] += spent
    return replace(found, plan=found.plan.model_copy(update={"batching": part}), timing=timing)
