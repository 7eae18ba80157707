"""What the machine is: one rank (a device) and how ranks are joined (a cluster's tiers).

Inside the code only seconds, bytes, FLOP and their rates; the TOML files carry the vendor's
unit in the key and are converted once by the loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shardplan.costmodel.correction import Correction

__all__ = ["Cluster", "Device", "Fact", "FactKind", "Tier", "Topology"]

FactKind = Literal["datasheet", "measured", "derived", "assumed"]
Topology = Literal["pair", "mesh", "switch", "ring", "pcie", "roce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Where a number comes from."""

    kind: FactKind
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One rank: a 910B card, an A3 die, a 310P3 die, a GPU."""

    name: str
    title: str
    vendor: Literal["ascend", "nvidia"]
    soc_versions: tuple[str, ...]
    """Names the compiler knows it by (`--soc_version`); empty for other vendors."""
    cube_cores: int
    vector_cores: int
    """Separate vector cores; 0 where cube and vector share one core."""
    clock_hz: float
    flop_per_s: Mapping[str, float]
    """Peak matrix rate by element type: fp16, bf16, int8, and fp8, fp4, int4, fp32 where there."""
    vector_flop_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    l2_bytes: float
    l2_bytes_per_s: float
    l1_bytes: float
    l0a_bytes: float
    l0b_bytes: float
    l0c_bytes: float
    ub_bytes: float
    launch_s: float
    """Floor of one kernel inside a captured graph, seconds."""
    host_launch_s: float
    """Floor of one kernel launched by the host, seconds."""
    calibration: str
    """Name of the coefficient file in `data/calibrations`."""
    weight_dtypes: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    engine_profiles: tuple[str, ...]
    """Engines that run on it; the first is the default."""
    facts: Mapping[str, Fact]
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    """By calibration section: what measurements of this machine change."""
    corrected_engine: str = ""
    """Engine profile whose kernels the corrections were measured against; "" for all alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One level of the interconnect, inner to outer."""

    name: str
    ranks: int
    """Consecutive ranks one group of this tier joins (the outermost: all ranks)."""
    topology: Topology
    bytes_per_s: float
    """One rank's rate into this tier, one direction, all its links together."""
    link_bytes_per_s: float
    """One link's rate, one direction (mesh: the link to one peer)."""
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Ranks of one device joined by tiers."""

    name: str
    title: str
    device: Device
    ranks_per_node: int
    nodes: int
    max_nodes: int
    """Nodes that the described fabric can join."""
    rank_counts: tuple[int, ...]
    """Ranks of one node that a job may use; more than a node takes whole nodes."""
    tiers: tuple[Tier, ...]
    facts: Mapping[str, Fact]

    @property
    def ranks(self) -> int:
        """All ranks of the cluster."""
        return self.ranks_per_node * self.nodes
