"""Target `vllm-ascend` for a plan with prefill and decode pools.

    serve_prefill_node<i>.sh   the prefill instances of node i
    serve_decode_node<i>.sh    the decode instances of node i
    proxy.sh                   the plugin's example proxy over all instances
    bench.sh, README.md        load test; steps, assumptions, what the plan promises

Instances fill the nodes one after another, the larger role first: their sizes divide a node or
are whole nodes, so none crosses a border. Both roles name one connector, whose cache a decode
rank pulls (`kv_transfer` in `search/data/vllm_ascend.toml`, with its sources). A listener a rank
starts at kv_port: an instance's is the first port plus its first device.
Left out, and refused: pools of different hardware generations, and nodes without a documented
port range.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardplan.search.emit.common import (
    Slot,
    check_plan,
    model_name,
    predicted,
    printable,
    refuse,
    table,
)
from shardplan.search.emit.vllm_ascend import Flag, checked_family, script
from shardplan.search.emit.vllm_layout import Launch, Split, split_servers
from shardplan.search.emit.vllm_readme import ahead_words, bench
from shardplan.search.emit.vllm_schemes import Checkpoint, checkpoint_of
from shardplan.search.plan import Plan, Pool, StrategyInfo

__all__ = ["disagg_files"]

_TARGET = "vllm-ascend"
_ROLES = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One pool as vLLM runs it: each instance is one server."""

    pool: Pool
    plan: Plan
    """The deployment's plan with one instance in place of all."""
    family: str
    checkpoint: Checkpoint
    split: Split
    launches: tuple[Launch, ...]


def disagg_files(plan: Plan) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that vLLM on Ascend cannot run."""
    if [pool.role for pool in plan.pools] != list(_ROLES):
        raise refuse(
            _TARGET,
            "a disaggregated plan has one prefill and one decode pool",
            got=", ".join(pool.role for pool in plan.pools),
            hint="search again with --serving disagg",
        )
    plans = [_instance(plan, pool) for pool in plan.pools]
    families = [checked_family(one, pool.role) for one, pool in zip(plans, plan.pools, strict=True)]
    if families[0] != families[1]:
        raise refuse(
            _TARGET,
            "prefill and decode run on one hardware generation",
            got=f"prefill on {families[0]}, decode on {families[1]}",
            hint="search with both pools on the same devices",
        )
    _check_pair(*(pool.strategy for pool in plan.pools))
    splits = [_one_server(one) for one in plans]
    placed = _placed(plan)
    sides = [
        _Side(
            pool=pool,
            plan=one,
            family=families[0],
            checkpoint=checkpoint_of(one, families[0]),
            split=split,
            launches=own,
        )
        for pool, one, split, own in zip(plan.pools, plans, splits, placed, strict=True)
    ]
    made = {}
    for side in sides:
        for node in sorted({one.slot.node for one in side.launches}):
            made[f"serve_{side.pool.role}_node{node}.sh"] = _script(plan, side, node)
    made["proxy.sh"] = _proxy(plan, sides)
    servers = Split(
        servers=sum(pool.instances for pool in plan.pools),
        groups=splits[1].groups,
        experts=splits[1].experts,
    )
    made["bench.sh"] = bench(sides[1].plan, sides[1].checkpoint, servers)
    made["README.md"] = _readme(plan, sides, sorted({*made, "README.md"}))
    return made


def _instance(plan: Plan, pool: Pool) -> Plan:
    """The plan of one instance; prefill runs eagerly, as it is priced."""
    way, request = pool.strategy, plan.request
    if pool.role == "prefill":
        way = way.model_copy(update={"batch": min(way.batch, way.chunk // (1 + way.mtp))})
        request = request.model_copy(update={"engine_profile": "vllm-ascend-eager"})
    changes = {
        "strategy": way,
        "cluster": pool.cluster,
        "memory": pool.memory,
        "request": request,
        "pools": (),
        "transfer": None,
    }
    one = plan.model_copy(update=changes)
    check_plan(one)
    return one


def _check_pair(prefill: StrategyInfo, decode: StrategyInfo) -> None:
    """What the connector asserts of both sides, and what a prediction layer needs."""
    if (prefill.mtp > 0) != (decode.mtp > 0):
        raise refuse(
            _TARGET,
            "both pools predict tokens ahead, or neither: the layer's cache is handed over",
            got=f"prefill mtp={prefill.mtp}, decode mtp={decode.mtp}",
            hint="search again with --serving disagg",
        )
    if prefill.tp % decode.tp:
        raise refuse(
            _TARGET,
            "tp of prefill is a multiple of tp of decode",
            got=f"prefill tp={prefill.tp}, decode tp={decode.tp}",
            hint=f"try a decode tp that divides {prefill.tp}",
        )
    if decode.pp > 1:
        raise refuse(
            _TARGET,
            "decode instances have one pipeline stage",
            got=f"decode pp={decode.pp}",
            hint="try pp=1",
        )


def _one_server(plan: Plan) -> Split:
    """How an instance is one server. `InputError` where it would be several."""
    split = split_servers(plan)
    if split.servers > 1:
        way = plan.strategy
        raise refuse(
            _TARGET,
            "an instance of a pool is one server",
            got=f"tp={way.tp}, pp={way.pp}, dp={way.dp}, ep={way.ep}: {split.servers} servers",
            hint="plan replicas as instances",
        )
    return split


def _shares_cards(plan: Plan) -> bool:
    return plan.request.prefill_cards is None


def _placed(plan: Plan) -> list[tuple[Launch, ...]]:
    """Launches of each pool: instances side by side, the larger ones first."""
    per_node = plan.pools[0].cluster.ranks_per_node
    if per_node not in _ports():
        raise refuse(
            _TARGET,
            "the connector's ports are documented for nodes of 8 and 16 NPUs",
            got=f"ranks_per_node={per_node}",
            hint="plan for a server of 8 or 16",
        )
    places: dict[str, tuple[Launch, ...]] = {}
    heads: dict[int, int] = {}
    start = 0
    for pool in sorted(plan.pools, key=lambda one: -one.strategy.ranks):
        if not _shares_cards(plan):
            start, heads = 0, {}
        size, node_ranks = pool.strategy.ranks, pool.cluster.ranks_per_node
        made: list[Launch] = []
        for server in range(pool.instances):
            made += _server(pool, server, start + server * size, node_ranks, heads)
        start += pool.instances * size
        places[pool.role] = tuple(made)
    return [places[role] for role in _ROLES]


def _server(
    pool: Pool, server: int, start: int, per_node: int, heads: dict[int, int]
) -> list[Launch]:
    """One instance from rank `start` on; `heads`: servers of each node so far."""
    way = pool.strategy
    node, first = divmod(start, per_node)
    nodes = -(-way.ranks // per_node)
    straddles = first + way.ranks > per_node if nodes == 1 else first or way.ranks % per_node
    if straddles:
        raise refuse(
            _TARGET,
            "an instance must fit inside one node or fill whole nodes",
            got=f"{pool.role} instances of {way.ranks} on nodes of {per_node}",
            hint=f"search again on {pool.cluster.name}",
        )
    offset = heads.get(node, 0)
    heads[node] = offset + 1
    return [
        Launch(
            server=server,
            slot=Slot(node=node + index, first=first, ranks=min(way.ranks, per_node)),
            head=node,
            index=index,
            nodes=nodes,
            spans=way.tp * way.pp > per_node,
            port_offset=offset,
        )
        for index in range(nodes)
    ]


def _ports() -> dict[int, int]:
    """First kv_port by NPUs of a node."""
    rows: dict[str, Any] = table("vllm_ascend")["kv_transfer"]["first_port"]
    return {int(ranks): port for ranks, port in rows.items() if ranks.isdigit()}


def _script(plan: Plan, side: _Side, node: int) -> str:
    here = [one for one in side.launches if one.slot.node == node]
    first = _ports()[side.pool.cluster.ranks_per_node]

    def connector(one: Launch) -> list[Flag]:
        return [("--kv-transfer-config", json.dumps(_config(plan, side, one, first)))]

    return script(side.plan, side.family, side.checkpoint, side.split, here, connector)


def _config(plan: Plan, side: _Side, one: Launch, first_port: int) -> dict[str, Any]:
    """The connector's settings of one server."""
    facts = table("vllm_ascend")["kv_transfer"]
    prefill, decode = (pool.strategy for pool in plan.pools)
    sizes: dict[str, dict[str, Any]] = {
        "prefill": {"dp_size": prefill.dp, "tp_size": prefill.tp},
        "decode": {"dp_size": decode.dp, "tp_size": decode.tp},
    }
    if prefill.pp > 1:
        sizes["prefill"]["pp_size"] = prefill.pp
        sizes["prefill"]["pp_layer_partition"] = ",".join(map(str, prefill.stage_layers))
    return {
        "kv_connector": facts["connector"],
        "kv_role": facts["producer" if side.pool.role == "prefill" else "consumer"],
        "kv_port": str(first_port + one.slot.first),
        "engine_id": f"{side.pool.role}-{one.server}",
        "kv_connector_extra_config": sizes,
    }


def _addresses(plan: Plan, role: str) -> str:
    """Shell variable that lists the addresses of a pool's nodes."""
    return "NODE_ADDRESSES" if _shares_cards(plan) else f"{role.upper()}_NODE_ADDRESSES"


def _proxy(plan: Plan, sides: Sequence[_Side]) -> str:
    """The proxy over the heads of all instances."""
    facts, ports = table("vllm_ascend")["kv_transfer"], table("vllm_ascend")["ports"]
    lines = [
        "#!/usr/bin/env bash",
        "# Sends each request to a prefill instance, then to a decode instance (README.md).",
        "set -euo pipefail",
        f': "${{PROXY:?set PROXY to {facts["proxy"]} of vllm-ascend}}"',
    ]
    for name in dict.fromkeys(_addresses(plan, side.pool.role) for side in sides):
        lines += [
            f': "${{{name}:?set {name} to the IP addresses of the nodes, in their order}}"',
            f'read -r -a {name}_LIST <<< "${name}"',
        ]
    words = [f'--host "${{HOST:-0.0.0.0}}" --port "${{PORT:-{facts["proxy_port"]}}}"']
    for side, option in zip(sides, ("prefiller", "decoder"), strict=True):
        heads = [one for one in side.launches if one.index == 0]
        name = f"{_addresses(plan, side.pool.role)}_LIST"
        hosts = " ".join(f'"${{{name}[{one.head}]}}"' for one in heads)
        numbers = " ".join(str(ports["serve"] + one.port_offset) for one in heads)
        words += [f"--{option}-hosts {hosts}", f"--{option}-ports {numbers}"]
    lines += ["", "exec " + " \\\n  ".join(['python3 "$PROXY"', *words, '"$@"'])]
    return "\n".join(lines) + "\n"


def _readme(plan: Plan, sides: Sequence[_Side], names: Sequence[str]) -> str:
    """README.md of the deployment."""
    facts = table("vllm_ascend")
    engine, transfer = facts["engine"], facts["kv_transfer"]
    shapes = [
        f"- {side.pool.instances} {side.pool.role} instance(s) on "
        f"{printable(side.pool.cluster.title)}: "
        f"{printable(side.pool.strategy.parallelism().describe())}"
        for side in sides
    ]
    body = {"model": model_name(plan), "prompt": "The capital of France is", "max_tokens": 16}
    lines = [
        f"# {model_name(plan)} with vLLM on Ascend: prefill and decode apart",
        "",
        *shapes,
        "",
        f"Written for vllm {engine['vllm']} and vllm-ascend {engine['vllm_ascend']}. Files: "
        f"{', '.join(names)}.",
        "",
        "## Steps",
        "",
        *_steps(plan, sides),
        "",
        "## A first request",
        "",
        "```bash",
        f"curl -sS http://127.0.0.1:{transfer['proxy_port']}/v1/completions \\",
        "  -H 'Content-Type: application/json' \\",
        f"  -d '{json.dumps(body)}'",
        "```",
        "",
        "## Load test",
        "",
        "`BASE_URL=http://HOST:PORT ./bench.sh` sends the plan's workload to the proxy. "
        "The plan promises:",
        "",
        *predicted(plan),
        "",
        "## Assumed",
        "",
        f"- Connector {transfer['connector']}: a decode rank pulls the cache of a finished prompt. "
        "It needs the Mooncake transfer engine built with -DUSE_ASCEND_DIRECT=ON.",
        "- Prefill instances run eagerly; their --max-num-seqs is what fits in memory.",
        "- Prompts are spread evenly; the proxy is the plugin's example, not part of its wheel.",
        *ahead_words(sides[1].plan),
        "- Not run on a device by the tool that wrote this.",
    ]
    return "\n".join(lines) + "\n"


def _steps(plan: Plan, sides: Sequence[_Side]) -> list[str]:
    needs = dict.fromkeys(need for side in sides for need in side.checkpoint.needs)
    steps = [
        "1. Put the checkpoint on every node at one path (or let vLLM download it). It holds: "
        + "; ".join(needs)
        + "."
    ]
    for side in sides:
        settings = "MODEL=FOLDER "
        if any(one.nodes > 1 for one in side.launches):
            settings += "HEAD_ADDRESS=IP NODE_ADDRESS=IP NIC=INTERFACE "
        where = "node" if _shares_cards(plan) else f"{side.pool.role} node"
        for node in sorted({one.slot.node for one in side.launches}):
            heads = sorted({one.head for one in side.launches if one.slot.node == node})
            head = f" (HEAD_ADDRESS: node {heads[0]})" if "HEAD_ADDRESS" in settings else ""
            steps.append(
                f"{len(steps) + 1}. On {where} {node}: "
                f"`{settings}./serve_{side.pool.role}_node{node}.sh`{head}"
            )
    names = dict.fromkeys(_addresses(plan, side.pool.role) for side in sides)
    lists = " ".join(f'{name}="IP IP ..."' for name in names)
    steps.append(
        f"{len(steps) + 1}. Once all answer /health, on one node: "
        f"`PROXY=FILE {lists} ./proxy.sh`; requests go to port "
        f"{table('vllm_ascend')['kv_transfer']['proxy_port']} there."
    )
    return steps
