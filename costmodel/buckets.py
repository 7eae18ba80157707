"""Sizes of graphs of static shape: which shapes to compile when loads vary, exactly.

Loads are cells in ascending order, cell x of share p_x; a load runs at the smallest size that is
not below it, so with sizes s_1 < ... < s_n, the last of them the largest load,

    E(s) = sum over x of p_x t(x, s(x))       t(x, j) = seconds of cell x padded to size j

    wanted: sizes that minimise  E(s) + n price     with n at most `most`

Cells x = i + 1 ... j that share size j cost w(i, j), so with w from sums over x,

    f_1(j) = w(-1, j)       f_n(j) = min over i < j of f_(n-1)(i) + w(i, j)

is exact for every t, monotone or not, in n m^2 for m cells. Of equal costs the fewest sizes win.

`price` is what a graph's memory would have earned as cache. A graph takes B bytes of the K that
hold the cache of b sequences. Fewer slots serve less: throughput R(b) has elasticity
e = d ln R / d ln b, so a graph costs a share e B / K of the throughput, as if every load took that
much longer: price = E_0 e B / K, where E_0 is the cost of the loads unpadded.

Left out: how long a graph takes to capture or compile; buffers that graphs share.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.datafile import number, read_facts, read_shipped
from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Fact
from shardplan.costmodel.kernels.base import Array

__all__ = ["Sizes", "best_sizes", "cost_of", "doubled", "graph_memory", "padding_of"]

Cells = NDArray[np.int64]


class Sizes(NamedTuple):
    """Chosen sizes, as places of cells, and what a load then costs on average."""

    places: tuple[int, ...]
    expected_s: float


def best_sizes(seconds: Array, *, most: int, price_s: float) -> Sizes:
    """The sizes that cost least, price of the graphs with it.

    `seconds` `[m, m]`: share of cell x times its seconds at size j; what is left of the diagonal is
    not read. `most`: sizes at most, at least 1.
    """
    count = len(seconds)
    sums = np.cumsum(np.triu(seconds), axis=0)
    whole = np.diagonal(sums)
    ways = np.where(np.tri(count, k=-1, dtype=bool).T, whole[None, :] - sums, np.inf)
    cost, came = whole.copy(), list[Cells]()
    best, used = float(cost[-1]) + price_s, 1
    for sizes in range(2, min(most, count) + 1):
        every = cost[:, None] + ways
        came.append(every.argmin(axis=0))
        cost = every[came[-1], np.arange(count)]
        if float(cost[-1]) + sizes * price_s < best:
            best, used = float(cost[-1]) + sizes * price_s, sizes
    places = [count - 1]
    for step in reversed(came[: used - 1]):
        places.append(int(step[places[-1]]))
    return cost_of(seconds, tuple(reversed(places)))


def cost_of(seconds: Array, places: tuple[int, ...]) -> Sizes:
    """What given sizes cost, without the price of the graphs; the last one holds every load."""
    at = np.searchsorted(places, np.arange(len(seconds)))
    picked = seconds[np.arange(len(seconds)), np.asarray(places)[at]]
    return Sizes(places, math.fsum(picked.tolist()))


def padding_of(shares: Array, loads: Array, places: tuple[int, ...]) -> float:
    """Share of the computed units that is padding; `shares` and `loads` `[m]` of the cells."""
    at = np.searchsorted(places, np.arange(len(loads)))
    computed = float(shares @ loads[np.asarray(places)[at]])
    return 1.0 - float(shares @ loads) / computed if computed else 0.0


def doubled(loads: Array) -> tuple[int, ...]:
    """Places of the sizes that are powers of two, rounded up to a cell, and of the largest."""
    powers = 2.0 ** np.arange(math.ceil(math.log2(max(float(loads[-1]), 1.0))) + 1)
    found = np.searchsorted(loads, powers[powers < loads[-1]])
    return tuple(sorted({*found.tolist(), len(loads) - 1}))


def graph_memory(engine: EngineProfile) -> tuple[float, Fact]:
    """Bytes of one graph on a rank, and what they rest on: the engine's, or an assumption."""
    if engine.graph_bytes:
        return engine.graph_bytes, engine.facts["graph_bytes"]
    return _unknown()


@functools.cache
def _unknown() -> tuple[float, Fact]:
    where = "graphs/unknown.toml"
    field = number("graph_bytes", low=0, high=65536, scale=2.0**20)
    read = read_facts(read_shipped("graphs", "table", "unknown"), {"graph_mib": field}, where)
    return cast("float", read.values["graph_bytes"]), read.facts["graph_bytes"]
