"""Sections of NVIDIA devices that vLLM and TensorRT-LLM do not share.

    python -m shardplan.costmodel.fitting.nvidia_engines DATA_DIR \
        --out costmodel/data/calibrations --report results/calibration/h200-engines.md

The base of h100 and h200 is fitted to TensorRT-LLM's tables (`fitting.matmul`,
`fitting.attention`) and to NCCL. vLLM 0.24 runs other products (cuBLAS and CUTLASS), other
attention (FlashAttention-3) and an all_reduce of its own, TensorRT-LLM its all_reduce; each is
fitted to that engine's table with the formulas and the bounds of the base.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from shardplan.costmodel.calibration import Calibration, load_calibration
from shardplan.costmodel.fitting import attention, collectives, matmul
from shardplan.costmodel.fitting.attention_tables import Table
from shardplan.costmodel.fitting.collective_tables import CollectiveTable
from shardplan.costmodel.fitting.common import (
    ErrorStats,
    FittedSection,
    held_out,
    markdown_errors,
    read_rows,
    write_sections,
)

__all__ = ["DEVICES", "main", "trtllm", "vllm"]

DEVICES = ("h200", "h100")
_MODULE = "python -m shardplan.costmodel.fitting.nvidia_engines"
_VLLM = "nvidia_ops/{device}_sxm__vllm_0.24.0__{table}_perf.csv.gz"
_ORIGIN = "PyPI aiconfigurator-core 0.12.0, Apache-2.0, NVIDIA"
_SHARE, _LEAST_TOKENS, _MOST_BATCH, _MOST_GROUP = 0.3, 60, 512, 16
_ONESHOT_BYTES = 1e6
_ALL_REDUCE = "collectives.switch.graph.all_reduce"
_STATIC: Mapping[str, float] = {
    "quantize_floor_s": 2.3e-6,
    "quantize_row_s": 9.5e-7,
    "quantize_power": 1.0,
    "quantize": matmul.QUANTIZE,
}
"""vLLM's fp8 rows cast their input in every call, with a given scale (ai-dynamo/aiconfigurator
collector/vllm/collect_gemm.py: activation_scheme static). What that takes is how much longer
products of at most 256 outputs and inputs take than in bf16: 2.3 us, 7.2 ns more for each row
(132 at once), and for each million elements what HBM takes."""

Result = tuple[dict[str, list[FittedSection]], list[tuple[str, ErrorStats]]]
"""Sections by file, and the errors to report."""


def _attention_table(data: Path, device: str, phase: str, tokens: str, what: str) -> Table:
    path = data / _VLLM.format(device=device, table=f"{phase}_attention")
    kept = []
    for row in read_rows(path):
        plain = row["attn_dtype"] == row["kv_cache_dtype"] == "bfloat16"
        heads, kv_heads = float(row["num_heads"]), float(row["num_key_value_heads"])
        if not plain or row["window_size"] != "0" or row["head_dim"] != "128":
            continue
        batch, length = float(row["batch_size"]), float(row[tokens])
        if length < _LEAST_TOKENS or batch > _MOST_BATCH or heads > _MOST_GROUP * kv_heads:
            continue
        seconds = float(row["latency"]) * 1e-3
        kept.append((batch, length, heads, kv_heads, float(row["head_dim"]), seconds))
    picked = held_out([("sample", *row[:5]) for row in kept], _SHARE)
    values = np.asarray(kept, dtype=np.float64)[picked]
    return Table(
        rows=values[:, :-1],
        seconds=values[:, -1],
        odd=np.zeros(len(values), dtype=np.bool_),
        source=f"{what} on {device.upper()} SXM, bf16, head 128, vLLM 0.24.0 (FlashAttention-3), "
        f"three tenths of the rows ({_ORIGIN})",
    )


def _attention(data: Path, device: str) -> list[attention.Fit]:
    """Both phases with the problems of the base, over vLLM's rows."""
    tables: Mapping[str, Callable[[], Table]] = {
        "attention.prefill": lambda: _attention_table(
            data, device, "context", "isl", "prefill attention"
        ),
        "attention.decode": lambda: _attention_table(
            data, device, "generation", "step", "decode attention"
        ),
    }
    return [
        attention.fit(replace(problem, table=tables[problem.section]()))
        for problem in attention.gpu_problems(data, device)
    ]


def _products(data: Path, device: str) -> tuple[list[FittedSection], list[tuple[str, ErrorStats]]]:
    sections, errors = [], []
    for table in matmul.TABLES:
        if table.calibration != device or table.style != "nvidia":
            continue
        own = replace(
            table,
            path=_VLLM.format(device=device, table="gemm"),
            fixed={
                "tile_elements": table.fixed["tile_elements"],
                **(_STATIC if table.dtype == "fp8" else {}),
            },
            source=f"fitted to {table.dtype} rows of gemm_perf (vLLM 0.24.0, {device.upper()}) in "
            f"{_ORIGIN}",
        )
        section, lines = matmul.fitted_section(own, data)
        sections.append(section)
        errors += lines
    return sections, errors


def _all_reduce(table: CollectiveTable) -> tuple[FittedSection, list[tuple[str, ErrorStats]]]:
    problem = collectives.CollectiveProblem(
        table=table,
        bounds=collectives.CUSTOM,
        fixed={"oneshot_bytes": _ONESHOT_BYTES},
        around=Calibration(name="none", sections={}),
    )
    return collectives.fit(problem)


def _vllm_all_reduce(data: Path, device: str) -> CollectiveTable:
    path = data / _VLLM.format(device=device, table="custom_allreduce")
    rows = [row for row in read_rows(path) if row["backend"] == "vllm_graph"]
    return CollectiveTable(
        section=_ALL_REDUCE,
        cluster=f"hgx-{device}",
        kind="all_reduce",
        launch="graph",
        custom=False,
        ranks=np.asarray([int(row["num_gpus"]) for row in rows], dtype=np.int64),
        message_bytes=np.asarray([2.0 * float(row["message_size"]) for row in rows]),
        seconds=np.asarray([float(row["latency"]) * 1e-3 for row in rows]),
        odd=np.zeros(len(rows), dtype=np.bool_),
        source=f"vLLM 0.24.0 all_reduce in a graph on {device.upper()} SXM, one NVLink node "
        f"({_ORIGIN})",
    )


def vllm(data: Path, device: str) -> Result:
    """vLLM's products, attention and all_reduce on a device."""
    products, errors = _products(data, device)
    fits = _attention(data, device)
    reduce, lines = _all_reduce(_vllm_all_reduce(data, device))
    errors += [line for one in fits for line in one.errors] + lines
    sections = {
        "matmul": products,
        "attention": [one.section for one in fits],
        "collectives": [reduce],
    }
    return sections, [(f"vllm, {name}", stats) for name, stats in errors]


def trtllm(data: Path, device: str) -> Result:
    """TensorRT-LLM's all_reduce on a device, in place of NCCL's; the rest is the base."""
    known = load_calibration(device).section("collectives.switch.custom.all_reduce")
    section = FittedSection(
        name=_ALL_REDUCE,
        kind=known.kind,
        source=known.source,
        coefficients=known.coefficients,
        rows_fitted=known.rows_fitted,
        held=ErrorStats(
            rows=known.rows_held_out,
            median=known.median_error,
            p90=known.p90_error,
            worst=known.p90_error,
            bias=0.0,
        ),
    )
    return {"collectives": [section]}, []


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit both engines on both devices, write their folders and the table of errors."""
    parser = argparse.ArgumentParser(prog=_MODULE)
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    heading = f"Written by `{_MODULE}`; do not edit by hand."
    lines: list[tuple[str, ErrorStats]] = []
    for device in DEVICES:
        for engine, make in (("trtllm", trtllm), ("vllm", vllm)):
            files, errors = make(options.data, device)
            for family, sections in files.items():
                write_sections(options.out / device / engine / f"{family}.toml", heading, sections)
            lines += errors
    text = (
        "# vLLM on H200 and H100: its own products, attention and all_reduce\n\n"
        "Relative error of the priced time on rows that the fit did not see.\n\n"
        f"{markdown_errors(lines)}\n"
        f"Regenerate: `{_MODULE} DATA_DIR --out costmodel/data/calibrations "
        "--report results/calibration/h200-engines.md`\n"
    )
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(text, encoding="utf-8")
    print(markdown_errors(lines))


if __name__ == "__main__":
    main()
