"""Readers of the measured collectives, and the sections for which no measurement exists.

Message bytes are those of the full tensor. The tables' own labels: hccl_test prints the gathered
buffer (all_gather) or one rank's buffer (all_to_all, so times p here); the A3 report labels one
rank's shard (all_gather, reduce_scatter) or the tensor (all_reduce), in KiB and MiB; NCCL and
TensorRT-LLM rows count 16-bit elements, of one rank's buffer for all_to_all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.fitting.common import FittedSection, read_rows
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.collectives import CollectiveKind, Launch
from shardplan.costmodel.placement import TierSpan, group_tiers

__all__ = [
    "CollectiveTable",
    "assumed_sections",
    "custom_rows",
    "mesh_rows",
    "nccl_rows",
    "spans_of",
    "switch_rows",
]

_MESH = "ascend_ops/aiconfigurator_npu_910b_vllm_ascend_0.23.0/hccl_910b_single_node.csv"
_SWITCH = "ascend_ops/a3_hccl_bench_vs_profiler.csv"
_SCATTER_ODD = (2.4e6, 1e7, 8e7)
"""Bytes between which, and from which on, the reduce_scatter table jumps 5 to 10 times."""
_UNITS = {"KB": 1024.0, "MB": 1048576.0}
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


def switch_rows(data: Path) -> list[CollectiveTable]:
    """A3 collectives inside captured graphs, as a profiler saw them in service."""
    out = []
    for op, kind in _SWITCH_OPS.items():
        rows = []
        for row in read_rows(data / _SWITCH):
            label = row["msg_bytes_label"]
            if row["op"] != op or not label or not row["in_situ_us"]:
                continue
            dies = int(row["num_dies"])
            size = float(label[:-2]) * _UNITS[label[-2:]]
            whole = size if kind == "all_reduce" else size * dies
            rows.append((dies, whole, float(row["in_situ_us"]) * 1e-6))
        out.append(
            _table(
                rows,
                section=f"collectives.switch.graph.{kind}",
                cluster="atlas-800i-a3",
                kind=kind,
                launch="graph",
                source="Ascend profiler in service on Atlas 800 A3, HCCL 8.5, AIV, 8 and 16 dies "
                "(github Horacehxw/msModeling 39df672b, comm_alignment_report_20260312.md)",
            )
        )
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
    "launch and synchronisation as A3 profiles show them in service (12 to 24 us); no 910B "
    "measurement inside a graph is public"
)
_HOST = "graph section, with the host-launch floor that hccl_test shows on 910B (43 us)"
_PAIR = "floor of the smallest A3 collectives (5.4 us; 43 us by the host); efficiency assumed"
_RING = "ring formula of the HCCL user guide; efficiency and step time assumed"


def _npu_assumed(
    fitted: Sequence[FittedSection], neutral: Mapping[str, float]
) -> list[FittedSection]:
    graph = {"floor_s": 1.2e-5, "base_s": 6e-6, "sync_s": 4e-6}
    host = {"floor_s": 4.3e-5, "base_s": 3e-5, "sync_s": 4e-6}
    steps = {"efficiency": 0.7}
    on_die = {"graph": {"floor_s": 5.4e-6, "base_s": 4e-6, "sync_s": 1e-6}, "host": host}
    out = []
    for kind, measured in _efficiencies(fitted, "collectives.mesh.host.").items():
        shape = {name: measured[name] for name in ("efficiency", "e_r", "e_rr", "oneshot_bytes")}
        out.append(_assumed(f"mesh.graph.{kind}", _GRAPH, neutral, graph, shape))
    for launch, floors, why in (("graph", graph, _GRAPH), ("host", host, _HOST)):
        out += [
            _assumed(f"mesh.{launch}.any", why, neutral, floors, {"efficiency": 0.64}),
            _assumed(f"pair.{launch}.any", _PAIR, neutral, on_die[launch], {"efficiency": 0.85}),
            _assumed(f"ring.{launch}.any", _RING, neutral, floors, steps, {"step_s": 2e-6}),
            _assumed(f"pcie.{launch}.any", _RING, neutral, floors, steps, {"step_s": 5e-6}),
            _assumed(f"roce.{launch}.any", _RING, neutral, floors, steps, {"step_s": 3e-6}),
        ]
    service = _efficiencies(fitted, "collectives.switch.graph.")
    lent = service.get("all_gather", {})
    out.append(
        _assumed("switch.graph.any", "the section fitted to all_gather", neutral, graph, lent)
    )
    for kind, measured in {**service, "any": lent}.items():
        late = {"floor_s": 4.3e-5, "base_s": measured.get("base_s", 0.0) + 3.1e-5}
        out.append(_assumed(f"switch.host.{kind}", _HOST, neutral, measured, late))
    return out


def _gpu_assumed(
    fitted: Sequence[FittedSection], neutral: Mapping[str, float]
) -> list[FittedSection]:
    service = _efficiencies(fitted, "collectives.switch.graph.")
    lent = service.get("all_gather", {})
    why = "graph section, with the floor of host-launched all_reduce kernels (20.5 us, vLLM 0.24)"
    ib = "NCCL over InfiniBand: efficiency 0.85 and step time assumed; no table covers it"
    out = [_assumed("switch.graph.any", "the section fitted to all_gather", neutral, lent)]
    for kind, measured in {**service, "any": lent}.items():
        out.append(_assumed(f"switch.host.{kind}", why, neutral, measured, {"floor_s": 2.05e-5}))
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
