"""Target `atc`: builds by Huawei's graph compiler, split over devices by its own algorithm.

    numa_config.json       --cluster_config: the devices that one replica runs on
    parallel_option.json   --graph_parallel_option_path: tensor parallelism of the plan's size
    atc.sh                 one build for prefill, one for decode, both of static shape
    rank_table*.json       HCCL's view of each replica, where the addresses it needs are known
    README.md              steps, assumptions, what the plan promises

With tp = 1 nothing is split: only `atc.sh` and `README.md` are written. A data-parallel plan is
the same build loaded once a replica. Sources: the tables in `search/data/atc.toml`; HCCL rank
tables in `rank_table`.

Left out, and refused: pipeline stages (parallel_option.json documents no key for them, and a
`--shard_model_dir` build needs shards that a plan does not hold), expert and context parallelism,
replicas of several nodes each. The compiler's solver chooses which operators it splits, and
whether tokens are split between them (sequence parallelism); the plan fixes only how many ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardplan.costmodel.kernels.algorithms import AUTO
from shardplan.models.errors import InputError
from shardplan.models.modules import MODULES, module_ranks
from shardplan.search.algorithms import hccl_algo
from shardplan.search.emit.atc_readme import (
    atc_readme,
    build_script,
    no_table,
)
from shardplan.search.emit.common import (
    Slot,
    check_algorithm,
    family_of,
    printable,
    refuse,
    table,
)
from shardplan.search.emit.placing import in_order
from shardplan.search.emit.rank_table import (
    RankDevice,
    Server,
    check_address,
    dump_json,
    rank_table,
)
from shardplan.search.plan import Plan

__all__ = ["files"]

_TARGET = "atc"
_ELSEWHERE = "use target vllm-ascend"


def files(
    plan: Plan,
    *,
    cann: int | str = 8,
    soc_version: str | None = None,
    addresses: Sequence[str] | str = (),
    device_addresses: Sequence[str] | str = (),
) -> dict[str, str]:
    """Texts by file name.

    `cann`: major release, 7 or 8. `soc_version`: one of the device's names, default the first.
    `addresses`: IP address of each node that the plan uses. `device_addresses`: IP address of
    each device's network port, replica by replica and rank by rank. Both lists may be given as one
    string with commas.
    Raises InputError for a plan or option that cannot be expressed, with the nearest that can.
    """
    facts = table("atc")
    if plan.pools:
        raise refuse(
            _TARGET,
            "a compiled model is one graph, not pools of prefill and decode instances",
            got=", ".join(f"{one.instances} {one.role}" for one in plan.pools),
            hint="search with --serving agg, or use target vllm-ascend",
        )
    family = family_of(plan, _TARGET, facts["families"], _device_hint(plan))
    release = _release(cann)
    soc = _soc(plan, soc_version)
    _check_strategy(plan, family)
    way = plan.strategy
    groups = in_order(_TARGET, plan, groups=way.dp, ranks=way.tp)
    last = max(slot.node for slots in groups for slot in slots)
    hosts = _addresses(addresses, "addresses", last + 1)
    ports = _addresses(device_addresses, "device_addresses", way.ranks)
    _check_groups(groups, family, hosts)
    made = {"atc.sh": build_script(plan, soc)}
    left: list[str] = []
    if way.tp > 1:
        made["numa_config.json"] = dump_json(_cluster_config(groups[0], family, soc, hosts))
        made["parallel_option.json"] = dump_json(_parallel_option(way.tp))
        tables = _rank_tables(groups, family, hosts, ports)
        made |= tables
        if not tables:
            left.append(no_table())
        if way.collectives != AUTO:
            setting = hccl_algo(way.collectives)
            left.append(f"- Run with `export HCCL_ALGO='{setting}'`: the plan is priced so.")
    made["README.md"] = atc_readme(plan, release, soc, sorted({*made, "README.md"}), left)
    return made


def _device_hint(plan: Plan) -> str:
    families = "310P, 910A and A2 (910B)"
    other = _ELSEWHERE if plan.cluster.soc_versions else "plan for an Ascend cluster"
    return f"splitting by the compiler is documented for {families}; {other}"


def _release(cann: int | str) -> Mapping[str, Any]:
    releases: list[Mapping[str, Any]] = table("atc")["releases"]
    for release in releases:
        if str(release["cann"]) == str(cann):
            return release
    raise InputError(
        "cann is the major release of a CANN whose ATC splits graphs",
        got=f"cann={cann!r}",
        hint="try 7 (7.0) or 8 (8.0 to 8.3, the last); later ATC dropped the flags, " + _ELSEWHERE,
    )


def _soc(plan: Plan, asked: str | None) -> str:
    known = plan.cluster.soc_versions
    if asked is not None and asked not in known:
        raise InputError(
            "soc_version is one of the names of the plan's device",
            got=repr(asked[:100]),
            hint="try " + ", ".join(printable(name) for name in known),
        )
    return asked or known[0]


def _check_strategy(plan: Plan, family: str) -> None:
    """`InputError` for an axis that the compiler has no option for."""
    way = plan.strategy
    wider = way.tp * way.pp
    example = f", for example tp={wider}" if wider <= plan.cluster.ranks_per_node else ""
    rules = (
        ("pp", way.pp, "parallel_option.json has no key for pipeline stages", example),
        ("ep", way.ep, "the compiler does not split experts", ""),
        ("cp", way.cp, "the compiler does not split contexts", ""),
    )
    for axis, size, rule, more in rules:
        if size > 1:
            hint = f"search with {axis}=1{more}{_or_elsewhere(family)}"
            raise refuse(_TARGET, rule, got=f"{axis}={size}", hint=hint)
    if way.mtp:
        rule = "a compiled graph has no loop that drafts tokens"
        raise refuse(_TARGET, rule, got=f"mtp={way.mtp}", hint="search with mtp off")
    check_algorithm(_TARGET, plan)
    for module in MODULES:
        ranks = module_ranks(way.parallelism(), module)
        if ranks != way.tp:
            rule = "the compiler splits all modules over the same ranks"
            hint = f"search with {module}_tp=0{_or_elsewhere(family)}"
            raise refuse(_TARGET, rule, got=f"{module}_tp={ranks}, tp={way.tp}", hint=hint)


def _or_elsewhere(family: str) -> str:
    """The other target, where it knows the device."""
    return f", or {_ELSEWHERE}" if family in table("vllm_ascend")["families"] else ""


def _addresses(given: Sequence[str] | str, what: str, count: int) -> tuple[str, ...]:
    """The addresses as a tuple, empty when none is given."""
    words = given.split(",") if isinstance(given, str) else list(given)
    found = tuple(check_address(word.strip(), what) for word in words if word.strip())
    if found and (len(found) != count or len(set(found)) < count):
        raise InputError(
            f"{what} holds {count} different addresses, in order",
            got=f"{len(found)} given, {len(set(found))} different",
        )
    return found


def _check_groups(groups: Sequence[Sequence[Slot]], family: str, hosts: tuple[str, ...]) -> None:
    nodes, ranks = len(groups[0]), sum(slot.ranks for slot in groups[0])
    dies = int(table("atc")["duo_dies"]["value"])
    if family == "310p" and ranks > 1 and ranks % dies:
        raise refuse(
            _TARGET, "a 310P build takes whole cards", got=f"tp={ranks}", hint="try tp=2, 4, 8"
        )
    if nodes == 1:
        return
    if family == "310p":
        raise refuse(
            _TARGET,
            "a 310P cluster file describes one server",
            got=f"nodes={nodes}",
            hint="use tp within one server",
        )
    if len(groups) > 1:
        raise refuse(
            _TARGET,
            "one build serves replicas of one node each",
            got=f"tp={ranks}, dp={len(groups)}",
            hint=f"plan one replica (dp=1){_or_elsewhere(family)}",
        )
    if not hosts:
        raise InputError(
            "numa_config.json of several nodes holds their addresses",
            got=f"nodes={nodes}",
            hint=f"give `addresses`, {nodes} of them",
        )


def _cluster_config(
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


def _parallel_option(tp: int) -> dict[str, Any]:
    """Semi-automatic: the plan fixes the size, the compiler's solver the operators."""
    return {
        "graph_parallel_option": {
            "auto": False,
            "opt_level": table("atc")["solver"]["value"],
            "tensor_parallel_option": {"tensor_parallel_size": tp},
        }
    }


def _rank_tables(
    groups: Sequence[Sequence[Slot]], family: str, hosts: tuple[str, ...], ports: tuple[str, ...]
) -> dict[str, str]:
    """One table a replica; none at all where device addresses are needed and not given."""
    needed = family == "910a" or len(groups[0]) > 1
    if needed and not ports:
        return {}
    made, rank = {}, 0
    for index, slots in enumerate(groups):
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
        name = "rank_table.json" if len(groups) == 1 else f"rank_table_replica{index}.json"
        made[name] = dump_json(rank_table(servers, device_ip_needed=needed))
    return made
