"""Fit of the `a3-die` calibration from kernels that a profiler saw inside networks on A3.

    python -m shardplan.costmodel.fitting.a3 DATA_DIR \
        --out costmodel/data/calibrations --report results/calibration/a3.md

Run it after the fits of 910b2, on which this calibration stands. A few dozen shapes of two networks
(Qwen3-32B bf16, DeepSeek-V3 w8a8; weights in the NZ layout, streamed once a step) cannot fix a
surface, so each section is 910b2's with few factors, found by the robust fit of `common` with a
ridge towards 1 (what the rows do not say stays 910b2's):

    matmul.bf16, matmul.w8a8   floor_s, compute, hbm, l2 each times a factor, and short_k added to
                               the surface at m >= 1024, in full at k = 256, fading out at k = 8192
    matmul.w8a8                the profiler lists the quantization kernel apart: its rate and its
                               launch (added to the floor) are fitted to the DynamicQuant rows
    attention.prefill          efficiency times a factor
    attention.decode           floor times a factor (one row)
    pointwise.*                floor and rate of each kind (`pointwise`), all measured on A3

Two launches no row shows: the cache write of keys and values is one kernel where a step counts two
rows, so each has half of its floor; and query and key norms with rotary embedding were seen in
prefill only, so their floor is what the published decode step (11.4 ms of compute) leaves after all
listed kernels: one whole-network figure. Held-out errors: each row is left out once.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shardplan.costmodel.calibration import Calibration, Section, load_calibration
from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.fitting import pointwise
from shardplan.costmodel.fitting.common import (
    ErrorStats,
    FittedSection,
    error_stats,
    markdown_errors,
    read_rows,
    robust_fit,
    write_sections,
)
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.attention import attention_decode, attention_prefill
from shardplan.costmodel.kernels.base import Array, Machine
from shardplan.costmodel.kernels.matmul import matmul_with
from shardplan.costmodel.kernels.precision import precision_of
from shardplan.costmodel.kernels.surface import factor_name

__all__ = ["MatmulRows", "main", "matmul_rows", "scaled"]

_TABLES = ("a3_insitu_kernels_qwen3_32b_bf16.csv", "a3_insitu_kernels_dsv3_w8a8.csv")
_SOURCE = (
    "Ascend profiler in service on an Atlas 800 A3 die, CANN 8.5, vLLM 0.15, ACL graph "
    "(github Horacehxw/msModeling 39df672b, per_shape_cv_output.txt); 910b2 times few factors"
)
_PROMPT = 4104.0
_DECODE = (16.0, 4800.0, 4.0, 1.0, 128.0)
"""Sequences, context (about 4k to 5.6k), heads, kv heads and head size of the decode row."""
_REST_S = 11.4e-3
"""Compute of the published decode step; 64 layers."""
_LAYERS = 64
_KNOT = re.compile(r"s_m(\d+)_n\d+_k(\d+)")
_FACTOR = re.compile(r"u(\d+)_[mnk]\d+")
_SHORT_K = (256.0, 8192.0)
_MANY_ROWS = 1024.0
_FACTORS = ("floor_s", "compute", "hbm", "l2")
_RIDGE, _LOOSE = 1.0, 0.1
"""Pull towards 1 of factors that few rows fix together, and of a factor alone."""
_HEADING = "Written by `python -m shardplan.costmodel.fitting.a3`; do not edit by hand."


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulRows:
    """Profiled products y[m, n] = x[m, k] @ w[k, n]: sizes and seconds `[rows]`."""

    m: Array
    n: Array
    k: Array
    seconds: Array

    def where(self, pick: Array) -> MatmulRows:
        """The picked rows."""
        keep = pick.astype(np.bool_)
        return MatmulRows(
            m=self.m[keep], n=self.n[keep], k=self.k[keep], seconds=self.seconds[keep]
        )


def _rows(data: Path, *kernels: str) -> list[dict[str, str]]:
    return [
        row
        for table in _TABLES
        for row in read_rows(data / "ascend_ops" / table)
        if row["kernel"] in kernels
    ]


def _sizes(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def matmul_rows(data: Path, *kernels: str) -> MatmulRows:
    """Rows of plain products; a weight in the NZ layout has its fractals as further dims."""
    found = []
    for row in _rows(data, *kernels):
        x, w = (_sizes(part) for part in row["input_shapes"].split(";")[:2])
        found.append((x[0], math.prod(w) / x[1], x[1], float(row["mean_us"]) * 1e-6))
    m, n, k, seconds = np.asarray(found, dtype=np.float64).T
    return MatmulRows(m=m, n=n, k=k, seconds=seconds)


def scaled(base: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """Coefficients times factors; `short_k` is added to the surface as the module says."""
    out = dict(base)
    for name, factor in factors.items():
        if name in out:
            out[name] *= factor
    shift = factors.get("short_k", 0.0)
    if shift and any(_KNOT.fullmatch(name) for name in base):
        return _on_grid(out, shift)
    return out | _as_factor(base, shift) if shift else out


def _on_grid(base: Mapping[str, float], shift: float) -> dict[str, float]:
    """The shift on the knots of a surface given as a grid."""
    low, high = _SHORT_K
    out = dict(base)
    for name in base:
        found = _KNOT.fullmatch(name)
        if found and float(found[1]) >= _MANY_ROWS:
            share = math.log(high / float(found[2])) / math.log(high / low)
            out[name] += shift * min(max(share, 0.0), 1.0)
    return out


def _as_factor(base: Mapping[str, float], shift: float) -> dict[str, float]:
    """The shift as one more product of a surface given as a sum of products."""
    ranks = [int(found[1]) for found in map(_FACTOR.fullmatch, base) if found]
    rank = max(ranks, default=0) + 1
    low, high = (int(size) for size in _SHORT_K)
    return {
        factor_name(rank, "m", int(_MANY_ROWS / 2)): 0.0,
        factor_name(rank, "m", int(_MANY_ROWS)): 1.0,
        factor_name(rank, "n", low): 1.0,
        factor_name(rank, "k", low): shift,
        factor_name(rank, "k", high): 0.0,
    }


def _solve(
    model: Callable[[Mapping[str, float]], Array], seconds: Array, names: Sequence[str]
) -> dict[str, float]:
    """Factors by name; exponents of factors are what is fitted, from 0."""

    def named(point: Array) -> dict[str, float]:
        return {
            name: value if name == "short_k" else math.exp(value)
            for name, value in zip(names, point.tolist(), strict=True)
        }

    start = np.zeros(len(names))
    found = robust_fit(
        lambda point: model(named(point)),
        seconds,
        start,
        start - 1.5,
        start + 1.5,
        ridge=np.full(len(names), _RIDGE if len(names) > 1 else _LOOSE),
    )
    return named(found)


def _left_out(
    model: Callable[[Mapping[str, float]], Array], seconds: Array, names: Sequence[str]
) -> ErrorStats:
    """Errors of each row under the factors fitted to the others."""
    guesses = []
    for row in range(seconds.size):
        keep = np.arange(seconds.size) != row
        if not keep.any():
            return error_stats(np.zeros(0), np.zeros(0))
        factors = _solve(lambda f, keep=keep: model(f)[keep], seconds[keep], names)  # type: ignore[misc]  # the loop's own mask
        guesses.append(model(factors)[row])
    return error_stats(np.asarray(guesses), seconds)


def _fit(
    name: str,
    base: Section,
    model: Callable[[Mapping[str, float]], Array],
    seconds: Array,
    names: Sequence[str],
) -> tuple[FittedSection, list[tuple[str, ErrorStats]], dict[str, float]]:
    """The section, its lines of the report and its factors."""
    factors = _solve(model, seconds, names)
    held = _left_out(model, seconds, names)
    fitted = error_stats(model(factors), seconds)
    lines = [
        (f"{name}: 910b2 as it is", error_stats(model({}), seconds)),
        (f"{name}: rows fitted", fitted),
    ]
    lines += [(f"{name}: each left out once", held)] if held.rows else []
    said = ", ".join(f"{key} {value:.3g}" for key, value in factors.items())
    section = FittedSection(
        name=name,
        kind="fitted",
        source=f"{_SOURCE} ({said})",
        coefficients=scaled(base.coefficients, factors),
        rows_fitted=seconds.size,
        held=held if held.rows else None,
        fit_errors=fitted,
    )
    return section, lines, factors


def _matmul_model(
    device: Device, base: Mapping[str, float], rows: MatmulRows, dtype: str
) -> Callable[[Mapping[str, float]], Array]:
    """Seconds under factors, without the kernel that quantizes."""
    rule = replace(precision_of(dtype), quantizes=False)

    def model(factors: Mapping[str, float]) -> Array:
        sizes = (rows.m, rows.n, rows.k)
        return matmul_with(scaled(base, factors), device, sizes, rule, "cold").total_s

    return model


def _fit_bf16(
    data: Path, device: Device, base: Section
) -> tuple[FittedSection, list[tuple[str, ErrorStats]]]:
    rows = matmul_rows(data, "MatMulV2", "MatMulV3")
    model = _matmul_model(device, base.coefficients, rows, "bf16")
    section, lines, _ = _fit("matmul.bf16", base, model, rows.seconds, (*_FACTORS, "short_k"))
    return section, lines


def _fit_w8a8(
    data: Path, device: Device, base: Section
) -> tuple[FittedSection, list[tuple[str, ErrorStats]]]:
    """The product from its own rows, then the quantization kernel beside it."""
    rows = matmul_rows(data, "QuantBatchMatmulV3")
    model = _matmul_model(device, base.coefficients, rows, "w8a8")
    section, lines, _ = _fit("matmul.w8a8", base, model, rows.seconds, _FACTORS)
    quantized = _rows(data, "DynamicQuant")
    shapes = np.asarray([_sizes(row["input_shapes"]) for row in quantized], dtype=np.float64)
    seconds = np.asarray([float(row["mean_us"]) * 1e-6 for row in quantized])
    own = section.coefficients

    def kernel(point: Array) -> Array:
        launch_s, rate, row_s = point
        moved = shapes[:, 0] * shapes[:, 1] * 3.0 / (device.hbm_bytes_per_s * rate)
        each = row_s * (shapes[:, 0] / device.vector_cores) ** own["quantize_power"]
        return np.asarray(launch_s + moved + each, dtype=np.float64)

    start = np.asarray([3e-6, 0.3, 3e-6])
    lower, upper = np.asarray([1e-6, 0.02, 1e-9]), np.asarray([6e-6, 2.0, 2e-5])
    found = robust_fit(kernel, seconds, start, lower, upper, scale=0.1)
    lines.append(("DynamicQuant: rows fitted", error_stats(kernel(found), seconds)))
    parts = {
        "floor_s": own["floor_s"] + float(found[0]),
        "quantize": float(found[1]),
        "quantize_row_s": float(found[2]),
    }
    source = section.source + "; quantization from DynamicQuant, its launch in floor_s"
    return replace(section, coefficients={**own, **parts}, source=source), lines


def _with(base: Calibration, section: Section, coefficients: Mapping[str, float]) -> Calibration:
    own = replace(section, coefficients=coefficients)
    return replace(base, sections={**base.sections, section.name: own})


def _fit_attention(
    data: Path, device: Device, base: Calibration
) -> tuple[list[FittedSection], list[tuple[str, ErrorStats]]]:
    rows = _rows(data, "FusedInferAttentionScore")
    prefill = [row for row in rows if row["scenario"].startswith("prefill")]
    tokens = np.asarray([_sizes(row["input_shapes"].split(";")[0])[0] for row in prefill])
    seconds = np.asarray([float(row["mean_us"]) * 1e-6 for row in prefill])
    section = base.section("attention.prefill")

    def machine(one: Section, **changes: float) -> Machine:
        return Machine(device, _with(base, one, {**one.coefficients, **changes}))

    def prompts(factors: Mapping[str, float]) -> Array:
        shifted = section["e"] + math.log(factors.get("e", 1.0))
        return attention_prefill(
            machine(section, e=shifted),
            tokens / _PROMPT,
            _PROMPT,
            0.0,
            4.0,
            1.0,
            128.0,
            kernel="flash",
            kv_dtype="bf16",
        ).total_s

    first, lines, factors = _fit("attention.prefill", section, prompts, seconds, ("e",))
    shifted = section["e"] + math.log(factors["e"])
    first = replace(first, coefficients={**section.coefficients, "e": shifted})
    decode = base.section("attention.decode")
    seen = np.asarray([float(r["mean_us"]) * 1e-6 for r in rows if r["scenario"] == "decode_B16"])

    def steps(factors: Mapping[str, float]) -> Array:
        own = machine(decode, floor_s=decode["floor_s"] * factors.get("floor_s", 1.0))
        time = attention_decode(own, *_DECODE, kernel="flash", kv_dtype="bf16").total_s
        return np.full(seen.size, float(time))

    second, more, _ = _fit("attention.decode", decode, steps, seen, ("floor_s",))
    return [first, second], lines + more


def _pointwise(data: Path, device: Device) -> list[FittedSection]:
    """The kinds of `pointwise`, with the two launches that no row shows."""
    sections = []
    for kind in pointwise.KINDS:
        section = pointwise.fit(device, kind, *pointwise.read(data, kind))
        own = dict(section.coefficients)
        if kind.name == "kv_append":
            own["floor_s"] *= 0.5
            section = replace(
                section, source=f"{section.source}; one launch writes keys and values: half each"
            )
        sections.append(replace(section, coefficients=own))
    writes = next(one for one in sections if one.name == "pointwise.kv_append")
    rest = _rest_s(data) / _LAYERS - 2.0 * writes.coefficients["floor_s"]
    return [_norm_rope(one, rest) if one.name.endswith("qk_norm_rope") else one for one in sections]


def _norm_rope(section: FittedSection, floor_s: float) -> FittedSection:
    return replace(
        section,
        coefficients={**section.coefficients, "floor_s": floor_s},
        source=f"{section.source}; floor: what 11.4 ms of compute of the published decode step "
        "(Qwen3-32B, tp 16, batch 16) leave after all kernels listed, one whole-network figure",
    )


def _rest_s(data: Path) -> float:
    """Compute of the decode step that the listed kernels do not account for, seconds."""
    rows = [
        row
        for row in read_rows(data / "ascend_ops" / _TABLES[0])
        if row["scenario"] == "decode_B16"
    ]
    steps = min(int(row["count"]) for row in rows)
    listed = sum(int(row["count"]) * float(row["mean_us"]) * 1e-6 for row in rows) / steps
    return _REST_S - listed


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit all sections, write the folder's files and the table of errors."""
    parser = argparse.ArgumentParser(prog="python -m shardplan.costmodel.fitting.a3")
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    device, base = load_device("a3-die"), load_calibration("910b2")
    folder = options.out / "a3-die"
    wide, lines = _fit_bf16(options.data, device, base.section("matmul.bf16"))
    narrow, more = _fit_w8a8(options.data, device, base.section("matmul.w8a8"))
    attention, seen = _fit_attention(options.data, device, base)
    write_sections(folder / "matmul.toml", _HEADING, [wide, narrow])
    write_sections(folder / "attention.toml", _HEADING, attention)
    write_sections(folder / "pointwise.toml", _HEADING, _pointwise(options.data, device))
    text = (
        "# Kernels in networks on an A3 die\n\n"
        "Relative error of the priced time of kernels that a profiler saw in service. The first "
        "line of each family is the calibration it stands on, unchanged; the last is honest: each "
        "row priced by a fit to the others.\n\n"
        f"{markdown_errors([*lines, *more, *seen])}\n"
        "Regenerate, after the fits of 910b2: `python -m shardplan.costmodel.fitting.a3 DATA_DIR "
        "--out costmodel/data/calibrations --report results/calibration/a3.md`\n"
    )
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
