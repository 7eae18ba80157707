"""Parts of a plan that stand by themselves: model, machine, memory and time of a step."""

from __future__ import annotations

from typing import Literal

from shardplan.search.plan_confidence import Part

__all__ = ["BreakdownRow", "ClusterInfo", "MemoryRow", "ModelInfo"]


class ModelInfo(Part):
    """Which model, and the digest of its sizes that a plan is bound to."""

    name: str
    architecture: str
    source: str
    digest: str
    parameters: int
    active_parameters: int
    layers: int
    kv_bytes_per_token: float
    """Over all layers, at the plan's KV dtype."""
    max_context: int


class ClusterInfo(Part):
    """Which machine."""

    name: str
    title: str
    device: str
    soc_versions: tuple[str, ...]
    ranks_per_node: int
    nodes: int
    ranks: int
    hbm_bytes: float
    fast_ranks: int = 0
    """Ranks that links other than RoCE join: a node, or a supernode; 0 where it is not known."""


class MemoryRow(Part):
    """Bytes on one rank of one pipeline stage."""

    stage: int
    layers: int
    weights_bytes: float
    kv_cache_bytes: float
    activations_bytes: float
    communicators_bytes: float
    reserve_bytes: float
    total_bytes: float
    capacity_bytes: float
    """What the engine may use of the card's memory."""


class BreakdownRow(Part):
    """Seconds of one step by kind of operator, summed over the stages a token passes."""

    phase: Literal["prefill", "decode"]
    kind: str
    calls: int
    compute_s: float
    memory_s: float
    collective_s: float
    overhead_s: float
    total_s: float
    basis: str
    """What the formula's coefficients rest on: measured, fitted, derived, assumed."""
