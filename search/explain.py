"""Why a plan: its binding limits, what each change of the question would buy, and a rival.

    plan -> the same question -> one thing different -> the best plan then       (shadow prices)
    plan, rival -> the same question -> both priced by the same code -> where each ms and GiB goes

A shadow price is exact: the whole search is run again with one thing changed, so it tells what the
best plan would then do, not what this plan would. Plans of pools: `search.explain_pools`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.hardware import Cluster
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.search.api import search
from shardplan.search.asked_again import (
    FASTER,
    Known,
    asked_of,
    faster,
    known_of,
    objective_of,
)
from shardplan.search.evaluate import LIMITS, LayoutScorer
from shardplan.search.explanation import Binding, Explanation, PoolPart, Shadow
from shardplan.search.kept import Kept, kept_at
from shardplan.search.plan import Plan
from shardplan.search.seen import AT_RATE
from shardplan.search.space import Choice, batch_grid

__all__ = [
    "explain",
    "explanation_of",
    "looser",
    "more_cards",
    "priced",
    "quantized",
    "wide_enough",
]

_MOST_SLOTS = 1024
_TIMES = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "ttft_p99_ms": "99th percentile of TTFT",
    "tpot_p99_ms": "99th percentile of TPOT",
}


def priced(scorer: LayoutScorer, choice: Choice, batch: int, chunk: int) -> Kept:
    """One strategy with every column of its score."""
    slots, tokens = np.array([float(batch)]), np.array([float(chunk)])
    scores = scorer.score(choice, slots, tokens)
    at = np.zeros(1, dtype=np.int64)
    return kept_at(scores, scorer.parallel, choice, slots, tokens, at).one(0)


def explain(plan: Plan, *, model: str | None = None, shadows: bool = True) -> Explanation:
    """Why this plan. `model`: its `config.json`, where the plan's own is not found."""
    if plan.pools:
        from shardplan.search.explain_pools import explain_pools

        return explain_pools(plan, model=model, shadows=shadows)
    known = known_of(plan, model)
    return explanation_of(plan, _bindings(known), _shadows(known) if shadows else ())


def explanation_of(
    plan: Plan, bindings: Iterable[Binding], shadows: Iterable[Shadow]
) -> Explanation:
    """What is found of a plan, with what the plan itself tells."""
    return Explanation(
        model=plan.model.name,
        cluster=plan.cluster.name,
        strategy=plan.strategy,
        performance=plan.performance,
        objective=plan.request.objective,
        bindings=tuple(bindings),
        breakdown=plan.breakdown,
        memory=plan.memory,
        shadows=tuple(shadows),
        pools=tuple(
            PoolPart(
                role=pool.role,
                instances=pool.instances,
                cards=pool.cards,
                strategy=pool.strategy,
                memory=pool.memory,
            )
            for pool in plan.pools
        ),
    )


def _bindings(known: Known) -> Iterator[Binding]:
    """Each limit, and whether more slots break it first."""
    question, way = known.question, known.plan.strategy
    scorer = LayoutScorer(question, way.parallelism())
    columns = priced(scorer, known.choice, way.batch, way.chunk).columns
    first = _first_broken(known, scorer)
    held = {
        "memory": (columns["memory_bytes"], scorer.ledger.capacity_bytes),
        "ttft": (columns["ttft_s"], question.limits.ttft_s),
        "tpot": (columns["tpot_s"], question.limits.tpot_s),
        "ttft_p99": (columns.get("ttft_p99_s", 0.0), question.limits.ttft_p99_s),
        "tpot_p99": (columns.get("tpot_p99_s", 0.0), question.limits.tpot_p99_s),
    }
    if AT_RATE in columns:
        held["ttft_at_rate"] = columns[AT_RATE], question.limits.ttft_s
    for name, (value, limit) in held.items():
        if limit is not None:
            yield Binding(
                name=name, value=value, limit=limit, used=value / limit, binds=name in first
            )


def _first_broken(known: Known, scorer: LayoutScorer) -> set[str]:
    """Limits that the next number of slots, or the next larger step, breaks."""
    way, work = known.plan.strategy, known.question.workload
    if work.concurrency is not None and way.batch * way.dp >= work.concurrency:
        return set()
    grid = [size for size in batch_grid(_MOST_SLOTS) if size > way.batch]
    found = set()
    for batch, chunk in [(grid[0], way.chunk)] if grid else []:
        one = priced(scorer, known.choice, batch, max(chunk, batch * (1 + way.mtp)))
        if one.limit >= 0:
            name, most = LIMITS[one.limit], known.question.limits.ttft_s
            queue = name == "ttft" and one.columns["ttft_s"] <= (most or 0.0)
            found.add("ttft_at_rate" if queue else name)
    return found


def _shadows(known: Known) -> Iterator[Shadow]:
    """One change of the question after another."""
    plan, cards = known.plan, known.plan.request.cards
    more = more_cards(known.cluster, cards)
    yield _changed(known, f"{more} cards in place of {cards}", cards=more)
    for tier in known.cluster.tiers:
        if tier.ranks > 1:
            words = f"{tier.name} links {FASTER - 1:.0%} faster"
            yield _changed(known, words, cluster=faster(known.cluster, tier))
    if plan.strategy.kv_dtype in ("bf16", "fp16"):
        yield _changed(known, "an int8 KV cache", kv_dtype="int8")
    for words, changed in looser(known):
        yield _changed(known, words, **changed)
    yield from quantized(plan)


def looser(known: Known) -> Iterator[tuple[str, dict[str, float]]]:
    """Each limit a quarter looser, in words and as options."""
    asked = asked_of(known)
    for name, words in _TIMES.items():
        if asked[name] is not None:
            yield f"{words} up to {asked[name] * FASTER:g} ms", {name: asked[name] * FASTER}


def quantized(plan: Plan) -> Iterator[Shadow]:
    """What other types of weights would buy, as the search told."""
    for row in plan.quantization:
        if row.weight_dtype != plan.strategy.weight_dtype:
            words = f"{row.weight_dtype} weights, {row.kv_dtype} KV"
            yield Shadow(
                change=words, objective=row.objective, gain=row.gain, strategy=row.strategy
            )


def more_cards(cluster: Cluster, cards: int) -> int:
    """The next number of cards that a job may have."""
    inside = [count for count in cluster.rank_counts if count > cards]
    return inside[0] if inside else cards + cluster.ranks_per_node


def wide_enough(cluster: Cluster, cards: int) -> Cluster:
    """The cluster with nodes for so many cards. `InputError` where it has no more of them."""
    if cards <= cluster.ranks:
        return cluster
    nodes = -(-cards // cluster.ranks_per_node)
    return load_cluster(cluster.name, nodes=nodes, device=cluster.device.name)


def _changed(known: Known, change: str, **different: Any) -> Shadow:
    """The best plan of the question with some options different."""
    asked = {**asked_of(known), **different}
    try:
        asked["cluster"] = wide_enough(asked["cluster"], asked["cards"])
        plan = search(**asked).plan
    except (InputError, InfeasibleError) as error:
        return Shadow.none(change, error)
    own, now = objective_of(known.plan), objective_of(plan)
    return Shadow(change=change, objective=now, gain=now / own, strategy=plan.strategy)
