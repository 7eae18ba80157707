"""Cluster files of CANN and HCCL: which nodes there are, and which devices of each take part.

    numa_config.json   --cluster_config of ATC (CANN 7.0 to 8.3): cluster[].cluster_nodes[] with
                       item_list[], item_def[] (310P: times its device_list[]), node_def[]
    numa_config.json   of DataFlow (RESOURCE_CONFIG_PATH): the same with nodes_topology,
                       item_topology and device_id of items
    RankTable          --cluster_config of open-source GE (CANN 9): a rank table and HcclCommConfig
    rank table         HCCL, versions 1.0 and 1.2: server_list[].device[]

Published samples are no strict JSON (comments, commas before a closing bracket), so neither is
asked for. A file tells nodes, addresses and devices; what links them comes from the shipped
cluster of the same server. Sources: hiascend.com graphdevg/atlasag_25_0074 and dfdevc_23_0031; GE
docs, atc_tools/CLI_options/--cluster_config; HCCL user guide, cluster information configuration.
Left out: link rates of DataFlow files (no two samples agree on what they count), rank tables of
version 2.0 and of the old template with group_list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardplan.costmodel.datafile import MAX_FILE_BYTES
from shardplan.costmodel.errors import DataFileError

__all__ = ["ListedCluster", "ListedNode", "parse_cluster_file", "read_cluster_file"]

_TOKENS = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_MOST_ID = 2**31 - 1
_MOST_SHOWN = 80
_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedNode:
    """A server of a file: its name there, its address ("" where none), its devices in order."""

    name: str
    address: str
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedCluster:
    """What a file lists."""

    nodes: tuple[ListedNode, ...]
    soc_version: str = ""
    """Name of the device for the compiler; "" in a rank table, which does not tell."""

    @property
    def ranks(self) -> int:
        """Devices of all nodes."""
        return sum(len(node.devices) for node in self.nodes)


def read_cluster_file(path: Path) -> ListedCluster:
    """The cluster of a file. `DataFileError` for a file that is none of the formats."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataFileError(
                f"a cluster file must not be larger than {MAX_FILE_BYTES} bytes", got=str(path)
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataFileError(
            "a cluster file must be readable", got=f"{path}: {error.strerror}"
        ) from None
    except UnicodeDecodeError as error:
        raise DataFileError(
            "a cluster file must be UTF-8 text", got=f"{path}: byte {error.start}"
        ) from None
    return parse_cluster_file(text, str(path))


def parse_cluster_file(text: str, where: str) -> ListedCluster:
    """The cluster of a text; `where` names it in errors. `DataFileError` as `read_cluster_file`."""
    plain = _TOKENS.sub(lambda m: m.group() if m.group()[0] == '"' else " ", text)
    plain = _COMMA.sub(lambda m: m.group(1) or "", plain)
    try:
        data = json.loads(plain)
    except (ValueError, RecursionError) as error:
        raise DataFileError("a cluster file must be JSON", got=f"{where}: {error}") from None
    try:
        found = _listed(data)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataFileError(
            "a cluster file lacks a key, or holds another kind of value there",
            got=f"{where}: {type(error).__name__}: {error}",
            hint=_KINDS,
        ) from None
    _check(found, where)
    return found


_KINDS = "known: numa_config.json of ATC or DataFlow, HCCL rank tables 1.0 and 1.2"


def _listed(data: Any) -> ListedCluster:
    if "cluster" in data:
        return _numa(data)
    table = data.get("RankTable", data)
    return ListedCluster(nodes=tuple(_server(one) for one in table["server_list"]))


def _numa(data: Mapping[str, Any]) -> ListedCluster:
    definition = data["item_def"][0]
    dies = len(definition.get("device_list", ())) or 1
    nodes = tuple(
        _node(node, dies) for cluster in data["cluster"] for node in cluster["cluster_nodes"]
    )
    return ListedCluster(nodes=nodes, soc_version=str(definition["item_type"]))


def _node(node: Mapping[str, Any], dies: int) -> ListedNode:
    items = [_number(one.get("device_id", one["item_id"])) for one in node["item_list"]]
    return ListedNode(
        name=str(node["node_id"]),
        address=str(node.get("ipaddr", "")),
        devices=tuple(item * dies + die for item in items for die in range(dies)),
    )


def _server(server: Mapping[str, Any]) -> ListedNode:
    devices = sorted(server["device"], key=lambda one: _number(one["rank_id"]))
    return ListedNode(
        name=str(server["server_id"]),
        address=str(server.get("host_ip", "")),
        devices=tuple(_number(one["device_id"]) for one in devices),
    )


def _number(value: object) -> int:
    """An id, which files write as a number or as a text; `ValueError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no whole number"[:_MOST_SHOWN])
    number = int(value)
    if abs(number) > _MOST_ID:
        raise ValueError(f"ids are at most {_MOST_ID}")
    return number


def _check(found: ListedCluster, where: str) -> None:
    names = [node.name for node in found.nodes]
    if not names or len(set(names)) < len(names):
        raise DataFileError("a cluster file names each node once", got=f"{where}: {names[:16]}")
    for node in found.nodes:
        ids = node.devices
        if not ids or len(set(ids)) < len(ids) or min(ids) < 0:
            raise DataFileError(
                "a cluster file names each device of a node once",
                got=f"{where}: node {node.name[:64]}: {list(ids[:16])}",
            )
