"""A small model and mesh that keep what a strategy can get wrong.

Kept: how many ways each dim is cut, heads per kv head, kv heads and experts per rank (up to two),
which templates exist, pipeline stages and which of them are longer, the order of mesh axes.
Reduced: widths, head sizes, vocabulary, layers, and data-parallel ranks above a limit (one prime
factor at a time, replicas first, so that every sub-axis that had ranks still has at least two);
context-parallel ranks after them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from shardplan.models.modules import (
    MODULES,
    data_widths,
    expert_groups,
    groups_of,
    module_ranks,
    o_dim,
)
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


def _factors(size: int, widths: tuple[int, ...]) -> list[int]:
    """Ranks of each sub-axis of one axis, major to minor, cut at the widths."""
    chain = (size, *reversed(widths), 1)
    return [a // b for a, b in itertools.pairwise(chain)]


def _minor(factors: list[int], widths: tuple[int, ...], width: int) -> int:
    """What a width has become, of factors that may have shrunk."""
    kept = widths.index(width) + 1 if width > 1 else 0
    return math.prod(factors[len(factors) - kept :])


def _shrink_axes(spec: ModelSpec, par: Parallelism) -> Parallelism:
    within, among = expert_groups(par) if spec.moe else (1, 1)
    widths = data_widths(par)
    data, context = _factors(par.dp, widths), _factors(par.cp, (within,) if within > 1 else ())
    while par.tp * math.prod(data) * math.prod(context) > STAGE_RANKS:
        large = [(one, i) for one in (data, context) for i, n in enumerate(one) if not _prime(n)]
        if not large:
            break
        factors, place = large[0]
        factors[place] //= _smallest_prime(factors[place])
    shared = _minor(data, widths, among)
    shared *= _minor(context, (within,), within)
    sizes = {f"{one}_tp": getattr(par, f"{one}_tp") for one in MODULES}
    for one in MODULES:
        if groups_of(par, one) > 1:
            sizes[f"{one}_tp"] = par.tp * _minor(data, widths, groups_of(par, one))
    return replace(
        par,
        dp=math.prod(data),
        cp=math.prod(context),
        ep=par.ep if par.ep <= par.tp else par.tp * shared,
        **sizes,
    )


def _prime(n: int) -> bool:
    """Whether a sub-axis is as small as it may become."""
    return n == _smallest_prime(n)


def _per_rank(total: int, ways: int) -> int:
    """Two per rank where there were more than one."""
    return ways * min(total // ways, 2)


def _kv_heads(spec: ModelSpec, tp: int) -> int:
    ways = math.gcd(tp, spec.kv_heads)
    for each in range(min(spec.kv_heads // ways, 2), spec.kv_heads // ways + 1):
        if math.gcd(tp, ways * each) == ways:
            return ways * each
    return spec.kv_heads


def _all_kv_heads(spec: ModelSpec, par: Parallelism) -> int:
    """Kv heads that keep how tp, and the groups that share the output projection, cut them."""
    groups = groups_of(par, "o")
    if par.tp == 1 and groups > 1:
        return _per_rank(spec.kv_heads, groups) if o_dim(spec, par) == "K" else spec.kv_heads
    return par.tp * min(spec.heads // par.tp, 2) if spec.mla else _kv_heads(spec, par.tp)


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
        shared_ffn=2 * max(par.tp, module_ranks(par, "shared")) if moe.shared_ffn else 0,
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
    kv = _all_kv_heads(spec, small)
    queries = 1 if spec.mla else _per_rank(spec.queries_per_kv, par.tp // math.gcd(par.tp, kv))
    dense = min(spec.dense_layers, 1) if spec.moe else 0
    table = max(par.tp, module_ranks(small, "embed"), module_ranks(small, "head"))
    width = math.lcm(4, groups_of(small, "o")) if o_dim(spec, small) == "D" else 4
    model = replace(
        spec,
        name=f"{spec.name}/small",
        hidden=8,
        layers=sum(stages),
        heads=kv * queries,
        kv_heads=kv,
        head_dim=width,
        ffn=2 * max(par.tp, module_ranks(small, "ffn")),
        vocab=table * max(2, -(-16 // table)),
        sliding_layers=sum(stages) // 2 if spec.sliding_layers else 0,
        sliding_window=3 if spec.sliding_window else None,
        mla=_shrink_mla(spec.mla, width) if spec.mla else None,
        moe=_shrink_moe(spec.moe, small, dense) if spec.moe else None,
    )
    cuts_tokens = small.sp or (small.ep > 1 and small.exchange == "alltoall")
    ways = small.tp if cuts_tokens else 1
    exchanged = expert_groups(small)[0] if small.exchange == "alltoall" else 1
    batch = small.dp * ways * exchanged
    pieces = small.cp * ways
    tokens = pieces * max(1, -(-4 // pieces))
    return Case(
        spec=model,
        parallel=small,
        batch=batch if batch >= LEAST_SEQUENCES else 2 * batch,
        tokens=tokens,
    )


def _shrink_mla(mla: MlaSpec, width: int) -> MlaSpec:
    return MlaSpec(
        q_lora_rank=None if mla.q_lora_rank is None else 6,
        kv_lora_rank=6,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=width,
    )
