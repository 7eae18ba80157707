"""A plan's question, asked again: as it was, or with one thing different."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.hardware import Cluster, Tier
from shardplan.models.errors import InputError
from shardplan.models.spec import ModelSpec
from shardplan.search.evaluate import Question
from shardplan.search.plan import ClusterInfo, Plan
from shardplan.search.proof import model_of
from shardplan.search.space import Choice

__all__ = ["FASTER", "Known", "asked_of", "faster", "known_of", "machine_of", "objective_of"]

FASTER = 1.25
"""A link that is a quarter faster, a limit that is a quarter looser."""
_LIMITS = ("ttft", "tpot", "ttft_p99", "tpot_p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A plan and its question; with pools, as a deployment without them would be asked it."""

    plan: Plan
    spec: ModelSpec
    cluster: Cluster
    question: Question
    choice: Choice


def known_of(plan: Plan, model: str | None = None) -> Known:
    """The question of a plan; `InputError` where a part of it came from a file that is not named.

    `model`: its `config.json`, where the plan's own is not found.
    """
    spec, cluster = model_of(plan, model), machine_of(plan.cluster)
    question = Question(
        spec=spec,
        cluster=cluster,
        engine=load_engine(plan.request.engine_profile),
        workload=plan.request.workload,
        limits=plan.request.limits,
        objective=plan.request.objective,
        cards=plan.cards,
    )
    return Known(
        plan=plan, spec=spec, cluster=cluster, question=question, choice=Choice.of(plan.strategy)
    )


def machine_of(machine: ClusterInfo) -> Cluster:
    """The cluster that a plan names. `InputError` where it is no preset."""
    try:
        return load_cluster(machine.name, nodes=machine.nodes, device=machine.device)
    except InputError as error:
        raise InputError(
            "the plan's cluster is a preset, or a file in this place", got=str(error)[:160]
        ) from None


def asked_of(known: Known) -> dict[str, Any]:
    """The plan's question as options of a search, of its own types and on cards that are given."""
    plan, request = known.plan, known.plan.request
    work, limits = request.workload, request.limits
    return {
        "model": known.spec,
        "cluster": known.cluster,
        "cards": request.cards,
        "input_len": work.input_len,
        "output_len": work.output_len,
        "concurrency": work.concurrency,
        "rate": work.request_rate,
        "prefix_hit": work.prefix_hit or None,
        **{
            f"{name}_ms": None if (limit := getattr(limits, f"{name}_s")) is None else limit * 1e3
            for name in _LIMITS
        },
        "objective": "throughput" if request.objective in ("cards", "cost") else request.objective,
        "weight_dtype": request.weight_dtype if plan.pools else plan.strategy.weight_dtype,
        "kv_dtype": plan.strategy.kv_dtype,
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


def objective_of(plan: Plan) -> float:
    """What is maximised: 1 / latency, else output tokens a second."""
    if plan.request.objective == "latency":
        return 1.0 / plan.performance.end_to_end_s
    return plan.performance.output_tokens_per_s


def faster(cluster: Cluster, tier: Tier) -> Cluster:
    """The cluster with links of one tier that are a quarter faster."""
    changed = replace(
        tier,
        bytes_per_s=tier.bytes_per_s * FASTER,
        link_bytes_per_s=tier.link_bytes_per_s * FASTER,
    )
    tiers = tuple(changed if one is tier else one for one in cluster.tiers)
    return replace(cluster, tiers=tiers)
