"""What a row says in FLOP/s and bytes/s, and whether that can be true.

A rate above the datasheet by more than `_MARGIN` (clocks boost over the datasheet's) cannot be: the
kernel did not run, or the timer did not wait for it. Such rows are refused, never written. A
device that `shardplan devices` does not know is held to `_CEILING`, far above any made so far.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from shardplan.costmodel.devices import device_names, load_device
from shardplan.costmodel.hardware import Device
from shardplan.search.profiling.points import COLLECTIVES, Point
from shardplan.search.profiling.table import Row
from shardplan.search.profiling.timing import Timing

__all__ = [
    "Ceiling",
    "Peak",
    "ceiling_of",
    "cold_bytes",
    "heats",
    "impossible",
    "peaks",
]

_MARGIN = 1.12
_HOT_CACHES = 4.0
_HOT_FLOP_PER_BYTE = 100.0


class Ceiling(NamedTuple):
    """Rates that nothing exceeds."""

    flop_per_s: dict[str, float]
    bytes_per_s: float


class Peak(NamedTuple):
    """The best of a profile: what it is, the rate or time, and the point that reached it."""

    what: str
    value: float
    unit: str
    point: Point


_CEILING = Ceiling({"bf16": 1e17, "fp16": 1e17, "int8": 1e17}, 1e15)


def _known(name: str) -> Device | None:
    """The device of the catalogue that a runtime calls `name`."""
    for one in device_names():
        device = load_device(one)
        words = device.title.lower()
        if name in device.soc_versions or words.startswith(f"{name.lower()} "):
            return device
    return None


@functools.cache
def ceiling_of(device_name: str) -> Ceiling:
    """Datasheet rates with a margin, or the general ceiling for a device we do not know."""
    device = _known(device_name)
    if device is None:
        return _CEILING
    rates = {key: value * _MARGIN for key, value in device.flop_per_s.items()}
    return Ceiling(rates, device.hbm_bytes_per_s * _MARGIN)


def cold_bytes(point: Point, cache_bytes: float, copies: int = 1) -> float:
    """Bytes of one call that must come from device memory; 0 where a cache may hold them."""
    if point.op == "copy":
        big = point.message_bytes > _HOT_CACHES * cache_bytes
        return 2.0 * point.message_bytes if big else 0.0
    if point.op in ("moe", "kv_append"):
        return 0.0
    stored = point.stored_bytes()
    return stored if stored * copies > (_HOT_CACHES - 1.0) * cache_bytes else 0.0


def heats(point: Point) -> bool:
    """Whether arithmetic binds, so that the device may come to its power limit."""
    return point.flop() > _HOT_FLOP_PER_BYTE * point.tensor_bytes()


def impossible(point: Point, timing: Timing, ceiling: Ceiling, cold: float) -> str:
    """Why a time cannot be; empty where it can."""
    if not 0.0 < timing.min_s < float("inf"):
        return f"a call took {timing.min_s:g} s"
    top = ceiling.flop_per_s.get(point.dtype, _CEILING.flop_per_s["bf16"])
    if point.flop() / timing.min_s > top:
        return f"{point.flop() / timing.min_s:.3g} FLOP/s is above what the device has, {top:.3g}"
    if cold / timing.min_s > ceiling.bytes_per_s:
        rate = cold / timing.min_s
        return f"{rate:.3g} bytes/s is above what the memory has, {ceiling.bytes_per_s:.3g}"
    return ""


def peaks(rows: Iterable[Row], cache_bytes: float) -> list[Peak]:
    """Best FLOP/s by dtype, bytes/s of memory and of collectives, and the shortest call by mode.

    Of the medians. A copy that a cache of `cache_bytes` may hold is not counted.
    """
    best: dict[str, Peak] = {}

    def offer(what: str, value: float, unit: str, point: Point) -> None:
        known = best.get(what)
        if known is None or (value < known.value if unit == "s" else value > known.value):
            best[what] = Peak(what, value, unit, point)

    for row in rows:
        point, spent = row.point, row.median_s
        offer(f"shortest call, {point.mode}", spent, "s", point)
        if point.op == "matmul":
            offer(f"matmul {point.dtype}", point.flop() / spent, "FLOP/s", point)
        elif point.op == "attention_prefill":
            offer(f"{point.op} {point.dtype}", point.flop() / spent, "FLOP/s", point)
        elif point.op == "attention_decode":
            offer(point.op, point.stored_bytes() / spent, "bytes/s", point)
        elif point.op == "copy":
            offer("copy", cold_bytes(point, cache_bytes) / spent, "bytes/s", point)
        elif point.op in COLLECTIVES:
            name = f"{point.op}, {point.ranks} ranks"
            offer(name, point.message_bytes / spent, "bytes/s", point)
    return sorted(best.values(), key=lambda peak: (peak.unit, peak.what))
