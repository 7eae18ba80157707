"""What has been priced already: grid points seen once, and rows priced at them.

A grid of slots and step sizes holds few different steps (1,200 grid points of the default space:
some 50 decode steps, some 500 mixed ones), and layouts that differ in how experts or tokens are
split share most of their rows. So a load is cut down to its different points, a row is priced at
those once for all choices and layouts that ask for it, and the sums are spread over the grid.
Every number is computed as it would be without: elementwise, by the same formula.

A memo belongs to one machine under one engine. Loads of few points are not worth remembering.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array

__all__ = ["FEW_POINTS", "Memo", "Points", "different_points"]

FEW_POINTS = 64
"""Loads of fewer points are priced as they are."""
_MOST_ROWS = 4096
"""Prices kept at once: some 16 KB each."""


@dataclass(frozen=True, slots=True)
class Points:
    """The different points of arrays that broadcast against one another."""

    number: int
    """Names them in their memo."""
    arrays: tuple[Array, ...]
    """Each of shape [points] or []."""
    inverse: NDArray[np.intp]
    """Of the grid's shape: which point stands where."""

    def spread(self, values: Array) -> Array:
        """Values `[..., points]` over the grid; those without points of their own as they are."""
        points = max(one.size for one in self.arrays)
        if values.shape[-1:] != (points,):
            return values
        return values.take(self.inverse, axis=-1)


@dataclass(slots=True)
class Memo:
    """Points and prices by what they depend on."""

    points: dict[Hashable, Points] = field(default_factory=dict)
    prices: dict[Hashable, dict[int, Array]] = field(default_factory=dict)
    """Seconds of rows, by the row's number, of each set of what else they depend on."""
    numbers: dict[Hashable, int] = field(default_factory=dict)
    """Short names of what prices depend on."""
    mixes: dict[Hashable, Any] = field(default_factory=dict)
    """Average steps of a grid, which do not depend on a layout's dtypes."""
    issued: int = 0

    def number(self, one: Hashable) -> int:
        """A number that stands for what equals `one`, and for nothing else."""
        return self.numbers.setdefault(one, len(self.numbers))

    def priced(self, key: Hashable) -> dict[int, Array]:
        """Seconds of rows by their numbers, where what else they depend on is `key`."""
        return self.prices.setdefault(key, {})

    def different(self, arrays: tuple[Array, ...]) -> Points:
        """The different points of these arrays, from memory where they were asked for before."""
        key = tuple((one.shape, one.tobytes()) for one in arrays)
        found = self.points.get(key)
        if found is None:
            self.issued += 1
            found = self.points[key] = different_points(self.issued, arrays)
        return found

    def make_room(self) -> None:
        """Forget everything where there is too much of it."""
        if sum(map(len, self.prices.values())) > _MOST_ROWS:
            self.clear()

    def clear(self) -> None:
        """Forget everything; numbers of points are not given out again."""
        self.points.clear()
        self.mixes.clear()
        self.prices.clear()


def different_points(number: int, arrays: tuple[Array, ...]) -> Points:
    """The different points of arrays that broadcast, in the order of the arrays' values."""
    shape = np.broadcast_shapes(*(one.shape for one in arrays))
    flat = [one if one.ndim == 0 else np.broadcast_to(one, shape).ravel() for one in arrays]
    varying = [one for one in flat if one.ndim]
    if not varying:
        return Points(number, tuple(flat), np.zeros(shape, dtype=np.intp))
    _, first, inverse = np.unique(varying[0], return_index=True, return_inverse=True)
    for one in varying[1:]:
        if not np.array_equal(one[first][inverse], one):
            values, further = np.unique(one, return_inverse=True)
            both = inverse * values.size + further
            _, first, inverse = np.unique(both, return_index=True, return_inverse=True)
    chosen = tuple(one if one.ndim == 0 else one[first] for one in flat)
    return Points(number, chosen, inverse.reshape(shape))
