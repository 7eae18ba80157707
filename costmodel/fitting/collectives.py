"""Fit of `collectives.toml` from measured collectives; what is not measured is stated as assumed.

    python -m shardplan.costmodel.fitting.collectives DATA_DIR \
        --out costmodel/data/calibrations --report results/calibration/collectives.md

Fitted, by topology and launch: the 910B mesh launched by the host (hccl_test, 2, 4 and 8 cards),
the A3 switch above die pairs (isolated benchmark, 8 and 16 dies), the NVLink switch of H100 and
H200 (NCCL 2.29.2) and TensorRT-LLM's own all_reduce there. A fifth of the sizes is kept out by
hash; a second fit without the largest sizes says how the formula extrapolates. The few A3 rows are
each held out once, by a fit to the others. Left out of the mesh fit: reduce_scatter from 2.4 MB to
10 MB and from 80 MB on, where the table jumps 5 to 10 times; and three A3 gathers that service
contradicts (`collective_tables`).

What a collective costs more in service than alone is the difference of the two columns of the same
A3 table (`in_service`), no fit: a constant below the size at which HCCL leaves the vector-core
kernels, a share of the time above it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.calibration import Calibration, Section
from shardplan.costmodel.fitting.collective_tables import (
    CollectiveTable,
    ServiceRow,
    assumed_sections,
    custom_rows,
    die_sections,
    lent_sections,
    mesh_rows,
    nccl_rows,
    service_rows,
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
    trial_section,
    write_sections,
)
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.collectives import CollectiveKind, collective

__all__ = ["CUSTOM", "CollectiveProblem", "fit", "in_service", "main"]

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
CUSTOM: Bounds = {**_SWITCH, "oneshot_efficiency": (0.4, 0.1, 1.0)}
_LINKS: Bounds = {**_FLAT, "floor_link_s": (1e-6, 0.0, 5e-6)}
_DIES: Bounds = {
    "base_s": (5e-6, 1e-6, 2e-5),
    "efficiency": (0.95, 0.5, 1.1),
    "ramp_bytes": (2e5, 0.0, 2e6),
    "protocol_s": (8e-5, 0.0, 2e-4),
}
_ONESHOT_BYTES = 2e5
"""Where HCCL and NCCL leave their small-message all_reduce, read off the tables' steps."""
_A3_FLOOR = {"floor_s": 5.4e-6, "protocol_bytes": 524288.0}
_SERVICE_RANKS = 16.0


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
    section = trial_section(name, coefficients)
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
    errors = []
    if problem.extrapolate:
        stats = _score(problem, coefficients, usable & held)
        errors.append((f"{label}: held out", stats))
        bound = np.quantile(table.message_bytes, 0.8)
        small = usable & (table.message_bytes < bound)
        beyond = _score(problem, _solve(problem, small), usable & ~small)
        errors.append((f"{label}: {bound / 1e6:.0f} MB and more, fitted below", beyond))
    else:
        stats = _left_out(problem, usable)
        errors.append((f"{label}: rows fitted", _score(problem, coefficients, usable)))
        errors.append((f"{label}: each left out once", stats))
    if table.odd.any():
        errors.append((f"{label}: rows left out", _score(problem, coefficients, table.odd)))
    section = FittedSection(
        name=table.section,
        kind="fitted",
        source=table.source,
        coefficients=coefficients,
        rows_fitted=int((usable & ~held).sum()),
        held=stats if stats.rows else None,
    )
    return section, errors


def _mesh_problems(data: Path, around: Calibration) -> list[CollectiveProblem]:
    problems = []
    for table in mesh_rows(data):
        fixed = {"oneshot_bytes": _ONESHOT_BYTES} if table.kind == "all_reduce" else {}
        bounds = _FLAT if table.kind == "all_reduce" else _LINKS
        problems.append(CollectiveProblem(table=table, bounds=bounds, fixed=fixed, around=around))
    return problems


def in_service(rows: Sequence[ServiceRow], kind: CollectiveKind) -> dict[str, float]:
    """What service adds to a benchmark's time: the rows' own differences, by number of dies.

    all_gather has both numbers of dies; a kind that lacks one takes all_gather's there, scaled.
    """
    both = [row for row in rows if not (math.isnan(row.bench_s) or math.isnan(row.service_s))]
    limit = _A3_FLOOR["protocol_bytes"]

    def added(one: str, dies: int) -> float:
        found = [
            row.service_s - row.bench_s
            for row in both
            if row.kind == one and row.ranks == dies and row.message_bytes < limit * dies
        ]
        return float(np.mean(found)) if found else math.nan

    few, many = added("all_gather", 8), added("all_gather", 16)
    own_few, own_many = added(kind, 8), added(kind, 16)
    most = own_many if own_many > 0.0 else many
    least = own_few if own_few > 0.0 else few * most / many
    large = [
        row.service_s / row.bench_s - 1.0
        for row in both
        if row.message_bytes >= limit * row.ranks and row.service_s > 0.5 * row.bench_s
    ]
    return {
        "service_s": most,
        "service_ranks": _SERVICE_RANKS,
        "service_power": math.log2(most / least),
        "service_share": float(np.median(large)),
    }


def _die_problems(data: Path, around: Calibration) -> list[CollectiveProblem]:
    rows = service_rows(data)
    problems = []
    for table in switch_rows(data):
        bounds, fixed = _DIES, {**_A3_FLOOR, **in_service(rows, table.kind)}
        if table.kind == "all_reduce":
            bounds = {"base_s": _DIES["base_s"]}
            fixed |= {"efficiency": 0.92, "ramp_bytes": 1e5, "protocol_s": 1.6e-4}
        problems.append(
            CollectiveProblem(
                table=table, bounds=bounds, fixed=fixed, around=around, extrapolate=False
            )
        )
    return problems


def _left_out(problem: CollectiveProblem, usable: NDArray[np.bool_]) -> ErrorStats:
    """Errors of rows that a fit to the other rows has not seen; nan where one row is all."""
    table = problem.table
    model, seen = [], []
    for row in np.flatnonzero(usable):
        others = usable.copy()
        others[row] = False
        if others.sum() < len(problem.bounds):
            continue
        one = np.zeros_like(usable)
        one[row] = True
        model.append(_model(problem, _solve(problem, others), one)[0])
        seen.append(table.seconds[row])
    return error_stats(np.asarray(model, dtype=np.float64), np.asarray(seen, dtype=np.float64))


def _gpu_problems(data: Path, device: str, around: Calibration) -> list[CollectiveProblem]:
    problems = [
        CollectiveProblem(
            table=table,
            bounds=CUSTOM if table.kind == "all_reduce" else _SWITCH,
            fixed={"oneshot_bytes": _ONESHOT_BYTES} if table.kind == "all_reduce" else {},
            around=around,
        )
        for table in nccl_rows(data, device)
    ]
    custom = CollectiveProblem(
        table=custom_rows(data, device),
        bounds=CUSTOM,
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


def _service_errors(
    rows: Sequence[ServiceRow], sections: Sequence[FittedSection]
) -> list[tuple[str, ErrorStats]]:
    """Errors of the prices in service, by kind, on all rows that a profiler saw."""
    known = _around(sections)
    out = []
    for kind in sorted({row.kind for row in rows}):
        mine = [row for row in rows if row.kind == kind and not math.isnan(row.service_s)]
        model = [
            float(
                collective(
                    row.kind,
                    spans_of("atlas-800i-a3", row.ranks),
                    row.message_bytes,
                    known,
                    launch="graph",
                    in_service=True,
                ).total_s
            )
            for row in mine
        ]
        seen = np.asarray([row.service_s for row in mine], dtype=np.float64)
        out.append((f"atlas-800i-a3 {kind} in service", error_stats(np.asarray(model), seen)))
    return out


def _fit_910b(data: Path, out: Path) -> list[tuple[str, ErrorStats]]:
    """The mesh of 910B cards and the die pairs and switch of A3: two calibrations."""
    around = _around(die_sections([], _NEUTRAL))
    dies = [fit(problem) for problem in _die_problems(data, around)]
    own = [section for section, _ in dies]
    own += die_sections(own, _NEUTRAL)
    write_sections(out / "a3-die" / "collectives.toml", _HEADING, own)
    meshes = [fit(problem) for problem in _mesh_problems(data, around)]
    sections = [section for section, _ in meshes]
    sections += assumed_sections("910b2", sections, _NEUTRAL)
    write_sections(out / "910b2" / "collectives.toml", _HEADING, [*sections, *lent_sections(own)])
    lines = [line for _, errors in (*meshes, *dies) for line in errors]
    return lines + _service_errors(service_rows(data), own)


def _fit_gpu(data: Path, out: Path, device: str) -> list[tuple[str, ErrorStats]]:
    around = _around(assumed_sections(device, [], _NEUTRAL))
    fits = [fit(problem) for problem in _gpu_problems(data, device, around)]
    sections = [section for section, _ in fits]
    sections += assumed_sections(device, sections, _NEUTRAL)
    write_sections(out / device / "collectives.toml", _HEADING, sections)
    return [line for _, errors in fits for line in errors]


_HEADING = "Written by `python -m shardplan.costmodel.fitting.collectives`; do not edit by hand."


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit all devices, write the coefficient files and the table of errors."""
    parser = argparse.ArgumentParser(prog="python -m shardplan.costmodel.fitting.collectives")
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    lines = _fit_910b(options.data, options.out)
    for device in ("h200", "h100"):
        lines += _fit_gpu(options.data, options.out, device)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    text = (
        "# Collectives against measurements\n\n"
        "Relative error of the priced time. Held out: a fifth of the sizes, by hash, not used in "
        "the fit that ships. Extrapolation rows use a fit of their own. The A3 rows are few: each "
        "is left out once and priced by a fit to the others; in service, the constants are the "
        "differences of the table's own columns. The A3 rows left out are the benchmark on 8 "
        "dies from 0.6 to 0.9 MB a die: 155 to 186 us, flat, where service shows 75 us (its "
        "report calls it a protocol switch that it does not reproduce).\n\n"
        f"{markdown_errors(lines)}\n"
        "Regenerate: `python -m shardplan.costmodel.fitting.collectives DATA_DIR "
        "--out costmodel/data/calibrations --report results/calibration/collectives.md`\n"
    )
    options.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
