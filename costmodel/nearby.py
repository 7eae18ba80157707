"""What measurements say beyond a formula: log(measured / formula), kept where it was measured.

`ShapeTable`, of products y[m, n] = x[m, k] @ w[k, n]. A library picks its kernels by shape, so that
times are jagged in n and k where a formula is smooth, and a model has few shapes. For measured
shapes j with a curve r_j(m), linear in ln m and constant outside its knots,

    r(m, n, k) = sum_j w_j r_j(m) / (1 + sum_j w_j)        w_j = (reach / d_j)^4
    d_j        = distance of (ln n, ln k) from those of j

so that a measured shape is priced as measured, one that lies within `reach` of measured ones partly
as they are, and any other by the formula alone.

`grid_factor`: exp of a correction over two sizes, linear in the logs of its knots and constant
outside, from the coefficients `r_x16_y1024` of a section; 1 where a section has none.
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.errors import CalibrationError, DataFileError

__all__ = ["ShapeTable", "grid_factor", "grid_name"]

Array = NDArray[np.float64]
_POWER = 4
_NEAREST = 1e-4
"""Logs of sizes that differ by less are the same size."""
_KNOT = re.compile(r"r_x(\d+)_y(\d+)")
_SIZES = ("n", "k")


@dataclass(frozen=True, slots=True, eq=False)
class ShapeTable:
    """Curves of measured shapes; see the module for the formula."""

    log_n: Array
    """`[shapes]`"""
    log_k: Array
    log_m: Array
    """`[knots]`, ascending."""
    values: Array
    """`[shapes, knots]`, without unit."""
    reach: float
    curves: dict[tuple[float, float], Array] = field(default_factory=dict, repr=False)
    """Curves that were asked for."""

    @classmethod
    def read(cls, text: str, reach: float, where: str) -> ShapeTable:
        """A table from CSV: columns n, k and one a knot of m; an empty cell was not measured.

        `DataFileError` where a cell is no number or a row has none.
        """
        rows = list(csv.reader(io.StringIO(text)))
        try:
            knots = np.log(np.asarray([float(cell) for cell in rows[0][len(_SIZES) :]]))
            sizes = np.log(np.asarray([[float(c) for c in row[: len(_SIZES)]] for row in rows[1:]]))
            values = [_filled(row[len(_SIZES) :], knots) for row in rows[1:]]
        except (ValueError, IndexError) as error:
            raise DataFileError(
                "a table of shapes holds numbers", got=f"{where}: {error}"
            ) from None
        if tuple(rows[0][: len(_SIZES)]) != _SIZES or np.any(np.diff(knots) <= 0.0):
            raise DataFileError(
                "a table of shapes has the columns n, k and ascending rows", got=where
            )
        return cls(sizes[:, 0], sizes[:, 1], knots, np.asarray(values), reach)

    def curve(self, n: float, k: float) -> Array:
        """The correction of a shape at the knots of m, `[knots]`."""
        found = self.curves.get((n, k))
        if found is None:
            away = np.hypot(self.log_n - np.log(n), self.log_k - np.log(k))
            weight = (self.reach / np.maximum(away, _NEAREST)) ** _POWER
            found = weight @ self.values / (1.0 + weight.sum())
            self.curves[n, k] = found
        return found

    def factor(self, m: Array, n: Array, k: Array) -> Array:
        """exp of the correction; the sizes broadcast."""
        place = np.log(np.maximum(m, 1.0))
        if n.size == 1 and k.size == 1:
            curve = self.curve(float(n.ravel()[0]), float(k.ravel()[0]))
            shape = np.broadcast_shapes(m.shape, n.shape, k.shape)
            return np.broadcast_to(np.exp(np.interp(place, self.log_m, curve)), shape)
        places, ns, ks = np.broadcast_arrays(place, n, k)
        pairs = np.stack([ns.ravel(), ks.ravel()], 1)
        shapes, which = np.unique(pairs, axis=0, return_inverse=True)
        which = which.ravel()
        curves = np.stack([self.curve(float(a), float(b)) for a, b in shapes])
        at = np.interp(places.ravel(), self.log_m, np.arange(self.log_m.size))
        low = np.minimum(at.astype(np.int64), max(self.log_m.size - 2, 0))
        high = np.minimum(low + 1, self.log_m.size - 1)
        share = at - low
        found = curves[which, low] * (1.0 - share) + curves[which, high] * share
        return np.asarray(np.exp(found).reshape(places.shape), dtype=np.float64)


def _filled(cells: list[str], knots: Array) -> Array:
    """A row with its gaps filled along ln m; `ValueError` where nothing was measured."""
    known = [at for at, cell in enumerate(cells) if cell]
    if not known or len(cells) != knots.size:
        raise ValueError(f"{len(known)} values in {len(cells)} cells for {knots.size} columns")
    values = np.asarray([float(cells[at]) for at in known])
    return np.asarray(np.interp(knots, knots[known], values), dtype=np.float64)


def grid_name(x: int, y: int) -> str:
    """The coefficient's name of one knot."""
    return f"r_x{x}_y{y}"


@functools.lru_cache(maxsize=64)
def _grid(names: tuple[str, ...], values: tuple[float, ...]) -> tuple[Array, Array, Array]:
    points = {}
    for name, value in zip(names, values, strict=True):
        found = _KNOT.fullmatch(name)
        if found:
            points[int(found[1]), int(found[2])] = value
    xs, ys = (sorted({point[axis] for point in points}) for axis in range(2))
    if len(points) != len(xs) * len(ys):
        raise CalibrationError(
            "the grid of a calibration section must be full",
            got=f"{len(points)} of {len(xs) * len(ys)} knots",
        )
    table = np.asarray([[points[x, y] for y in ys] for x in xs], dtype=np.float64)
    return np.log(np.asarray(xs, dtype=float)), np.log(np.asarray(ys, dtype=float)), table


def grid_factor(coefficients: Mapping[str, float], x: Array, y: Array) -> Array | float:
    """exp of a section's correction at sizes x and y, which broadcast; 1 where it has none."""
    names = tuple(name for name in coefficients if name.startswith("r_x"))
    if not names:
        return 1.0
    xs, ys, table = _grid(names, tuple(coefficients[name] for name in names))
    places = []
    for size, knots in ((x, xs), (y, ys)):
        at = np.interp(np.log(np.maximum(size, 1.0)), knots, np.arange(knots.size))
        low = np.minimum(at.astype(np.int64), max(knots.size - 2, 0))
        places.append((low, np.minimum(low + 1, knots.size - 1), at - low))
    (x0, x1, share_x), (y0, y1, share_y) = places
    low = table[x0, y0] * (1.0 - share_y) + table[x0, y1] * share_y
    high = table[x1, y0] * (1.0 - share_y) + table[x1, y1] * share_y
    return np.asarray(np.exp(low * (1.0 - share_x) + high * share_x), dtype=np.float64)
