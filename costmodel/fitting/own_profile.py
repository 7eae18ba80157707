"""Fit of `h200/torch-graph/` from this project's own profile of a device.

    python -m shardplan.costmodel.fitting.own_profile results/profiles --tables DATA_DIR \
        --out costmodel/data/calibrations --report results/calibration/h200-torch-graph.md

results/profiles holds `h200_ops.csv` and `h200_collectives.csv`; DATA_DIR the published NCCL table,
which says how a collective grows from the 2 ranks measured here to 4 and 8.

    matmul       formula and surface of `kernels.matmul` on all shapes, then the curve of each
                 shape beyond them (`nearby.ShapeTable`)
    attention    formulas of `kernels.flash`, then a smooth grid beyond them (`nearby.grid_factor`)
    pointwise    floor and rates in L2 and HBM of each kernel
    moe          the formula of `kernels.moe` on blocks of grouped products
    collectives  the device's own sections, then the grid of ranks and sizes that was measured

Held out, by hash: a fifth of the shapes. Of products that is every row of a shape: what a model
whose shapes were not measured gets. The files written are fitted to all rows, attention apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.fitting.collective_tables import spans_of
from shardplan.costmodel.fitting.common import (
    ErrorStats,
    FittedSection,
    error_stats,
    held_out,
    markdown_errors,
    robust_fit,
    write_sections,
)
from shardplan.costmodel.fitting.own_profile_attention import attention_sections
from shardplan.costmodel.fitting.own_profile_matmul import matmul_section, write_shapes
from shardplan.costmodel.fitting.own_profile_tables import (
    POINTWISE,
    Profile,
    collective_rows,
    read_profile,
)
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.collectives import Launch, collective
from shardplan.costmodel.kernels.moe import moe_block_with
from shardplan.costmodel.kernels.precision import precision_of
from shardplan.costmodel.nearby import grid_name

__all__ = ["collective_sections", "main", "moe_section", "pointwise_sections"]

_DEVICE, _ENGINE = "h200", "torch-graph"
_RANKS = (2, 4, 8)
_MODES: Mapping[Launch, str] = {"graph": "graph", "host": "eager"}
"""How a collective is launched, and what the profile calls it."""
_MODULE = "python -m shardplan.costmodel.fitting.own_profile"
_POINTWISE: Mapping[str, tuple[float, float, float]] = {
    "floor_s": (2e-6, 5e-7, 2e-4),
    "l2": (0.5, 0.02, 3.0),
    "hbm": (0.7, 0.1, 1.0),
}
_MOE: Mapping[str, tuple[float, float, float]] = {
    "floor_s": (10e-6, 2e-6, 60e-6),
    "compute": (0.6, 0.2, 0.92),
    "hbm": (0.75, 0.3, 1.0),
    "reread": (0.7, 0.0, 1.0),
    "blend": (3.0, 1.2, 6.0),
}
_MOE_FIXED = {"tile_rows": 128.0, "l2": 0.65, "imbalance": 1.0}
"""Coefficients with start, lower and upper bound, and those that the rows do not fix."""
_DERIVED = {"rmsnorm": "add_rmsnorm", "embedding": "slice"}
"""Kernels priced like a measured one: the norm without its sum, a lookup as a gather of rows."""

Errors = list[tuple[str, ErrorStats]]


def _streamed(device: Device, coef: Mapping[str, float], moved: Array) -> Array:
    """Memory time as `kernels.pointwise` has it."""
    l2_byte_s = 1.0 / (device.l2_bytes_per_s * coef["l2"])
    hbm_byte_s = 1.0 / (device.hbm_bytes_per_s * coef["hbm"])
    beyond = np.maximum(moved - device.l2_bytes, 0.0)
    return np.asarray(
        coef["floor_s"] + moved * l2_byte_s + beyond * max(0.0, hbm_byte_s - l2_byte_s)
    )


def _fit_streamed(device: Device, moved: Array, seconds: Array) -> dict[str, float]:
    names = list(_POINTWISE)
    bounds = np.asarray(list(_POINTWISE.values()))
    point = robust_fit(
        lambda p: _streamed(device, dict(zip(names, p.tolist(), strict=True)), moved),
        seconds,
        *bounds.T,
        scale=0.05,
    )
    return dict(zip(names, point.tolist(), strict=True))


def pointwise_sections(profile: Profile, source: str) -> tuple[list[FittedSection], Errors]:
    """A section a streaming kernel, and those derived from them."""
    device, base = load_device(_DEVICE), load_calibration(_DEVICE)
    sections: dict[str, FittedSection] = {}
    errors: Errors = []
    for name, kind in POINTWISE.items():
        elements, seconds = profile.pointwise(kind)
        moved = elements * kind.bytes_per_element
        held = held_out([(kind.op, one) for one in elements.tolist()])
        trial = _fit_streamed(device, moved[~held], seconds[~held])
        stats = error_stats(_streamed(device, trial, moved[held]), seconds[held])
        flop = base.section(f"pointwise.{name}")["flop_per_element"]
        sections[name] = FittedSection(
            name=f"pointwise.{name}",
            kind="fitted",
            source=f"{kind.op} ({kind.backend}) of {source}",
            coefficients={**_fit_streamed(device, moved, seconds), "flop_per_element": flop},
            rows_fitted=seconds.size,
            held=stats,
        )
        errors.append((f"pointwise.{name}", stats))
    for name, like in _DERIVED.items():
        flop = base.section(f"pointwise.{name}")["flop_per_element"]
        sections[name] = FittedSection(
            name=f"pointwise.{name}",
            kind="derived",
            source=f"like pointwise.{like}",
            coefficients={**sections[like].coefficients, "flop_per_element": flop},
        )
    return list(sections.values()), errors


def _moe_time(device: Device, coef: Mapping[str, float], rows: Array) -> Array:
    tokens, hidden, ffn, experts, topk = rows.T
    sizes = (tokens, hidden, ffn, experts, topk, np.ones_like(tokens))
    return moe_block_with(coef, device, sizes, precision_of("bf16")).total_s


def _fit_moe(device: Device, rows: Array, seconds: Array) -> dict[str, float]:
    names = list(_MOE)
    bounds = np.asarray(list(_MOE.values()))

    def model(point: Array) -> Array:
        coef = {**_MOE_FIXED, **dict(zip(names, point.tolist(), strict=True))}
        return _moe_time(device, coef, rows)

    point = robust_fit(model, seconds, *bounds.T, scale=0.05)
    return {**_MOE_FIXED, **dict(zip(names, point.tolist(), strict=True))}


def moe_section(profile: Profile, source: str) -> tuple[FittedSection, Errors]:
    """`moe.bf16` from blocks of gate and up, SwiGLU and down as grouped products."""
    device = load_device(_DEVICE)
    names = ("tokens", "hidden", "ffn", "experts", "topk")
    found = profile.of("moe", "grouped_mm", names)
    rows, seconds = found[:, :-1], found[:, -1]
    held = held_out(rows.tolist())
    trial = _fit_moe(device, rows[~held], seconds[~held])
    stats = error_stats(_moe_time(device, trial, rows[held]), seconds[held])
    section = FittedSection(
        name="moe.bf16",
        kind="fitted",
        source=f"moe (grouped_mm) of {source}",
        coefficients=_fit_moe(device, rows, seconds),
        rows_fitted=seconds.size,
        held=stats,
    )
    return section, [("moe.bf16", stats)]


def _between(message: Array, logs: Array) -> tuple[Array, Array]:
    """Each inner size from its neighbours alone, `[ranks, inner]`, and as it was measured."""
    place = np.log(message)
    share = (place[1:-1] - place[:-2]) / (place[2:] - place[:-2])
    return logs[:, :-2] * (1.0 - share) + logs[:, 2:] * share, logs[:, 1:-1]


def collective_sections(
    profile: Profile, data: Path, source: str, launch: Launch
) -> tuple[list[FittedSection], Errors]:
    """Sections of collectives over the NVLink switch: captured, or launched by PyTorch."""
    base = load_calibration(_DEVICE)
    sections, errors = [], []
    for kind, (message, seconds) in collective_rows(profile, data, _DEVICE, _MODES[launch]).items():
        name = f"collectives.switch.{launch}.{kind}"
        plain = {key: v for key, v in base.section(name).coefficients.items() if key[:3] != "r_x"}
        logs = np.stack(
            [
                np.log(
                    measured
                    / collective(
                        kind, spans_of(f"hgx-{_DEVICE}", ranks), message, base, launch=launch
                    ).total_s
                )
                for ranks, measured in zip(_RANKS, seconds, strict=True)
            ]
        )
        guessed, known = _between(message, logs)
        stats = error_stats(np.exp(guessed[0]), np.exp(known[0]))
        knots = {
            grid_name(ranks, int(size)): float(logs[at, column])
            for at, ranks in enumerate(_RANKS)
            for column, size in enumerate(message)
        }
        sections.append(
            FittedSection(
                name=name,
                kind="fitted",
                source=f"{source}; 4 and 8 ranks by the increments of the published NCCL 2.29.2 "
                "table over 2 ranks; errors are those of each size from its neighbours",
                coefficients={**plain, **knots},
                rows_fitted=message.size,
                held=stats,
            )
        )
        errors.append((f"{name}, 2 ranks", stats))
    return sections, errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit all families and write the folder of the engine."""
    parser = argparse.ArgumentParser(prog=_MODULE)
    parser.add_argument("profiles", type=Path, metavar="PROFILES")
    parser.add_argument("--tables", type=Path, required=True, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args(arguments)
    out = options.out / _DEVICE / _ENGINE
    operators = read_profile(options.profiles / f"{_DEVICE}_ops.csv")
    links = read_profile(options.profiles / f"{_DEVICE}_collectives.csv")
    source = f"results/profiles/{_DEVICE}_ops.csv ({operators.machine})"
    heading = f"Written by `{_MODULE}`; do not edit by hand."
    product, shapes, lines = matmul_section(operators, load_device(_DEVICE), source)
    write_sections(out / "matmul.toml", heading, [product])
    write_shapes(out / "matmul_shapes.csv", shapes)
    attention, errors = attention_sections(operators, _DEVICE, source)
    write_sections(out / "attention.toml", heading, attention)
    lines += errors
    pointwise, errors = pointwise_sections(operators, source)
    write_sections(out / "pointwise.toml", heading, pointwise)
    lines += errors
    experts, errors = moe_section(operators, source)
    write_sections(out / "moe.toml", heading, [experts])
    lines += errors
    source = f"results/profiles/{_DEVICE}_collectives.csv ({links.machine}, NVLS off)"
    collectives: list[FittedSection] = []
    for launch in _MODES:
        found, errors = collective_sections(links, options.tables, source, launch)
        collectives += found
        lines += errors
    write_sections(out / "collectives.toml", heading, collectives)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(_page(lines), encoding="utf-8")
    print(markdown_errors(lines))


def _page(lines: Errors) -> str:
    return (
        f"# {_DEVICE} under {_ENGINE}: operators against this project's own profile\n\n"
        "Relative error of the priced time on rows that the fit did not see. `matmul.bf16` leaves "
        "out all rows of a shape (n, k): the error of a model whose shapes were not measured; "
        "those of a measured shape between its measured rows are given apart.\n\n"
        f"{markdown_errors(lines)}\n"
        f"Regenerate: `{_MODULE} results/profiles --tables DATA_DIR "
        "--out costmodel/data/calibrations --report results/calibration/h200-torch-graph.md`\n"
    )


if __name__ == "__main__":
    main()
