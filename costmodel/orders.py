"""Which orders of the axes price a layout differently on a cluster's tiers.

An order of the axes moves the members of every group (`models.ranks`), and with them the tiers
that its collectives cross (`placement`); it changes nothing else, neither the applied graph nor
the memory. Two orders whose groups cross the same tiers are one price.

With ranks numbered in mixed radix, an instance of R consecutive ranks holds of a sub-axis of size
n and stride s

    inside(R) = min(max(R / s, 1), n)    where sizes nest: R and s, and R and n s, divide one way

values, and of a group over several sub-axes the product of theirs. So where every sub-axis nests
in every tier, these numbers say all spans, and the signature is them; where one does not, it is
the strides themselves, which tells apart more than needed and never less. Data-parallel sub-axes
that no collective joins are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import permutations

from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.placement import meetings
from shardplan.models.parallel import AXES, Axis, Mesh, Parallelism, make_mesh
from shardplan.models.ranks import extents
from shardplan.models.spec import ModelSpec

__all__ = ["Signature", "distinct_orders", "placement_signature"]

Signature = tuple[tuple[int, ...], ...]


def _joined(mesh: Mesh) -> tuple[str, ...]:
    """Sub-axes that a collective may join: those of any group that is not of batches alone."""
    groups = (axes for name, axes in mesh.groups.items() if not name.startswith("dp"))
    joined = {axis for axes in groups for axis in axes}
    return tuple(axis for axis in mesh.axes if axis in joined)


def placement_signature(cluster: Cluster, mesh: Mesh, par: Parallelism) -> Signature:
    """Equal for two orders of one layout only if all its groups cross the same tiers."""
    tiers = tuple(tier.ranks for tier in cluster.tiers)
    return _signature(tiers, mesh, par, _joined(mesh))


def _signature(
    tiers: tuple[int, ...], mesh: Mesh, par: Parallelism, joined: tuple[str, ...]
) -> Signature:
    pairs = tuple(extents(mesh, par, (axis,))[0] for axis in joined)
    stages = extents(mesh, par, ("pp",))
    meet = tuple(one for size, step in stages for one in meetings(tiers, size, step))
    if all(_nests(size, step, ranks) for size, step in pairs for ranks in tiers):
        inside = (tuple(min(max(r // s, 1), n) for r in tiers) for n, s in pairs)
        return (meet, *inside)
    return (meet, *pairs)


def _nests(size: int, stride: int, ranks: int) -> bool:
    """Whether the steps and the whole of a sub-axis fall on the borders of a tier."""
    whole = size * stride
    return not (ranks % stride and stride % ranks) and not (ranks % whole and whole % ranks)


def distinct_orders(
    spec: ModelSpec,
    cluster: Cluster,
    par: Parallelism,
    orders: Iterable[tuple[Axis, ...]] | None = None,
) -> tuple[tuple[Axis, ...], ...]:
    """The orders of a layout that can differ in price, the first of each class, default first.

    `orders`: those to choose from, in their order; None for all.
    Raises `LayoutError` for sizes that do not fit the model.
    """
    mesh = make_mesh(spec, par)
    tiers = tuple(tier.ranks for tier in cluster.tiers)
    joined, live = _joined(mesh), tuple(one for one in AXES if getattr(par, one) > 1)
    found: dict[Signature, tuple[Axis, ...]] = {}
    for order in _orders(live) if orders is None else orders:
        one = Parallelism(tp=par.tp, pp=par.pp, dp=par.dp, cp=par.cp, order=order)
        found.setdefault(_signature(tiers, mesh, one, joined), order)
    return tuple(found.values())


@functools.cache
def _orders(live: tuple[Axis, ...]) -> tuple[tuple[Axis, ...], ...]:
    """Orders that differ in the axes that have ranks, default first."""
    first: dict[tuple[Axis, ...], tuple[Axis, ...]] = {}
    for order in permutations(AXES):
        first.setdefault(tuple(one for one in order if one in live), order)
    return tuple(first.values())
