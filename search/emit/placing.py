"""Where the ranks of a plan lie when it numbers them otherwise than the target does.

Both targets number ranks by data-parallel group, stage, context part and tensor-parallel rank,
major to minor (vLLM: `ExternalDP x DP x PP x PCP x TP`, vllm 0.23.0
vllm/distributed/parallel_state.py, `initialize_model_parallel`; a replica of the compiler is one
tensor-parallel group). A plan's own order (`Parallelism.order`) says on which node and device each
of these ranks lies. Devices of a process are listed in ascending order alone
(ASCEND_RT_VISIBLE_DEVICES, CANN environment variable reference: "only ascending order"), so

    target's rank -> coordinates on the axes -> rank id in the plan's order -> (node, device)

is expressible where the ranks that one process group starts on a node lie on one node in ascending
order; gaps between them are fine. A plan in the default order, which nothing chose, keeps the
target's own placement (what that may change is said in the target's README).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from shardplan.models.parallel import AXES, Axis
from shardplan.search.emit.common import Slot, place, refuse
from shardplan.search.plan import Plan, StrategyInfo

__all__ = ["TARGET_ORDER", "in_order", "plan_ranks"]

TARGET_ORDER: tuple[Axis, ...] = ("dp", "pp", "cp", "tp")
"""Axes of the targets' own numbering, major to minor."""


def plan_ranks(way: StrategyInfo) -> tuple[int, ...]:
    """The plan's rank id of each rank as the target numbers them."""
    stride, step = {}, 1
    for axis in reversed(way.order):
        stride[axis] = step
        step *= getattr(way, axis)
    steps = [range(0, getattr(way, one) * stride[one], stride[one]) for one in TARGET_ORDER]
    return tuple(sum(one) for one in product(*steps))


def in_order(target: str, plan: Plan, *, groups: int, ranks: int) -> tuple[tuple[Slot, ...], ...]:
    """Slots of `groups` groups of `ranks` of the target's ranks, where the plan's order puts them.

    `InputError` where the target cannot start its processes there.
    """
    way, per_node = plan.strategy, plan.cluster.ranks_per_node
    slots = place(target, groups=groups, ranks=ranks, per_node=per_node)
    lies = plan_ranks(way)
    if way.order == AXES or lies == tuple(range(len(lies))):
        return slots
    return tuple(tuple(_moved(target, way, one, lies, per_node) for one in g) for g in slots)


def _moved(target: str, way: StrategyInfo, slot: Slot, ranks: Sequence[int], per_node: int) -> Slot:
    start = slot.node * per_node + slot.first
    mine = ranks[start : start + slot.ranks]
    nodes = {rank // per_node for rank in mine}
    if len(nodes) > 1 or list(mine) != sorted(mine):
        raise refuse(
            target,
            "the ranks of one process group lie on one node, in ascending order",
            got=f"order={'>'.join(way.order)}, ranks {', '.join(map(str, mine[:16]))}, "
            f"{per_node} a node",
            hint=f"search with the order {'>'.join(TARGET_ORDER)}",
        )
    devices = tuple(rank % per_node for rank in mine)
    node, first = nodes.pop(), devices[0]
    if devices == tuple(range(first, first + slot.ranks)):
        return replace(slot, node=node, first=first)
    return replace(slot, node=node, first=first, listed=devices)
