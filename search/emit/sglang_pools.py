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

from shardplan.search.emit.common import Raw, command_line, model_name, table
from shardplan.search.emit.pool_folder import (
    address_lines,
    address_list,
    checkpoint_steps,
    front_settings,
    pool_shapes,
    side_files,
    start_steps,
)
from shardplan.search.emit.pools import Side, check_pools, instance_of, one_server, placed
from shardplan.search.emit.serving_page import Page, page
from shardplan.search.emit.sglang import assumed, checked, script
from shardplan.search.emit.vllm_flags import Flag
from shardplan.search.emit.vllm_layout import Launch
from shardplan.search.emit.vllm_readme import url_of
from shardplan.search.plan import Plan

__all__ = ["pool_files"]

_TARGET = "sglang"


def pool_files(plan: Plan) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that SGLang on Ascend cannot run."""
    check_pools(_TARGET, plan)
    plans = [instance_of(plan, pool) for pool in plan.pools]
    sides = [
        Side(
            pool=pool,
            plan=one,
            checkpoint=checked(one),
            split=one_server(_TARGET, one),
            launches=own,
        )
        for pool, one, own in zip(plan.pools, plans, placed(_TARGET, plan), strict=True)
    ]
    made = {**side_files(sides, _script), "router.sh": _router(plan, sides)}
    made["README.md"] = _readme(plan, sides, sorted({*made, "README.md"}))
    return made


def _script(side: Side, here: list[Launch]) -> str:
    facts = table("sglang")
    transfer, ports = facts["transfer"], facts["ports"]

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


def _router(plan: Plan, sides: Sequence[Side]) -> str:
    """The router over the heads of all instances."""
    ports = table("sglang")["ports"]
    lines = [
        "#!/usr/bin/env bash",
        "# Sends each request to a prefill and a decode instance (README.md).",
        "set -euo pipefail",
        *address_lines(plan),
    ]
    flags: list[Flag] = [("--pd-disaggregation", None), ("--policy", "cache_aware")]
    for side in sides:
        name = f"{address_list(plan, side.pool.role)}_LIST"
        for one in side.heads:
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


def _readme(plan: Plan, sides: Sequence[Side], names: Sequence[str]) -> str:
    facts = table("sglang")
    written_for = f"Written for sglang {facts['engine']['sglang']}. Files: {', '.join(names)}."
    return page(
        plan,
        Page(
            title=f"{model_name(plan)} with SGLang on Ascend: prefill and decode apart",
            about=[*pool_shapes(plan), "", written_for],
            steps=_steps(plan, sides),
            url=url_of(facts["ports"]["router"]),
            load="`BASE_URL=http://HOST:PORT ./bench.sh` sends the plan's workload to the router.",
            assumed=[
                *assumed(sides[1].plan, sides[1].split),
                "- Prefill instances run eagerly; MemFabric (mf-adapter) moves the caches.",
            ],
        ),
    )


def _steps(plan: Plan, sides: Sequence[Side]) -> list[str]:
    port = table("sglang")["ports"]["router"]
    return [
        *checkpoint_steps(sides, "SGLang"),
        *start_steps(plan, sides, "MODEL=FOLDER PREFILL_ADDRESS=IP "),
        f"Once all answer /health, on one node: `{front_settings(plan)} ./router.sh`; requests go "
        f"to port {port} there.",
    ]
