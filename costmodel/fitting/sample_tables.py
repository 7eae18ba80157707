"""Measured tables as families of rows to sample from: shapes under the names of phase `op`.

Each family says which of its rows may be drawn (`keep`): those that its fit keeps back, by the same
hash, or all where no fit reads the table. What does not enter: NVIDIA's own all_reduce kernels
(phase `op` prices library collectives), kernels of a profile whose context length is unknown,
and rows that the notes of the tables call contaminated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.fitting import matmul, moe
from shardplan.costmodel.fitting.attention_tables import (
    Table,
    gpu_decode,
    gpu_prefill,
    mla_decode_table,
    mla_prefill_table,
    npu_decode,
    npu_prefill,
)
from shardplan.costmodel.fitting.collective_tables import mesh_rows, nccl_rows
from shardplan.costmodel.fitting.common import held_out, read_rows

__all__ = ["Family", "families"]

_ATTENTION = ("batch", "tokens", "heads", "kv_heads", "head_dim")
_PRODUCT = ("m", "n", "k")
_EXPERTS = ("tokens", "hidden", "ffn", "experts", "topk", "ep")
_OPERATORS = "aiconfigurator-npu@90d7765a vllm-ascend 0.18.0 "
_LATER = "aiconfigurator-npu@6eca62fc vllm-ascend 0.23.0 "
_HCCL = "aiconfigurator-npu@0af81bf5 hccl_910b_single_node.csv"
_NVIDIA = "aiconfigurator-core 0.12.0 "
_A3 = "msModeling@39df672b per_shape_cv_output.txt"
_A3_BENCH = "msModeling@39df672b comm_alignment_report_20260312.md"
_LONG_S = 4e-4
"""Isolated A3 collectives from here on: ten launches by the host, which phase `op` includes and
their benchmark does not."""
_OWN_KERNELS = {
    "attention_prefill": {"backend": "sdpa_cudnn"},
    "attention_decode": {"backend": "sdpa_cudnn"},
    "all_reduce": {"mode": "eager"},
}
"""Of what was measured in several ways: attention as the fit takes it, launches as phase `op`."""
_OWN_SECTIONS = {
    "matmul": "matmul.bf16",
    "attention_prefill": "attention.prefill",
    "attention_decode": "attention.decode",
    "moe": "moe.bf16",
    "all_reduce": "collectives.switch.host.all_reduce",
}

_Readers = tuple[tuple[str, Callable[[Path], Table], str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Rows of one group of figures, and how they are written."""

    file: str
    group: str
    source: str
    fixed: Mapping[str, str]
    """Columns that all rows share."""
    columns: Sequence[str]
    shapes: Sequence[Sequence[float]]
    seconds: Sequence[float]
    keep: Sequence[bool]
    calibration: str = ""
    section: str | None = None
    """The section fitted to the table; None where none is."""
    engine: str = ""
    """The engine whose own section counts, where it has one."""
    held_out: bool = True
    """Where no section is named: whether nothing of the table entered a fit."""
    note: str = field(default="")


def _kept(mask: NDArray[np.bool_]) -> list[bool]:
    return [bool(one) for one in mask]


def _products(data: Path) -> Iterator[Family]:
    for table in matmul.TABLES:
        samples = matmul.read(table, data)
        npu = table.calibration == "910b2"
        device = table.calibration
        engine = {} if npu else {"engine_profile": "trtllm"}
        name = table.path.rsplit("/", 1)[1]
        yield Family(
            file="ascend_910b.csv" if npu else "nvidia.csv",
            group=f"{device} matmul {table.dtype}",
            source=(_OPERATORS if npu else _NVIDIA) + name.removesuffix(".gz"),
            fixed={"device": device, **engine, "phase": "op", "op": "matmul", "dtype": table.dtype},
            columns=_PRODUCT,
            shapes=np.stack(samples.sizes, axis=1).tolist(),
            seconds=samples.seconds.tolist(),
            keep=_kept(held_out(zip(*samples.sizes, strict=True))),
            calibration=device,
            section=f"matmul.{table.dtype}",
        )


def _attention(
    table: Table, device: str, op: str, section: str, source: str, *, odd: bool = False
) -> Family:
    npu = device == "910b2"
    engine = {} if npu else {"engine_profile": "trtllm"}
    latent = op.startswith("mla")
    held = held_out(table.rows.tolist())
    return Family(
        file="ascend_910b.csv" if npu else "nvidia.csv",
        group=f"{device} {op}" + (", slower kernel" if odd else ""),
        source=source,
        fixed={"device": device, **engine, "phase": "op", "op": op},
        columns=_ATTENTION[:3] if latent else _ATTENTION,
        shapes=table.rows[:, :3].tolist() if latent else table.rows.tolist(),
        seconds=table.seconds.tolist(),
        keep=_kept(table.odd if odd else held & ~table.odd),
        calibration=device,
        section=None if odd else section,
        note="128 heads, 8 or more sequences of 1024 or more tokens: no fit reads them"
        if odd
        else "",
    )


def _attentions(data: Path) -> Iterator[Family]:
    plain: _Readers = (
        ("attention_prefill", npu_prefill, "FusedInferAttentionScore.csv"),
        ("attention_decode", npu_decode, "FusedInferAttentionScore_Decode.csv"),
    )
    for op, read, name in plain:
        yield _attention(read(data), "910b2", op, op.replace("_", "."), _OPERATORS + name)
    latent: _Readers = (
        ("mla_prefill", mla_prefill_table, "context_mla.csv"),
        ("mla_decode", mla_decode_table, "generation_mla.csv"),
    )
    for op, read, name in latent:
        table = read(data)
        yield _attention(table, "910b2", op, op.replace("_", "."), _LATER + name)
        if table.odd.any():
            yield _attention(table, "910b2", op, "", _LATER + name, odd=True)
    for device in ("h100", "h200"):
        for op, read_gpu, word in (
            ("attention_prefill", gpu_prefill, "context"),
            ("attention_decode", gpu_decode, "generation"),
        ):
            name = f"{device}_sxm trtllm 1.3.0rc20 {word}_attention_perf"
            section = op.replace("_", ".")
            yield _attention(read_gpu(data, device), device, op, section, _NVIDIA + name)


def _experts(data: Path) -> Iterator[Family]:
    for dtype, name in (
        ("bf16", "GroupedMatmul_MoE_BF16.csv"),
        ("w8a8", "GroupedMatmul_MoE_W8A8.csv"),
    ):
        folder = data / "ascend_ops" / "aiconfigurator_npu_910b_vllm_ascend_0.18.0"
        sizes, seconds = moe.read(folder / name)
        yield Family(
            file="ascend_910b.csv",
            group=f"910b2 moe {dtype}",
            source=_OPERATORS + name,
            fixed={"device": "910b2", "phase": "op", "op": "moe", "dtype": dtype},
            columns=_EXPERTS,
            shapes=np.stack(sizes, axis=1).tolist(),
            seconds=seconds.tolist(),
            keep=_kept(held_out(zip(*sizes, strict=True))),
            calibration="910b2",
            section=f"moe.{dtype}",
        )


def _collectives(data: Path) -> Iterator[Family]:
    npu = [(table, "910b2", "host") for table in mesh_rows(data)]
    gpu = [(table, gpu, "graph") for gpu in ("h100", "h200") for table in nccl_rows(data, gpu)]
    for table, device, launch in (*npu, *gpu):
        if launch == "graph" and table.kind != "all_reduce":
            continue
        shapes = list(zip(table.ranks.tolist(), table.message_bytes.tolist(), strict=True))
        held = held_out([(table.kind, *shape) for shape in shapes])
        # Phase `op` takes the buffer that one rank sends, as the tools print it.
        share = [ranks if table.kind == "all_to_all" else 1 for ranks, _ in shapes]
        sizes = [(p, size / part) for (p, size), part in zip(shapes, share, strict=True)]
        yield Family(
            file="ascend_910b.csv" if launch == "host" else "nvidia.csv",
            group=f"{device} {table.kind}",
            source=_HCCL if launch == "host" else f"{_NVIDIA}{device}_sxm nccl 2.29.2 nccl_perf",
            fixed={"cluster": table.cluster, "phase": "op", "op": table.kind},
            columns=("ranks", "message_bytes"),
            shapes=sizes,
            seconds=table.seconds.tolist(),
            keep=_kept(held & ~table.odd),
            calibration=device,
            section=table.section,
        )


def _weight(shape: str) -> tuple[int, int]:
    """(k, n) of a profiled weight: plain `n, k`, or in blocks of 16 x 16 and 16 x 32."""
    sizes = [int(size) for size in shape.split(",")]
    if len(sizes) == 2:  # noqa: PLR2004  # not in blocks
        return sizes[1], sizes[0]
    first, second, rows, columns = sizes
    return (second * rows, first * columns) if columns > rows else (first * rows, second * columns)


def _network(data: Path) -> Iterator[Family]:
    """Kernels that a profiler saw inside networks on an A3 die.

    Quantized products are those with one scale a token, with the kernel that makes these scales.
    """
    rows = [
        row
        for name in ("qwen3_32b_bf16", "dsv3_w8a8")
        for row in read_rows(data / "ascend_ops" / f"a3_insitu_kernels_{name}.csv")
    ]
    quantize = {
        (row["scenario"], row["input_shapes"]): float(row["mean_us"])
        for row in rows
        if row["kernel"] == "DynamicQuant"
    }
    found: dict[str, list[tuple[tuple[float, ...], float]]] = {"bf16": [], "w8a8": []}
    for row in rows:
        if not row["kernel"].startswith(("MatMulV", "QuantBatchMatmul")):
            continue
        left, right, *scales = row["input_shapes"].split(";")
        m, k = (int(size) for size in left.split(","))
        depth, n = _weight(right)
        quantized = row["kernel"].startswith("Quant")
        extra = quantize.get((row["scenario"], left)) if scales[1:] == [str(m)] else None
        if depth != k or (quantized and extra is None):
            continue
        time_us = float(row["mean_us"]) + (extra or 0.0)
        found["w8a8" if quantized else "bf16"].append(((m, n, k), time_us * 1e-6))
    for dtype, kernels in found.items():
        yield _profiled(
            "matmul",
            dtype,
            _PRODUCT,
            kernels,
            "inside a network" + (", with its DynamicQuant" if dtype == "w8a8" else ""),
        )
    prompts = [
        ((round(tokens / 4104), 4104, 4, 1, 128), float(row["mean_us"]) * 1e-6)
        for row in rows
        if row["kernel"] == "FusedInferAttentionScore" and row["scenario"].startswith("prefill")
        for tokens in (int(row["input_shapes"].split(",", 1)[0]),)
    ]
    note = "inside a network; prompts of 4104 tokens"
    yield _profiled("attention_prefill", "bf16", _ATTENTION, prompts, note)


def _profiled(
    op: str,
    dtype: str,
    columns: Sequence[str],
    kernels: Sequence[tuple[Sequence[float], float]],
    note: str,
) -> Family:
    return Family(
        file="a3_kernels.csv",
        group=f"a3-die {op}" + (f" {dtype}" if op == "matmul" else ""),
        source=_A3,
        fixed={"device": "a3-die", "phase": "op", "op": op, "dtype": dtype},
        columns=columns,
        shapes=[shape for shape, _ in kernels],
        seconds=[seconds for _, seconds in kernels],
        keep=[True] * len(kernels),
        held_out=False,
        note=note,
    )


def _switch(data: Path) -> Iterator[Family]:
    """Isolated A3 collectives that are long enough for a launch not to matter."""
    kinds = {"allGather": "all_gather", "reduceScatter": "reduce_scatter"}
    for name, kind in kinds.items():
        rows = [
            (int(row["num_dies"]), row["msg_bytes_label"], float(row["bench_us"]) * 1e-6)
            for row in read_rows(data / "ascend_ops" / "a3_hccl_bench_vs_profiler.csv")
            if row["op"] == name and row["bench_us"]
        ]
        rows = [row for row in rows if row[2] >= _LONG_S and row[1].endswith("MB")]
        yield Family(
            file="a3_kernels.csv",
            group=f"a3-die {kind}",
            source=_A3_BENCH,
            fixed={"cluster": "atlas-800i-a3", "phase": "op", "op": kind},
            columns=("ranks", "message_bytes"),
            shapes=[(dies, round(float(size[:-2]) * 2**20) * dies) for dies, size, _ in rows],
            seconds=[seconds for *_, seconds in rows],
            keep=[True] * len(rows),
            held_out=False,
            note="isolated benchmark; the fit reads the same messages in service",
        )


def _own(profiles: Path) -> Iterator[Family]:
    """The project's own measurements on H200, graphs and (collectives) launches by the host."""
    columns = {
        "matmul": _PRODUCT,
        "attention_prefill": _ATTENTION,
        "attention_decode": _ATTENTION,
        "moe": _EXPERTS[:5],
        "all_reduce": ("ranks", "message_bytes"),
    }
    rows = [
        row
        for name in ("h200_ops.csv", "h200_collectives.csv")
        for row in read_rows(profiles / name)
        if row["dtype"] == "bf16" and row["op"] in columns
    ]
    for op, names in columns.items():
        wanted = _OWN_KERNELS.get(op, {})
        mine = [
            row
            for row in rows
            if row["op"] == op and all(row[name] == value for name, value in wanted.items())
        ]
        shapes = [tuple(float(row[name]) for name in names) for row in mine]
        where = {"cluster": "hgx-h200"} if op == "all_reduce" else {"device": "h200"}
        yield Family(
            file="h200_profile.csv",
            group=f"h200 {op}, PyTorch",
            source="results/profiles",
            fixed={**where, "engine_profile": "torch-graph", "phase": "op", "op": op},
            columns=names,
            shapes=shapes,
            seconds=[float(row["time_s_median"]) for row in mine],
            keep=_kept(held_out(shapes)),
            calibration="h200",
            section=_OWN_SECTIONS[op],
            engine="torch-graph",
            note="launched by the host" if op == "all_reduce" else "in a CUDA graph",
        )


def families(data: Path, profiles: Path) -> Iterator[Family]:
    """Every family, those of a file together."""
    yield from _products(data)
    yield from _attentions(data)
    yield from _experts(data)
    yield from _collectives(data)
    yield from _network(data)
    yield from _switch(data)
    yield from _own(profiles)
