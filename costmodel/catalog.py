"""Clusters by name or from a file, and how many ranks a job may take.

A file holds facts (`shardplan.costmodel.datafile`); GB = 1e9 bytes and us = 1e-6 s are converted
here. Devices come from `shardplan.costmodel.devices`, whose functions are given on here as well.

A cluster names its device by catalogue name, by a path relative to the cluster's own file, or holds
it in a `[device]` table. Its `[[tiers]]` go from the inside out; `ranks = "all"` on the last one
means every rank. The file describes the fabric at `max_nodes`; a cluster of fewer nodes keeps the
tiers that it still crosses, cut to its own number of ranks.

A `.json` file is a cluster file of CANN or HCCL (`shardplan.costmodel.cluster_files`): it stands
for the shipped cluster of its device and ranks a node, with as many nodes as it lists.

Left out: per-link faults, oversubscribed spines, hosts (processors, memory, PCIe to the host).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args

from shardplan.costmodel.cluster_files import read_cluster_file
from shardplan.costmodel.datafile import (
    Field,
    check_keys,
    is_file_name,
    label,
    mapping,
    number,
    read_facts,
    read_shipped,
    read_toml,
    shipped_names,
)
from shardplan.costmodel.devices import (
    device_from_table,
    device_names,
    device_summary,
    fact_summary,
    is_profile,
    load_device,
    profiled_device,
)
from shardplan.costmodel.errors import DataFileError
from shardplan.costmodel.hardware import Cluster, Device, Fact, Tier, Topology
from shardplan.models.errors import InputError

__all__ = [
    "CLUSTER_FIELDS",
    "TIER_FIELDS",
    "TIER_RANKS",
    "cluster_from_table",
    "cluster_names",
    "cluster_summary",
    "device_from_table",
    "device_names",
    "device_summary",
    "load_cluster",
    "load_device",
    "resolve_cards",
]

CLUSTER_FIELDS: Mapping[str, Field] = {
    "ranks_per_node": number("ranks_per_node", low=1, high=4096, whole=True),
    "nodes": number("nodes", low=1, high=2**17, whole=True),
    "max_nodes": number("max_nodes", low=1, high=2**17, whole=True),
    "rank_counts": Field(target="rank_counts", shape="counts", low=1, high=4096),
}
TIER_FIELDS: Mapping[str, Field] = {
    "gb_per_s": number("bytes_per_s", low=1e-3, high=1e6, scale=1e9),
    "link_gb_per_s": number("link_bytes_per_s", low=1e-3, high=1e6, scale=1e9),
    "latency_us": number("latency_s", low=0, high=1e6, scale=1e-6),
}
TIER_RANKS: Mapping[str, Field] = {"ranks": number("ranks", low=2, high=2**29, whole=True)}


def cluster_names() -> tuple[str, ...]:
    """Names of the clusters that ship, sorted."""
    return shipped_names("clusters")


def load_cluster(
    name_or_path: str | Path,
    *,
    nodes: int | None = None,
    device: str | Path | Device | None = None,
    cards: int | None = None,
) -> Cluster:
    """A shipped cluster by name (case ignored), or one from a TOML or a CANN cluster file.

    `nodes` replaces the file's own number of nodes and `device` its device (the same server is sold
    with several bins). With `cards` and no `nodes`, a cluster too small for the cards gets the
    fewest nodes that hold them. `UnknownNameError`, `DataFileError`, or `InputError` for a number
    of nodes that the fabric cannot join and for a device of another vendor.
    """
    if is_file_name(name_or_path):
        path = Path(name_or_path)
        if path.suffix == ".json":
            return _listed_cluster(path, nodes, device)
        table = read_toml(path, "cluster")
        if is_profile(table):
            full, default = _profiled_cluster(table, path)
        else:
            full, default = cluster_from_table(table, str(path), folder=path.parent)
    else:
        full, default = _shipped_cluster(str(name_or_path).lower())
    if nodes is None:
        nodes = max(default, -(-cards // full.ranks_per_node) if cards else 0)
    cluster = _scaled(full, nodes)
    return cluster if device is None else _with_device(cluster, device)


def _listed_cluster(path: Path, nodes: int | None, device: str | Path | Device | None) -> Cluster:
    """The shipped cluster that a CANN or HCCL file describes; `device` where it does not say."""
    listed = read_cluster_file(path)
    counts = {len(node.devices) for node in listed.nodes}
    chip = _listed_device(path, listed.soc_version, device)
    full = [_shipped_cluster(name)[0] for name in cluster_names()]
    own = [one for one in full if one.device.soc_versions == chip.soc_versions]
    found = [one for one in own if {one.ranks_per_node} == counts]
    if len(found) != 1:
        sold = ", ".join(one.name for one in own or full if one.device.vendor == chip.vendor)
        raise DataFileError(
            "a cluster file lists whole servers, of a kind that one shipped cluster describes",
            got=f"{path}: {len(listed.nodes)} nodes of {sorted(counts)} x {chip.name}",
            hint=f"give --cluster as one of {sold}, with --nodes {len(listed.nodes)} "
            f"--device {chip.name} --cards {listed.ranks}",
        )
    return _scaled(replace(found[0], device=chip), nodes or len(listed.nodes))


def _listed_device(path: Path, soc: str, asked: str | Path | Device | None) -> Device:
    """The device asked for, else the catalogue's of that soc_version."""
    if asked is not None:
        return asked if isinstance(asked, Device) else load_device(asked)
    known = [load_device(name) for name in device_names()]
    for one in known:
        if soc in one.soc_versions:
            return one
    raise DataFileError(
        "a cluster file names a known device, or --device does",
        got=f"{path}: {soc or 'no soc_version'}"[:200],
        hint="known: " + ", ".join(name for one in known for name in one.soc_versions),
    )


def _profiled_cluster(table: Mapping[str, object], path: Path) -> tuple[Cluster, int]:
    """The shipped cluster that a device profile was measured in, with the profile's device."""
    if "cluster" not in table:
        raise DataFileError(
            "a device profile stands for a cluster only when it names one",
            got=str(path),
            hint=f"name a cluster and give --device {path.name}",
        )
    full, default = _shipped_cluster(label(table, "cluster", str(path)).lower())
    return _with_device(full, profiled_device(table, str(path), folder=path.parent)), default


@functools.cache
def _shipped_cluster(name: str) -> tuple[Cluster, int]:
    if name in device_names():
        own = [one for one in cluster_names() if _shipped_cluster(one)[0].device.name == name]
        raise InputError(
            "a cluster is asked for, and this is a device",
            got=f"cluster={name!r}",
            hint=f"try {' or '.join(own)}" if own else f"try a cluster, with --device {name}",
        )
    table = read_shipped("clusters", "cluster", name)
    return cluster_from_table(table, f"clusters/{name}.toml")


def cluster_from_table(
    table: Mapping[str, object], where: str, *, folder: Path | None = None
) -> tuple[Cluster, int]:
    """The cluster that a parsed file describes, at its largest, and its default number of nodes.

    `where` names the file in errors; a device path is relative to `folder`.
    """
    check_keys(table, ["name", "title", "device", *CLUSTER_FIELDS], ["tiers"], where)
    read = read_facts(table, CLUSTER_FIELDS, where)
    values: dict[str, Any] = dict(read.values)
    default, most = values.pop("nodes"), values["max_nodes"]
    if default > most:
        raise DataFileError(
            "`nodes` must not exceed `max_nodes`", got=f"{where}: nodes={default}, max_nodes={most}"
        )
    per_node = values["ranks_per_node"]
    counts = values["rank_counts"] = tuple(sorted(values["rank_counts"]))
    if counts[-1] != per_node:
        raise DataFileError(
            "the largest of `rank_counts` must be `ranks_per_node`",
            got=f"{where}: rank_counts={list(counts)}, ranks_per_node={per_node}",
        )
    facts = dict(read.facts)
    tiers = _tiers(table.get("tiers", []), most * per_node, facts, where)
    _check_tiers(tiers, per_node, most * per_node, where)
    cluster = Cluster(
        name=label(table, "name", where),
        title=label(table, "title", where),
        device=_own_device(table["device"], where, folder),
        nodes=most,
        tiers=tiers,
        facts=MappingProxyType(facts),
        **values,
    )
    return cluster, default


def _own_device(entry: object, where: str, folder: Path | None) -> Device:
    if isinstance(entry, Mapping):
        return device_from_table(entry, f"{where}: [device]", folder=folder)
    name = label({"device": entry}, "device", where)
    if is_file_name(name):
        return load_device((folder or Path()) / name)
    return load_device(name)


def _tiers(entries: object, ranks: int, facts: dict[str, Fact], where: str) -> tuple[Tier, ...]:
    if not isinstance(entries, list):
        raise DataFileError("`tiers` is a list of tables", got=where, hint="use [[tiers]]")
    tiers: list[Tier] = []
    for index, entry in enumerate(entries):
        here = f"{where}: tiers[{index}]"
        table = mapping(entry, here)
        check_keys(table, ["name", "topology", "ranks", *TIER_FIELDS], [], here)
        everything = table["ranks"] == "all" and index == len(entries) - 1
        read = read_facts(table, TIER_FIELDS if everything else {**TIER_FIELDS, **TIER_RANKS}, here)
        name = label(table, "name", here)
        values: dict[str, Any] = {"ranks": ranks, **read.values}
        topology = label(table, "topology", here, get_args(Topology))
        tiers.append(Tier(name=name, topology=cast("Topology", topology), **values))
        facts.update({f"tiers.{name}.{target}": fact for target, fact in read.facts.items()})
    return tuple(tiers)


def _check_tiers(tiers: tuple[Tier, ...], per_node: int, ranks: int, where: str) -> None:
    names = [tier.name for tier in tiers]
    if len(set(names)) != len(names):
        raise DataFileError("tier names must differ", got=f"{where}: {', '.join(names)}")
    inner = 1
    for tier in tiers:
        if tier.ranks <= inner or tier.ranks % inner:
            raise DataFileError(
                "a tier must join a whole number of the tiers inside it, more than one",
                got=f"{where}: {tier.name} joins {tier.ranks} ranks, the tier inside it {inner}",
            )
        if tier.link_bytes_per_s > tier.bytes_per_s:
            raise DataFileError(
                "`link_gb_per_s` must not exceed `gb_per_s`", got=f"{where}: tier {tier.name}"
            )
        inner = tier.ranks
    if inner != ranks:
        raise DataFileError(
            "the last tier must join all ranks",
            got=f"{where}: it joins {inner} of {ranks}",
            hint='write ranks = "all"',
        )
    if per_node > 1 and per_node not in {tier.ranks for tier in tiers}:
        raise DataFileError(
            "one tier must join exactly the ranks of a node", got=f"{where}: {per_node} ranks"
        )


def _scaled(full: Cluster, nodes: int) -> Cluster:
    """`full` (at its largest) with `nodes` nodes: tiers cut to the ranks that are left."""
    if isinstance(nodes, bool) or not isinstance(nodes, int) or not 1 <= nodes <= full.max_nodes:
        raise InputError(
            f"`nodes` of {full.name} must be a whole number from 1 to {full.max_nodes}",
            got=f"nodes={nodes}",
            hint=f"try {full.max_nodes if isinstance(nodes, int) and nodes > 1 else 1}",
        )
    ranks = nodes * full.ranks_per_node
    tiers: list[Tier] = []
    for tier in full.tiers:
        if not tiers or tiers[-1].ranks < ranks:
            tiers.append(replace(tier, ranks=min(tier.ranks, ranks)))
    return replace(full, nodes=nodes, tiers=tuple(tiers) if ranks > 1 else ())


def _with_device(cluster: Cluster, device: str | Path | Device) -> Cluster:
    found = device if isinstance(device, Device) else load_device(device)
    if found.vendor != cluster.device.vendor:
        raise InputError(
            "a cluster takes devices of its own vendor",
            got=f"cluster={cluster.name} ({cluster.device.vendor}), "
            f"device={found.name} ({found.vendor})",
        )
    return replace(cluster, device=found)


def resolve_cards(cluster: Cluster, cards: int | None) -> int:
    """Ranks that a job uses: all of the cluster for None, else `cards` if a job may have so many.

    A job takes one of `rank_counts` inside a node, or whole nodes. `InputError` otherwise, with the
    nearest numbers that are allowed.
    """
    if cards is None:
        return cluster.ranks
    inside = cluster.rank_counts
    per_node = cluster.ranks_per_node
    is_whole = isinstance(cards, int) and not isinstance(cards, bool)
    if is_whole and cards in inside:
        return cards
    if is_whole and per_node <= cards <= cluster.ranks and cards % per_node == 0:
        return cards
    allowed = (*inside, *range(2 * per_node, cluster.ranks + 1, per_node))
    below = [count for count in allowed if count < cards][-1:]
    above = [count for count in allowed if count > cards][:1]
    listed = " or ".join(filter(None, [", ".join(map(str, inside[:-1])), str(inside[-1])]))
    hint = "try " + " or ".join(map(str, below + above))
    if cards > cluster.ranks and cluster.nodes < cluster.max_nodes:
        hint += f", or more nodes (this cluster has {cluster.nodes})"
    raise InputError(
        f"a job on {cluster.name} takes {listed} cards of a node, or whole nodes",
        got=f"cards={cards}",
        hint=hint,
    )


def cluster_summary(name_or_path: str | Path) -> dict[str, object]:
    """A cluster for a JSON listing, at its default number of nodes; its device by name."""
    cluster = load_cluster(name_or_path)
    out: dict[str, object] = {
        "name": cluster.name,
        "title": cluster.title,
        "device": cluster.device.name,
        "ranks": cluster.ranks,
    }
    for key in ("ranks_per_node", "nodes", "max_nodes", "rank_counts"):
        out[key] = fact_summary(getattr(cluster, key), cluster.facts[key])
    out["tiers"] = [_tier_summary(tier, cluster.facts) for tier in cluster.tiers]
    return out


def _tier_summary(tier: Tier, facts: Mapping[str, Fact]) -> dict[str, object]:
    out: dict[str, object] = {"name": tier.name, "topology": tier.topology, "ranks": tier.ranks}
    for key in ("bytes_per_s", "link_bytes_per_s", "latency_s"):
        out[key] = fact_summary(getattr(tier, key), facts[f"tiers.{tier.name}.{key}"])
    return out
