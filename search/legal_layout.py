"""Layout rules that every engine obeys: what the graph divides into, and what links allow.

Symbols: r = ranks of one replica, the part of a deployment that shares its experts; R = ranks of
the widest tier that is not RoCE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from shardplan.costmodel.hardware import Cluster
from shardplan.models.errors import LayoutError
from shardplan.models.modules import MODULES
from shardplan.models.parallel import Parallelism, make_mesh
from shardplan.models.ranks import axis_stride
from shardplan.search.mtp import most_depth
from shardplan.search.rulebook import Subject, value

__all__ = ["LAYOUT_RULES", "fast_ranks", "is_sent", "replica_ranks"]


def _width(s: Subject) -> bool:
    par, moe = s.parallel, s.spec.moe
    tp = par.tp
    dense = s.spec.dense_layers == 0 or par.ffn_tp > 0 or s.spec.ffn % tp == 0
    if moe is None:
        return dense
    split = tp // math.gcd(tp, par.ep)
    shared = par.shared_tp > 0 or moe.shared_ffn % tp == 0
    return dense and moe.ffn % split == 0 and shared


def _vocabulary(s: Subject) -> bool:
    own = s.parallel.head_tp > 0 and s.parallel.embed_tp > 0
    return own or s.spec.vocab % s.parallel.tp == 0


def _plain(par: Parallelism) -> bool:
    """Whether contexts lie on one rank and every module over tp."""
    return par.cp == 1 and not any(getattr(par, f"{module}_tp") for module in MODULES)


def _nests(s: Subject) -> bool:
    """Whether contexts, experts and modules find places in one mesh."""
    if _plain(s.parallel):
        return True
    try:
        make_mesh(s.spec, s.parallel)
    except LayoutError:
        return False
    return True


def _ep_experts(s: Subject) -> bool:
    moe, ep = s.spec.moe, s.parallel.ep
    return ep == 1 if moe is None else moe.experts % ep == 0


def _ep_shape(s: Subject) -> bool:
    tp, dp, ep = s.parallel.tp, s.parallel.dp, s.parallel.ep
    if s.parallel.cp > 1:
        return True  # `mesh` says
    if ep > tp:
        return ep % tp == 0 and dp % (ep // tp) == 0
    if tp % ep:
        return False
    ways = tp if s.spec.mla is not None else math.gcd(tp, s.spec.kv_heads)
    low, high = sorted((ways, ep))
    return high % low == 0


def is_sent(s: Subject) -> bool:
    """Whether tokens are sent to the experts of other ranks."""
    return s.parallel.exchange == "alltoall" and s.parallel.ep > 1


def replica_ranks(s: Subject) -> int:
    """Ranks of one replica."""
    return s.parallel.ranks // s.parallel.replicas


def fast_ranks(cluster: Cluster) -> float:
    """Ranks that links other than RoCE join: those of a node or supernode; no end without RoCE."""
    fast = [tier.ranks for tier in cluster.tiers if tier.topology != "roce"]
    return max(fast, default=1) if len(fast) < len(cluster.tiers) else math.inf


def _tp_tier(s: Subject) -> bool:
    reach = s.parallel.tp * axis_stride(s.parallel, "tp")
    return s.parallel.tp == 1 or reach <= fast_ranks(s.cluster)


def _rings(s: Subject) -> bool:
    ranks = replica_ranks(s)
    return ranks in value("910a-rings", "ranks") or ranks % s.cluster.ranks_per_node == 0


LAYOUT_RULES: Mapping[str, Callable[[Subject], bool]] = MappingProxyType(
    {
        "tp-heads": lambda s: s.spec.heads % s.parallel.tp == 0,
        "tp-vocabulary": _vocabulary,
        "pp-layers": lambda s: s.parallel.pp <= s.spec.layers,
        "sp-tp": lambda s: s.parallel.tp > 1 or not s.parallel.sp,
        "ep-experts": _ep_experts,
        "ep-shape": _ep_shape,
        "tp-width": _width,
        "mesh": _nests,
        "mtp-layers": lambda s: s.parallel.mtp == 0 or s.spec.mtp_layers > 0,
        "mtp-engine": lambda s: (
            not s.spec.mtp_layers or s.parallel.mtp <= most_depth(s.spec, s.engine)
        ),
        "tp-tier": _tp_tier,
        "a3-modules": lambda s: (ranks := replica_ranks(s)) == 1 or ranks % 2 == 0,
        "910a-rings": _rings,
    }
)
