"""Products of a profile: `matmul.bf16` of one engine, and the curves of its measured shapes.

First the physical coefficients and the surface of `kernels.matmul` on all rows (`surface_fit`),
with weights cold as the profile rotates them; then, for each measured shape, ln(measured / model)
at its rows (`nearby.ShapeTable`). `_REACH`, over which a measured shape speaks for others, is the
one with the least error on shapes left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.fitting.common import ErrorStats, FittedSection, error_stats, held_out
from shardplan.costmodel.fitting.own_profile_tables import Profile
from shardplan.costmodel.fitting.surface_fit import Knots, Sizes, SurfaceProblem
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.matmul import matmul_with
from shardplan.costmodel.kernels.precision import precision_of
from shardplan.costmodel.kernels.surface import knot_name
from shardplan.costmodel.nearby import ShapeTable

__all__ = ["matmul_section", "shape_table", "write_shapes"]

_RULE = precision_of("bf16")
_FIXED = {"tile_elements": 32768.0, "copies": 1e4}
"""So many copies that the benchmark's weights are cold, as they are in a model."""
_START: Mapping[str, tuple[float, float, float]] = {
    "floor_s": (3e-6, 1e-6, 1e-5),
    "compute": (0.8, 0.5, 1.0),
    "hbm": (0.85, 0.5, 0.98),
    "l2": (0.7, 0.3, 1.2),
}
_KNOTS: Knots = (
    (1, 16, 64, 128, 256, 512, 1024, 2048, 8192),
    (512, 1024, 2048, 4096, 8192, 16384, 32768, 151936),
    (256, 1024, 2048, 4096, 8192, 16384, 32768),
)
_KERNEL_ROWS = 16
_REACH = 0.1
_DIGITS = 4


def _doubled() -> tuple[Sizes, tuple[Sizes, ...]]:
    """A grid of sizes, and the same with m, n or k doubled."""
    rows = 2.0 ** np.arange(0, 13)
    features = np.asarray([512, 1024, 2048, 4096, 8192.0])
    m, n, k = (axis.ravel() for axis in np.meshgrid(rows, features, features))
    across = np.where((m < _KERNEL_ROWS) & (2 * m >= _KERNEL_ROWS), 1.0, 2.0)
    return (m, n, k), ((across * m, n, k), (m, 2 * n, k), (m, n, 2 * k))


def _fit(device: Device, rows: Array) -> dict[str, float]:
    """Physical coefficients and surface; rows `[rows, (m, n, k, seconds)]`."""
    bounds = np.asarray(list(_START.values()))

    def parts(point: Array, sizes: Sizes) -> tuple[Array, Array]:
        coef = {**_FIXED, **dict(zip(_START, point.tolist(), strict=True))}
        time = matmul_with(coef, device, sizes, _RULE)
        return time.overhead_s, time.compute_s + time.memory_s

    grid, doubled = _doubled()
    physical, surface = SurfaceProblem(
        formula=parts,
        knots=_KNOTS,
        start=bounds[:, 0],
        lower=bounds[:, 1],
        upper=bounds[:, 2],
        sizes=(rows[:, 0], rows[:, 1], rows[:, 2]),
        measured_s=rows[:, 3],
        grid=grid,
        doubled=doubled,
        hinge=3.0,
    ).solve()
    names = [knot_name(a, b, c) for a in _KNOTS[0] for b in _KNOTS[1] for c in _KNOTS[2]]
    return {
        **_FIXED,
        **dict(zip(_START, physical.tolist(), strict=True)),
        **dict(zip(names, surface.tolist(), strict=True)),
    }


def _model(coef: Mapping[str, float], device: Device, rows: Array) -> Array:
    return matmul_with(coef, device, (rows[:, 0], rows[:, 1], rows[:, 2]), _RULE).total_s


def shape_table(rows: Array, model_s: Array) -> list[list[str]]:
    """The CSV of `nearby.ShapeTable`: ln(measured / model) of each shape at its rows."""
    knots = sorted({int(m) for m in rows[:, 0]})
    cells: dict[tuple[int, int], dict[int, str]] = {}
    for (m, n, k, seconds), priced in zip(rows.tolist(), model_s.tolist(), strict=True):
        text = f"{np.log(seconds / priced):.{_DIGITS}f}"
        cells.setdefault((int(n), int(k)), {})[int(m)] = text
    body = [[str(n), str(k), *(cells[n, k].get(m, "") for m in knots)] for n, k in sorted(cells)]
    return [["n", "k", *(str(m) for m in knots)], *body]


def _text(table: list[list[str]]) -> str:
    return "".join(",".join(row) + "\n" for row in table)


def _predicted(
    coef: Mapping[str, float], device: Device, seen: Array, wanted: Array, reach: float
) -> Array:
    """Seconds of the wanted rows by formula and curves of the rows seen."""
    text = _text(shape_table(seen, _model(coef, device, seen)))
    table = ShapeTable.read(text, reach, "trial")
    m, n, k = wanted[:, 0], wanted[:, 1], wanted[:, 2]
    return _model(coef, device, wanted) * table.factor(m, n, k)


def _gaps(rows: Array) -> NDArray[np.bool_]:
    """Rows of a shape to leave out between others: about a fifth, never the first or last."""
    first, last = rows[:, 0].min(), rows[:, 0].max()
    inside = (rows[:, 0] > first) & (rows[:, 0] < last)
    marked = held_out([("gap", *row[:3]) for row in rows.tolist()])
    return np.asarray(marked & inside, dtype=np.bool_)


def matmul_section(
    profile: Profile, device: Device, source: str
) -> tuple[FittedSection, list[list[str]], list[tuple[str, ErrorStats]]]:
    """The section, the table of measured shapes, and the errors to report."""
    rows = profile.of("matmul", "linear", ("m", "n", "k"))
    held = held_out([(n, k) for n, k in rows[:, 1:3].tolist()])
    trial = _fit(device, rows[~held])
    stats = error_stats(_predicted(trial, device, rows[~held], rows[held], _REACH), rows[held, 3])
    coef = _fit(device, rows)
    gaps = _gaps(rows)
    between = error_stats(_predicted(coef, device, rows[~gaps], rows[gaps], _REACH), rows[gaps, 3])
    section = FittedSection(
        name="matmul.bf16",
        kind="fitted",
        source=f"matmul (linear) of {source}; measured shapes in matmul_shapes.csv, errors are of "
        "shapes that are not among them",
        coefficients={**coef, "shapes_reach": _REACH},
        rows_fitted=rows.shape[0],
        held=stats,
    )
    lines = [
        ("matmul.bf16, shapes not measured", stats),
        ("matmul.bf16, measured shapes between measured rows", between),
    ]
    return section, shape_table(rows, _model(coef, device, rows)), lines


def write_shapes(path: Path, table: list[list[str]]) -> None:
    """Write the measured shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(table), encoding="utf-8")
