"""Readers of the measured collectives, and the sections for which no measurement exists.

Message bytes are those of the full tensor. The tables' own labels: hccl_test prints the gathered
buffer (all_gather) or one rank's buffer (all_to_all, so times p here); the A3 report labels one
rank's shard (all_gather, reduce_scatter) or the tensor (all_reduce), in KiB and MiB; NCCL and
TensorRT-LLM rows count 16-bit elements, of one rank's buffer for all_to_all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.fitting.common import FittedSection, read_rows
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.collectives import CollectiveKind, Launch
from shardplan.costmodel.placement import TierSpan, group_tiers

__all__ = [
    "A3_SOURCE",
    "CollectiveTable",
    "ServiceRow",
    "assumed_sections",
    "custom_rows",
    "die_sections",
    "lent_sections",
    "mesh_rows",
    "nccl_rows",
    "service_rows",
    "spans_of",
    "switch_rows",
]

_MESH = "ascend_ops/aiconfigurator_npu_910b_vllm_ascend_0.23.0/hccl_910b_single_node.csv"
_SWITCH = "ascend_ops/a3_hccl_bench_vs_profiler.csv"
_SCATTER_ODD = (2.4e6, 1e7, 8e7)
"""Bytes between which, and from which on, the reduce_scatter table jumps 5 to 10 times."""
A3_SOURCE = (
    "isolated benchmark on Atlas 800 A3, HCCL 8.5, AIV, 8 and 16 dies "
    "(github Horacehxw/msModeling 39df672b, comm_alignment_report_20260312.md)"
)
_UNITS = {"KB": 1024.0, "MB": 1048576.0}
_GATHER_ODD, _GATHER_ODD_RANKS = (524288.0, 1048576.0), 8
"""Bytes a die between which the A3 benchmark on 8 dies reads 155 to 186 us, flat, where the same
gather takes 75 us in service; its report calls it a protocol switch that it does not reproduce."""
_MESH_OPS: Mapping[str, CollectiveKind] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
_SWITCH_OPS: Mapping[str, CollectiveKind] = {
    "allReduce": "all_reduce",
    "allGather": "all_gather",
    "reduceScatter": "reduce_scatter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTable:
    """Measured times of one collective on one cluster; `odd` rows are kept out of the fit."""

    section: str
    cluster: str
    kind: CollectiveKind
    launch: Launch
    custom: bool
    ranks: NDArray[np.int64]
    message_bytes: Array
    seconds: Array
    odd: NDArray[np.bool_]
    source: str


def spans_of(cluster: str, ranks: int) -> tuple[TierSpan, ...]:
    """Tiers that `ranks` consecutive ranks of a shipped cluster cross."""
    return group_tiers(load_cluster(cluster), group=ranks, stride=1)


def _table(
    rows: Sequence[tuple[int, float, float]],
    *,
    section: str,
    cluster: str,
    kind: CollectiveKind,
    launch: Launch,
    source: str,
    custom: bool = False,
) -> CollectiveTable:
    ranks = np.asarray([row[0] for row in rows], dtype=np.int64)
    message = np.asarray([row[1] for row in rows], dtype=np.float64)
    odd = np.zeros(len(rows), dtype=np.bool_)
    if section == "collectives.switch.graph.all_gather" and cluster == "atlas-800i-a3":
        low, high = _GATHER_ODD
        odd = (ranks == _GATHER_ODD_RANKS) & (message > ranks * low) & (message < ranks * high)
    if section == "collectives.mesh.host.reduce_scatter":
        jump, calm, collapse = _SCATTER_ODD
        odd = ((message > jump) & (message < calm)) | (message >= collapse)
    return CollectiveTable(
        section=section,
        cluster=cluster,
        kind=kind,
        launch=launch,
        custom=custom,
        ranks=ranks,
        message_bytes=message,
        seconds=np.asarray([row[2] for row in rows], dtype=np.float64),
        odd=odd,
        source=source,
    )


def mesh_rows(data: Path) -> list[CollectiveTable]:
    """hccl_test on 2, 4 and 8 cards of one 910B node, launched by the host."""
    out = []
    for op, kind in _MESH_OPS.items():
        rows = []
        for row in read_rows(data / _MESH):
            if row["op"] != op:
                continue
            ranks = int(row["num_npus"])
            size = float(row["buffer_bytes_tool"]) * (ranks if kind == "all_to_all" else 1)
            rows.append((ranks, size, float(row["latency_us"]) * 1e-6))
        out.append(
            _table(
                rows,
                section=f"collectives.mesh.host.{kind}",
                cluster="atlas-800t-a2",
                kind=kind,
                launch="host",
                source="hccl_test on one 910B node of 8, fp16, host-launched "
                "(github xiaowanCN/aiconfigurator-npu 0af81bf5)",
            )
        )
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRow:
    """One A3 collective in service: seconds seen by the profiler, and in a benchmark (nan: not)."""

    kind: CollectiveKind
    ranks: int
    message_bytes: float
    bench_s: float
    service_s: float
    """nan where it was only measured in the benchmark."""


def service_rows(data: Path) -> list[ServiceRow]:
    """A3 collectives whose size is known, alone in a benchmark and between a network's kernels."""
    out = []
    for row in read_rows(data / _SWITCH):
        label, kind = row["msg_bytes_label"], _SWITCH_OPS[row["op"]]
        if not label:
            continue
        dies, size = int(row["num_dies"]), float(label[:-2]) * _UNITS[label[-2:]]
        cells = (row["bench_us"], row["in_situ_us"])
        seconds = [float(cell) * 1e-6 if cell else math.nan for cell in cells]
        out.append(
            ServiceRow(
                kind=kind,
                ranks=dies,
                message_bytes=size if kind == "all_reduce" else size * dies,
                bench_s=seconds[0],
                service_s=seconds[1],
            )
        )
    return out


def switch_rows(data: Path) -> list[CollectiveTable]:
    """A3 collectives alone, launched by the vector cores (AIV): the benchmark's column."""
    out = []
    rows = service_rows(data)
    for kind in _SWITCH_OPS.values():
        mine = [row for row in rows if row.kind == kind]
        table = _table(
            [(row.ranks, row.message_bytes, row.bench_s) for row in mine],
            section=f"collectives.switch.graph.{kind}",
            cluster="atlas-800i-a3",
            kind=kind,
            launch="graph",
            source=A3_SOURCE,
        )
        out.append(table)
    return out


def nccl_rows(data: Path, device: str) -> list[CollectiveTable]:
    """NCCL on 2, 4 and 8 GPUs of one NVLink node, 16-bit elements."""
    path = data / "nvidia_ops" / f"{device}_sxm__nccl_2.29.2__nccl_perf.csv.gz"
    out = []
    for op, kind in _MESH_OPS.items():
        rows = []
        for row in read_rows(path):
            if row["op_name"] != op or row["nccl_dtype"] != "half":
                continue
            ranks = int(row["num_gpus"])
            size = 2.0 * float(row["message_size"]) * (ranks if kind == "all_to_all" else 1)
            rows.append((ranks, size, float(row["latency"]) * 1e-3))
        out.append(
            _table(
                rows,
                section=f"collectives.switch.graph.{kind}",
                cluster=f"hgx-{device}",
                kind=kind,
                launch="graph",
                source=f"NCCL 2.29.2 on {device.upper()} SXM, one NVLink node "
                "(PyPI aiconfigurator-core 0.12.0, Apache-2.0, NVIDIA)",
            )
        )
    return out


def custom_rows(data: Path, device: str) -> CollectiveTable:
    """TensorRT-LLM's own all_reduce kernels on 2, 4 and 8 GPUs."""
    path = data / "nvidia_ops" / f"{device}_sxm__trtllm_1.3.0rc20__custom_allreduce_perf.csv.gz"
    rows = [
        (int(row["num_gpus"]), 2.0 * float(row["message_size"]), float(row["latency"]) * 1e-3)
        for row in read_rows(path)
    ]
    return _table(
        rows,
        section="collectives.switch.custom.all_reduce",
        cluster=f"hgx-{device}",
        kind="all_reduce",
        launch="graph",
        source=f"TensorRT-LLM 1.3.0rc20 all_reduce on {device.upper()} SXM, one NVLink node "
        "(PyPI aiconfigurator-core 0.12.0, Apache-2.0, NVIDIA)",
        custom=True,
    )


def _efficiencies(fitted: Sequence[FittedSection], lead: str) -> dict[str, Mapping[str, float]]:
    return {
        section.name.rsplit(".", 1)[1]: section.coefficients
        for section in fitted
        if section.name.startswith(lead)
    }


def assumed_sections(
    device: str, fitted: Sequence[FittedSection], neutral: Mapping[str, float]
) -> list[FittedSection]:
    """Sections of the tiers and launches that no table covers, each with what it rests on."""
    if device == "910b2":
        return _npu_assumed(fitted, neutral)
    return _gpu_assumed(fitted, neutral)


_GRAPH = (
    "rates of hccl_test on this mesh, and from 0.5 MiB a rank on what it pays beyond its launch "
    "floor at every size, so the device's own; below, launch and synchronisation of the "
    "vector-core kernels (AIV, which vllm-ascend's guides switch on) as A3 profiles show them in "
    "service (12 to 24 us), left at A3's size: no 910B measurement in a graph is public"
)
_ANY = "launch and synchronisation as A3 profiles show them in service (12 to 24 us)"
_HOST = "graph section, with the host-launch floor that hccl_test shows on 910B (43 us)"
_PAIR = "floor of the smallest A3 collectives (5.4 us; 43 us by the host); efficiency assumed"
_STEPS = "steps of the HCCL user guide's formulas; efficiency and step time assumed"
_RING = (
    "the 910A constants of GraphEngine's own cost model (mirror-cann/ge@f513b8f2 topology.h): "
    "4 ports of 14 GB/s a ring, of 90 GB/s; 1 us a transfer, 9 us a port"
)
_LENT = "fitted on A3 dies (calibration a3-die)"
_RATES = ("efficiency", "e_r", "e_rr", "oneshot_bytes")
_AIV_BYTES = 524288.0
_GRAPH_FLOOR: Mapping[str, float] = {"floor_s": 1.2e-5, "base_s": 6e-6, "sync_s": 4e-6}
_HOST_FLOOR: Mapping[str, float] = {"floor_s": 4.3e-5, "base_s": 3e-5, "sync_s": 4e-6}
_PAIR_FLOOR: Mapping[str, Mapping[str, float]] = {
    "graph": {"floor_s": 5.4e-6, "base_s": 4e-6, "sync_s": 1e-6},
    "host": _HOST_FLOOR,
}


def _npu_assumed(
    fitted: Sequence[FittedSection], neutral: Mapping[str, float]
) -> list[FittedSection]:
    out = []
    for kind, measured in _efficiencies(fitted, "collectives.mesh.host.").items():
        rates = {name: measured[name] for name in _RATES}
        large = {
            "protocol_bytes": _AIV_BYTES,
            "protocol_s": measured["base_s"] - _GRAPH_FLOOR["base_s"],
            "protocol_sync_s": measured["sync_s"] - _GRAPH_FLOOR["sync_s"],
        }
        out.append(_assumed(f"mesh.graph.{kind}", _GRAPH, neutral, _GRAPH_FLOOR, rates, large))
    steps = {"efficiency": 0.7}
    ring = {"efficiency": 56.0 / 90.0, "base_s": 9e-6, "step_s": 0.0}
    for launch, floors, why in (("graph", _GRAPH_FLOOR, _ANY), ("host", _HOST_FLOOR, _HOST)):
        out += [
            _assumed(f"mesh.{launch}.any", why, neutral, floors, {"efficiency": 0.64}),
            replace(_assumed(f"ring.{launch}.any", _RING, neutral, floors, ring), kind="derived"),
            _assumed(f"pcie.{launch}.any", _STEPS, neutral, floors, steps, {"step_s": 5e-6}),
            _assumed(f"roce.{launch}.any", _STEPS, neutral, floors, steps, {"step_s": 3e-6}),
        ]
    return out


def die_sections(
    fitted: Sequence[FittedSection], neutral: Mapping[str, float]
) -> list[FittedSection]:
    """Sections of die pairs and of the switch above them that no table covers."""
    out = [
        _assumed(f"pair.{launch}.any", _PAIR, neutral, floors, {"efficiency": 0.85})
        for launch, floors in _PAIR_FLOOR.items()
    ]
    alone = _efficiencies(fitted, "collectives.switch.graph.")
    lent = alone.get("all_gather", {})
    out.append(_assumed("switch.graph.any", "the section fitted to all_gather", neutral, lent))
    for kind, measured in {**alone, "any": lent}.items():
        late = {"floor_s": 4.3e-5, "base_s": measured.get("base_s", 0.0) + 3.1e-5}
        out.append(_assumed(f"switch.host.{kind}", _HOST, neutral, measured, late))
    return out


def lent_sections(sections: Sequence[FittedSection]) -> list[FittedSection]:
    """The sections of A3 dies for devices of the family that have no table of their own."""
    return [
        replace(one, kind="derived", source=f"{_LENT}: {one.source}", held=None, fit_errors=None)
        if one.kind == "fitted"
        else one
        for one in sections
    ]


def _gpu_assumed(
    fitted: Sequence[FittedSection], neutral: Mapping[str, float]
) -> list[FittedSection]:
    service = _efficiencies(fitted, "collectives.switch.graph.")
    lent = service.get("all_gather", {})
    why = "the same NCCL rows: that benchmark launches from the host"
    ib = "NCCL over InfiniBand: efficiency 0.85 and step time assumed; no table covers it"
    out = [_assumed("switch.graph.any", "the section fitted to all_gather", neutral, lent)]
    for kind, measured in {**service, "any": lent}.items():
        own = _assumed(f"switch.host.{kind}", why, neutral, measured)
        out.append(replace(own, kind="derived"))
    for launch, floor in (("graph", 1.2e-5), ("host", 2.05e-5)):
        known = {"floor_s": floor, "base_s": 1e-5, "step_s": 4e-6, "efficiency": 0.85}
        out.append(_assumed(f"roce.{launch}.any", ib, neutral, known))
    return out


def _assumed(
    name: str, source: str, neutral: Mapping[str, float], *known: Mapping[str, float]
) -> FittedSection:
    coefficients = dict(neutral)
    for part in known:
        coefficients |= part
    return FittedSection(
        name=f"collectives.{name}", kind="assumed", source=source, coefficients=coefficients
    )
