"""Fit of `attention.toml` and `mla.toml` from measured attention kernels.

    python -m shardplan.costmodel.fitting.attention DATA_DIR \
        --out costmodel/data/calibrations --report results/calibration/attention.md

DATA_DIR holds the tables as published (`ascend_ops/`, `nvidia_ops/`). Each section is fitted by

    minimise  sum rho(ln(model / measured)) + ridge^2 rows sum (surface terms)^2

and decode on the 910B then gets a separable surface (`decode_surface`). NVIDIA: a fifth of the
shapes is kept out by hash. 910B: the errors are of every row under a fit that did not see it (five
folds, two seeds) and the coefficients written are fitted to all rows. A second fit that sees only
short contexts says how the formula extrapolates. The bounds keep the decode time from falling with
batch or context. Left out of the fit: MLA prefill with 128 heads, 8 or more sequences and 1024 or
more tokens, where the measured stack takes another, slower kernel (their error is reported).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.calibration import Calibration
from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.fitting.attention_derived import derived_sections
from shardplan.costmodel.fitting.attention_tables import (
    MLA_DIMS,
    Table,
    gpu_decode,
    gpu_prefill,
    mla_decode_table,
    mla_prefill_table,
    npu_decode,
    npu_prefill,
)
from shardplan.costmodel.fitting.common import (
    ErrorStats,
    FittedSection,
    cross_validated,
    error_stats,
    held_out,
    markdown_errors,
    robust_fit,
    trial_section,
    write_sections,
)
from shardplan.costmodel.fitting.decode_surface import decode_surface
from shardplan.costmodel.kernels.attention import attention_decode, attention_prefill
from shardplan.costmodel.kernels.base import Array, Machine
from shardplan.costmodel.kernels.flash import tile_rows
from shardplan.costmodel.kernels.mla import mla_decode, mla_prefill

__all__ = ["DECODE", "HEADS", "PREFILL", "Fit", "Problem", "fit", "gpu_problems", "main"]

Bounds = Mapping[str, tuple[float, float, float]]
Call = Callable[[Machine, Array], Array]

_DEVICES = ("910b2", "h200", "h100")
_TEXT = """# Attention kernels against measurements

Relative error of the priced time. Held out: a fifth of the shapes, by hash, not used in the fit
that ships. Cross-validated: every row under a fit that did not see it (five folds, two seeds); the
fit that ships uses all rows. The other rows test extrapolation and use a fit of their own.

{table}

Regenerate: `python -m shardplan.costmodel.fitting.attention DATA_DIR --out \
costmodel/data/calibrations --report results/calibration/attention.md` (`--calibration 910b2` \
for one device; the other lines stay)
"""
_SURFACE = (0.0, -1.0, 1.0)
PREFILL: Bounds = {
    "floor_s": (2e-5, 1e-6, 8e-5),
    "fill_keys": (640.0, 0.0, 3000.0),
    "tail": (0.7, 0.0, 2.0),
    "e": (-0.4, -3.0, 1.0),
    **dict.fromkeys(("e_x", "e_xx", "e_y", "e_yy", "e_xy", "e_g", "e_gx", "e_gxx"), _SURFACE),
}
DECODE: Bounds = {
    "floor_s": (2e-5, 1e-6, 9e-5),
    "batch_s": (1e-7, 0.0, 5e-6),
    "keys_s": (1e-7, 0.0, 1e-5),
    "task_s": (1.8e-6, 1e-9, 1e-4),
    "task_g": (0.1, 0.0, 4.0),
    "l2_efficiency": (0.6, 0.1, 2.0),
    "l2_full": (0.7, 0.1, 0.9),
    "l2_none": (1.2, 0.95, 3.0),
    "hbm_shift": (-0.5, -1.0, 0.0),
    "l2_hidden": (0.1, 0.0, 1.0),
    "hbm_waves": (0.5, 0.0, 1.0),
    "e": (-0.4, -3.0, 0.5),
    "e_t": (0.0, 0.0, 0.8),
    **dict.fromkeys(("e_x", "e_xx", "e_g", "e_gg"), (0.0, -0.3, 0.3)),
}
HEADS: Bounds = {
    "l2_hidden_g": (0.0, 0.0, 1.0),
    "floor_g": (0.0, -0.5, 0.5),
    **dict.fromkeys(("e_k", "e_gk", "e_grouped", "e_gx"), (0.0, -0.3, 0.3)),
}
"""Start, lower and upper bound of each coefficient; the surface terms start at nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One section to fit: its rows, its formula, its coefficients."""

    section: str
    device: str
    table: Table
    call: Call
    bounds: Bounds
    fixed: Mapping[str, float]
    scale: float
    ridge: float
    surface: bool = False
    """Whether a separable surface follows the coefficients."""
    seeds: tuple[int, ...] = ()
    """Splits into folds that give the errors; none: a fifth of the rows is kept out instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted section and the errors to report, by name of the rows."""

    section: FittedSection
    errors: tuple[tuple[str, ErrorStats], ...]


def _prefill(machine: Machine, rows: Array) -> Array:
    batch, tokens, heads, kv_heads, dim = rows.T
    return attention_prefill(
        machine, batch, tokens, 0, heads, kv_heads, dim, kernel="flash", kv_dtype="bf16"
    ).total_s


def _decode(machine: Machine, rows: Array) -> Array:
    batch, tokens, heads, kv_heads, dim = rows.T
    return attention_decode(
        machine, batch, tokens, heads, kv_heads, dim, kernel="flash", kv_dtype="bf16"
    ).total_s


def _mla_prefill(machine: Machine, rows: Array) -> Array:
    batch, tokens, heads = rows[:, :3].T
    nope, rope, value, _ = MLA_DIMS
    return mla_prefill(machine, batch, tokens, 0, heads, nope, rope, value, kernel="flash").total_s


def _mla_decode(machine: Machine, rows: Array) -> Array:
    batch, tokens, heads = rows[:, :3].T
    _, rope, _, rank = MLA_DIMS
    return mla_decode(
        machine, batch, tokens, heads, rank, rope, kernel="flash", kv_dtype="bf16"
    ).total_s


def _ranges(problem: Problem, rows: Array) -> dict[str, float]:
    """Clip ranges of the surface: what the fitted rows span."""
    batch, tokens, heads, kv_heads = rows[:, :4].T
    spans = {"keys_min": float(tokens.min()), "keys_max": float(tokens.max())}
    if "tail" in problem.bounds:
        device = load_device(problem.device)
        size = tile_rows(device) * problem.fixed["tile_scale"]
        share = batch * heads * np.ceil(tokens / size) / device.cube_cores
        return spans | {"tiles_min": float(share.min()), "tiles_max": float(share.max())}
    cores = load_device(problem.device).cube_cores
    return spans | {
        "share_min": float((batch * kv_heads).min()) / cores,
        "group_max": float((heads / kv_heads).max()),
        "streams_max": float(kv_heads.max()),
        "batch_max": float(batch.max()),
    }


def _model(problem: Problem, coefficients: Mapping[str, float], rows: Array) -> Array:
    section = trial_section(problem.section, coefficients)
    calibration = Calibration(name="trial", sections={problem.section: section})
    return problem.call(Machine(load_device(problem.device), calibration), rows)


def _solve(problem: Problem, fitted: NDArray[np.bool_]) -> dict[str, float]:
    """Coefficients fitted to the rows that `fitted` marks."""
    rows, seconds = problem.table.rows[fitted], problem.table.seconds[fitted]
    fixed = dict(problem.fixed) | _ranges(problem, rows)
    names = list(problem.bounds)
    start, lower, upper = np.asarray(list(problem.bounds.values()), dtype=np.float64).T
    weights = [problem.ridge if name.startswith("e_") else 0.0 for name in names]

    def model(point: Array) -> Array:
        return _model(problem, fixed | dict(zip(names, point.tolist(), strict=True)), rows)

    found = robust_fit(
        model,
        seconds,
        start,
        lower,
        upper,
        scale=problem.scale,
        ridge=np.asarray(weights) * np.sqrt(len(rows)),
    )
    solved = fixed | dict(zip(names, found.tolist(), strict=True))
    if not problem.surface:
        return solved
    return solved | decode_surface(lambda shapes: _model(problem, solved, shapes), rows, seconds)


def _score(
    problem: Problem, coefficients: Mapping[str, float], pick: NDArray[np.bool_]
) -> ErrorStats:
    rows, seconds = problem.table.rows[pick], problem.table.seconds[pick]
    return error_stats(_model(problem, coefficients, rows), seconds)


def _held(problem: Problem) -> tuple[dict[str, float], ErrorStats, NDArray[np.bool_]]:
    """Coefficients to ship, their errors on rows they did not see, and the rows fitted."""
    table, normal = problem.table, ~problem.table.odd
    if not problem.seeds:
        out = held_out(table.rows.tolist())
        coefficients = _solve(problem, ~out & normal)
        return coefficients, _score(problem, coefficients, out & normal), ~out & normal
    places = np.flatnonzero(normal)

    def predict(left_out: NDArray[np.bool_]) -> Array:
        out = np.zeros_like(normal)
        out[places[left_out]] = True
        return _model(problem, _solve(problem, normal & ~out), table.rows[out])

    stats = cross_validated(
        table.rows[normal].tolist(), table.seconds[normal], predict, seeds=problem.seeds
    )
    return _solve(problem, normal), stats, normal


def fit(problem: Problem) -> Fit:
    """Fit one section; errors on rows kept out, on longer contexts, on rows left out."""
    table, normal = problem.table, ~problem.table.odd
    coefficients, stats, fitted = _held(problem)
    bound = np.quantile(table.rows[:, 1], 0.8)
    short = normal & (table.rows[:, 1] < bound)
    beyond = _score(problem, _solve(problem, short), normal & ~short)
    label = f"{problem.device} {problem.section}"
    errors = [
        (f"{label}: {'cross-validated' if problem.seeds else 'held out'}", stats),
        (f"{label}: {bound:.0f} tokens and more, fitted below", beyond),
    ]
    if table.odd.any():
        errors.append((f"{label}: rows left out", _score(problem, coefficients, table.odd)))
    section = FittedSection(
        name=problem.section,
        kind="fitted",
        source=table.source,
        coefficients=coefficients,
        rows_fitted=int(fitted.sum()),
        held=stats,
    )
    return Fit(section=section, errors=tuple(errors))


def _npu_problems(data: Path) -> tuple[Problem, ...]:
    prefill = {"tile_scale": 1.0, "softmax_flop": 44.0, "e_d": 0.0}
    decode = {"softmax_flop": 44.0, "compute_efficiency": 0.6}
    expanded = prefill | {"tile_scale": 2.0, "e_g": 0.0, "e_gx": 0.0, "e_gxx": 0.0}
    latent = {name: value for name, value in PREFILL.items() if name not in expanded}
    common: dict[str, Any] = {"device": "910b2", "seeds": (0, 1)}
    return (
        Problem(
            section="attention.prefill",
            table=npu_prefill(data),
            call=_prefill,
            bounds=PREFILL,
            fixed=prefill,
            scale=0.05,
            ridge=0.4,
            **common,
        ),
        Problem(
            section="attention.decode",
            table=npu_decode(data),
            call=_decode,
            bounds={**DECODE, **HEADS},
            fixed=decode,
            scale=0.015,
            ridge=0.05,
            surface=True,
            **common,
        ),
        Problem(
            section="mla.prefill",
            table=mla_prefill_table(data),
            call=_mla_prefill,
            bounds=latent,
            fixed=expanded,
            scale=0.05,
            ridge=0.4,
            **common,
        ),
        Problem(
            section="mla.decode",
            table=mla_decode_table(data),
            call=_mla_decode,
            bounds=DECODE,
            fixed=decode | dict.fromkeys(HEADS, 0.0),
            scale=0.02,
            ridge=0.1,
            **common,
        ),
    )


def gpu_problems(data: Path, device: str) -> tuple[Problem, ...]:
    prefill = {"tile_scale": 1.0, "softmax_flop": 22.0, "e_d": 0.0}
    return (
        Problem(
            section="attention.prefill",
            device=device,
            table=gpu_prefill(data, device),
            call=_prefill,
            bounds=PREFILL,
            fixed=prefill,
            scale=0.05,
            ridge=0.02,
        ),
        Problem(
            section="attention.decode",
            device=device,
            table=gpu_decode(data, device),
            call=_decode,
            bounds={**DECODE, **HEADS, "hbm_shift": (1.0, 0.0, 4.0)},
            fixed={"softmax_flop": 22.0, "compute_efficiency": 0.6},
            scale=0.05,
            ridge=0.02,
        ),
    )


def _write(device: str, fits: Sequence[Fit], out: Path) -> None:
    fitted = [one.section for one in fits]
    sections = fitted + derived_sections(device, fitted)
    heading = "Written by `python -m shardplan.costmodel.fitting.attention`; do not edit by hand."
    for family in ("attention", "mla"):
        mine = [section for section in sections if section.name.startswith(family)]
        write_sections(out / device / f"{family}.toml", heading, mine)


def _kept(report: Path, devices: Sequence[str]) -> list[str]:
    """Lines of an earlier report about devices that are not fitted now."""
    if not report.is_file():
        return []
    others = tuple(f"| {name} " for name in _DEVICES if name not in devices)
    lines = report.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(others)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit the devices, write their coefficient files and the table of errors."""
    parser = argparse.ArgumentParser(prog="python -m shardplan.costmodel.fitting.attention")
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--calibration", choices=_DEVICES, action="append", help="only these")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    devices = options.calibration or _DEVICES
    lines: list[tuple[str, ErrorStats]] = []
    for device in devices:
        npu = device == "910b2"
        problems = _npu_problems(options.data) if npu else gpu_problems(options.data, device)
        fits = [fit(problem) for problem in problems]
        _write(device, fits, options.out)
        lines += [line for one in fits for line in one.errors]
    options.report.parent.mkdir(parents=True, exist_ok=True)
    table = "\n".join([markdown_errors(lines).rstrip(), *_kept(options.report, devices)])
    options.report.write_text(_TEXT.format(table=table), encoding="utf-8")


if __name__ == "__main__":
    main()
