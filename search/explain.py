"""Why a plan: its binding limits, what each change of the question would buy, and a rival.

    plan -> the same question -> one thing different -> the best plan then       (shadow prices)
    plan, rival -> the same question -> both priced by the same code -> where each ms and GiB goes

A shadow price is exact: the whole search is run again with one thing changed, so it tells what the
best plan would then do, not what this plan would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.hardware import Cluster, Tier
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.models.spec import ModelSpec
from shardplan.search.api import search
from shardplan.search.evaluate import LIMITS, LayoutScorer, Question
from shardplan.search.explanation import Binding, Explanation, Shadow
from shardplan.search.kept import Kept, kept_at
from shardplan.search.plan import Plan
from shardplan.search.proof import model_of
from shardplan.search.seen import AT_RATE
from shardplan.search.space import Choice, batch_grid

__all__ = ["FASTER", "Known", "explain", "faster", "known_of"]

FASTER = 1.25
"""A link that is a quarter faster, a limit that is a quarter looser."""
_MOST_SLOTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A plan's question, its strategy ready to be priced again."""

    plan: Plan
    spec: ModelSpec
    cluster: Cluster
    question: Question
    scorer: LayoutScorer
    choice: Choice
    kept: Kept


def known_of(plan: Plan, model: str | None = None) -> Known:
    """The question of a plan; `InputError` where a part of it came from a file that is not named,
    or the plan is one of pools."""
    if plan.pools:
        raise InputError(
            "a plan of prefill and decode pools is not explained",
            got=f"{len(plan.pools)} pools",
            hint="its report shows both pools; explain the plan of --serving agg",
        )
    spec = model_of(plan, model)
    machine, way = plan.cluster, plan.strategy
    try:
        cluster = load_cluster(machine.name, nodes=machine.nodes, device=machine.device)
    except InputError as error:
        raise InputError(
            "the plan's cluster is a preset, or a file in this place", got=str(error)[:160]
        ) from None
    question = Question(
        spec=spec,
        cluster=cluster,
        engine=load_engine(plan.request.engine_profile),
        workload=plan.request.workload,
        limits=plan.request.limits,
        objective=plan.request.objective,
        cards=way.ranks,
    )
    choice = Choice(
        attention=way.attention,
        weight_dtype=way.weight_dtype,
        kv_dtype=way.kv_dtype,
        weight_prefetch=way.weight_prefetch,
        fused_collectives=way.fused_collectives,
        collectives=way.collectives,
    )
    scorer = LayoutScorer(question, way.parallelism())
    kept = priced(scorer, choice, way.batch, way.chunk)
    return Known(
        plan=plan,
        spec=spec,
        cluster=cluster,
        question=question,
        scorer=scorer,
        choice=choice,
        kept=kept,
    )


def priced(scorer: LayoutScorer, choice: Choice, batch: int, chunk: int) -> Kept:
    """One strategy with every column of its score."""
    slots, tokens = np.array([float(batch)]), np.array([float(chunk)])
    scores = scorer.score(choice, slots, tokens)
    at = np.zeros(1, dtype=np.int64)
    return kept_at(scores, scorer.parallel, choice, slots, tokens, at).one(0)


def explain(plan: Plan, *, model: str | None = None, shadows: bool = True) -> Explanation:
    """Why this plan. `model`: its `config.json`, where the plan's own is not found."""
    known = known_of(plan, model)
    return Explanation(
        model=plan.model.name,
        cluster=plan.cluster.name,
        strategy=plan.strategy,
        performance=plan.performance,
        objective=plan.request.objective,
        bindings=tuple(_bindings(known)),
        breakdown=plan.breakdown,
        memory=plan.memory,
        shadows=tuple(_shadows(known)) if shadows else (),
    )


def _bindings(known: Known) -> Iterator[Binding]:
    """Each limit, and whether more slots break it first."""
    kept, question = known.kept, known.question
    first = _first_broken(known)
    columns = kept.columns
    held = {
        "memory": (columns["memory_bytes"], known.scorer.ledger.capacity_bytes),
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


def _first_broken(known: Known) -> set[str]:
    """Limits that the next number of slots, or the next larger step, breaks."""
    way, work = known.plan.strategy, known.question.workload
    if work.concurrency is not None and way.batch * way.dp >= work.concurrency:
        return set()
    grid = [size for size in batch_grid(_MOST_SLOTS) if size > way.batch]
    found = set()
    for batch, chunk in [(grid[0], way.chunk)] if grid else []:
        one = priced(known.scorer, known.choice, batch, max(chunk, batch * (1 + way.mtp)))
        if one.limit >= 0:
            name, most = LIMITS[one.limit], known.question.limits.ttft_s
            queue = name == "ttft" and one.columns["ttft_s"] <= (most or 0.0)
            found.add("ttft_at_rate" if queue else name)
    return found


def _shadows(known: Known) -> Iterator[Shadow]:
    """One change of the question after another."""
    plan, request = known.plan, known.plan.request
    yield _changed(known, *_more_cards(known))
    for tier in known.cluster.tiers:
        if tier.ranks > 1:
            words = f"{tier.name} links {FASTER - 1:.0%} faster"
            yield _changed(known, words, cluster=faster(known.cluster, tier))
    if plan.strategy.kv_dtype in ("bf16", "fp16"):
        yield _changed(known, "an int8 KV cache", kv_dtype="int8")
    for name, limit in (("ttft", request.limits.ttft_s), ("tpot", request.limits.tpot_s)):
        if limit is not None:
            words = f"{name.upper()} up to {limit * FASTER * 1e3:g} ms"
            yield _changed(known, words, **{f"{name}_ms": limit * FASTER * 1e3})
    for row in plan.quantization:
        if row.weight_dtype != plan.strategy.weight_dtype:
            words = f"{row.weight_dtype} weights, {row.kv_dtype} KV"
            yield Shadow(
                change=words, objective=row.objective, gain=row.gain, strategy=row.strategy
            )


def _more_cards(known: Known) -> tuple[str, Any]:
    """The next number of cards that a job may have, in words and as options."""
    cluster, cards = known.cluster, known.plan.request.cards
    inside = [count for count in cluster.rank_counts if count > cards]
    more = inside[0] if inside else cards + cluster.ranks_per_node
    return f"{more} cards in place of {cards}", {"cards": more}


def faster(cluster: Cluster, tier: Tier) -> Cluster:
    """The cluster with links of one tier that are a quarter faster."""
    changed = replace(
        tier,
        bytes_per_s=tier.bytes_per_s * FASTER,
        link_bytes_per_s=tier.link_bytes_per_s * FASTER,
    )
    tiers = tuple(changed if one is tier else one for one in cluster.tiers)
    return replace(cluster, tiers=tiers)


def _plain(objective: str) -> str:
    """The objective on cards that are given."""
    return "throughput" if objective in ("cards", "cost") else objective


def _asked(known: Known) -> dict[str, Any]:
    """The plan's question as options of a search."""
    request, work = known.plan.request, known.plan.request.workload
    limits = request.limits
    return {
        "model": known.spec,
        "cluster": known.cluster,
        "cards": request.cards,
        "input_len": work.input_len,
        "output_len": work.output_len,
        "concurrency": work.concurrency,
        "rate": work.request_rate,
        "prefix_hit": work.prefix_hit or None,
        "ttft_ms": None if limits.ttft_s is None else limits.ttft_s * 1e3,
        "tpot_ms": None if limits.tpot_s is None else limits.tpot_s * 1e3,
        "ttft_p99_ms": None if limits.ttft_p99_s is None else limits.ttft_p99_s * 1e3,
        "tpot_p99_ms": None if limits.tpot_p99_s is None else limits.tpot_p99_s * 1e3,
        "objective": _plain(request.objective),
        "weight_dtype": known.plan.strategy.weight_dtype,
        "kv_dtype": known.plan.strategy.kv_dtype,
        "attention": request.attention,
        "engine_profile": request.engine_profile,
        "weight_prefetch": request.weight_prefetch,
        "fused_collectives": request.fused_collectives,
        "mtp": request.mtp,
        "mtp_acceptance": work.mtp_acceptance,
        "cp": request.cp,
        "module_tp": request.module_tp,
        "only": request.only or None,
        "collectives": request.collectives,
    }


def _changed(known: Known, change: str, more: Any = None, **different: Any) -> Shadow:
    """The best plan of the question with some options different."""
    asked = {**_asked(known), **(more or {}), **different}
    cards, cluster = asked["cards"], asked["cluster"]
    if cards > cluster.ranks:
        nodes = -(-cards // cluster.ranks_per_node)
        asked["cluster"] = load_cluster(cluster.name, nodes=nodes, device=cluster.device.name)
    try:
        plan = search(**asked).plan
    except (InputError, InfeasibleError) as error:
        return Shadow(change=change, objective=None, gain=None, strategy=None, note=str(error))
    own, now = known.kept.columns["objective"], _objective(plan)
    return Shadow(change=change, objective=now, gain=now / own, strategy=plan.strategy)


def _objective(plan: Plan) -> float:
    """What is maximised: 1 / latency, else output tokens a second."""
    if plan.request.objective == "latency":
        return 1.0 / plan.performance.end_to_end_s
    return plan.performance.output_tokens_per_s
