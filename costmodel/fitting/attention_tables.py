"""Readers of the measured attention tables: rows `[batch, tokens, heads, kv_heads, head_dim]`.

Where they come from: 910B, vllm-ascend 0.18 kernels in NPU-graph replay (batch 1..128, tokens
128..16384, head 128) and MLA kernels of 0.23; H100 and H200, TensorRT-LLM 1.3.0rc20 kernels of the
`aiconfigurator-core` 0.12.0 package (full attention, 16-bit cache, head 128, groups
up to 16, batch up to 512, from 60 tokens on; half of the rows, picked by hash).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.fitting.common import held_out, read_rows
from shardplan.costmodel.kernels.base import Array

__all__ = [
    "MLA_DIMS",
    "Table",
    "gpu_decode",
    "gpu_prefill",
    "mla_decode_table",
    "mla_prefill_table",
    "npu_decode",
    "npu_prefill",
]

MLA_DIMS = (128.0, 64.0, 128.0, 512.0)
"""No-position, rotary and value head parts and latent rank of the measured kernels, elements."""
_KERNELS = "ascend_ops/aiconfigurator_npu_910b_vllm_ascend_0.18.0"
_LATENT = "ascend_ops/aiconfigurator_npu_910b_vllm_ascend_0.23.0"
_GPU_SHARE = 0.5
_GPU_TOKENS = 60.0
_GPU_BATCH = 512.0
_GPU_GROUP = 16.0
"""Contexts shorter than a block of cache, larger batches and larger groups are left out."""
_SLOW_HEADS, _SLOW_BATCH, _SLOW_TOKENS = 128, 8, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Shapes `[rows, 5]`, seconds `[rows]`, rows of another kernel `[rows]`, and their source."""

    rows: Array
    seconds: Array
    odd: NDArray[np.bool_]
    source: str


def _table(rows: Iterable[tuple[float, ...]], source: str) -> Table:
    """A table from (batch, tokens, heads, kv_heads, head_dim, seconds)."""
    values = np.asarray(list(rows), dtype=np.float64)
    odd = np.zeros(len(values), dtype=np.bool_)
    return Table(rows=values[:, :5], seconds=values[:, 5], odd=odd, source=source)


def _npu(data: Path, name: str, what: str) -> Table:
    def shape(row: Mapping[str, str]) -> tuple[float, ...]:
        heads = float(row["Num Heads"])
        kv_heads = float(row["Num KV Heads"]) or heads
        sizes = (float(row["Batch"]), float(row["Seq Len"]), heads, kv_heads)
        return (*sizes, float(row["Head Size"]), float(row["Average Duration(us)"]) * 1e-6)

    source = (
        f"{what} on a 910B of 24 cores, FusedInferAttentionScore of vllm-ascend 0.18 in NPU-graph "
        "replay (github hudingyi688/aiconfigurator-npu 90d7765a); errors by cross-validation"
    )
    return _table((shape(row) for row in read_rows(data / _KERNELS / name)), source)


def npu_prefill(data: Path) -> Table:
    """Causal prefill, bf16, head 128."""
    return _npu(data, "FusedInferAttentionScore.csv", "prefill attention, bf16, head 128,")


def npu_decode(data: Path) -> Table:
    """Decode, bf16 cache, head 128."""
    return _npu(data, "FusedInferAttentionScore_Decode.csv", "decode attention, bf16, head 128,")


def _latent(data: Path, name: str, tokens: str, time: str, unit: float, what: str) -> Table:
    source = (
        f"MLA {what} on a 910B of 24 cores, fp16, vllm-ascend 0.23 "
        "(github xiaowanCN/aiconfigurator-npu 6eca62fc); errors by cross-validation"
    )
    return _table(
        (
            (
                float(row["batch"]),
                float(row[tokens]),
                float(row["num_heads"]),
                1.0,
                MLA_DIMS[0] + MLA_DIMS[1],
                float(row[time]) * unit,
            )
            for row in read_rows(data / _LATENT / name)
        ),
        source,
    )


def mla_prefill_table(data: Path) -> Table:
    """MLA prefill on expanded heads; the rows of the slower kernel are marked odd."""
    table = _latent(data, "context_mla.csv", "seq_len", "latency_ms", 1e-3, "prefill")
    batch, tokens, heads = table.rows[:, :3].T
    slow = (heads >= _SLOW_HEADS) & (batch >= _SLOW_BATCH) & (tokens >= _SLOW_TOKENS)
    return Table(rows=table.rows, seconds=table.seconds, odd=slow, source=table.source)


def mla_decode_table(data: Path) -> Table:
    """MLA absorbed decode."""
    return _latent(data, "generation_mla.csv", "kv_len", "latency_us", 1e-6, "decode")


def _gpu(data: Path, device: str, phase: str, tokens: str, what: str) -> Table:
    path = data / "nvidia_ops" / f"{device}_sxm__trtllm_1.3.0rc20__{phase}_attention_perf.csv.gz"
    kept = []
    for row in read_rows(path):
        plain = row["attn_dtype"] == row["kv_cache_dtype"] == "bfloat16"
        if float(row[tokens]) < _GPU_TOKENS or float(row["batch_size"]) > _GPU_BATCH:
            continue
        if float(row["num_heads"]) > _GPU_GROUP * float(row["num_key_value_heads"]):
            continue
        if not plain or row["window_size"] != "0" or row["head_dim"] != "128":
            continue
        sizes = (row["batch_size"], row[tokens], row["num_heads"], row["num_key_value_heads"])
        kept.append((*map(float, (*sizes, row["head_dim"])), float(row["latency"]) * 1e-3))
    picked = held_out([("sample", *shape) for shape in kept], _GPU_SHARE)
    source = (
        f"{what} on {device.upper()} SXM, bf16, head 128, TensorRT-LLM 1.3.0rc20, "
        "half of the rows (PyPI aiconfigurator-core 0.12.0, Apache-2.0, NVIDIA)"
    )
    return _table((row for row, keep in zip(kept, picked, strict=True) if keep), source)


def gpu_prefill(data: Path, device: str) -> Table:
    """Causal prefill on an NVIDIA device, full attention."""
    return _gpu(data, device, "context", "isl", "prefill attention")


def gpu_decode(data: Path, device: str) -> Table:
    """Decode on an NVIDIA device; `step` past tokens and the new one are read."""
    return _gpu(data, device, "generation", "step", "decode attention")
