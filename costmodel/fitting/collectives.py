"""Fit of `collectives.toml` from measured collectives; what is not measured is stated as assumed.

    python -m shardplan.costmodel.fitting.collectives DATA_DIR \
        --out costmodel/data/calibrations --report results/calibration/collectives.md

Fitted, by topology and launch: the 910B mesh launched by the host (hccl_test, 2, 4 and 8 cards),
the A3 switch inside captured graphs (profiler, 8 and 16 dies), the NVLink switch of H100 and H200
(NCCL 2.29.2) and TensorRT-LLM's own all_reduce there. A fifth of the sizes is kept out by hash; a
second fit without the largest sizes says how the formula extrapolates. Left out of the mesh fit:
reduce_scatter from 2.4 MB to 10 MB and from 80 MB on, where the table jumps 5 to 10 times.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.calibration import Calibration, Section
from shardplan.costmodel.fitting.collective_tables import (
    CollectiveTable,
    assumed_sections,
    custom_rows,
    mesh_rows,
    nccl_rows,
    spans_of,
    switch_rows,
)
from shardplan.costmodel.fitting.common import (
    ErrorStats,
    FittedSection,
    error_stats,
    held_out,
    markdown_errors,
    robust_fit,
    write_sections,
)
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.collectives import collective

__all__ = ["CollectiveProblem", "fit", "main"]

Bounds = Mapping[str, tuple[float, float, float]]
_NEUTRAL: Mapping[str, float] = {
    "floor_s": 0.0,
    "floor_rank_s": 0.0,
    "base_s": 0.0,
    "step_s": 0.0,
    "sync_s": 0.0,
    "efficiency": 0.85,
    "e_r": 0.0,
    "e_rr": 0.0,
    "ranks_max": 8.0,
    "ramp_bytes": 0.0,
    "ramp_r": 0.0,
    "oneshot_bytes": 0.0,
    "oneshot_efficiency": 0.64,
    "protocol_bytes": 0.0,
    "protocol_s": 0.0,
}
"""A collective that only moves bytes; a fit or an assumption replaces what it knows."""
_FLAT: Bounds = {
    "floor_s": (2e-5, 1e-6, 2e-4),
    "floor_rank_s": (1e-6, 0.0, 8e-5),
    "base_s": (1e-5, -5e-5, 2e-4),
    "sync_s": (1e-5, 0.0, 1e-4),
    "efficiency": (0.7, 0.2, 1.1),
    "e_r": (0.0, -0.5, 0.5),
    "e_rr": (0.0, -0.3, 0.3),
}
_SWITCH: Bounds = {**_FLAT, "ramp_bytes": (1e6, 0.0, 1e8), "ramp_r": (0.0, -3.0, 1.0)}
_CUSTOM: Bounds = {**_SWITCH, "oneshot_efficiency": (0.4, 0.1, 1.0)}
_SERVICE: Bounds = {
    "base_s": (-2e-5, -1e-4, 1e-4),
    "sync_s": (1e-5, 0.0, 1e-4),
    "efficiency": (0.9, 0.3, 1.1),
    "protocol_s": (5e-5, 0.0, 2e-4),
}
_ONESHOT_BYTES = 2e5
"""Where HCCL and NCCL leave their small-message all_reduce, read off the tables' steps."""
_A3_FLOOR = {"floor_s": 5.4e-6, "protocol_bytes": 524288.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveProblem:
    """One section to fit: its rows, its free and its fixed coefficients."""

    table: CollectiveTable
    bounds: Bounds
    fixed: Mapping[str, float]
    around: Calibration
    """Sections of the other tiers that the rows cross."""
    extrapolate: bool = True


def _calibration(problem: CollectiveProblem, coefficients: Mapping[str, float]) -> Calibration:
    name = problem.table.section
    section = Section(
        name=name,
        kind="fitted",
        source="",
        rows_fitted=0,
        rows_held_out=0,
        median_error=0.0,
        p90_error=0.0,
        coefficients=coefficients,
    )
    return Calibration(name="trial", sections={**problem.around.sections, name: section})


def _model(
    problem: CollectiveProblem, coefficients: Mapping[str, float], pick: NDArray[np.bool_]
) -> Array:
    """Seconds of the picked rows, `[picked]`: one call a group size."""
    table = problem.table
    ranks, message = table.ranks[pick], table.message_bytes[pick]
    calibration = _calibration(problem, coefficients)
    out = np.empty(len(message), dtype=np.float64)
    for group in sorted(set(ranks.tolist())):
        mine = ranks == group
        out[mine] = collective(
            table.kind,
            spans_of(table.cluster, int(group)),
            message[mine],
            calibration,
            launch=table.launch,
            custom=table.custom,
        ).total_s
    return out


def _solve(problem: CollectiveProblem, pick: NDArray[np.bool_]) -> dict[str, float]:
    names = list(problem.bounds)
    start, lower, upper = np.asarray(list(problem.bounds.values()), dtype=np.float64).T
    fixed = dict(_NEUTRAL) | dict(problem.fixed)

    def model(point: Array) -> Array:
        return _model(problem, fixed | dict(zip(names, point.tolist(), strict=True)), pick)

    found = robust_fit(model, problem.table.seconds[pick], start, lower, upper, scale=0.03)
    return fixed | dict(zip(names, found.tolist(), strict=True))


def _score(
    problem: CollectiveProblem, coefficients: Mapping[str, float], pick: NDArray[np.bool_]
) -> ErrorStats:
    return error_stats(_model(problem, coefficients, pick), problem.table.seconds[pick])


def fit(
    problem: CollectiveProblem,
) -> tuple[FittedSection, list[tuple[str, ErrorStats]]]:
    """Fit one section; its errors on held-out sizes, on the largest, on rows left out."""
    table = problem.table
    shapes = zip(table.ranks.tolist(), table.message_bytes.tolist(), strict=True)
    held = held_out([(table.kind, *shape) for shape in shapes])
    usable = ~table.odd
    if not problem.extrapolate:
        held = np.zeros_like(held)
    coefficients = _solve(problem, usable & ~held)
    label = f"{table.cluster} {table.section.removeprefix('collectives.')}"
    stats = _score(problem, coefficients, usable & held)
    errors = [(f"{label}: held out", stats)] if problem.extrapolate else []
    if problem.extrapolate:
        bound = np.quantile(table.message_bytes, 0.8)
        small = usable & (table.message_bytes < bound)
        beyond = _score(problem, _solve(problem, small), usable & ~small)
        errors.append((f"{label}: {bound / 1e6:.0f} MB and more, fitted below", beyond))
    else:
        errors.append((f"{label}: rows fitted", _score(problem, coefficients, usable)))
    if table.odd.any():
        errors.append((f"{label}: rows left out", _score(problem, coefficients, table.odd)))
    section = FittedSection(
        name=table.section,
        kind="fitted",
        source=table.source,
        coefficients=coefficients,
        rows_fitted=int((usable & ~held).sum()),
        held=stats if problem.extrapolate else None,
    )
    return section, errors


def _npu_problems(data: Path, around: Calibration) -> list[CollectiveProblem]:
    problems = []
    for table in mesh_rows(data):
        fixed = {"oneshot_bytes": _ONESHOT_BYTES} if table.kind == "all_reduce" else {}
        problems.append(CollectiveProblem(table=table, bounds=_FLAT, fixed=fixed, around=around))
    for table in switch_rows(data):
        bounds = dict(_SERVICE)
        fixed = dict(_A3_FLOOR)
        if table.kind == "all_reduce":
            bounds = {"base_s": _SERVICE["base_s"]}
            fixed |= {"efficiency": 0.9, "sync_s": 1.2e-5, "protocol_s": 5e-5}
        problems.append(
            CollectiveProblem(
                table=table, bounds=bounds, fixed=fixed, around=around, extrapolate=False
            )
        )
    return problems


def _gpu_problems(data: Path, device: str, around: Calibration) -> list[CollectiveProblem]:
    problems = [
        CollectiveProblem(
            table=table,
            bounds=_CUSTOM if table.kind == "all_reduce" else _SWITCH,
            fixed={"oneshot_bytes": _ONESHOT_BYTES} if table.kind == "all_reduce" else {},
            around=around,
        )
        for table in nccl_rows(data, device)
    ]
    custom = CollectiveProblem(
        table=custom_rows(data, device),
        bounds=_CUSTOM,
        fixed={"oneshot_bytes": 1e6},
        around=around,
    )
    return [*problems, custom]


def _around(sections: Sequence[FittedSection]) -> Calibration:
    """Assumed sections as a calibration: what the fitted rows cross besides their own tier."""
    found = {
        section.name: Section(
            name=section.name,
            kind=section.kind,
            source=section.source,
            rows_fitted=0,
            rows_held_out=0,
            median_error=float("nan"),
            p90_error=float("nan"),
            coefficients=section.coefficients,
        )
        for section in sections
    }
    return Calibration(name="assumed", sections=found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit all devices, write the coefficient files and the table of errors."""
    parser = argparse.ArgumentParser(prog="python -m shardplan.costmodel.fitting.collectives")
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    lines: list[tuple[str, ErrorStats]] = []
    heading = "Written by `python -m shardplan.costmodel.fitting.collectives`; do not edit by hand."
    for device in ("910b2", "h200", "h100"):
        npu = device == "910b2"
        around = _around(assumed_sections(device, [], _NEUTRAL))
        problems = (
            _npu_problems(options.data, around)
            if npu
            else _gpu_problems(options.data, device, around)
        )
        fits = [fit(problem) for problem in problems]
        sections = [section for section, _ in fits]
        sections += assumed_sections(device, sections, _NEUTRAL)
        write_sections(options.out / device / "collectives.toml", heading, sections)
        lines += [line for _, errors in fits for line in errors]
    options.report.parent.mkdir(parents=True, exist_ok=True)
    text = (
        "# Collectives against measurements\n\n"
        "Relative error of the priced time. Held out: a fifth of the sizes, by hash, not used in "
        "the fit that ships. Extrapolation rows use a fit of their own. The A3 rows are too few "
        "to keep any back.\n\n"
        f"{markdown_errors(lines)}\n"
        "Regenerate: `python -m shardplan.costmodel.fitting.collectives DATA_DIR "
        "--out costmodel/data/calibrations --report results/calibration/collectives.md`\n"
    )
    options.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
