"""How ranks are numbered: where the members of a group of the mesh lie among all rank ids.

`Parallelism.order` names the axes from the one whose neighbours are farthest apart to the one
whose ranks follow one another. A rank with coordinate c_a on axis a has the id

    rank = sum over axes c_a stride_a        stride_a = product of the sizes of the axes after a

The sub-axes of one axis (dp0, dp1; tp0, tp1, tp2) stay together, major to minor as the mesh has
them. A group over several sub-axes has size_a members stride_a apart for each: its ids, from its
first member on, are all sums of one multiple of each. Pairs that continue one another are one
pair, so a group that is evenly spaced is ((members, stride),).
"""

from __future__ import annotations

import functools
import math

from shardplan.models.parallel import Axis, Mesh, Parallelism

__all__ = ["Extents", "axis_stride", "coordinates", "extents"]

Extents = tuple[tuple[int, int], ...]
"""(members, distance between them) by axis, major to minor."""


def axis_stride(par: Parallelism, axis: Axis) -> int:
    """Distance in ranks between neighbours on an axis."""
    after = par.order[par.order.index(axis) + 1 :]
    return math.prod(getattr(par, one) for one in after)


def coordinates(par: Parallelism, rank: int) -> dict[Axis, int]:
    """Place of a rank on each axis, the outermost first."""
    return {axis: rank // axis_stride(par, axis) % getattr(par, axis) for axis in par.order}


def _parent(name: str) -> str:
    """The axis that a sub-axis is a part of."""
    return name.rstrip("0123456789")


def extents(mesh: Mesh, par: Parallelism, axes: tuple[str, ...]) -> Extents:
    """Where the group over these sub-axes lies, `pp` for the stages of a pipeline."""
    sizes = tuple(getattr(par, one) for one in par.order)
    return _extents(mesh.axes, mesh.shape, par.order, sizes, axes)


@functools.lru_cache(maxsize=8192)
def _extents(
    names: tuple[str, ...],
    shape: tuple[int, ...],
    order: tuple[str, ...],
    sizes: tuple[int, ...],
    axes: tuple[str, ...],
) -> Extents:
    found = []
    for axis in axes:
        parent = _parent(axis)
        place = order.index(parent)
        stride = math.prod(sizes[place + 1 :])
        size = sizes[place]
        if axis in names:
            at = names.index(axis)
            rest = zip(names[at + 1 :], shape[at + 1 :], strict=True)
            stride *= math.prod(ways for name, ways in rest if _parent(name) == parent)
            size = shape[at]
        if size > 1:
            found.append((size, stride))
    found.sort(key=lambda pair: -pair[1])
    return _joined(found)


def _joined(pairs: list[tuple[int, int]]) -> Extents:
    """Pairs that continue one another as one."""
    joined: list[tuple[int, int]] = []
    for size, stride in pairs:
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    return tuple(joined)
