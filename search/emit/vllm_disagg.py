"""Target `vllm-ascend` for a plan with prefill and decode pools.

    serve_prefill_node<i>.sh   the prefill instances of node i
    serve_decode_node<i>.sh    the decode instances of node i
    rank_table_<role><k>.json  of instance k over several nodes, where addresses are given
    proxy.sh                   the plugin's example proxy over all instances
    bench.sh, README.md        load test; steps, assumptions, what the plan promises

Where instances lie is in `pools`. Both roles name one connector, whose cache a decode
rank pulls (`kv_transfer` in `search/data/vllm_ascend.toml`, with its sources). A listener a rank
starts at kv_port: an instance's is the first port plus its first device.
Left out, and refused: pools of different hardware generations, int8 caches, and nodes without a
documented port range.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardplan.search.emit.common import model_name, printable, refuse, table
from shardplan.search.emit.pool_folder import (
    address_lines,
    address_list,
    checkpoint_steps,
    front_settings,
    pool_shapes,
    side_files,
    start_steps,
)
from shardplan.search.emit.pools import (
    ROLES,
    Side,
    check_pools,
    instance_of,
    one_server,
    placed,
    shares_cards,
)
from shardplan.search.emit.serving_page import Page, ahead_words, page
from shardplan.search.emit.vllm_ascend import checked_family, script
from shardplan.search.emit.vllm_flags import Flag
from shardplan.search.emit.vllm_layout import Launch
from shardplan.search.emit.vllm_rank_tables import Fleet, rank_tables, table_steps
from shardplan.search.emit.vllm_readme import url_of
from shardplan.search.emit.vllm_schemes import checkpoint_of
from shardplan.search.plan import Plan, StrategyInfo

__all__ = ["VllmSide", "disagg_files", "pool_script", "pool_transfer", "proxy_script", "sides_of"]

_TARGET = "vllm-ascend"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSide(Side):
    """A pool on devices of one family."""

    family: str

    @property
    def first_port(self) -> int:
        """kv_port of the first device of a node."""
        return _ports()[self.pool.cluster.ranks_per_node]


def disagg_files(plan: Plan, addresses: str = "", device_addresses: str = "") -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that vLLM on Ascend cannot run."""
    sides = sides_of(plan)
    made = side_files(sides, lambda side, here: pool_script(plan, side, here))
    fleets = _fleets(plan, sides)
    tables = rank_tables(fleets, addresses=addresses, device_addresses=device_addresses)
    made |= tables
    made["proxy.sh"] = proxy_script(plan, sides)
    names, network = sorted({*made, "README.md"}), tuple(table_steps(fleets, tables))
    made["README.md"] = _readme(plan, sides, names, network)
    return made


def _fleets(plan: Plan, sides: Sequence[VllmSide]) -> list[Fleet]:
    """Both pools; nodes of decode are counted after those of prefill, unless they share them."""
    after = 0 if shares_cards(plan) else max(sides[0].nodes) + 1
    return [
        Fleet(
            role=side.pool.role,
            cluster=side.pool.cluster,
            launches=side.launches,
            first_node=first,
        )
        for side, first in zip(sides, (0, after), strict=True)
    ]


def sides_of(plan: Plan) -> list[VllmSide]:
    """Prefill, then decode. `InputError` for a plan that vLLM on Ascend cannot run."""
    check_pools(_TARGET, plan)
    plans = [instance_of(plan, pool) for pool in plan.pools]
    families = [checked_family(one, pool.role) for one, pool in zip(plans, plan.pools, strict=True)]
    if families[0] != families[1]:
        raise refuse(
            _TARGET,
            "prefill and decode run on one hardware generation",
            got=f"prefill on {families[0]}, decode on {families[1]}",
            hint="search with both pools on the same devices",
        )
    if families[0] not in table("vllm_ascend")["kv_transfer"]["families"]:
        raise refuse(
            _TARGET,
            "caches are handed over on A2, A3 and 950",
            got=f"device={printable(plan.pools[0].cluster.device)}",
            hint="search again with --serving agg",
        )
    _check_pair(*(pool.strategy for pool in plan.pools))
    splits = [one_server(_TARGET, one) for one in plans]
    for pool in plan.pools:
        if pool.cluster.ranks_per_node not in _ports():
            raise refuse(
                _TARGET,
                "the connector's ports are documented for nodes of 8 and 16 NPUs",
                got=f"{pool.role}: ranks_per_node={pool.cluster.ranks_per_node}",
                hint="plan for a server of 8 or 16",
            )
    return [
        VllmSide(
            pool=pool,
            plan=one,
            family=families[0],
            checkpoint=checkpoint_of(one, families[0]),
            split=split,
            launches=own,
        )
        for pool, one, split, own in zip(
            plan.pools, plans, splits, placed(_TARGET, plan), strict=True
        )
    ]


def _check_pair(prefill: StrategyInfo, decode: StrategyInfo) -> None:
    """What the connector asserts of both sides."""
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
            hint="search with --only pp=1",
        )
    for role, way in zip(ROLES, (prefill, decode), strict=True):
        if way.kv_dtype == "int8":
            raise refuse(
                _TARGET,
                "the connector hands over caches in 16 bit",
                got=f"{role} kv_dtype=int8",
                hint="search with --kv-dtype bf16",
            )


def _ports() -> dict[int, int]:
    """First kv_port by NPUs of a node."""
    rows: dict[str, Any] = table("vllm_ascend")["kv_transfer"]["first_port"]
    return {int(ranks): port for ranks, port in rows.items() if ranks.isdigit()}


def pool_script(plan: Plan, side: VllmSide, here: Sequence[Launch]) -> str:
    """The script that starts some instances of a pool on one node."""

    def connector(one: Launch) -> list[Flag]:
        return [("--kv-transfer-config", json.dumps(pool_transfer(plan, side, one)))]

    return script(side.plan, side.family, side.checkpoint, side.split, here, connector)


def pool_transfer(plan: Plan, side: VllmSide, one: Launch) -> dict[str, Any]:
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
        "kv_port": str(side.first_port + one.slot.first),
        "engine_id": f"{side.pool.role}-{one.server}",
        "kv_connector_extra_config": sizes,
    }


def proxy_script(plan: Plan, sides: Sequence[VllmSide]) -> str:
    """The proxy over the heads of all instances."""
    facts, ports = table("vllm_ascend")["kv_transfer"], table("vllm_ascend")["ports"]
    lines = [
        "#!/usr/bin/env bash",
        "# Sends each request to a prefill instance, then to a decode instance (README.md).",
        "set -euo pipefail",
        f': "${{PROXY:?set PROXY to {facts["proxy"]} of vllm-ascend}}"',
        *address_lines(plan),
    ]
    words = [f'--host "${{HOST:-0.0.0.0}}" --port "${{PORT:-{facts["proxy_port"]}}}"']
    for side, option in zip(sides, ("prefiller", "decoder"), strict=True):
        name = f"{address_list(plan, side.pool.role)}_LIST"
        hosts = " ".join(f'"${{{name}[{one.head}]}}"' for one in side.heads)
        numbers = " ".join(str(ports["serve"] + one.port_offset) for one in side.heads)
        words += [f"--{option}-hosts {hosts}", f"--{option}-ports {numbers}"]
    lines += ["", "exec " + " \\\n  ".join(['python3 "$PROXY"', *words, '"$@"'])]
    return "\n".join(lines) + "\n"


def _readme(
    plan: Plan, sides: Sequence[VllmSide], names: Sequence[str], network: Sequence[str]
) -> str:
    """README.md of the deployment; `network`: steps before the servers start."""
    facts = table("vllm_ascend")
    engine, transfer = facts["engine"], facts["kv_transfer"]
    written_for = (
        f"Written for vllm {engine['vllm']} and vllm-ascend {engine['vllm_ascend']}. Files: "
        f"{', '.join(names)}."
    )
    return page(
        plan,
        Page(
            title=f"{model_name(plan)} with vLLM on Ascend: prefill and decode apart",
            about=[*pool_shapes(plan), "", written_for],
            steps=[*network, *_steps(plan, sides)],
            url=url_of(transfer["proxy_port"]),
            load="`BASE_URL=http://HOST:PORT ./bench.sh` sends the plan's workload to the proxy.",
            assumed=[
                f"- Connector {transfer['connector']}: a decode rank pulls the cache of a finished "
                "prompt. It needs the Mooncake transfer engine built with -DUSE_ASCEND_DIRECT=ON.",
                "- Prefill instances run eagerly; their --max-num-seqs is what fits in memory.",
                "- Prompts are spread evenly; the proxy is the plugin's example, not part of its "
                "wheel.",
                *ahead_words(sides[1].plan),
            ],
        ),
    )


def _steps(plan: Plan, sides: Sequence[VllmSide]) -> list[str]:
    port = table("vllm_ascend")["kv_transfer"]["proxy_port"]
    return [
        *checkpoint_steps(sides, "vLLM"),
        *start_steps(plan, sides, "MODEL=FOLDER "),
        f"Once all answer /health, on one node: `PROXY=FILE {front_settings(plan)} ./proxy.sh`; "
        f"requests go to port {port} there.",
    ]
