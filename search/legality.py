"""Legality rules: sentences with sources (`data/rules.toml`) and the predicates that check them.

A predicate takes a `Subject` and says whether the rule holds. Rules are checked in the order of
`RULES`; the first that is broken names the reason. `SWITCH_RULES` say where an engine's switches
(`shardplan.costmodel.overlap`) may be on; they look at the weight dtype too.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.optable import NO_OVERLAP, Overlap
from shardplan.costmodel.placement import group_tiers
from shardplan.costmodel.weight_types import parts
from shardplan.models.parallel import Parallelism
from shardplan.models.ranks import axis_stride
from shardplan.models.spec import ModelSpec
from shardplan.search.families import device_family

__all__ = [
    "RULES",
    "SWITCH_RULES",
    "Rule",
    "Subject",
    "first_broken_rule",
    "first_broken_switch_rule",
    "rules",
    "unsupported_switch",
]

_EXPERTS_OVER_ALL = ("vllm-ascend", "vllm-ascend-eager", "vllm")
_NO_PIPELINE = ("mindie",)
_FUSED_RANKS = {"a2": (2, 4, 8), "950": (2, 4, 8, 16, 32, 64)}
_PREFETCH_FAMILIES = ("a2", "a3", "950")
_PREFETCH_WITH_SP = ("vllm-ascend", "vllm-ascend-eager")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a rule looks at."""

    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    parallel: Parallelism
    overlap: Overlap = NO_OVERLAP
    weight_dtype: str = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule as it is told to people."""

    id: str
    sentence: str
    source: str
    scope: str


def _width(s: Subject) -> bool:
    tp, moe = s.parallel.tp, s.spec.moe
    dense = s.spec.dense_layers == 0 or s.spec.ffn % tp == 0
    if moe is None:
        return dense
    split = tp // math.gcd(tp, s.parallel.ep)
    return dense and moe.ffn % split == 0 and moe.shared_ffn % tp == 0


def _ep_experts(s: Subject) -> bool:
    moe, ep = s.spec.moe, s.parallel.ep
    return ep == 1 if moe is None else moe.experts % ep == 0


def _ep_shape(s: Subject) -> bool:
    tp, dp, ep = s.parallel.tp, s.parallel.dp, s.parallel.ep
    if ep > tp:
        return ep % tp == 0 and dp % (ep // tp) == 0
    if tp % ep:
        return False
    ways = tp if s.spec.mla is not None else math.gcd(tp, s.spec.kv_heads)
    low, high = sorted((ways, ep))
    return high % low == 0


def _ep_engine(s: Subject) -> bool:
    par = s.parallel
    return s.engine.name not in _EXPERTS_OVER_ALL or par.ep in (1, par.tp * par.dp)


def _tp_tier(s: Subject) -> bool:
    fast = [tier.ranks for tier in s.cluster.tiers if tier.topology != "roce"]
    joined_by_roce = len(fast) < len(s.cluster.tiers)
    reach = s.parallel.tp * axis_stride(s.parallel, "tp")
    return not joined_by_roce or s.parallel.tp == 1 or reach <= max(fast, default=1)


RULES: Mapping[str, Callable[[Subject], bool]] = MappingProxyType(
    {
        "tp-heads": lambda s: s.spec.heads % s.parallel.tp == 0,
        "tp-vocabulary": lambda s: s.spec.vocab % s.parallel.tp == 0,
        "pp-layers": lambda s: s.parallel.pp <= s.spec.layers,
        "sp-tp": lambda s: s.parallel.tp > 1 or not s.parallel.sp,
        "ep-experts": _ep_experts,
        "ep-shape": _ep_shape,
        "tp-width": _width,
        "ep-engine": _ep_engine,
        "pp-engine": lambda s: s.parallel.pp == 1 or s.engine.name not in _NO_PIPELINE,
        "tp-tier": _tp_tier,
    }
)


def _family(s: Subject) -> str:
    family = device_family(s.cluster.device.soc_versions)
    return "" if family is None else str(family["name"])


def _fused_group(s: Subject) -> bool:
    if s.parallel.tp not in _FUSED_RANKS.get(_family(s), ()):
        return False
    spans = group_tiers(s.cluster, group=s.parallel.tp, stride=axis_stride(s.parallel, "tp"))
    return len(spans) == 1 and spans[0].tier.topology != "roce"


def _prefetched(s: Subject) -> bool:
    able = set(s.engine.weight_prefetch)
    has = {"gate_up", "down"} if s.spec.moe is None else {"experts"}
    return bool(able & (has | ({"qkv_a"} if s.spec.mla is not None else set())))


def _prefetch_sp(s: Subject) -> bool:
    custom = s.parallel.sp or s.overlap.fused_collectives
    return s.engine.name not in _PREFETCH_WITH_SP or s.spec.moe is not None or custom


def _unless(switch: str, holds: Callable[[Subject], bool]) -> Callable[[Subject], bool]:
    """A rule that only binds where a switch is on."""
    return lambda s: not getattr(s.overlap, switch) or holds(s)


_FUSED = functools.partial(_unless, "fused_collectives")
_PREFETCH = functools.partial(_unless, "weight_prefetch")

SWITCH_RULES: Mapping[str, Callable[[Subject], bool]] = MappingProxyType(
    {
        "fused-device": _FUSED(lambda s: _family(s) in _FUSED_RANKS),
        "fused-engine": _FUSED(
            lambda s: set(parts(s.weight_dtype)) <= set(s.engine.fused_collectives)
        ),
        "fused-group": _FUSED(_fused_group),
        "fused-sp": _FUSED(lambda s: not s.parallel.sp),
        "prefetch-device": _PREFETCH(lambda s: _family(s) in _PREFETCH_FAMILIES),
        "prefetch-engine": _PREFETCH(_prefetched),
        "prefetch-sp": _PREFETCH(_prefetch_sp),
    }
)
_ANY_LAYOUT = ("fused-device", "fused-engine", "prefetch-device", "prefetch-engine")
"""Rules that no layout can change."""


def first_broken_switch_rule(subject: Subject) -> str | None:
    """Id of the first rule that the switches of a layout break; None when they are legal."""
    if subject.overlap == NO_OVERLAP:
        return None
    return next((name for name, holds in SWITCH_RULES.items() if not holds(subject)), None)


def unsupported_switch(
    spec: ModelSpec, cluster: Cluster, engine: EngineProfile, overlap: Overlap, weight_dtype: str
) -> str | None:
    """Id of the first rule that rules a switch out whatever the layout; None where none does."""
    subject = Subject(
        spec=spec,
        cluster=cluster,
        engine=engine,
        parallel=Parallelism(),
        overlap=overlap,
        weight_dtype=weight_dtype,
    )
    return next((name for name in _ANY_LAYOUT if not SWITCH_RULES[name](subject)), None)


@functools.cache
def rules() -> Mapping[str, Rule]:
    """Every rule with its sentence, source and scope, by id."""
    text = (resources.files("shardplan.search") / "data" / "rules.toml").read_text("utf-8")
    return MappingProxyType(
        {name: Rule(id=name, **table) for name, table in tomllib.loads(text).items()}
    )


def first_broken_rule(subject: Subject) -> str | None:
    """Id of the first rule that a layout breaks; None when it is legal."""
    return next((name for name, holds in RULES.items() if not holds(subject)), None)
