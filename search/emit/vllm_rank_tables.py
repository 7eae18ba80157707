"""HCCL rank tables of vLLM's servers over several nodes, where their addresses are given.

    rank_table<k>.json           of server k; of pools rank_table_<role><k>.json of instance k

The engine reads none of its own accord (`[rank_table]` in `search/data/vllm_ascend.toml`): ranks
negotiate their links, and torch_npu below it takes a table instead where RANK_TABLE_FILE names one.
So the scripts set no variable, and README.md says when one is worth setting. A table holds the
ranks of one torch world: all data-parallel groups of a server, stages and tensor-parallel ranks.
Left out: servers joined by a supernode, whose tables (version 1.2) need ids of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardplan.search.emit.common import refuse, table
from shardplan.search.emit.rank_table import dump_json, instance_tables, listed
from shardplan.search.emit.vllm_layout import Launch
from shardplan.search.plan import ClusterInfo

__all__ = ["Fleet", "rank_tables", "table_steps"]

_TARGET = "vllm-ascend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Servers that start alike: all of a plan, or the instances of a pool."""

    role: str
    """Empty of a plan without pools."""
    cluster: ClusterInfo
    launches: Sequence[Launch]
    first_node: int = 0
    """Its node 0 among the addresses that are given."""

    @property
    def servers(self) -> dict[int, list[Launch]]:
        """Launches of each server, in the order of its nodes."""
        found: dict[int, list[Launch]] = {}
        for one in sorted(self.launches, key=lambda one: (one.server, one.index)):
            found.setdefault(one.server, []).append(one)
        return found

    @property
    def wants_tables(self) -> bool:
        """Whether a server fills several nodes, joined by device ports."""
        return any(one.nodes > 1 for one in self.launches) and not self.in_supernode

    @property
    def in_supernode(self) -> bool:
        """Whether links other than RoCE join its nodes."""
        return self.cluster.fast_ranks > self.cluster.ranks_per_node

    def file(self, server: int) -> str:
        """Name of a server's table."""
        return f"rank_table_{self.role}{server}.json" if self.role else f"rank_table{server}.json"


def rank_tables(
    fleets: Sequence[Fleet], *, addresses: str, device_addresses: str
) -> dict[str, str]:
    """Texts by file name; none where no address is given.

    `addresses`: one a node; `device_addresses`: one a rank, server by server; of pools those of
    prefill first. `InputError` for lists of another length, for one without the other, and where
    no table can use them.
    """
    if not (addresses or device_addresses):
        return {}
    if not (addresses and device_addresses):
        raise refuse(
            _TARGET,
            "a rank table needs the addresses of nodes and of devices",
            got=f"addresses={addresses!r}, device_addresses={device_addresses[:60]!r}",
            hint="give both options",
        )
    if not any(fleet.wants_tables for fleet in fleets):
        raise refuse(
            _TARGET,
            "a rank table is of a server over several nodes that RoCE joins",
            got=f"addresses={addresses[:60]!r}",
            hint="leave both options out: ranks negotiate their links",
        )
    nodes = max(one.slot.node + fleet.first_node for fleet in fleets for one in fleet.launches) + 1
    hosts = listed(addresses, "addresses", nodes)
    ranks = sum(one.slot.ranks for fleet in fleets for one in fleet.launches)
    ports = listed(device_addresses, "device_addresses", ranks)
    made: dict[str, str] = {}
    start = 0
    for fleet in fleets:
        placed = [[one.slot for one in own] for own in fleet.servers.values()]
        end = start + sum(slot.ranks for slots in placed for slot in slots)
        if fleet.wants_tables:
            devices = [
                (slot.node, one) for slots in placed for slot in slots for one in slot.devices
            ]
            at = dict(zip(devices, ports[start:end], strict=True))
            found = instance_tables(placed, hosts[fleet.first_node :], at)
            texts = zip(map(fleet.file, fleet.servers), map(dump_json, found), strict=True)
            made |= dict(texts)
        start = end
    return made


def table_steps(fleets: Sequence[Fleet], made: Mapping[str, str]) -> Iterator[str]:
    """What the tables are for, or how they are had; nothing where no server could use one."""
    spanning = [fleet for fleet in fleets if fleet.wants_tables]
    if not spanning:
        return
    facts = table("vllm_ascend")["rank_table"]
    variable, timeout = facts["variable"], facts["timeout"]
    when = (
        "Ranks negotiate their links over HCCL_SOCKET_IFNAME; only where the network needs links "
        "by rank table"
    )
    if not made:
        whose = " (of pools: prefill, then decode)" if fleets[0].role else ""
        yield (
            f"{when}: read each device's address with `hccn_tool -i DEVICE_ID -ip -g`, and emit "
            "again with `--option addresses=IP,IP,... --option device_addresses=IP,IP,...` (one a "
            f"node, one a rank, server by server{whose}): that writes the tables."
        )
        return
    files = ", ".join(
        f"{fleet.file(server)} on {_nodes(fleet, own)}"
        for fleet in spanning
        for server, own in fleet.servers.items()
    )
    yield (
        f"{when}: set {variable} to the whole path of the server's table (no link), and {timeout} "
        f"to more than HCCL's own, before the command: {files}."
    )


def _nodes(fleet: Fleet, own: Sequence[Launch]) -> str:
    role = f"{fleet.role} " if fleet.role else ""
    return f"{role}node " + ", ".join(str(one.slot.node) for one in own)
