"""Fit of `pointwise.toml` for the 910b2 calibration, from kernels profiled inside a network.

    python -m shardplan.costmodel.fitting.pointwise DATA_DIR --out costmodel/data/calibrations

Each kind of kernel has one to six measured shapes on an A3 die (24 cube and 48 vector cores, like
a 910B2): enough for a floor and a rate in L2, by least squares of the soft error of log(time),
not for held-out rows; the errors written are those of the fit. A kind with one shape keeps the
floor assumed for it. Kinds nobody measured stand in `pointwise_assumed.toml`, by hand.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.fitting.common import (
    FittedSection,
    error_stats,
    read_rows,
    robust_fit,
    write_sections,
)
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.base import Array

__all__ = ["KINDS", "Kind", "fit", "main", "read"]

_TABLES = ("a3_insitu_kernels_qwen3_32b_bf16.csv", "a3_insitu_kernels_dsv3_w8a8.csv")
_SOURCE = (
    "{kernels}, profiled on an A3 die: github.com/Horacehxw/msModeling @ 39df672b, "
    "per_shape_cv_output.txt; the errors are those of the fit"
)
_FLOOR = (4e-6, 1e-6, 40e-6)
_L2 = (0.1, 1e-3, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of kernel: which profiled kernels, and what one element of the first input moves."""

    name: str
    kernels: tuple[str, ...]
    bytes_per_element: float
    flop_per_element: float
    hbm: float = 0.7
    """Fraction of the HBM rate past L2: SwiGLU on 394 MB reaches 0.65, on 236 MB 0.72."""


KINDS = (
    Kind(name="add_rmsnorm", kernels=("AddRmsNormBias",), bytes_per_element=8, flop_per_element=7),
    Kind(
        name="rmsnorm",
        kernels=("RmsNorm", "AddRmsNormBias"),
        bytes_per_element=6,
        flop_per_element=5,
    ),
    Kind(name="rope", kernels=("InterleaveRope",), bytes_per_element=4, flop_per_element=6),
    Kind(
        name="qk_norm_rope",
        kernels=("split_qkv_rmsnorm_rope_kernel",),
        bytes_per_element=4,
        flop_per_element=11,
    ),
    Kind(name="swiglu", kernels=("SwiGlu",), bytes_per_element=3, flop_per_element=6),
    Kind(name="add", kernels=("Add",), bytes_per_element=6, flop_per_element=1),
    Kind(name="quantize", kernels=("DynamicQuant",), bytes_per_element=3, flop_per_element=4),
    Kind(
        name="quantize_static", kernels=("AscendQuantV2",), bytes_per_element=3, flop_per_element=3
    ),
    Kind(
        name="kv_append",
        kernels=("ReshapeAndCacheNdKernel",),
        bytes_per_element=8,
        flop_per_element=0,
    ),
    Kind(name="topk_router", kernels=("MoeGatingTopK",), bytes_per_element=4, flop_per_element=20),
    Kind(name="slice", kernels=("Slice",), bytes_per_element=4, flop_per_element=0),
    Kind(name="copy", kernels=("TensorMove",), bytes_per_element=4, flop_per_element=0),
)


def read(folder: Path, kind: Kind) -> tuple[Array, Array]:
    """Bytes and seconds of the kind's measured rows."""
    moved, seconds = [], []
    for table in _TABLES:
        for row in read_rows(folder / "ascend_ops" / table):
            if row["kernel"] in kind.kernels:
                first = row["input_shapes"].split(";")[0]
                elements = math.prod(int(size) for size in first.split(","))
                moved.append(elements * kind.bytes_per_element)
                seconds.append(float(row["mean_us"]) * 1e-6)
    return np.asarray(moved, dtype=np.float64), np.asarray(seconds, dtype=np.float64)


def _seconds(device: Device, kind: Kind, moved: Array, floor_s: float, l2: float) -> Array:
    """Memory time as `kernels.pointwise` has it; no measured row is bound by arithmetic."""
    l2_byte_s = 1.0 / (device.l2_bytes_per_s * l2)
    hbm_byte_s = 1.0 / (device.hbm_bytes_per_s * kind.hbm)
    beyond = np.maximum(moved - device.l2_bytes, 0.0)
    return floor_s + moved * l2_byte_s + beyond * max(0.0, hbm_byte_s - l2_byte_s)


def fit(device: Device, kind: Kind, moved: Array, seconds: Array) -> FittedSection:
    """The section of one kind."""
    bounds = np.asarray([_FLOOR, _L2])
    bounds[0, 1] = min(bounds[0, 1], float(seconds.min()) * 0.5)
    if seconds.size == 1:
        bounds[0, 1:] = bounds[0, 0] * np.asarray([0.999, 1.001])
    point = robust_fit(
        lambda p: _seconds(device, kind, moved, float(p[0]), float(p[1])),
        seconds,
        bounds[:, 0],
        bounds[:, 1],
        bounds[:, 2],
        scale=0.1,
    )
    errors = error_stats(_seconds(device, kind, moved, float(point[0]), float(point[1])), seconds)
    print(f"{kind.name:18s} rows {errors.rows} median {errors.median:.1%} worst {errors.worst:.1%}")
    return FittedSection(
        name=f"pointwise.{kind.name}",
        kind="fitted",
        source=_SOURCE.format(kernels=", ".join(kind.kernels)),
        coefficients={
            "floor_s": float(point[0]),
            "l2": float(point[1]),
            "hbm": kind.hbm,
            "flop_per_element": kind.flop_per_element,
        },
        rows_fitted=seconds.size,
        fit_errors=errors if seconds.size > point.size else None,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: fit every kind and write `910b2/pointwise.toml`."""
    parser = argparse.ArgumentParser(description="fit streaming kernels to profiled ones")
    parser.add_argument("data", type=Path, help="folder that holds the measured tables")
    parser.add_argument("--out", type=Path, required=True, help="folder of the calibrations")
    options = parser.parse_args(arguments)
    device = load_device("a3-die")
    sections = [fit(device, kind, *read(options.data, kind)) for kind in KINDS]
    heading = "Streaming kernels. Written by shardplan.costmodel.fitting.pointwise; do not edit."
    write_sections(options.out / "910b2" / "pointwise.toml", heading, sections)


if __name__ == "__main__":
    main()
