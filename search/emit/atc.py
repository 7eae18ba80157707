"""Target `atc`: builds by Huawei's graph compiler, through either of its two distributed doors.

door `split` (the default): a whole model, split by the compiler's own algorithm

    numa_config.json       --cluster_config: the devices that one replica runs on
    parallel_option.json   --graph_parallel_option_path: tensor parallelism of the plan's size
    atc.sh                 one build for prefill, one for decode, both of static shape
    rank_table*.json       HCCL's view of each replica, where the addresses it needs are known
    README.md              steps, assumptions, what the plan promises

door `shards`: slices that hold their own collectives (`atc_shards`). With `model`, an ONNX file,
either door builds that file: whole, or cut into one file a rank (`onnx_slices`).

With tp = 1 door `split` splits nothing: only `atc.sh` and `README.md` are written. A data-parallel
plan is the same build loaded once a replica. Sources: the tables in `search/data/atc.toml`; HCCL
rank tables in `rank_table`.

Left out, and refused by door `split`: pipeline stages (parallel_option.json documents no key for
them), expert and context parallelism; by both: replicas of several nodes each. The compiler's
solver chooses which operators it splits, and whether tokens are split between them (sequence
parallelism); the plan fixes only how many ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardplan.costmodel.kernels.algorithms import AUTO
from shardplan.models.errors import InputError
from shardplan.models.modules import MODULES, module_ranks
from shardplan.search.algorithms import hccl_algo
from shardplan.search.emit.atc_files import (
    ELSEWHERE,
    TARGET,
    check_worlds,
    cluster_config,
    or_elsewhere,
    rank_tables,
)
from shardplan.search.emit.atc_readme import atc_readme, build_script, no_table
from shardplan.search.emit.atc_shards import (
    World,
    relation_config,
    slice_names,
    tensor_world,
    worlds_of,
)
from shardplan.search.emit.atc_shards_readme import (
    shard_readme,
    shard_script,
    slice_pattern,
)
from shardplan.search.emit.common import check_algorithm, family_of, printable, refuse, table
from shardplan.search.emit.onnx_slices import OnnxFile, file_name, read_onnx, sliced
from shardplan.search.emit.rank_table import dump_json, listed
from shardplan.search.plan import Plan

__all__ = ["files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """What both doors need: the plan, its device for the compiler, addresses as given."""

    plan: Plan
    family: str
    soc: str
    release: Mapping[str, Any]
    addresses: Sequence[str] | str
    device_addresses: Sequence[str] | str
    model: OnnxFile | None


def files(
    plan: Plan,
    *,
    door: str = "split",
    cann: int | str = 8,
    soc_version: str | None = None,
    addresses: Sequence[str] | str = (),
    device_addresses: Sequence[str] | str = (),
    model: str = "",
) -> dict[str, str | bytes]:
    """Contents by file name.

    `door`: split or shards. `cann`: major release, 7 or 8. `soc_version`: one of the device's
    names, default the first. `addresses`: IP address of each node that the plan uses.
    `device_addresses`: IP address of each device's network port, world by world and rank by rank.
    Both lists may be given as one string with commas. `model`: an ONNX file to build in place of
    models that the user exports; it must have the plan's number of parameters.
    Raises InputError for a plan or option that cannot be expressed, with the nearest that can.
    """
    if plan.pools:
        raise refuse(
            TARGET,
            "a compiled model is one graph, not pools of prefill and decode instances",
            got=", ".join(f"{one.instances} {one.role}" for one in plan.pools),
            hint="search with --serving agg, or use target vllm-ascend",
        )
    if door not in ("split", "shards"):
        raise InputError("door is split or shards", got=repr(door[:100]))
    build = _Build(
        plan=plan,
        family=family_of(plan, TARGET, table("atc")["families"], _device_hint(plan)),
        release=_release(cann),
        soc=_soc(plan, soc_version),
        addresses=addresses,
        device_addresses=device_addresses,
        model=_model(plan, model) if model else None,
    )
    if plan.strategy.mtp:
        rule = "a compiled graph has no loop that drafts tokens"
        raise refuse(TARGET, rule, got=f"mtp={plan.strategy.mtp}", hint="search with mtp off")
    check_algorithm(TARGET, plan)
    return _split(build) if door == "split" else _shards(build)


def _model(plan: Plan, path: str) -> OnnxFile:
    """The ONNX file. `InputError` unless it has the plan's parameters."""
    found = read_onnx(path)
    if found.parameters != plan.model.parameters:
        raise InputError(
            "the plan was made for a model of other sizes",
            got=f"{found.name}: {found.parameters} parameters, plan: {plan.model.parameters}",
            hint="give the model that the plan names",
        )
    return found


def _split(build: _Build) -> dict[str, str | bytes]:
    plan, way = build.plan, build.plan.strategy
    _check_strategy(plan, _or_shards(build.family) + or_elsewhere(build.family))
    world = tensor_world(plan)
    hosts, ports = _listed(build, [world])
    check_worlds(world.replicas, build.family, hosts, replicas=way.dp)
    made: dict[str, str | bytes] = {"atc.sh": build_script(plan, build.soc, build.model)}
    if build.model is not None:
        made[f"model/{file_name(build.model)}.onnx"] = build.model.data
    left: list[str] = []
    if way.tp > 1:
        found = cluster_config(world.replicas[0], build.family, build.soc, hosts)
        made["numa_config.json"] = dump_json(found)
        made["parallel_option.json"] = dump_json(_parallel_option(way.tp))
        left = _tables(build, [world], hosts, ports, made)
    names = sorted({*made, "README.md"})
    made["README.md"] = atc_readme(plan, build.release, build.soc, names, left, build.model)
    return made


def _shards(build: _Build) -> dict[str, str | bytes]:
    plan, way = build.plan, build.plan.strategy
    if build.family == "310p":
        raise refuse(
            TARGET,
            "deploy_device_id_list names cluster, node and item, and a 310P item holds two dies",
            got=f"device={printable(plan.cluster.device)}",
            hint="use door split",
        )
    if build.model is not None:
        _check_strategy(plan, or_elsewhere(build.family))
    worlds = [tensor_world(plan)] if build.model is not None else list(worlds_of(plan))
    if worlds[0].ranks == 1:
        rule = "one rank holds all of a stage, so there is nothing to slice"
        hint = "use door split" if way.pp == 1 else "search with --only pp=1, or a wider tp"
        raise refuse(TARGET, rule, got=f"tp={way.tp}, pp={way.pp}", hint=hint)
    hosts, ports = _listed(build, worlds)
    made: dict[str, str | bytes] = {}
    for world in worlds:
        slots = world.replicas[0]
        check_worlds(world.replicas, build.family, hosts, replicas=len(world.replicas))
        found = cluster_config(slots, build.family, build.soc, hosts)
        made[f"numa_config{world.mark}.json"] = dump_json(found)
        names = slice_names(world.ranks, slice_pattern(build.model))
        made[f"model_relation_config{world.mark}.json"] = dump_json(relation_config(world, names))
    if build.model is not None:
        parts = zip(names, sliced(build.model, way.tp), strict=True)
        made |= {f"shards/{name}": data for name, data in parts}
    left = _tables(build, worlds, hosts, ports, made)
    marks = [world.mark for world in worlds]
    made["atc.sh"] = shard_script(build.soc, marks, build.model)
    names = sorted({*made, "README.md"})
    made["README.md"] = shard_readme(
        plan, build.release, build.soc, names, left, build.model, worlds[0]
    )
    return made


def _listed(build: _Build, worlds: Sequence[World]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Addresses of nodes and of device ports, checked; empty where none are given."""
    used = [slot.node for world in worlds for slots in world.replicas for slot in slots]
    hosts = listed(build.addresses, "addresses", max(used) + 1)
    ports = listed(build.device_addresses, "device_addresses", build.plan.strategy.ranks)
    return hosts, ports


def _tables(
    build: _Build,
    worlds: Sequence[World],
    hosts: tuple[str, ...],
    ports: tuple[str, ...],
    made: dict[str, str | bytes],
) -> list[str]:
    """Adds the rank tables to `made`; returns what is left to the reader, as lines of a list."""
    marked = [
        (f"{world.mark}_replica{i}" if len(world.replicas) > 1 else world.mark, slots)
        for world in worlds
        for i, slots in enumerate(world.replicas)
    ]
    tables = rank_tables(marked, build.family, hosts, ports)
    made |= tables
    left = [] if tables else [no_table()]
    algorithm = build.plan.strategy.collectives
    if algorithm != AUTO:
        setting = hccl_algo(algorithm)
        left.append(f"- Run with `export HCCL_ALGO='{setting}'`: the plan is priced so.")
    return left


def _device_hint(plan: Plan) -> str:
    families = "310P, 910A and A2 (910B)"
    other = ELSEWHERE if plan.cluster.soc_versions else "plan for an Ascend cluster"
    return f"splitting by the compiler is documented for {families}; {other}"


def _release(cann: int | str) -> Mapping[str, Any]:
    releases: list[Mapping[str, Any]] = table("atc")["releases"]
    for release in releases:
        if str(release["cann"]) == str(cann):
            return release
    raise InputError(
        "cann is the major release of a CANN whose ATC splits graphs",
        got=f"cann={cann!r}",
        hint="try 7 (7.0) or 8 (8.0 to 8.3, the last); later ATC dropped the flags, " + ELSEWHERE,
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


def _check_strategy(plan: Plan, others: str) -> None:
    """`InputError` for an axis that is not tp; `others` ends the hint, as `, or use ...`."""
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
            hint = f"search with --only {axis}=1{more}{others}"
            raise refuse(TARGET, rule, got=f"{axis}={size}", hint=hint)
    for module in MODULES:
        ranks = module_ranks(way.parallelism(), module)
        if ranks != way.tp:
            rule = "the compiler splits all modules over the same ranks"
            hint = f"search with {module}_tp=0{others}"
            raise refuse(TARGET, rule, got=f"{module}_tp={ranks}, tp={way.tp}", hint=hint)


def _or_shards(family: str) -> str:
    """The other door, for the end of a hint, where it knows the device."""
    return "" if family == "310p" else ", or use door shards"


def _parallel_option(tp: int) -> dict[str, Any]:
    """Semi-automatic: the plan fixes the size, the compiler's solver the operators."""
    return {
        "graph_parallel_option": {
            "auto": False,
            "opt_level": table("atc")["solver"]["value"],
            "tensor_parallel_option": {"tensor_parallel_size": tp},
        }
    }
