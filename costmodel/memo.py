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
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array

__all__ = ["FEW_POINTS", "Memo", "Points", "different_points"]

FEW_POINTS = 64
"""Loads of fewer points are priced as they are."""
_MOST_ROWS = 4096
"""Prices kept at once: some 16 KB each."""

Price = TypeVar("Price")


@dataclass(frozen=True, slots=True)
class Points:
    """The different points of arrays that broadcast against one another."""

    number: int
    """Names them in their memo."""
    arrays: tuple[Array, ...]
    """Each of shape [points] or []."""
    inverse: NDArray[np.intp]
    """Of the grid's shape: which point stands where."""


@dataclass(slots=True)
class Memo(Generic[Price]):
    """Points and prices by what they depend on."""

    points: dict[Hashable, Points] = field(default_factory=dict)
    prices: dict[Hashable, Price] = field(default_factory=dict)
    issued: int = 0

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
        if len(self.prices) > _MOST_ROWS:
            self.clear()

    def clear(self) -> None:
        """Forget everything; numbers of points are not given out again."""
        self.points.clear()
        self.prices.clear()


def different_points(number: int, arrays: tuple[Array, ...]) -> Points:
    """The different points of arrays that broadcast: all of them unless one array tells them apart.

    The first array that varies is taken as the key of a point; where another varies while it
    does not, every grid point stands for itself.
    """
    shape = np.broadcast_shapes(*(one.shape for one in arrays))
    flat = [one if one.ndim == 0 else np.broadcast_to(one, shape).ravel() for one in arrays]
    varying = [one for one in flat if one.ndim]
    if not varying:
        return Points(number, tuple(flat), np.zeros(shape, dtype=np.intp))
    _, first, inverse = np.unique(varying[0], return_index=True, return_inverse=True)
    if not all(np.array_equal(one[first][inverse], one) for one in varying[1:]):
        first = inverse = np.arange(varying[0].size)
    chosen = tuple(one if one.ndim == 0 else one[first] for one in flat)
    return Points(number, chosen, inverse.reshape(shape))
