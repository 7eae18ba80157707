"""Target `sglang` for a plan with prefill and decode pools.

    serve_prefill_node<i>.sh   the prefill instances of node i
    serve_decode_node<i>.sh    the decode instances of node i
    router.sh                  `sglang_router` over all instances
    quantize.sh, bench.sh, README.md   as of every serving target

Where instances lie is in `pools`. A prefill instance opens a bootstrap port; decode instances
find the caches there through MemFabric's store on the first prefill node (`transfer` and `ports`
in `search/data/sglang.toml`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardplan.search.emit.common import Raw, command_line, model_name, printable, table
from shardplan.search.emit.modelslim import quantize_script, quantize_steps
from shardplan.search.emit.pools import (
    address_list,
    check_pools,
    instance_of,
    one_server,
    placed,
    shares_cards,
)
from shardplan.search.emit.serving_page import Page, bench, page
from shardplan.search.emit.sglang import assumed, checked, script
from shardplan.search.emit.vllm_flags import Flag
from shardplan.search.emit.vllm_layout import Launch, Split
from shardplan.search.emit.vllm_readme import url_of
from shardplan.search.emit.vllm_schemes import Checkpoint
from shardplan.search.plan import Plan, Pool

__all__ = ["pool_files"]

_TARGET = "sglang"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One pool as SGLang runs it."""

    pool: Pool
    plan: Plan
    checkpoint: Checkpoint
    split: Split
    launches: tuple[Launch, ...]


def pool_files(plan: Plan) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that SGLang on Ascend cannot run."""
    check_pools(_TARGET, plan)
    plans = [instance_of(plan, pool) for pool in plan.pools]
    sides = [
        _Side(
            pool=pool,
            plan=one,
            checkpoint=checked(one),
            split=one_server(_TARGET, one),
            launches=own,
        )
        for pool, one, own in zip(plan.pools, plans, placed(_TARGET, plan), strict=True)
    ]
    made = {}
    for side in sides:
        for node in sorted({one.slot.node for one in side.launches}):
            made[f"serve_{side.pool.role}_node{node}.sh"] = _script(side, node)
    made["router.sh"] = _router(plan, sides)
    made |= quantize_script(sides[1].plan)
    instances = sum(pool.instances for pool in plan.pools)
    made["bench.sh"] = bench(sides[1].plan, sides[1].checkpoint.shell, servers=instances)
    made["README.md"] = _readme(plan, sides, sorted({*made, "README.md"}))
    return made


def _script(side: _Side, node: int) -> str:
    facts = table("sglang")
    transfer, ports = facts["transfer"], facts["ports"]
    here = [one for one in side.launches if one.slot.node == node]

    def role(one: Launch) -> list[Flag]:
        flags: list[Flag] = [
            ("--disaggregation-mode", side.pool.role),
            ("--disaggregation-transfer-backend", transfer["backend"]),
        ]
        if side.pool.role == "prefill":
            bootstrap = ports["bootstrap"] + one.port_offset
            flags.append(("--disaggregation-bootstrap-port", str(bootstrap)))
        return flags

    first = "set PREFILL_ADDRESS to the IP address of the first prefill node"
    store = f"tcp://$PREFILL_ADDRESS:{ports['memory_store']}"
    network = [f': "${{PREFILL_ADDRESS:?{first}}}"', f'export {transfer["store"]}="{store}"']
    return script(side.plan, side.checkpoint, side.split, here, role, network)


def _router(plan: Plan, sides: Sequence[_Side]) -> str:
    """The router over the heads of all instances."""
    ports = table("sglang")["ports"]
    lines = [
        "#!/usr/bin/env bash",
        "# Sends each request to a prefill and a decode instance (README.md).",
        "set -euo pipefail",
    ]
    for name in dict.fromkeys(address_list(plan, side.pool.role) for side in sides):
        lines += [
            f': "${{{name}:?set {name} to the IP addresses of the nodes, in their order}}"',
            f'read -r -a {name}_LIST <<< "${name}"',
        ]
    flags: list[Flag] = [("--pd-disaggregation", None), ("--policy", "cache_aware")]
    for side in sides:
        name = f"{address_list(plan, side.pool.role)}_LIST"
        for one in side.launches:
            if one.index:
                continue
            where = f'"http://${{{name}[{one.head}]}}:{ports["serve"] + one.port_offset}"'
            port = f" {ports['bootstrap'] + one.port_offset}"
            flags.append((f"--{side.pool.role}", Raw(where + port * (side.pool.role == "prefill"))))
    flags += [
        ("--host", Raw('"${HOST:-0.0.0.0}"')),
        ("--port", Raw(f'"${{PORT:-{ports["router"]}}}"')),
        ("--mini-lb", None),
    ]
    words = ["python3", "-m", "sglang_router.launch_router"]
    lines += ["", "exec " + command_line("sglang", "router", words, flags) + ' \\\n  "$@"']
    return "\n".join(lines) + "\n"


def _readme(plan: Plan, sides: Sequence[_Side], names: Sequence[str]) -> str:
    facts = table("sglang")
    shapes = [
        f"- {side.pool.instances} {side.pool.role} instance(s) on "
        f"{printable(side.pool.cluster.title)}: "
        f"{printable(side.pool.strategy.parallelism().describe())}"
        for side in sides
    ]
    written_for = f"Written for sglang {facts['engine']['sglang']}. Files: {', '.join(names)}."
    return page(
        plan,
        Page(
            title=f"{model_name(plan)} with SGLang on Ascend: prefill and decode apart",
            about=[*shapes, "", written_for],
            steps=_steps(plan, sides),
            url=url_of(facts["ports"]["router"]),
            load="`BASE_URL=http://HOST:PORT ./bench.sh` sends the plan's workload to the router.",
            assumed=[
                *assumed(sides[1].plan, sides[1].split),
                "- Prefill instances run eagerly; MemFabric (mf-adapter) moves the caches.",
            ],
        ),
    )


def _steps(plan: Plan, sides: Sequence[_Side]) -> list[str]:
    needs = dict.fromkeys(need for side in sides for need in side.checkpoint.needs)
    steps = [
        "Put the checkpoint on every node at one path (or let SGLang download it). It holds: "
        + "; ".join(needs)
        + ".",
        *quantize_steps(sides[1].plan),
    ]
    for side in sides:
        settings = "MODEL=FOLDER PREFILL_ADDRESS=IP "
        if any(one.nodes > 1 for one in side.launches):
            settings += "HEAD_ADDRESS=IP NODE_ADDRESS=IP NIC=INTERFACE "
        where = "node" if shares_cards(plan) else f"{side.pool.role} node"
        steps += [
            f"On {where} {node}: `{settings}./serve_{side.pool.role}_node{node}.sh`"
            for node in sorted({one.slot.node for one in side.launches})
        ]
    names = dict.fromkeys(address_list(plan, side.pool.role) for side in sides)
    lists = " ".join(f'{name}="IP IP ..."' for name in names)
    port = table("sglang")["ports"]["router"]
    return [
        *steps,
        f"Once all answer /health, on one node: `{lists} ./router.sh`; requests go to port {port} "
        "there.",
    ]
