"""A correction of log(time), piecewise linear in the logs of three sizes.

    s(x, y, z) = sum over the 8 corners of the knot cell of weight * value

Each axis holds ascending knots; a size outside them counts as the nearest knot, so that the
correction stays what the nearest measurement said. The values live in a calibration section
as `s_m16_n256_k4096 = -0.12` (the knot sizes are in the name), which is all that defines the
grid. A section without such keys has a surface of zero.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.errors import CalibrationError
from shardplan.costmodel.kernels.base import Array

__all__ = ["Surface", "knot_name", "surface_of"]

_KEY = re.compile(r"s_m(\d+)_n(\d+)_k(\d+)")


def knot_name(m: int, n: int, k: int) -> str:
    """The coefficient's name of one knot."""
    return f"s_m{m}_n{n}_k{k}"


@dataclass(frozen=True, slots=True)
class Surface:
    """Knots (log2, ascending) of the axes m, n, k and the flat values `[m, n, k]`."""

    knots: tuple[Array, Array, Array]
    values: Array

    def coordinate(self, axis: int, size: Array) -> Array:
        """Where the sizes lie on an axis, in knots: 0 at the first, 1 at the second, ..."""
        knots = self.knots[axis]
        place = np.interp(np.log2(np.maximum(size, 1.0)), knots, np.arange(knots.size))
        return np.asarray(place, dtype=np.float64)

    def at(self, places: Sequence[Array]) -> Array:
        """The correction at coordinates of one shape (three arrays), dimensionless."""
        strides = (self.knots[1].size * self.knots[2].size, self.knots[2].size, 1)
        base: NDArray[np.int64] = np.zeros(places[0].shape, dtype=np.int64)
        shares: list[Array] = []
        steps: list[int] = []
        for place, knots, stride in zip(places, self.knots, strides, strict=True):
            low = np.minimum(place.astype(np.int64), max(knots.size - 2, 0))
            base += low * stride
            shares.append(place - low)
            steps.append(stride if knots.size > 1 else 0)
        return self._blend(base, shares, steps)

    def _blend(
        self, base: NDArray[np.int64], shares: Sequence[Array], steps: Sequence[int]
    ) -> Array:
        """Linear in k, then n, then m, between the corners `base + steps`."""

        def along(axis: int, start: NDArray[np.int64]) -> Array:
            if axis == len(steps):
                return np.asarray(self.values.take(start), dtype=np.float64)
            low = along(axis + 1, start)
            if steps[axis] == 0:
                return low
            high = along(axis + 1, start + steps[axis])
            high -= low
            high *= shares[axis]
            high += low
            return high

        return along(0, base)


@functools.lru_cache(maxsize=64)
def _parse(names: tuple[str, ...], values: tuple[float, ...]) -> Surface:
    points = {}
    for name, value in zip(names, values, strict=True):
        found = _KEY.fullmatch(name)
        if found:
            points[tuple(int(part) for part in found.groups())] = value
    if not points:
        flat = np.zeros(1)
        return Surface((flat, flat, flat), flat)
    axes = [sorted({point[axis] for point in points}) for axis in range(3)]
    grid = [(m, n, k) for m in axes[0] for n in axes[1] for k in axes[2]]
    if len(grid) != len(points):
        raise CalibrationError(
            "the surface of a calibration section must fill its grid of knots",
            got=f"{len(points)} of {len(grid)} knots",
        )
    logs = [np.log2(np.asarray(axis, dtype=np.float64)) for axis in axes]
    return Surface((logs[0], logs[1], logs[2]), np.asarray([points[point] for point in grid]))


def surface_of(coefficients: Mapping[str, float]) -> Surface:
    """The surface that a section's coefficients describe; `CalibrationError` on a hole."""
    return _parse(tuple(coefficients), tuple(coefficients.values()))
