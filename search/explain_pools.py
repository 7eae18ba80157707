"""Why a plan of prefill and decode pools: what binds it, and what each change would buy.

    plan -> the same two pools -> one thing different -> the best deployment then   (shadow prices)

As of a plan without pools (`search.explain`) a shadow price is that of a whole search.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardplan.costmodel.kernels.base import Array
from shardplan.models.errors import InputError
from shardplan.search.asked_again import (
    FASTER,
    Known,
    asked_of,
    faster,
    known_of,
    machine_of,
    objective_of,
)
from shardplan.search.disagg import search_disagg
from shardplan.search.disagg_failure import nothing_disaggregated
from shardplan.search.disagg_plan import candidate_of
from shardplan.search.disagg_pools import columns_alone
from shardplan.search.disagg_question import DisaggQuestion, deployments
from shardplan.search.disagg_request import Sides, disagg_question, resolve_sides
from shardplan.search.disagg_space import Pool as Side
from shardplan.search.explain import (
    explanation_of,
    looser,
    more_cards,
    quantized,
    wide_enough,
)
from shardplan.search.explanation import Binding, Explanation, Shadow
from shardplan.search.plan import Plan, Pool
from shardplan.search.request import Asked, resolve
from shardplan.search.space import Choice
from shardplan.search.tables_disagg import instances_words

__all__ = ["KnownPools", "explain_pools", "known_pools"]

_AT = 1.0 - 1e-6
"""Share of a limit from which on it is met exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPools:
    """A plan of pools and its question."""

    known: Known
    options: dict[str, Any]
    """Of `Asked`."""
    sides: Sides
    question: DisaggQuestion
    """What its deployments are scored against."""


def known_pools(plan: Plan, model: str | None = None) -> KnownPools:
    """The question of a plan of pools; `InputError` as of `known_of`."""
    known = known_of(plan, model)
    options = {**asked_of(known), "serving": "disagg"}
    if plan.request.prefill_cards is not None:
        options["prefill_cluster"] = machine_of(plan.pools[0].cluster)
        options["prefill_cards"] = plan.request.prefill_cards
    sides = _sides(options)
    return KnownPools(known=known, options=options, sides=sides, question=disagg_question(sides))


def _sides(options: dict[str, Any]) -> Sides:
    asked = Asked(**options)
    return resolve_sides(asked, resolve(asked))


def explain_pools(plan: Plan, *, model: str | None = None, shadows: bool = True) -> Explanation:
    """Why this plan. `model`: its `config.json`, where the plan's own is not found."""
    found = known_pools(plan, model)
    return explanation_of(plan, _bindings(found), _shadows(found) if shadows else ())


def _bindings(found: KnownPools) -> Iterator[Binding]:
    """What either pool and the transfer carry, memory, and the times that are limited."""
    plan, question = found.known.plan, found.question
    transfer, rate = plan.transfer, plan.performance.requests_per_s
    bound = None if transfer is None else transfer.bound
    for pool, side in zip(plan.pools, (question.prefill, question.decode), strict=True):
        used, full = pool.times.used, max(pool.memory, key=lambda row: row.total_bytes)
        if used > 0.0:
            yield from _binding(f"{pool.role} pool", rate, rate / used, bound == pool.role)
        yield from _binding(
            f"{pool.role} memory",
            full.total_bytes,
            full.capacity_bytes,
            _next(side, pool, "memory") > full.capacity_bytes,
        )
    if transfer is not None and transfer.used > 0.0:
        yield from _binding("transfer", rate, rate / transfer.used, bound == "transfer")
    limits = plan.request.limits.model_dump()
    for name, limit in limits.items():
        if limit is not None:
            value = _time_s(found, name)
            binds = value >= limit * _AT
            if name == "tpot_s" and not binds:
                binds = _next(question.decode, plan.pools[1], "tpot_s") > limit
            yield from _binding(name.removesuffix("_s"), value, limit, binds)


def _time_s(found: KnownPools, name: str) -> float:
    """What a limit on time is held against; TPOT is that of full slots for its percentile, too."""
    plan, question = found.known.plan, found.question
    if name != "ttft_p99_s":
        return float(getattr(plan.performance, name.replace("_p99", "")))
    one, two = (
        _columns(side, pool, pool.strategy.chunk if side.role == "prefill" else pool.strategy.batch)
        for side, pool in zip((question.prefill, question.decode), plan.pools, strict=True)
    )
    x, y = (np.array([pool.instances], dtype=np.int64) for pool in plan.pools)
    service, _ = deployments(question, (one, two), x, y)
    late_s = service.ttft_p99_s
    assert late_s is not None  # of a question that limits it
    return float(late_s.flat[0])


def _columns(side: Side, pool: Pool, size: int) -> dict[str, Array]:
    """A pool's strategy with so many slots, or tokens of a step."""
    one = replace(side, grid=(size,))
    return columns_alone(one, pool.strategy.parallelism(), Choice.of(pool.strategy))


def _binding(name: str, value: float, limit: float, binds: bool) -> Iterator[Binding]:
    """Nothing where a file's numbers make no share."""
    used = value / limit if limit else math.inf
    if math.isfinite(used):
        yield Binding(name=name, value=value, limit=limit, used=used, binds=binds)


def _next(side: Side, pool: Pool, column: str) -> float:
    """A column of a pool's strategy with the next number of slots, or the next larger step.

    Below any limit where there is none.
    """
    way = pool.strategy
    own = way.chunk if side.role == "prefill" else way.batch
    larger = [size for size in side.grid if size > own]
    if not larger:
        return 0.0
    return float(_columns(side, pool, larger[0])[column][0])


def _shadows(found: KnownPools) -> Iterator[Shadow]:
    """One change of the question after another."""
    plan = found.known.plan
    transfer = f"the transfer {FASTER - 1:.0%} faster"
    yield _shadow(plan, transfer, functools.partial(_faster_transfer, found))
    for words, changed in _changes(found):
        yield _shadow(plan, words, functools.partial(_changed, found, **changed))
    yield from quantized(plan)


def _changes(found: KnownPools) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each change in words and as options."""
    options = found.options
    for name, count in (("cluster", "cards"), ("prefill_cluster", "prefill_cards")):
        if name in options:
            more = more_cards(options[name], options[count])
            words = f"{more} {count.replace('_', ' ')} in place of {options[count]}"
            yield words, {name: wide_enough(options[name], more), count: more}
    for name, of in (("cluster", ""), ("prefill_cluster", "prefill's ")):
        for tier in options[name].tiers if name in options else ():
            if tier.ranks > 1:
                words = f"{of}{tier.name} links {FASTER - 1:.0%} faster"
                yield words, {name: faster(options[name], tier)}
    if options["kv_dtype"] in ("bf16", "fp16"):
        yield "an int8 KV cache", {"kv_dtype": "int8"}
    yield from looser(found.known)


def _changed(found: KnownPools, **different: Any) -> DisaggQuestion:
    return disagg_question(_sides({**found.options, **different}))


def _faster_transfer(found: KnownPools) -> DisaggQuestion:
    question = found.question
    link = replace(question.link, bytes_per_s=question.link.bytes_per_s * FASTER)
    return replace(question, link=link)


def _shadow(plan: Plan, change: str, question: Callable[[], DisaggQuestion]) -> Shadow:
    """The best deployment of a changed question."""
    try:
        outcome = search_disagg(question())
    except InputError as error:
        return Shadow.none(change, error)
    best = outcome.best
    if best is None:
        return Shadow.none(change, nothing_disaggregated(outcome, None))
    one, now = candidate_of(outcome, best), best.columns["objective"]
    return Shadow(
        change=change,
        objective=now,
        gain=now / objective_of(plan),
        strategy=one.strategy,
        note=instances_words(one),
    )
