"""What a lost card or node takes with it, and how much of a deployment is then left.

A replica serves with all of its ranks or not at all; replicas pass nothing to one another
(`Parallelism.replicas`), so with K of them and L lost the deployment serves

    rate left = rate (K - L) / K        L of n cards: n, each of another replica
                                        L of n nodes: n times the most replicas on one node

and headroom over a rate R asks for  rate (K - L) / K >= R  within the limits. Ranks lie on nodes
in the order that the plan chose; where nothing chose one, engines keep those of a replica together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from numpy.typing import NDArray

from shardplan.models.errors import InputError
from shardplan.models.parallel import AXES, Axis, Parallelism
from shardplan.search.workload import one_of, whole

if TYPE_CHECKING:
    from shardplan.search.asked import Asked

__all__ = ["UNITS", "Spare", "instances_lost", "read_spare", "replica_of_ranks", "replicas_lost"]

Unit = Literal["card", "node"]
UNITS = ("card", "node")
_TOGETHER: tuple[Axis, ...] = ("dp", "pp", "cp", "tp")
"""Axes of rank numbers by which the ranks of a replica follow one another."""
_MOST_SPARE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Spare:
    """So many cards or nodes may be lost at once, wherever they are."""

    count: int
    unit: Unit = "card"

    def share_left(self, par: Parallelism, per_node: int, *, best: bool = False) -> float:
        """Share of the replicas that is left; `best`: of the best order of the ranks."""
        order = replace(par, order=AXES) if best else par
        lost = replicas_lost(order, per_node, self)
        return max(par.replicas - lost, 0) / par.replicas

    @property
    def words(self) -> str:
        """As people write it."""
        return f"{self.count} {self.unit}{'' if self.count == 1 else 's'}"


def read_spare(asked: Asked, rate: float | None) -> Spare | None:
    """What was asked; None without. `InputError` for what no headroom can be."""
    count, unit = asked.spare, asked.spare_unit
    one_of("spare_unit", unit, UNITS)
    if count is None:
        if unit != UNITS[0]:
            raise InputError(
                "`spare_unit` says what `spare` counts",
                got=f"spare_unit={unit}, spare=None",
                hint="add --spare 1",
            )
        return None
    found = whole("spare", count, _MOST_SPARE, try_=1)
    if rate is None:
        raise InputError(
            "headroom is held over a rate of requests",
            got=f"spare={found}, rate=None",
            hint="add --rate 4, or leave --spare out",
        )
    if asked.serving != "agg" and asked.objective not in ("cards", "cost"):
        raise InputError(
            "headroom of pools is that of the fewest cards for a rate",
            got=f"spare={found}, serving={asked.serving}, objective={asked.objective}",
            hint="add --objective cards or cost, or use --serving agg",
        )
    return Spare(count=found, unit=cast("Unit", unit))


def replica_of_ranks(par: Parallelism) -> NDArray[np.int64]:
    """The replica of each rank, ranks as they lie on nodes; `[ranks]`."""
    order: Sequence[Axis] = _TOGETHER if par.order == AXES else par.order
    sizes = [getattr(par, axis) for axis in order]
    places = np.arange(par.ranks).reshape(sizes)
    dp = np.moveaxis(places, order.index("dp"), 0).reshape(par.dp, -1)
    found = np.zeros(par.ranks, dtype=np.int64)
    found[dp] = (np.arange(par.dp) // (par.dp // par.replicas))[:, None]
    return found


def replicas_lost(par: Parallelism, per_node: int, spare: Spare) -> int:
    """Replicas that stop when so much is lost, at worst and at most all."""
    each = 1
    if spare.unit == "node":
        own = replica_of_ranks(par)
        nodes = (own[start : start + per_node] for start in range(0, own.size, per_node))
        each = max(len(np.unique(node)) for node in nodes)
    return min(spare.count * each, par.replicas)


def instances_lost(ranks: NDArray[np.float64], per_node: int, spare: Spare) -> NDArray[np.float64]:
    """The same of pools, whose instances are alike: parts that divide a node, or whole nodes.

    `ranks`: of an instance, any shape.
    """
    each = np.maximum(per_node // ranks, 1.0) if spare.unit == "node" else np.ones_like(ranks)
    return np.asarray(spare.count * each)
