"""Collectives over one or more tiers: alpha-beta forms by topology, floors by launch.

Symbols: n message bytes, p ranks that meet in a tier, b a link's and B a rank's bytes/s, a the time
of a step. `message_bytes` is the full tensor: gathered (all_gather), reduced (all_reduce), before
the reduction (reduce_scatter), of all ranks together (all_to_all: a rank sends (p - 1) / p of its
share n / p), or what one rank sends (send).

Volume / rate and steps of one tier (HCCL user guide, "collective communication algorithms"):

    topology           all_gather, reduce_scatter    all_to_all           steps
    mesh               n/p over b                    n/p^2 over b         1 (all links at once)
    switch, pair       (p-1)/p n over B              (p-1)/p n/p over B   1
    ring, pcie         (p-1)/p n over B              (p-1)/p n/p over B   p - 1
    roce (NHR, RHD)    (p-1)/p n over B              pairwise over B      ceil(log2 p), pairwise p-1

    all_reduce = reduce_scatter + all_gather; send = n over b (mesh) or B, one step

Neighbouring stages of a pipeline that meet in several tiers: send is the mean, by the shares of the
spans.

A tier whose span names an algorithm takes that one's steps and volume (`algorithms`). Where it
names none (`auto`) the table stands for the library's own pick: on roce NHR, which is H-D_R on 2^k
servers and, of the same steps and volume, NB; between the servers of a supernode (switch) all links
at once. HCCL's pick on A2 and A3 goes by size and is not published; on the 910A it is a ring where
servers are no power of two, which is slower than the table by its steps.

    tier  = steps (latency + step_s) + (v + sqrt(v r)) / (rate e)
    floor = floor_s + floor_rank_s log2 g + floor_link_s (g (g - 1) - 2)
    total = max(floor, base_s + sync_s log2 g + protocol + all tiers)

g = ranks of the group, v = the volume of the table, e = efficiency exp(e_r L + e_rr L^2) and
r = ramp_bytes exp(ramp_r L) with L = log2(p / 2), held beyond the fitted ranks; protocol =
protocol_s + protocol_sync_s log2 g from protocol_bytes a rank on (HCCL leaves the vector-core
kernels, AIV, there). Up to `oneshot_bytes` an all_reduce reads every peer's tensor once, at
`oneshot_efficiency`: n over b (mesh), (p-1) n over B else.

Several tiers (HCCL user guide, hierarchical communication): all_reduce = reduce_scatter inside,
all_reduce outside on n/p, all_gather inside; all_gather = inside, then outside; reduce_scatter =
outside, then inside; all_to_all = inside, then outside. One after another, except that (all_reduce
apart) a die pair's own link carries its share while the switch above carries the rest, and the
slower binds: an all_gather on 16 A3 dies gathers more bytes a second than either link can carry.
Launch and synchronisation are paid once, those of the outermost tier.

In service (`in_service`) a collective costs more than back to back in a benchmark, since kernels
of unequal length come before it on every rank:

    in service = total + service_s (min(g, service_ranks) / service_ranks)^service_power
                 below protocol_bytes a rank,  total (1 + service_share) from there on

and its launch is not in it: launches run ahead of the device there and are the step's (`step`), so
the section of captured graphs counts whatever the launch. Ranks that come late to a step as a whole
are the engine's (`engines`: step_skew).

A KernelTime holds the wire time as memory_s and launches, steps and synchronisation as overhead_s.
Sections: `collectives.<topology>.<launch>.<kind>`, or `.any` where kinds share one; `custom` stands
for an engine's own all_reduce kernel (vLLM and TensorRT-LLM have one on NVIDIA). The service and
link terms and protocol_sync_s may lack: they are 0 then.
Left out: contention between groups, uneven shares, buffers smaller than the message.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from shardplan.costmodel.calibration import Calibration, Section
from shardplan.costmodel.hardware import Tier
from shardplan.costmodel.kernels.algorithms import PIPELINE, form, runs
from shardplan.costmodel.kernels.base import (
    Array,
    ArrayLike,
    KernelTime,
    as_array,
    as_measured,
)
from shardplan.costmodel.nearby import grid_factor
from shardplan.costmodel.placement import TierSpan
from shardplan.models.errors import InputError

__all__ = [
    "KINDS",
    "CollectiveKind",
    "Launch",
    "collective",
    "collective_section",
    "group_size",
    "library_form",
]

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
Launch = Literal["graph", "host"]
KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "send",
)


class _Stage(NamedTuple):
    """One form run on one tier: wire seconds `[...]` and step overhead seconds."""

    topology: str
    wire_s: Array
    overhead_s: float


def group_size(spans: Sequence[TierSpan]) -> int:
    """Ranks of the group that crosses these tiers; two where they are neighbouring stages."""
    if any(span.share < 1.0 for span in spans):
        return 2
    return math.prod(span.members for span in spans)


def _section(
    calibration: Calibration, tier: Tier, kind: CollectiveKind, launch: Launch, custom: bool
) -> Section:
    lead = f"collectives.{tier.topology}"
    sections = calibration.sections
    if custom and f"{lead}.custom.{kind}" in sections:
        return sections[f"{lead}.custom.{kind}"]
    own = sections.get(f"{lead}.{launch}.{kind}")
    return own if own is not None else calibration.section(f"{lead}.{launch}.any")


def _rate(tier: Tier) -> float:
    return tier.link_bytes_per_s if tier.topology == "mesh" else tier.bytes_per_s


def _steps(tier: Tier, kind: CollectiveKind, members: int) -> int:
    if kind == "send" or tier.topology in ("mesh", "switch", "pair"):
        once = 1
    elif tier.topology == "roce" and kind != "all_to_all":
        once = math.ceil(math.log2(members))
    else:
        once = members - 1
    return 2 * once if kind == "all_reduce" else once


def _volume_share(tier: Tier, kind: CollectiveKind, members: int) -> float:
    """Bytes over the rate that binds, as a share of the message."""
    if kind == "send":
        return 1.0
    share = 1.0 / members if tier.topology == "mesh" else (members - 1.0) / members
    if kind == "all_to_all":
        return share / members
    return 2.0 * share if kind == "all_reduce" else share


def library_form(tier: Tier, kind: CollectiveKind, members: int) -> tuple[int, float]:
    """(steps, bytes over the rate as a share of the message) where no algorithm was picked."""
    return _steps(tier, kind, members), _volume_share(tier, kind, members)


def _wire_s(section: Section, tier: Tier, members: int, volume_bytes: Array) -> Array:
    level = math.log2(min(float(members), section["ranks_max"]) / 2.0)
    e = section["efficiency"] * math.exp(level * (section["e_r"] + section["e_rr"] * level))
    ramp = section["ramp_bytes"] * math.exp(level * section["ramp_r"])
    sent = volume_bytes + np.sqrt(volume_bytes * ramp)
    return np.asarray(sent / (_rate(tier) * e), dtype=np.float64)


def _stage(section: Section, span: TierSpan, kind: CollectiveKind, message: Array) -> _Stage:
    tier, members = span.tier, span.members
    if runs(span.algorithm, kind):
        steps, share = form(span.algorithm, kind, members)
    else:
        steps, share = library_form(tier, kind, members)
    wire = _wire_s(section, tier, members, message * share)
    overhead = steps * (tier.latency_s + section["step_s"])
    return _Stage(tier.topology, wire, overhead)


def _pipelined(
    pick: functools.partial[Section], spans: Sequence[TierSpan], kind: CollectiveKind, n: Array
) -> list[_Stage]:
    """A ring between servers beside the exchange inside them, a rank's own bytes a step."""
    half: CollectiveKind = "all_gather" if kind == "all_reduce" else kind
    inner, outer = spans
    message = n / outer.members
    within = _stage(pick(inner.tier, half), inner, half, message)
    section = pick(outer.tier, half)
    between = _wire_s(section, outer.tier, outer.members, message / inner.members)
    step_s = outer.tier.latency_s + section["step_s"]
    times = outer.members - 1
    whole = within.wire_s + within.overhead_s
    total = np.maximum(between + step_s, whole) * times + whole
    overhead = max(step_s, within.overhead_s) * times + within.overhead_s
    passes = 2.0 if kind == "all_reduce" else 1.0
    wire = np.asarray((total - overhead) * passes, dtype=np.float64)
    return [_Stage(outer.tier.topology, wire, overhead * passes)]


def _stages(
    pick: functools.partial[Section], spans: Sequence[TierSpan], kind: CollectiveKind, n: Array
) -> list[_Stage]:
    """Forms run one after another over the tiers, inner to outer, for `n` message bytes."""
    inner, outer = spans[0], spans[1:]
    if not outer or kind == "send":
        last = spans[-1]
        return [_stage(pick(last.tier, kind), last, kind, n)]
    if len(outer) == 1 and outer[0].algorithm == PIPELINE and runs(PIPELINE, kind):
        return _pipelined(pick, spans, kind, n)
    if kind == "all_reduce":
        scatter = _stage(pick(inner.tier, "reduce_scatter"), inner, "reduce_scatter", n)
        gather = _stage(pick(inner.tier, "all_gather"), inner, "all_gather", n)
        return [scatter, *_stages(pick, outer, kind, n / inner.members), gather]
    others = group_size(outer)
    first = _stage(pick(inner.tier, kind), inner, kind, n / others)
    if kind == "all_to_all":
        return [first, *_stages(pick, outer, kind, n / inner.members)]
    return [first, *_stages(pick, outer, kind, n)]


def _wire_total_s(kind: CollectiveKind, stages: Sequence[_Stage]) -> Array:
    """Wire seconds of all stages: one after another, or a die pair beside the switch above it."""
    pair = sum(stage.wire_s for stage in stages if stage.topology == "pair")
    switch = sum(stage.wire_s for stage in stages if stage.topology == "switch")
    rest = sum(stage.wire_s for stage in stages if stage.topology not in ("pair", "switch"))
    both = pair + switch if kind == "all_reduce" else np.maximum(pair, switch)
    return np.asarray(both + rest, dtype=np.float64)


def _floor_s(section: Section, ranks: int) -> float:
    links = float(ranks * (ranks - 1) - 2)
    by_rank = section["floor_rank_s"] * math.log2(ranks)
    return section["floor_s"] + by_rank + section.coefficients.get("floor_link_s", 0.0) * links


def _served(section: Section, ranks: int, message: Array, total: Array) -> Array:
    """The time in service of a collective that takes `total` in a benchmark."""
    known = section.coefficients
    limit = known.get("service_ranks", 1.0)
    share = min(float(ranks), limit) / limit
    small = total + known.get("service_s", 0.0) * share ** known.get("service_power", 0.0)
    if section["protocol_bytes"] <= 0.0:
        return np.asarray(small, dtype=np.float64)
    large = total * (1.0 + known.get("service_share", 0.0))
    left = message / ranks >= section["protocol_bytes"]
    return np.asarray(np.where(left, large, small), dtype=np.float64)


def _oneshot_s(section: Section, span: TierSpan, message: Array, floor_s: float) -> Array:
    share = 1.0 if span.tier.topology == "mesh" else span.members - 1.0
    rate = _rate(span.tier) * section["oneshot_efficiency"]
    return np.asarray(floor_s + message * share / rate, dtype=np.float64)


def collective(
    kind: CollectiveKind,
    spans: Sequence[TierSpan],
    message_bytes: ArrayLike,
    calibration: Calibration,
    *,
    launch: Launch,
    custom: bool = False,
    in_service: bool = False,
) -> KernelTime:
    """Time of one collective of a group that crosses `spans`, for `message_bytes` (any shape).

    `launch`: inside a captured graph or launched by the host. `custom`: take the engine's own
    all_reduce kernel where the calibration has one. `in_service`: between a network's kernels, its
    launch hidden, rather than alone in a benchmark. No spans, or one member in all: no time.
    `InputError` for an unknown kind or launch; `CalibrationError` without coefficients.
    """
    if kind not in KINDS:
        raise InputError("`kind` must be one of " + ", ".join(KINDS), got=f"kind={kind!r}")
    if launch not in ("graph", "host"):
        raise InputError("`launch` must be graph or host", got=f"launch={launch!r}")
    message = as_array(message_bytes)
    crossed = tuple(span for span in spans if span.members > 1)
    if not crossed:
        none = np.zeros_like(message)
        return KernelTime(none, none, none, none)
    if kind == "send" and len(crossed) > 1:
        each = functools.partial(collective, launch=launch, custom=custom, in_service=in_service)
        hops = [(one.share, each(kind, (one,), message, calibration)) for one in crossed]
        return KernelTime(*(sum((w * t[i] for w, t in hops), np.zeros(())) for i in range(4)))
    pick = functools.partial(_pick, calibration, "graph" if in_service else launch, custom)
    stages = _stages(pick, crossed, kind, message)
    last = pick(crossed[-1].tier, kind)
    ranks = group_size(crossed)
    wire = _wire_total_s(kind, stages)
    level = math.log2(ranks)
    protocol_s = last["protocol_s"] + last.coefficients.get("protocol_sync_s", 0.0) * level
    late = np.where(message / ranks >= last["protocol_bytes"], protocol_s, 0.0)
    steps = sum(stage.overhead_s for stage in stages)
    fixed = last["base_s"] + last["sync_s"] * level + late + steps
    floor = _floor_s(last, ranks)
    total = np.maximum(fixed + wire, floor)
    once = kind == "all_reduce" and len(crossed) == 1 and crossed[0].algorithm == "auto"
    if once and last["oneshot_bytes"] > 0.0:
        limit = last["oneshot_bytes"]
        small = _oneshot_s(last, crossed[0], np.minimum(message, limit), floor)
        total = np.where(message <= limit, small, np.maximum(total, small))
    total = total * grid_factor(last.coefficients, as_array(float(ranks)), message)
    names = [last.name]
    if in_service:
        total = _served(last, ranks, message, total)
        if calibration.corrections:  # a benchmark launched by the host corrects it too
            names.append(_section(calibration, crossed[-1].tier, kind, launch, custom).name)
    wire = np.minimum(wire, total)
    time = KernelTime(total, np.zeros_like(total), wire, total - wire)
    return as_measured(time, calibration, *names)


def collective_section(
    kind: CollectiveKind, spans: Sequence[TierSpan], calibration: Calibration, launch: Launch
) -> str:
    """Name of the section that a correction of this collective has: its outermost tier's."""
    return _section(calibration, spans[-1].tier, kind, launch, False).name


def _pick(
    calibration: Calibration, launch: Launch, custom: bool, tier: Tier, kind: CollectiveKind
) -> Section:
    return _section(calibration, tier, kind, launch, custom)
