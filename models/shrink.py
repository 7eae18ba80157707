"""A small model and mesh that keep what a strategy can get wrong.

Kept: how many ways each dim is cut, heads per kv head, kv heads and experts per rank (up to two),
which templates exist, pipeline stages and which of them are longer, the order of mesh axes.
Reduced: widths, head sizes, vocabulary, layers, and data-parallel ranks above a limit (one prime
factor at a time, replicas first, so that every sub-axis that had ranks still has at least two).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from shardplan.models.parallel import Parallelism, balanced_stages
from shardplan.models.spec import MlaSpec, ModelSpec, MoeSpec

__all__ = ["Case", "shrink"]

STAGE_RANKS = 64
LEAST_SEQUENCES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A small model, the strategy on it, and a request that every cut divides."""

    spec: ModelSpec
    parallel: Parallelism
    batch: int
    tokens: int


def _smallest_prime(n: int) -> int:
    return next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)


def _shrink_axes(spec: ModelSpec, par: Parallelism) -> Parallelism:
    shared = max(par.ep // par.tp, 1) if spec.moe else 1
    replicas = par.dp // shared
    while par.tp * replicas * shared > STAGE_RANKS:
        if replicas > _smallest_prime(replicas):
            replicas //= _smallest_prime(replicas)
        elif shared > _smallest_prime(shared):
            shared //= _smallest_prime(shared)
        else:
            break
    ep = par.ep if par.ep <= par.tp else par.tp * shared
    return replace(par, dp=replicas * shared, ep=ep)


def _per_rank(total: int, ways: int) -> int:
    """Two per rank where there were more than one."""
    return ways * min(total // ways, 2)


def _kv_heads(spec: ModelSpec, tp: int) -> int:
    ways = math.gcd(tp, spec.kv_heads)
    for each in range(min(spec.kv_heads // ways, 2), spec.kv_heads // ways + 1):
        if math.gcd(tp, ways * each) == ways:
            return ways * each
    return spec.kv_heads


def _shrink_moe(moe: MoeSpec, par: Parallelism, dense: int) -> MoeSpec:
    groups = min(moe.expert_groups, 2)
    topk = groups if groups > 1 else min(moe.experts_per_token, 2)
    experts = _per_rank(moe.experts, par.ep)
    while experts <= topk or experts % groups:
        experts += par.ep
    split = par.tp // min(par.ep, par.tp)
    return replace(
        moe,
        experts=experts,
        experts_per_token=topk,
        ffn=2 * split,
        shared_ffn=2 * par.tp if moe.shared_ffn else 0,
        dense_layers=dense,
        expert_groups=groups,
    )


def _shrink_stages(spec: ModelSpec, par: Parallelism) -> tuple[int, ...]:
    layers = balanced_stages(spec, par)
    if par.pp == 1:
        return (3 if spec.moe and spec.dense_layers else 2,)
    return tuple(1 + (count > min(layers)) for count in layers)


def shrink(spec: ModelSpec, par: Parallelism) -> Case:
    """The small case of a strategy on a model."""
    small = _shrink_axes(spec, par)
    stages = _shrink_stages(spec, par)
    small = replace(small, stage_layers=stages)
    kv = par.tp * min(spec.heads // par.tp, 2) if spec.mla else _kv_heads(spec, par.tp)
    queries = 1 if spec.mla else _per_rank(spec.queries_per_kv, par.tp // math.gcd(par.tp, kv))
    dense = min(spec.dense_layers, 1) if spec.moe else 0
    model = replace(
        spec,
        name=f"{spec.name}/small",
        hidden=8,
        layers=sum(stages),
        heads=kv * queries,
        kv_heads=kv,
        head_dim=4,
        ffn=2 * par.tp,
        vocab=par.tp * max(2, -(-16 // par.tp)),
        sliding_layers=sum(stages) // 2 if spec.sliding_layers else 0,
        sliding_window=3 if spec.sliding_window else None,
        mla=_shrink_mla(spec.mla) if spec.mla else None,
        moe=_shrink_moe(spec.moe, small, dense) if spec.moe else None,
    )
    cuts_tokens = small.sp or (small.ep > 1 and small.exchange == "alltoall")
    batch = small.dp * (small.tp if cuts_tokens else 1)
    tokens = small.tp * max(1, -(-4 // small.tp)) if cuts_tokens else 4
    return Case(
        spec=model,
        parallel=small,
        batch=batch if batch >= LEAST_SEQUENCES else 2 * batch,
        tokens=tokens,
    )


def _shrink_mla(mla: MlaSpec) -> MlaSpec:
    return MlaSpec(
        q_lora_rank=None if mla.q_lora_rank is None else 6,
        kv_lora_rank=6,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
    )
