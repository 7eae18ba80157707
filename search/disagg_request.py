"""From a question to two pools: what each role runs on, and what joins them.

A prefill pool on a cluster of its own is resolved as a question of its own (device, types,
engine), with what must agree held against the decode pool: one engine, one type of cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardplan.costmodel.catalog import cluster_names, load_cluster
from shardplan.costmodel.disagg import link_between, unbounded_utilisation
from shardplan.costmodel.hardware import Cluster
from shardplan.models.errors import InputError
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.disagg_space import Pool, Role, instance_sizes, prefill_grid
from shardplan.search.evaluate import Question
from shardplan.search.request import Asked, Resolved, resolve
from shardplan.search.rulebook import Subject
from shardplan.search.space import batch_grid

__all__ = ["Sides", "disagg_question", "resolve_sides", "role_question"]

_MOST_SLOTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """The question as each pool sees it; `decode` also stands for the whole deployment."""

    prefill: Resolved
    decode: Resolved
    shared: bool
    fabrics: tuple[Cluster, Cluster]
    """Clusters of prefill and decode; apart, each at its largest, with all its tiers."""


def _at_largest(named: str | Cluster, cluster: Cluster) -> Cluster:
    """The cluster with the tiers that join it to others."""
    if isinstance(named, Cluster):
        if named.name not in cluster_names():
            return named
        named = named.name
    return load_cluster(named, nodes=cluster.max_nodes)


def resolve_sides(asked: Asked, resolved: Resolved) -> Sides:
    """Both pools of a question that was resolved. `InputError` where they cannot work together."""
    if asked.prefill_cluster is None:
        if resolved.request.cards < 2:  # noqa: PLR2004
            raise InputError(
                "disaggregated serving takes an instance of either role, on cards of its own",
                got=f"cards={resolved.request.cards}",
                hint="use --cards 2, or --serving agg",
            )
        return Sides(
            prefill=resolved,
            decode=resolved,
            shared=True,
            fabrics=(resolved.cluster, resolved.cluster),
        )
    engine = resolved.engine
    apart = replace(
        asked,
        model=resolved.spec,
        cluster=asked.prefill_cluster,
        nodes=asked.prefill_nodes,
        cards=asked.prefill_cards,
        device=asked.prefill_device,
        engine_profile=asked.engine_profile or engine.name,
        serving="agg",
        prefill_cluster=None,
        prefill_nodes=None,
        prefill_cards=None,
        prefill_device=None,
        prefill_card_price=None,
    )
    own = resolve(apart)
    _check_cache(resolved, own)
    notes = [
        f"prefill pool: {note}"
        for note in own.notes
        if note not in resolved.notes and "aggregated" not in note and "engine profile" not in note
    ]
    request = resolved.request.model_copy(update={"prefill_cards": own.request.cards})
    resolved = replace(resolved, request=request, notes=(*resolved.notes, *notes))
    return Sides(
        prefill=own,
        decode=resolved,
        shared=False,
        fabrics=(
            _at_largest(asked.prefill_cluster, own.cluster),
            _at_largest(asked.cluster, resolved.cluster),
        ),
    )


def _check_cache(decode: Resolved, prefill: Resolved) -> None:
    kinds = [side.choices[0].kv_dtype for side in (prefill, decode)]
    if kinds[0] != kinds[1]:
        both = [
            kind
            for kind in decode.cluster.device.kv_dtypes
            if kind in prefill.cluster.device.kv_dtypes
        ]
        raise InputError(
            "both pools hold the cache as one type",
            got=f"prefill {kinds[0]} on {prefill.cluster.device.name}, decode {kinds[1]} on "
            f"{decode.cluster.device.name}",
            hint=f"use --kv-dtype {both[0]}" if both else "name devices with a common type",
        )


def disagg_question(sides: Sides) -> DisaggQuestion:
    """The two pools and the link between them."""
    work, limits = sides.decode.request.workload, sides.decode.request.limits
    prices, costs = sides.decode.prices, sides.decode.request.objective == "cost"
    slots = batch_grid(work.concurrency or _MOST_SLOTS)
    decode = _pool("decode", sides.decode, slots, sides.shared)
    grid = prefill_grid(sides.prefill.engine, _computed(sides))
    prefill = _pool("prefill", sides.prefill, grid, sides.shared)
    return DisaggQuestion(
        prefill=prefill,
        decode=decode,
        shared=sides.shared,
        link=link_between(*sides.fabrics, decode.cards, same=sides.shared),
        limits=limits,
        objective="cards" if costs else sides.decode.request.objective,
        prices=prices.pair if costs and prices is not None else (1.0, 1.0),
        spare=sides.decode.spare,
    )


def _computed(sides: Sides) -> int:
    """Tokens of a prompt that are not in the prefix cache."""
    work = sides.decode.request.workload
    return max(-int(-work.input_len * (1.0 - work.prefix_hit) // 1), 1)


def _pool(role: Role, resolved: Resolved, grid: tuple[int, ...], shared: bool) -> Pool:
    cards = resolved.request.cards
    subject = Subject(
        spec=resolved.spec,
        cluster=resolved.cluster,
        engine=resolved.engine,
        parallel=Parallelism(),
    )
    return Pool.of(
        role,
        subject,
        cards=cards,
        sizes=instance_sizes(resolved.cluster, cards - 1 if shared else cards),
        choices=resolved.choices,
        grid=grid,
        workload=resolved.request.workload,
        reach=resolved.reach,
    )


def role_question(question: DisaggQuestion, pool: Pool, cards: int) -> Question:
    """One pool's side of the question; of prefill, a request ends with its first token."""
    work = pool.workload
    if pool.role == "prefill":
        work = work.model_copy(update={"output_len": 1})
    return Question(
        spec=pool.spec,
        cluster=pool.cluster,
        engine=pool.engine,
        workload=work,
        limits=question.limits,
        objective=question.objective,
        cards=cards,
    )


def assumptions(question: DisaggQuestion) -> list[str]:
    """What the prices of a disaggregated deployment rest on, as notes."""
    link, demand = question.link, question.demand
    notes = [
        "prefill and decode run on pools of their own (disaggregated serving); a prompt's cache is "
        f"sent over the {link.tier} tier once it is whole, at an assumed "
        f"{link.bytes_per_s / 1e9:.3g} GB/s from rank to rank",
        "decode instances make all output tokens: the first is computed again once the cache is "
        "there (vllm-ascend 0.23.0, vLLM)",
        "instances are parts that divide a node, or whole nodes; prompts wait in one queue for all "
        "prefill instances, come at random and find steps as full as the rate makes them",
    ]
    if question.limits.has_tails:
        notes.append(
            "99th percentiles of pools: TTFT of a queue of prompts for all prefill instances, at "
            "a rate with a decode slot free for 99 of 100 requests; TPOT of all slots in use, "
            "which no request's exceeds"
        )
    elif demand.finds_slots:
        notes.append(
            "requests that come at the rate find a decode slot free, 99 of 100 of them, so that "
            "TTFT keeps its limit there"
        )
    if demand.in_flight is None and demand.mean_ttft_s is None:
        notes.append(
            f"no limit on TTFT bounds the queue: prefill instances are used to "
            f"{unbounded_utilisation():.0%} at most (assumed)"
        )
    if demand.in_flight == 1.0 and question.decode.workload.concurrency is None:
        notes.append("no rate or concurrency was given: latency is that of one request at a time")
    return notes
