"""Rules on what changes no graph: types of weights and cache, and the switches of an engine.

`FORMAT_RULES` look at types alone, so no layout changes their answer. `SWITCH_RULES` say where an
engine's switches (`shardplan.costmodel.overlap`) may be on; they look at layout and types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

from shardplan.costmodel.placement import group_tiers
from shardplan.costmodel.weight_types import parts, type_of
from shardplan.models.ranks import axis_stride
from shardplan.search.rulebook import Subject, family_name, value

__all__ = ["ANY_LAYOUT", "FORMAT_RULES", "SWITCH_RULES"]


def _not_weights(*dtypes: str) -> Callable[[Subject], bool]:
    return lambda s: not set(parts(s.weight_dtype)) & set(dtypes)


def _dense_weights(*dtypes: str) -> Callable[[Subject], bool]:
    return lambda s: s.spec.moe is None or type_of(s.weight_dtype, "experts") not in dtypes


def _int8_cache(holds: Callable[[Subject], bool]) -> Callable[[Subject], bool]:
    return lambda s: s.kv_dtype != "int8" or holds(s)


FORMAT_RULES: Mapping[str, Callable[[Subject], bool]] = MappingProxyType(
    {
        "w8a16-experts": _dense_weights("w8a16"),
        "w8a8-static-experts": _dense_weights("w8a8_static"),
        "w8a8sc-experts": _dense_weights("w8a8sc"),
        "w4a16-dense": lambda s: s.spec.moe is not None or "w4a16" not in parts(s.weight_dtype),
        "w8a16-310p": _not_weights("w8a16"),
        "w8a16-mindie": _not_weights("w8a16"),
        "int8-cache-device": _int8_cache(lambda _: False),
        "int8-cache-latent": _int8_cache(lambda s: s.spec.mla is None or s.role == "decode"),
        "int8-cache-mindie": _int8_cache(lambda _: False),
        "int8-cache-mindie-weights": _int8_cache(lambda s: parts(s.weight_dtype) == ("w8a8",)),
    }
)


def _fused_group(s: Subject) -> bool:
    sizes = value("fused-group", "ranks").get(family_name(s.cluster.device), ())
    if s.parallel.tp not in sizes:
        return False
    spans = group_tiers(s.cluster, group=s.parallel.tp, stride=axis_stride(s.parallel, "tp"))
    return len(spans) == 1 and spans[0].tier.topology != "roce"


def _prefetched(s: Subject) -> bool:
    able = set(s.engine.weight_prefetch)
    has = {"gate_up", "down"} if s.spec.moe is None else {"experts"}
    return bool(able & (has | ({"qkv_a"} if s.spec.mla is not None else set())))


def _prefetch_sp(s: Subject) -> bool:
    return s.spec.moe is not None or s.parallel.sp or s.overlap.fused_collectives


def _unless(switch: str, holds: Callable[[Subject], bool]) -> Callable[[Subject], bool]:
    """A rule that only binds where a switch is on."""
    return lambda s: not getattr(s.overlap, switch) or holds(s)


_FUSED = functools.partial(_unless, "fused_collectives")
_PREFETCH = functools.partial(_unless, "weight_prefetch")

SWITCH_RULES: Mapping[str, Callable[[Subject], bool]] = MappingProxyType(
    {
        "fused-device": _FUSED(lambda _: False),
        "fused-engine": _FUSED(
            lambda s: set(parts(s.weight_dtype)) <= set(s.engine.fused_collectives)
        ),
        "fused-group": _FUSED(_fused_group),
        "fused-sp": _FUSED(lambda s: not s.parallel.sp),
        "prefetch-device": _PREFETCH(lambda _: False),
        "prefetch-engine": _PREFETCH(_prefetched),
        "prefetch-sp": _PREFETCH(_prefetch_sp),
    }
)
ANY_LAYOUT = ("fused-device", "fused-engine", "prefetch-device", "prefetch-engine")
"""Rules on switches that no layout can change."""
