"""A correction of log(time), piecewise linear in the logs of three sizes.

    s(x, y, z) = sum over the 8 corners of the knot cell of weight * value

Each axis holds ascending knots; a size outside them counts as the nearest knot, so that the
correction stays what the nearest measurement said. A calibration section gives it in one of two
ways, the knot sizes in the names of its coefficients, and no such key means a surface of zero:

    s_m16_n256_k4096 = -0.12     a value of every knot of the grid; it corrects the kernel's body
    u1_m16, u1_n256, u1_k4096    factors: s(m, n, k) = sum_r u_r(m) u_r(n) u_r(k), each u_r
                                 piecewise linear; it corrects the whole time

A sum of products has a few hundred coefficients where a grid of the same knots has thousands; the
product of piecewise linear functions is linear along each axis, so both are evaluated alike.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.errors import CalibrationError
from shardplan.costmodel.kernels.base import Array

__all__ = ["Surface", "factor_name", "knot_name", "padded_surface_of", "surface_of"]

_KEY = re.compile(r"s_m(\d+)_n(\d+)_k(\d+)")
_FACTOR = re.compile(r"u(\d+)_([mnk])(\d+)")
_PADDED_ROWS = 32.0
"""Rows up to which a padded product is considered (two fractals; see `padded_surface_of`)."""


def knot_name(m: int, n: int, k: int) -> str:
    """The coefficient's name of one knot."""
    return f"s_m{m}_n{n}_k{k}"


def factor_name(rank: int, axis: str, size: int) -> str:
    """The coefficient's name of one knot of one factor; axis is m, n or k."""
    return f"u{rank}_{axis}{size}"


@dataclass(frozen=True, slots=True)
class Surface:
    """Knots (log2, ascending) of the axes m, n, k and the flat values `[m, n, k]`."""

    knots: tuple[Array, Array, Array]
    values: Array
    whole: bool = False
    """Whether it corrects the whole time of a call rather than the body."""

    def coordinate(self, axis: int, size: Array) -> Array:
        """Where the sizes lie on an axis, in knots: 0 at the first, 1 at the second, ..."""
        knots = self.knots[axis]
        place = np.interp(np.log2(np.maximum(size, 1.0)), knots, np.arange(knots.size))
        return np.asarray(place, dtype=np.float64)

    def at(self, places: Sequence[Array]) -> Array:
        """The correction at coordinates that broadcast (three arrays), dimensionless."""
        strides = (self.knots[1].size * self.knots[2].size, self.knots[2].size, 1)
        base: NDArray[np.int64] = np.zeros((), dtype=np.int64)
        shares: list[Array] = []
        steps: list[int] = []
        for place, knots, stride in zip(places, self.knots, strides, strict=True):
            low = np.minimum(place.astype(np.int64), max(knots.size - 2, 0))
            base = base + low * stride
            shares.append(place - low)
            steps.append(stride if knots.size > 1 else 0)
        return self._blend(base, shares, steps)

    def factor(self, sizes: Sequence[Array]) -> Array | float:
        """exp of the correction at sizes (m, n, k) that broadcast; 1 where there is none."""
        if self.values.size == 1 and not self.values[0]:
            return 1.0
        places = [self.coordinate(axis, size) for axis, size in enumerate(sizes)]
        return np.asarray(np.exp(self.at(places)), dtype=np.float64)

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


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """A mapping as a cache key: equal to another only if both hold the very same object."""

    mapping: Mapping[str, float]

    def __hash__(self) -> int:
        return id(self.mapping)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.mapping is self.mapping


def _grid(coefficients: Mapping[str, float]) -> Surface | None:
    """The surface of the `s_` keys, None where there are none."""
    points = {}
    for name, value in coefficients.items():
        found = _KEY.fullmatch(name)
        if found:
            points[tuple(int(part) for part in found.groups())] = value
    if not points:
        return None
    axes = [sorted({point[axis] for point in points}) for axis in range(3)]
    grid = [(m, n, k) for m in axes[0] for n in axes[1] for k in axes[2]]
    if len(grid) != len(points):
        raise CalibrationError(
            "the surface of a calibration section must fill its grid of knots",
            got=f"{len(points)} of {len(grid)} knots",
        )
    logs = [np.log2(np.asarray(axis, dtype=np.float64)) for axis in axes]
    return Surface((logs[0], logs[1], logs[2]), np.asarray([points[point] for point in grid]))


def _factored(coefficients: Mapping[str, float]) -> Surface | None:
    """The surface of the `u` keys on the union of their knots, None where there are none."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for name, value in coefficients.items():
        found = _FACTOR.fullmatch(name)
        if found:
            rank, axis, size = found.groups()
            lines.setdefault((axis, rank), {})[int(size)] = value
    if not lines:
        return None
    ranks = sorted({rank for _, rank in lines})
    if len(lines) != 3 * len(ranks):
        raise CalibrationError(
            "every factor of a surface needs knots of m, n and k", got=f"{len(lines)} lines"
        )
    knots, parts = [], []
    for axis in "mnk":
        own = [lines[axis, rank] for rank in ranks]
        logs = np.log2(np.asarray(sorted({size for line in own for size in line}), dtype=float))
        knots.append(logs)
        sizes = [sorted(line) for line in own]
        parts.append(
            np.stack(
                [
                    np.interp(logs, np.log2(size), [line[one] for one in size])
                    for line, size in zip(own, sizes, strict=True)
                ]
            )
        )
    values = np.einsum("rm,rn,rk->mnk", *parts).ravel()
    return Surface((knots[0], knots[1], knots[2]), values, whole=True)


@functools.lru_cache(maxsize=256)
def _parse(key: _Same) -> Surface:
    surface = _factored(key.mapping) or _grid(key.mapping)
    if surface is None:
        flat = np.zeros(1)
        return Surface((flat, flat, flat), flat)
    return surface


@functools.lru_cache(maxsize=256)
def _padded(key: _Same) -> Surface:
    surface = _parse(key)
    shape = tuple(axis.size for axis in surface.knots)
    values = surface.values.reshape(shape).copy()
    few = surface.knots[0] <= math.log2(_PADDED_ROWS)
    values[few] = np.minimum.accumulate(values[few][::-1])[::-1]
    return replace(surface, values=values.ravel())


def surface_of(coefficients: Mapping[str, float]) -> Surface:
    """The surface that a section's coefficients describe; `CalibrationError` on a hole.

    The mapping must not change afterwards: the surface of one object is read once.
    """
    return _parse(_Same(coefficients))


def padded_surface_of(coefficients: Mapping[str, float]) -> Surface:
    """`surface_of` where up to 32 rows may be padded: at m, the least of m and the knots above it.

    Some libraries take a slower kernel for a few rows than for 16 or 32 of them; an engine that
    captures its steps as graphs pads the rows, so that more rows never cost less.
    """
    return _padded(_Same(coefficients))
