"""Fit of `moe.toml` for the 910b2 calibration, from the measured blocks of routed experts.

    python -m shardplan.costmodel.fitting.moe DATA_DIR \
        --out costmodel/data/calibrations --report results/calibration/moe.md

Minimises the soft absolute error of log(time) over the coefficients of `kernels.moe`. The errors
reported are of every row under a fit that did not see it (five folds, three seeds); the
coefficients written are fitted to all rows.
Blocks of few tokens scatter (the benchmark routes at random and once), which bounds the error.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.fitting.common import (
    ErrorStats,
    FittedSection,
    cross_validated,
    error_stats,
    markdown_errors,
    read_rows,
    robust_fit,
    write_sections,
)
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.moe import moe_block_with
from shardplan.costmodel.kernels.precision import precision_of

__all__ = ["fit", "main", "read"]

Sizes = tuple[Array, Array, Array, Array, Array, Array]
_TABLES = {"bf16": "GroupedMatmul_MoE_BF16.csv", "w8a8": "GroupedMatmul_MoE_W8A8.csv"}
_FOLDER = "ascend_ops/aiconfigurator_npu_910b_vllm_ascend_0.18.0/"
_SOURCE = (
    "fitted to {table} of github.com/hudingyi688/aiconfigurator-npu @ 90d7765a (910B, "
    "vllm-ascend 0.18.0, blocks of gate/up, SwiGLU and down grouped matmuls); "
    "errors by cross-validation"
)
_COLUMNS = ("Num Tokens", "Hidden Size", "Intermediate Size", "Num Experts", "TopK", "EP Size")
_FIXED = {"tile_rows": 128.0, "l2": 0.65}
"""A tile is 128 x 256 (fp32 in L0C); the L2 rate is that of dense products."""
_START: Mapping[str, tuple[float, float, float]] = {
    "floor_s": (15e-6, 3e-6, 60e-6),
    "compute": (0.7, 0.5, 0.92),
    "hbm": (0.75, 0.5, 1.0),
    "hbm_size": (0.03, 0.0, 0.2),
    "imbalance": (1.2, 1.0, 2.0),
    "reread": (0.7, 0.0, 1.0),
    "blend": (3.0, 1.2, 6.0),
    "quantize": (0.5, 0.05, 1.5),
}
_LARGE_TOKENS = 2048
_SEEDS = (0, 1, 2)


def read(path: Path) -> tuple[Sizes, Array]:
    """Sizes (tokens, hidden, ffn, experts, topk, ep) and seconds of a table's rows."""
    rows = list(read_rows(path))
    columns = [np.asarray([float(row[name]) for row in rows]) for name in _COLUMNS]
    seconds = np.asarray([float(row["Average Duration(us)"]) * 1e-6 for row in rows])
    tokens, hidden, ffn, experts, topk, ep = columns
    return (tokens, hidden, ffn, experts, topk, ep), seconds


def _take(sizes: Sizes, rows: NDArray[np.bool_]) -> Sizes:
    tokens, hidden, ffn, experts, topk, ep = (size[rows] for size in sizes)
    return tokens, hidden, ffn, experts, topk, ep


def fit(dtype: str, device: Device, sizes: Sizes, seconds: Array) -> dict[str, float]:
    """Coefficients of `moe.dtype` that fit the rows best."""
    rule = precision_of(dtype)
    names = [name for name in _START if rule.quantizes or name != "quantize"]
    bounds = np.asarray([_START[name] for name in names])

    def model(point: Array) -> Array:
        coef = {**_FIXED, **dict(zip(names, point.tolist(), strict=True))}
        return moe_block_with(coef, device, sizes, rule).total_s

    point = robust_fit(model, seconds, bounds[:, 0], bounds[:, 1], bounds[:, 2], scale=0.03)
    return {**_FIXED, **dict(zip(names, point.tolist(), strict=True))}


def _judge(
    dtype: str, device: Device, sizes: Sizes, seconds: Array
) -> tuple[ErrorStats, ErrorStats]:
    """Errors on rows that the fit did not see, and on many tokens when fitted to few."""

    def predict(out: NDArray[np.bool_]) -> Array:
        coef = fit(dtype, device, _take(sizes, ~out), seconds[~out])
        return moe_block_with(coef, device, _take(sizes, out), precision_of(dtype)).total_s

    many = np.asarray(sizes[0] >= _LARGE_TOKENS, dtype=np.bool_)
    shapes = list(zip(*sizes, strict=True))
    held = cross_validated(shapes, seconds, predict, seeds=_SEEDS)
    return held, error_stats(predict(many), seconds[many])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: fit both tables and write `910b2/moe.toml`."""
    parser = argparse.ArgumentParser(description="fit MoE coefficients to measured tables")
    parser.add_argument("data", type=Path, help="folder that holds the measured tables")
    parser.add_argument("--out", type=Path, required=True, help="folder of the calibrations")
    parser.add_argument("--report", type=Path, help="Markdown file for the errors")
    options = parser.parse_args(arguments)
    device = load_device("910b2")
    sections: list[FittedSection] = []
    errors: list[tuple[str, ErrorStats]] = []
    for dtype, table in _TABLES.items():
        sizes, seconds = read(options.data / _FOLDER / table)
        held, large = _judge(dtype, device, sizes, seconds)
        errors += [(f"{dtype}, cross-validated", held), (f"{dtype}, 2048 tokens and more", large)]
        sections.append(
            FittedSection(
                name=f"moe.{dtype}",
                kind="fitted",
                source=_SOURCE.format(table=table),
                coefficients=fit(dtype, device, sizes, seconds),
                rows_fitted=seconds.size,
                held=held,
            )
        )
    heading = "Routed experts. Written by shardplan.costmodel.fitting.moe; do not edit."
    write_sections(options.out / "910b2" / "moe.toml", heading, sections)
    report = markdown_errors(errors)
    if options.report is not None:
        command = "python -m shardplan.costmodel.fitting.moe DATA_DIR"
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(f"# Routed experts\n\n`{command}`\n\n{report}", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
