"""A point, a device and a row that the tests of `shardplan profile` share."""

from __future__ import annotations

from typing import Any

from shardplan.search.profiling.backend import Target
from shardplan.search.profiling.points import Point
from shardplan.search.profiling.table import Row

MATMUL = Point(op="matmul", dtype="bf16", m=4, n=8, k=16, mode="eager", backend="linear")
PROFILE = ["profile", "--device", "cpu", "--grid", "tiny"]


def target(**changes: Any) -> Target:
    """A CPU without torch behind it."""
    facts: dict[str, Any] = {
        "kind": "cpu",
        "torch": None,
        "runtime": None,
        "place": "cpu",
        "name": "a machine",
        "driver": "1.2",
        "version": "3.4",
        "cache_bytes": 1000.0,
        "memory_bytes": 1e12,
    }
    return Target(**{**facts, **changes})


def row(point: Point = MATMUL, seconds: float = 1e-3, device: str = "a machine") -> Row:
    """One measurement."""
    return Row(
        point=point,
        median_s=seconds,
        min_s=seconds,
        repeats=5,
        device_name=device,
        driver="1.2",
        torch_version="3.4",
    )
