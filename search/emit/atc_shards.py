"""The sharded-model door of target `atc`: slices that hold their own collectives.

    model_relation_config*.json   --model_relation_config: slice -> device, ranks, their groups
    numa_config*.json             --cluster_config: the devices of one world
    rank_table*.json              HCCL's view of each world, where its addresses are known
    atc.sh                        one build a stage and phase
    README.md                     steps, assumptions, what the plan promises

A world is one pipeline stage of one replica: its tp and cp ranks, and those of the data-parallel
groups that share experts or modules. The groups are those that the collectives of the applied
graph join (`shardplan.models.apply`), so what is built is what was priced. Between stages the
application hands on the hidden state, which no file of this door describes.
Source: hiascend.com atlasatcparam_16_0026 and 0027 (--shard_model_dir, --model_relation_config);
slice names as torchair's dynamo_export gives them (<name>_rank<n>.air).
Left out, and refused: 310P, whose items hold two dies each while deploy_device_id_list names
cluster, node and item; stages whose world spans several data-parallel groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardplan.models.accounting import transfers
from shardplan.models.apply import ShardedGraph
from shardplan.models.modules import data_widths
from shardplan.search.emit.atc_files import TARGET
from shardplan.search.emit.common import Slot, refuse
from shardplan.search.emit.placing import in_order
from shardplan.search.emit.weights import applied
from shardplan.search.plan import Plan

__all__ = ["World", "comm_groups", "relation_config", "slice_names", "tensor_world", "worlds_of"]

AIR = "export_rank{rank}.air"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks of one distributed build, and the devices of each replica of it."""

    mark: str
    """What its file names end in: `_stage1`, or nothing for a plan of one stage."""
    replicas: tuple[tuple[Slot, ...], ...]
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    """(name, ranks) of each communication group."""

    @property
    def ranks(self) -> int:
        """Ranks of the world."""
        return sum(slot.ranks for slot in self.replicas[0])


def worlds_of(plan: Plan) -> tuple[World, ...]:
    """The world of every stage. `InputError` for a plan that this door cannot express."""
    way = plan.strategy
    shared = max(data_widths(way.parallelism()), default=1)
    if shared > 1 and way.pp > 1:
        raise refuse(
            TARGET,
            "the ranks of a stage that share experts or modules lie side by side",
            got=f"pp={way.pp}, data-parallel groups that share: {shared}",
            hint="search with --only pp=1, or an ep of at most tp*cp",
        )
    graphs = [applied(plan, TARGET, phase) for phase in ("prefill", "decode")]
    replicas, ranks = way.dp // shared, shared * way.cp * way.tp
    slots = in_order(TARGET, plan, groups=replicas * way.pp, ranks=ranks)
    groups = comm_groups(graphs, shared)
    return tuple(
        World(
            mark=f"_stage{stage}" if way.pp > 1 else "",
            replicas=tuple(slots[replica * way.pp + stage] for replica in range(replicas)),
            groups=groups,
        )
        for stage in range(way.pp)
    )


def tensor_world(plan: Plan) -> World:
    """The world of a plan that is tensor parallel only, all of its ranks in one group."""
    way = plan.strategy
    slots = in_order(TARGET, plan, groups=way.dp, ranks=way.tp)
    return World(mark="", replicas=slots, groups=(("tp_group_0", tuple(range(way.tp))),))


def comm_groups(
    graphs: Sequence[ShardedGraph], shared: int
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, ranks) of each group that a collective of the graphs joins.

    `shared`: data-parallel groups in one world. Ranks count over the world's sub-axes, major to
    minor as the mesh has them. A group is named after its sub-axes: `tp0_tp1_group_0`.
    """
    mesh = graphs[0].mesh
    axes = list(mesh.axes)
    while axes and axes[0].startswith("dp") and _data_ranks(graphs[0], axes) > shared:
        axes.pop(0)
    sizes = [mesh.size((axis,)) for axis in axes]
    found: dict[str, tuple[int, ...]] = {}
    for joined in dict.fromkeys(_joined(graphs)):
        over = [axis for axis in axes if axis in joined]
        for index, members in enumerate(_members(axes, sizes, over)):
            found[f"{'_'.join(over)}_group_{index}"] = members
    return tuple(found.items())


def _data_ranks(graph: ShardedGraph, axes: Sequence[str]) -> int:
    return graph.mesh.size(tuple(axis for axis in axes if axis.startswith("dp")))


def _joined(graphs: Sequence[ShardedGraph]) -> Iterator[tuple[str, ...]]:
    """Sub-axes of every collective, sends left out."""
    for graph in graphs:
        for block in graph.blocks.values():
            for one in transfers(graph, block):
                if one.kind != "send":
                    yield one.axes


def _members(
    axes: Sequence[str], sizes: Sequence[int], over: Sequence[str]
) -> Iterator[tuple[int, ...]]:
    """Ranks of each group over `over`: one for every place on the other axes."""
    rest = [range(1) if axis in over else range(n) for axis, n in zip(axes, sizes, strict=True)]
    inner = [range(n) if axis in over else range(1) for axis, n in zip(axes, sizes, strict=True)]
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    for base in itertools.product(*rest):
        start = sum(a * b for a, b in zip(base, strides, strict=True))
        yield tuple(
            start + sum(a * b for a, b in zip(step, strides, strict=True))
            for step in itertools.product(*inner)
        )


def relation_config(world: World, names: Sequence[str]) -> dict[str, Any]:
    """model_relation_config.json of a world; `names` are the slices, by rank."""
    places = [
        f"0:{node}:{item}"
        for node, slot in enumerate(world.replicas[0])
        for item in range(slot.ranks)
    ]
    deployed = zip(names, places, strict=True)
    made: dict[str, Any] = {
        "deploy_config": [
            {"submodel_name": name, "deploy_device_id_list": where} for name, where in deployed
        ],
        "model_name_to_instance_id": [
            {"submodel_name": name, "model_instance_id": rank} for rank, name in enumerate(names)
        ],
    }
    if world.groups:
        made["comm_group"] = [
            {"group_name": name, "group_rank_list": f"[{','.join(map(str, ranks))}]"}
            for name, ranks in world.groups
        ]
    made["rank_table"] = [
        {"rank_id": rank, "model_instance_id": rank} for rank in range(len(names))
    ]
    return made


def slice_names(ranks: int, pattern: str = AIR) -> list[str]:
    """File names of the slices of a world, by rank."""
    return [pattern.format(rank=rank) for rank in range(ranks)]
