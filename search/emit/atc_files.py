"""The cluster files of target `atc`: numa_config.json and HCCL rank tables of one world.

A world is the devices that one distributed build runs on; it is listed as its own process numbers
it, items from 0 on each node. Sources: the tables in `search/data/atc.toml`; `rank_table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardplan.models.errors import InputError
from shardplan.search.emit.common import Slot, refuse, table
from shardplan.search.emit.rank_table import (
    RankDevice,
    Server,
    dump_json,
    rank_table,
)

__all__ = [
    "ELSEWHERE",
    "TARGET",
    "check_worlds",
    "cluster_config",
    "or_elsewhere",
    "rank_tables",
]

TARGET = "atc"
ELSEWHERE = "use target vllm-ascend"


def or_elsewhere(family: str) -> str:
    """The other target, where it knows the device."""
    return f", or {ELSEWHERE}" if family in table("vllm_ascend")["families"] else ""


def check_worlds(
    worlds: Sequence[Sequence[Slot]], family: str, hosts: tuple[str, ...], *, replicas: int
) -> None:
    """`InputError` for worlds that no cluster file describes; `worlds` holds all replicas'."""
    nodes, ranks = len(worlds[0]), sum(slot.ranks for slot in worlds[0])
    dies = int(table("atc")["duo_dies"]["value"])
    if family == "310p" and ranks > 1 and ranks % dies:
        raise refuse(
            TARGET, "a 310P build takes whole cards", got=f"tp={ranks}", hint="try tp=2, 4, 8"
        )
    if nodes == 1:
        return
    if family == "310p":
        raise refuse(
            TARGET,
            "a 310P cluster file describes one server",
            got=f"nodes={nodes}",
            hint="use tp within one server",
        )
    if replicas > 1:
        raise refuse(
            TARGET,
            "one build serves replicas of one node each",
            got=f"ranks={ranks}, replicas={replicas}",
            hint=f"plan one replica (dp=1){or_elsewhere(family)}",
        )
    if not hosts:
        raise InputError(
            "numa_config.json of several nodes holds their addresses",
            got=f"nodes={nodes}",
            hint=f"give `addresses`, {nodes} of them",
        )


def cluster_config(
    slots: Sequence[Slot], family: str, soc: str, hosts: tuple[str, ...]
) -> dict[str, Any]:
    """The devices of one replica, as they are numbered in its own process."""
    facts = table("atc")
    kind = facts["node_types"][family]
    if family == "310p":
        dies = int(facts["duo_dies"]["value"])
        items = [{"item_id": i} for i in range(slots[0].ranks // dies)]
        devices = [{"device_id": i} for i in range(dies)]
        node: dict[str, Any] = {"node_id": 0, "node_type": kind, "item_list": items}
        return {
            "cluster": [{"cluster_nodes": [node]}],
            "item_def": [{"device_list": devices, "item_type": soc}],
        }
    nodes = [
        {
            "node_id": i,
            "node_type": kind,
            "ipaddr": hosts[slot.node] if hosts else "127.0.0.1",
            "port": facts["control_port"]["value"],
            "is_local": i == 0,
            "item_list": [{"item_id": item} for item in range(slot.ranks)],
        }
        for i, slot in enumerate(slots)
    ]
    return {
        "cluster": [{"cluster_nodes": nodes}],
        "item_def": [{"item_type": soc}],
        "node_def": [{"item": [{"item_type": soc}]}],
    }


def rank_tables(
    worlds: Sequence[tuple[str, Sequence[Slot]]],
    family: str,
    hosts: tuple[str, ...],
    ports: tuple[str, ...],
) -> dict[str, str]:
    """One table a world, named after it; none where device addresses are needed and not given."""
    needed = family == "910a" or len(worlds[0][1]) > 1
    if needed and not ports:
        return {}
    made, rank = {}, 0
    for mark, slots in worlds:
        servers = []
        for slot in slots:
            ips = ports[rank : rank + slot.ranks] or ("",) * slot.ranks
            rank += slot.ranks
            servers.append(
                Server(
                    server_id=f"node_{slot.node}",
                    host_ip=hosts[slot.node] if hosts else "",
                    devices=tuple(
                        RankDevice(device_id=device, device_ip=ip)
                        for device, ip in zip(slot.devices, ips, strict=True)
                    ),
                )
            )
        made[f"rank_table{mark}.json"] = dump_json(rank_table(servers, device_ip_needed=needed))
    return made
