"""Fit of `matmul.toml` for one calibration, from measured tables of matrix products.

    python -m shardplan.costmodel.fitting.matmul DATA_DIR --calibration 910b2 \
        --out costmodel/data/calibrations --report results/calibration/matmul-910b2.md

DATA_DIR holds the tables as published (`ascend_ops/`, `nvidia_ops/`; their paths are below).
NVIDIA's tables: minimises, over the physical coefficients and the surface's knots,

    sum rho(ln(model / measured)) + smoothness + ridge
        + sum over a grid of sizes: max(0, ln t(x) - ln t(one size doubled))

so that a larger product is hardly ever faster where single measurements say it is; only the step
from below 16 rows to 16 and more, where another kernel takes over, may fall as it was measured.
A fifth of the shapes is kept out of the fit whose errors are reported.

Ascend's: the physical coefficients alone first, then a separable surface (`separable_fit`) on every
size of the measured grid; for fewer than 16 rows, where the library changes kernels with the
shape, times may fall with size as they were measured. The errors reported are of every row under a
fit that did not see it (five folds, two seeds).

Another fit without the largest sizes says how the formula extrapolates; the coefficients written
are then fitted to all rows of the table. The dtypes nobody measured are in `matmul_derived.toml`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.fitting.common import (
    ErrorStats,
    FittedSection,
    cross_validated,
    error_stats,
    held_out,
    markdown_errors,
    read_rows,
    robust_fit,
    write_sections,
)
from shardplan.costmodel.fitting.separable_fit import SeparableProblem, coefficients_of
from shardplan.costmodel.fitting.surface_fit import Formula, Knots, Sizes, SurfaceProblem
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.matmul import matmul_with
from shardplan.costmodel.kernels.precision import precision_of
from shardplan.costmodel.kernels.surface import knot_name

__all__ = ["QUANTIZE", "TABLES", "Samples", "Table", "fit", "fitted_section", "main", "read"]

_START: Mapping[str, tuple[float, float, float]] = {
    "floor_s": (5e-6, 1e-6, 2e-5),
    "compute": (0.85, 0.5, 1.0),
    "hbm": (0.75, 0.5, 0.98),
    "l2": (0.7, 0.3, 1.2),
    "copies": (6.0, 3.0, 12.0),
    "quantize": (0.7, 0.3, 1.5),
    "quantize_row_s": (8e-6, 1e-6, 2e-5),
    "quantize_power": (0.4, 0.2, 1.0),
}
"""Start, lower and upper bound of each physical coefficient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One measured table and the section it fits."""

    path: str
    calibration: str
    dtype: str
    style: str
    """`ascend` (profiler columns) or `nvidia` (m, n, k, latency in ms)."""
    knots: Knots
    fixed: Mapping[str, float]
    share: float
    """Share of the rows used, by hash; the rest would only cost time."""
    source: str

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Physical coefficients to fit."""
        quantized = self.dtype == "w8a8"
        names = [name for name in _START if quantized or not name.startswith("quantize")]
        return tuple(name for name in names if name not in self.fixed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Measured products: sizes and seconds `[rows]`."""

    sizes: Sizes
    seconds: Array

    def take(self, rows: NDArray[np.bool_]) -> Samples:
        """Some of the rows."""
        m, n, k = (size[rows] for size in self.sizes)
        return Samples(sizes=(m, n, k), seconds=self.seconds[rows])


_FEATURES = (256, 512, 1024, 2048, 4096, 7168, 8192, 12288, 16384)
_ASCEND_KNOTS: Knots = (tuple(2**power for power in range(15)), _FEATURES, _FEATURES)
"""Every measured size."""
_ASCEND_COMPUTE = (0.85, 0.5, 0.94)
"""The best product of the tables runs at 0.92 of the cube's peak."""
_FLOOR_SHARE = 0.95
"""Of the shortest measured time: what a launch takes at most."""
_RANK, _REACH = 10, (8.0, 4.0, 4.0)
"""Factors of the separable surface and its reach, by cross-validation."""
_SEEDS = (0, 1)
_NVIDIA_KNOTS: Knots = (
    (1, 16, 64, 128, 256, 1024, 4096, 16384),
    (128, 512, 2048, 8192, 65536),
    (128, 1024, 2560, 4096, 16384, 65536),
)
_SCALE_S = 7.2e-6
QUANTIZE = 0.7
"""Of the HBM rate, where kernels quantize large inputs: between 0.5 and 1 it fits alike."""
_DYNAMIC: Mapping[str, float] = {
    "scale_s": _SCALE_S,
    "quantize_floor_s": 2.2e-6,
    "quantize_row_s": 0.0,
    "quantize_power": 1.0,
    "quantize": QUANTIZE,
}
"""TensorRT-LLM's fp8 rows make their input fp8 in every call, its scale found anew
(ai-dynamo/aiconfigurator collector/trtllm/collect_gemm.py: QuantAlgo.FP8 without an input scale):
maximum, scale and cast beside the product. What that takes is how much longer products of at most
256 outputs, short ones themselves, take than in bf16: 9.2 to 9.7 us with small inputs, on both
devices, and up to 2 us more for each million elements. `scale_s` is the part of the scale: with at
most 64 rows and inputs of at most 2,048 these rows take 7.1 to 7.8 us (medians) more than its
block-scaled product and than vLLM's, which cast only."""
_KERNEL_ROWS = 16
_TOP = 0.7
_ASCEND = "ascend_ops/aiconfigurator_npu_910b_vllm_ascend_0.18.0/"
_ASCEND_SOURCE = (
    "fitted to {table} of github.com/hudingyi688/aiconfigurator-npu @ 90d7765a (910B, "
    "vllm-ascend 0.18.0, graph replay, six weight copies in turn); errors by cross-validation"
)
_NVIDIA_SOURCE = (
    "fitted to {dtype} rows of gemm_perf (TensorRT-LLM 1.3.0rc20, {gpu}) in PyPI "
    "aiconfigurator-core 0.12.0, Apache-2.0, (c) NVIDIA CORPORATION & AFFILIATES"
)


def _ascend(name: str, dtype: str) -> Table:
    return Table(
        path=_ASCEND + name,
        calibration="910b2",
        dtype=dtype,
        style="ascend",
        knots=_ASCEND_KNOTS,
        fixed={"copies": 6.0, "split_k": 6.0},
        share=1.0,
        source=_ASCEND_SOURCE.format(table=name),
    )


def _nvidia(gpu: str, dtype: str) -> Table:
    return Table(
        path=f"nvidia_ops/{gpu}_sxm__trtllm_1.3.0rc20__gemm_perf.csv.gz",
        calibration=gpu,
        dtype=dtype,
        style="nvidia",
        knots=_NVIDIA_KNOTS,
        fixed={"tile_elements": 32768.0, **(_DYNAMIC if dtype == "fp8" else {})},
        share=0.08,
        source=_NVIDIA_SOURCE.format(dtype=dtype, gpu=gpu.upper()),
    )


TABLES: tuple[Table, ...] = (
    _ascend("MatMulV2.csv", "bf16"),
    _ascend("QuantBatchMatmulV3.csv", "w8a8"),
    *(_nvidia(gpu, dtype) for gpu in ("h100", "h200") for dtype in ("bf16", "fp8")),
)


def _ascend_row(row: Mapping[str, str]) -> tuple[float, float, float, float]:
    left, right = row["Input Shapes"].split(";")
    m, k = left.split(",")
    n = right.split(",")[0]
    return float(m), float(n), float(k), float(row["Average Duration(us)"]) * 1e-6


def _nvidia_row(row: Mapping[str, str]) -> tuple[float, float, float, float]:
    return float(row["m"]), float(row["n"]), float(row["k"]), float(row["latency"]) * 1e-3


def read(table: Table, folder: Path) -> Samples:
    """The rows of a table, thinned to its share; `InputError` if the file is not there."""
    rows = read_rows(folder / table.path)
    if table.style == "ascend":
        found = [_ascend_row(row) for row in rows]
    else:
        wanted = {"bf16": "bfloat16"}.get(table.dtype, table.dtype)
        least = min(table.knots[1])
        found = [_nvidia_row(row) for row in rows if row["gemm_dtype"] == wanted]
        found = [row for row in found if min(row[1], row[2]) >= least]
    values = np.asarray(found, dtype=np.float64)
    if table.share < 1.0:
        values = values[held_out((("thin", *row[:3]) for row in found), table.share)]
    return Samples(sizes=(values[:, 0], values[:, 1], values[:, 2]), seconds=values[:, 3])


def _doubled() -> tuple[Sizes, tuple[Sizes, ...]]:
    """A grid of sizes, and the same with m, n or k doubled."""
    rows = np.concatenate([2.0 ** np.arange(0, 14), [3, 6, 7, 24, 33, 48, 96, 192, 400.0]])
    features = np.asarray([256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192.0])
    m, n, k = (axis.ravel() for axis in np.meshgrid(rows, features, features))
    across = np.where((m < _KERNEL_ROWS) & (2 * m >= _KERNEL_ROWS), 1.0, 2.0)
    return (m, n, k), ((across * m, n, k), (m, 2 * n, k), (m, n, 2 * k))


def _larger() -> tuple[Sizes, tuple[Sizes, ...]]:
    """A grid of 16 rows and more, and the same with m a step larger or n or k doubled."""
    step = 0.25
    rows = 2.0 ** np.arange(np.log2(_KERNEL_ROWS), 14.0 + step, step)
    features = np.asarray([256, 384, 512, 1024, 1536, 2048, 3072, 4096, 5632, 8192, 12288.0])
    m, n, k = (axis.ravel() for axis in np.meshgrid(rows, features, features))
    return (m, n, k), ((2.0**step * m, n, k), (m, 2 * n, k), (m, n, 2 * k))


def _formula(table: Table, device: Device) -> Formula:
    rule = precision_of(table.dtype)

    def parts(point: Array, sizes: Sizes) -> tuple[Array, Array]:
        coef = {**table.fixed, **dict(zip(table.coefficients, point.tolist(), strict=True))}
        time = matmul_with(coef, device, sizes, rule)
        return time.overhead_s, time.compute_s + time.memory_s

    return parts


def _separable(table: Table, device: Device, samples: Samples) -> dict[str, float]:
    """Physical coefficients, then the factors of a surface over them."""
    rule = precision_of(table.dtype)
    names = table.coefficients
    floor = (4e-6, 1e-6, _FLOOR_SHARE * float(samples.seconds.min()))
    start = {**_START, "compute": _ASCEND_COMPUTE, "floor_s": floor}
    bounds = np.asarray([start[name] for name in names])

    def base(point: Array, sizes: Sizes) -> Array:
        coef = {**table.fixed, **dict(zip(names, point.tolist(), strict=True))}
        return matmul_with(coef, device, sizes, rule).total_s

    point = robust_fit(
        lambda trial: base(trial, samples.sizes), samples.seconds, *bounds.T, scale=0.2
    )
    grid, larger = _larger()
    factors = SeparableProblem(
        base=lambda sizes: base(point, sizes),
        knots=table.knots,
        sizes=samples.sizes,
        measured_s=samples.seconds,
        grid=grid,
        larger=larger,
        rank=_RANK,
        reach=_REACH,
    ).solve()
    physical = dict(zip(names, point.tolist(), strict=True))
    return {**table.fixed, **physical, **coefficients_of(factors, table.knots)}


def fit(table: Table, device: Device, samples: Samples) -> dict[str, float]:
    """Coefficients of the table's section that fit the samples best."""
    if table.style == "ascend":
        return _separable(table, device, samples)
    bounds = np.asarray([_START[name] for name in table.coefficients])
    grid, doubled = _doubled()
    problem = SurfaceProblem(
        formula=_formula(table, device),
        knots=table.knots,
        start=bounds[:, 0],
        lower=bounds[:, 1],
        upper=bounds[:, 2],
        sizes=samples.sizes,
        measured_s=samples.seconds,
        grid=grid,
        doubled=doubled,
    )
    physical, surface = problem.solve()
    knots = [
        knot_name(a, b, c) for a in table.knots[0] for b in table.knots[1] for c in table.knots[2]
    ]
    return {
        **table.fixed,
        **dict(zip(table.coefficients, physical.tolist(), strict=True)),
        **dict(zip(knots, surface.tolist(), strict=True)),
    }


def _unseen(table: Table, device: Device, samples: Samples, out: NDArray[np.bool_]) -> Array:
    """Seconds of the rows `out` by a fit to the others."""
    coef = fit(table, device, samples.take(~out))
    return matmul_with(coef, device, samples.take(out).sizes, precision_of(table.dtype)).total_s


def _held(table: Table, device: Device, samples: Samples) -> ErrorStats:
    """Errors on rows that the fit did not see."""

    def predict(out: NDArray[np.bool_]) -> Array:
        return _unseen(table, device, samples, out)

    shapes = list(zip(*samples.sizes, strict=True))
    if table.style == "ascend":
        return cross_validated(shapes, samples.seconds, predict, seeds=_SEEDS)
    out = held_out(shapes)
    return error_stats(predict(out), samples.seconds[out])


def _largest(samples: Samples) -> NDArray[np.bool_]:
    """Rows with m, n or k at the top of its range."""
    tops = [size >= _TOP * size.max() for size in samples.sizes]
    return np.asarray(tops[0] | tops[1] | tops[2], dtype=np.bool_)


def fitted_section(
    table: Table, folder: Path
) -> tuple[FittedSection, list[tuple[str, ErrorStats]]]:
    """The section of a table, and the named errors to report."""
    device, samples = load_device(table.calibration), read(table, folder)
    held, top = _held(table, device, samples), _largest(samples)
    extrapolated = error_stats(_unseen(table, device, samples, top), samples.seconds[top])
    section = FittedSection(
        name=f"matmul.{table.dtype}",
        kind="fitted",
        source=table.source,
        coefficients=fit(table, device, samples),
        rows_fitted=samples.seconds.size,
        held=held,
    )
    name = f"{table.calibration} {table.dtype}"
    said = "cross-validated" if table.style == "ascend" else "held out"
    return section, [(f"{name}, {said}", held), (f"{name}, largest sizes", extrapolated)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: fit the tables of one calibration and write its `matmul.toml`."""
    parser = argparse.ArgumentParser(description="fit matmul coefficients to measured tables")
    parser.add_argument("data", type=Path, help="folder that holds the measured tables")
    parser.add_argument("--calibration", required=True, choices=("910b2", "h100", "h200"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the calibrations")
    parser.add_argument("--report", type=Path, help="Markdown file for the errors")
    options = parser.parse_args(arguments)
    sections, errors = [], []
    for table in TABLES:
        if table.calibration == options.calibration:
            section, rows = fitted_section(table, options.data)
            sections.append(section)
            errors.extend(rows)
    heading = "Matrix products. Written by shardplan.costmodel.fitting.matmul; do not edit."
    write_sections(options.out / options.calibration / "matmul.toml", heading, sections)
    report = markdown_errors(errors)
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        module = "python -m shardplan.costmodel.fitting.matmul"
        command = f"{module} DATA_DIR --calibration {options.calibration}"
        options.report.write_text(f"# Matrix products\n\n`{command}`\n\n{report}", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
