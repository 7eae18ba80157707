"""Strategies of one pool side by side, and what became of those that are left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg_space import Pool
from shardplan.search.space import Choice

__all__ = ["Options", "Priced", "Row", "fitting", "limited_s", "stacked"]

Row = tuple[int, int, dict[str, Array]]
"""A layout and a choice by their places, and columns that broadcast over the grid."""


@dataclass(slots=True)
class Options:
    """Strategies of one pool side by side: every column has shape `[options]`."""

    layouts: list[Parallelism]
    choices: tuple[Choice, ...]
    columns: dict[str, Array]
    """cards, layout, choice, cut, chunk, slots, rate, memory, free, the costs and the parts of a
    step: compute, transfer of memory, collectives, overhead, seconds."""
    cuts: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    """Layers of each stage; () for the even cut."""

    @property
    def size(self) -> int:
        """Options."""
        return int(self.columns["cards"].size)

    def at(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Options:
        """Some of them."""
        columns = {name: one[index] for name, one in self.columns.items()}
        return replace(self, columns=columns)

    def joined(self, other: Options) -> Options:
        """These and others of the same pool, whose cuts are among these."""
        if not other.size:
            return self
        columns = {
            name: np.concatenate([one, other.columns[name]]) for name, one in self.columns.items()
        }
        return replace(self, columns=columns)

    def layout(self, index: int) -> Parallelism:
        """The layout of one option, but for its cut."""
        return self.layouts[int(self.columns["layout"][index])]

    def way(self, index: int) -> Parallelism:
        """The layout of one option, with its cut."""
        cut = self.cuts[int(self.columns["cut"][index])]
        return replace(self.layout(index), stage_layers=cut)

    def choice(self, index: int) -> Choice:
        """The choice of one option."""
        return self.choices[int(self.columns["choice"][index])]


@dataclass(slots=True)
class Priced:
    """A pool's options, and what became of its other strategies."""

    options: Options
    total: Counter[int] = field(default_factory=Counter)
    """Strategies by cards of an instance."""
    left_out: Counter[tuple[int, str]] = field(default_factory=Counter)
    """By cards and reason."""
    least_bytes: float = np.inf
    """Memory that the leanest of those that do not fit needs."""
    least_s: float = np.inf
    """Service (prefill) or TPOT (decode) of the fastest of those that fit."""
    unreached: tuple[Parallelism, ...] = ()
    """Legal layouts that the time limit left unpriced."""


def stacked(rows: list[Row], points: int) -> dict[str, Array]:
    """Columns of all rows, one after another."""
    if not rows:
        return {"cards": np.zeros(0)}
    columns = {}
    for name in rows[0][2]:
        column = np.empty((len(rows), points))
        for place, row in enumerate(rows):
            column[place] = row[2][name]
        columns[name] = column.ravel()
    columns["layout"] = np.repeat([float(row[0]) for row in rows], points)
    columns["choice"] = np.repeat([float(row[1]) for row in rows], points)
    columns["cut"] = np.zeros(columns["choice"].size)
    return columns


def limited_s(options: Options, role: str) -> Array:
    """What a limit bounds: one prompt alone, or TPOT."""
    return options.columns["alone_s" if role == "prefill" else "tpot_s"]


def fitting(priced: Priced, pool: Pool, limit_s: float) -> Priced:
    """The options that fit and can meet the limit; the others are counted."""
    found = priced.options
    if not found.size:
        return priced
    time = limited_s(found, pool.role)
    big = found.columns["free"] < 0.0
    priced.least_s = float(time[~big].min(initial=np.inf))
    slow = ~big & (time > limit_s)
    for reason, mask in (("memory", big), ("ttft" if pool.role == "prefill" else "tpot", slow)):
        sizes, counts = np.unique(found.columns["cards"][mask], return_counts=True)
        for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            priced.left_out[int(size), reason] += count
    if big.any():
        priced.least_bytes = min(priced.least_bytes, float(found.columns["memory"].min()))
    priced.options = found.at(~(big | slow))
    return priced
