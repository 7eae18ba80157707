"""Algorithms of the collectives between servers that a user of HCCL may pick, by machine.

HCCL takes them from HCCL_ALGO (level1; what runs inside a server is not to be chosen, and level2,
between supernodes, only for kernels expanded on the AI CPU, which engines do not use). What each
costs is in `shardplan.costmodel.kernels.algorithms`; which device takes which in
`data/hccl_algorithms.toml`.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.algorithms import AUTO, PIPELINE, form, runs
from shardplan.costmodel.kernels.collectives import KINDS, library_form
from shardplan.costmodel.placement import between_nodes
from shardplan.models.errors import InputError
from shardplan.search.families import device_family

__all__ = ["ALL", "algorithms_for", "asked_algorithms", "hccl_algo", "supported"]

ALL = "all"
_MOST_PARTIES = 64


@functools.cache
def _table() -> tuple[Mapping[str, Any], ...]:
    path = files("shardplan.search").joinpath("data", "hccl_algorithms.toml")
    return tuple(tomllib.loads(path.read_text("utf-8"))["algorithms"])


def supported(soc_versions: tuple[str, ...]) -> tuple[str, ...]:
    """Algorithms with a price that HCCL takes between servers of this device; none elsewhere."""
    family = device_family(soc_versions)
    if family is None:
        return ()
    rows = (one for one in _table() if family["name"] in one["families"])
    return tuple(str(one["name"]) for one in rows if one.get("form", True))


def algorithms_for(cluster: Cluster) -> tuple[str, ...]:
    """`auto`, and the algorithms that can change a price on this cluster."""
    able = supported(cluster.device.soc_versions)
    return (AUTO, *(name for name in able if _differs(cluster, name)))


def _differs(cluster: Cluster, name: str) -> bool:
    """Whether an algorithm has other steps or volume than the library's pick, for any group."""
    outer = between_nodes(cluster)
    if outer is None or cluster.nodes == 1:
        return False
    if name == PIPELINE and cluster.ranks_per_node > 1:
        return True
    return any(
        form(name, kind, parties) != library_form(outer, kind, parties)
        for kind in KINDS
        if runs(name, kind)
        for parties in range(2, min(cluster.nodes, _MOST_PARTIES) + 1)
    )


def asked_algorithms(cluster: Cluster, asked: str) -> tuple[str, ...]:
    """What `auto`, `all` or a name stands for. `InputError` for one that is not to be had."""
    word = str(asked).lower()  # a Python caller may pass anything
    if word in (AUTO, ALL):
        return (AUTO,) if word == AUTO else algorithms_for(cluster)
    able = supported(cluster.device.soc_versions)
    found = next((one for one in able if one.lower() == word), None)
    known = ", ".join((AUTO, ALL, *able))
    if found is None:
        bare = [one["name"] for one in _table() if not one.get("form", True)]
        unpriced = word in [one.lower() for one in bare]
        raise InputError(
            "HCCL documents no cost of this algorithm"
            if unpriced
            else f"collectives between servers of {cluster.device.name} run as {known}",
            got=f"collectives={word[:40]!r}",
            hint=f"try {known}",
        )
    if cluster.nodes == 1:
        raise InputError(
            "an algorithm between servers needs more than one server",
            got=f"collectives={found}, nodes={cluster.nodes}",
            hint="use auto, or more --nodes",
        )
    return (found,)


def hccl_algo(name: str) -> str:
    """The value of HCCL_ALGO that picks an algorithm."""
    row = next(one for one in _table() if one["name"] == name)
    setting = f"level0:NA;level1:{name}"
    return f"{row['only']}={setting}" if "only" in row else setting
