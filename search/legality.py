"""Legality rules: sentences with sources (`data/rules.toml`) and the predicates that check them.

A predicate takes a `Subject` and says whether the rule holds. Rules are checked in the order of
`RULES`; the first that is broken names the reason.
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
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec

__all__ = ["RULES", "Rule", "Subject", "first_broken_rule", "rules"]

_EXPERTS_OVER_ALL = ("vllm-ascend", "vllm-ascend-eager", "vllm")
_NO_PIPELINE = ("mindie",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a rule looks at."""

    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    parallel: Parallelism


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
    return not joined_by_roce or s.parallel.tp <= max(fast, default=1)


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
