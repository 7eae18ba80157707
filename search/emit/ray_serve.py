"""Target `ray`: the configuration of a Ray Serve application of vLLM servers.

    serve.yaml   for `serve deploy`: one application, its servers as replicas
    quantize.sh, bench.sh, README.md   as of every serving target

Ray LLM knows GPUs and TPUs. A replica that holds NPUs as a custom resource gets
ASCEND_RT_VISIBLE_DEVICES from Ray, and one whose bundles have no GPU starts vLLM's workers as its
own processes; so a server inside one node is expressible, as one actor with all its devices. What
is not is refused: servers over several nodes, data-parallel groups that share experts (Ray's own
servers for them place workers by GPU bundles), and pools whose instances share a node, as replicas
of one configuration have one connector port. Engine arguments are the flags of target
`vllm-ascend`; fields are checked against `schemas/ray.json`. Options: `weights`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from shardplan.search.emit.common import (
    Raw,
    known_flags,
    model_name,
    refuse,
    table,
    weights_folder,
)
from shardplan.search.emit.containers import Servers, app_name, servers_of
from shardplan.search.emit.modelslim import quantize_script, quantize_steps
from shardplan.search.emit.schemas import check
from shardplan.search.emit.serving_page import Page, ahead_words, bench, page
from shardplan.search.emit.vllm_disagg import pool_transfer
from shardplan.search.emit.vllm_flags import environment, serve_flags
from shardplan.search.emit.vllm_readme import shape_of, url_of
from shardplan.search.emit.yaml_text import yaml_text
from shardplan.search.plan import Plan

__all__ = ["files"]

_TARGET = "ray"
_RAYS_OWN = (
    "--host",
    "--port",
    "--served-model-name",
    "--distributed-executor-backend",
    "--data-parallel-size",
)
"""Flags that Ray sets itself, or that say one group."""


def files(plan: Plan, *, weights: str = "") -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that Ray Serve cannot run on Ascend."""
    kinds = servers_of(plan)
    for kind in kinds:
        _check(kind)
    folder = weights_folder(plan, weights)
    whole = _deploy(plan, kinds, folder)
    check(_TARGET, "ray", "ServeDeploySchema", whole)
    made = {
        "serve.yaml": yaml_text("serve deploy serve.yaml", whole),
        **quantize_script(kinds[-1].plan),
        "bench.sh": bench(
            kinds[-1].plan, kinds[-1].checkpoint.shell, url=url_of(table("ray")["ports"]["serve"])
        ),
    }
    listed = sorted({*made, "README.md"})
    made["README.md"] = page(plan, _page(plan, kinds, folder, listed))
    return made


def _check(kind: Servers) -> None:
    """`InputError` for servers that a replica cannot be."""
    way, other = kind.plan.strategy, "use target k8s or docker-compose"
    per_node = kind.plan.cluster.ranks_per_node
    if kind.split.groups > 1:
        raise refuse(
            _TARGET,
            "a replica is one data-parallel group",
            got=f"dp={way.dp}, ep={way.ep}, tp={way.tp}",
            hint=f"try {' or '.join(dict.fromkeys(('ep=1', f'ep={way.tp}')))}, or {other}",
        )
    if kind.launches[0].nodes > 1:
        raise refuse(
            _TARGET,
            "a replica lies inside one node",
            got=f"tp={way.tp}, pp={way.pp}, ranks_per_node={per_node}",
            hint=f"try tp*pp of at most {per_node}, or {other}",
        )
    if kind.side is not None and kind.count > 1 and way.ranks < per_node:
        raise refuse(
            _TARGET,
            "instances of a pool do not share a node",
            got=f"{kind.count} {kind.role} instances of {way.ranks} on nodes of {per_node}",
            hint=f"plan one instance, or instances of {per_node}; or {other}",
        )


def _deploy(plan: Plan, kinds: Sequence[Servers], folder: str) -> dict[str, Any]:
    """The file that `serve deploy` reads."""
    facts = table("ray")
    configs = [_llm_config(kind, folder) for kind in kinds]
    for one in configs:
        check(_TARGET, "ray", "LLMConfig", one)
    if plan.pools:
        args: dict[str, Any] = {"prefill_config": configs[0], "decode_config": configs[1]}
        check(_TARGET, "ray", "PDServingArgs", args)
    else:
        args = {"llm_configs": configs}
        check(_TARGET, "ray", "LLMServingArgs", args)
    application = {
        "name": app_name(plan),
        "route_prefix": "/",
        "import_path": facts["app"]["pools" if plan.pools else "aggregated"],
        "args": args,
    }
    return {
        "http_options": {"host": "0.0.0.0", "port": facts["ports"]["serve"]},
        "applications": [application],
    }


def _llm_config(kind: Servers, folder: str) -> dict[str, Any]:
    """One kind of server: its replicas, devices, engine arguments and environment."""
    one, plan, resource = kind.launches[0], kind.plan, table("ray")["app"]["resource"]
    flags = serve_flags(plan, kind.family, kind.checkpoint, kind.split, one)
    if kind.side is not None:
        flags.append(("--kv-transfer-config", json.dumps(_transfer(kind))))
    return {
        "model_loading_config": {"model_id": model_name(plan), "model_source": folder},
        "llm_engine": "vLLM",
        "engine_kwargs": dict(_argument(*flag) for flag in flags if flag[0] not in _RAYS_OWN),
        "deployment_config": {
            "num_replicas": kind.count,
            "max_ongoing_requests": plan.strategy.batch,
            "ray_actor_options": {"num_cpus": 1, "resources": {resource: one.slot.ranks}},
        },
        "placement_group_config": {"bundles": [{"CPU": 1}], "strategy": "STRICT_PACK"},
        "runtime_env": {"env_vars": dict(environment(plan, kind.family, kind.split))},
    }


def _argument(name: str, value: str | None) -> tuple[str, Any]:
    """An argument of vLLM's engine from a flag of its command.

    `ValueError` for a flag of another release, or one whose value only a shell knows.
    """
    if name not in known_flags("vllm_flags", "serve"):
        raise ValueError(f"{name} is not in the flags of vllm_flags.toml")
    key = name.removeprefix("--").replace("-", "_")
    if value is None:
        return key, True
    if isinstance(value, Raw):
        raise ValueError(f"{name} holds an expression of a shell")
    try:
        return key, json.loads(value)  # numbers and objects
    except ValueError:
        return key, value


def _transfer(kind: Servers) -> dict[str, Any]:
    """The connector: ports apart by role; each replica names itself."""
    if kind.side is None:
        raise ValueError("a connector is a pool's")
    config = pool_transfer(kind.whole, kind.side, kind.launches[0])
    del config["engine_id"]
    first = kind.side.first_port
    after = kind.plan.cluster.ranks_per_node if kind.role == "decode" else 0
    return {**config, "kv_port": str(first + after)}


def _page(plan: Plan, kinds: Sequence[Servers], folder: str, listed: Sequence[str]) -> Page:
    facts, engine = table("ray"), table("vllm_ascend")["engine"]
    needs = dict.fromkeys(need for kind in kinds for need in kind.checkpoint.needs)
    what = ", ".join(f"{kind.count} {kind.role}(s)" for kind in kinds)
    door = facts["ports"]["serve"]
    cards = kinds[0].plan.cluster.ranks_per_node
    return Page(
        title=f"{model_name(plan)} with Ray Serve: "
        + ("prefill and decode apart" if plan.pools else shape_of(plan)),
        about=[
            f"{what} of vllm {engine['vllm']} with vllm-ascend {engine['vllm_ascend']} under ray "
            f"{facts['engine']['ray']}. Files: {', '.join(listed)}."
        ],
        steps=[
            "On every node: ray[llm], vllm and vllm-ascend of these versions in one environment, "
            f"and the checkpoint at {folder} (or emit again with `--option weights=FOLDER`). It "
            "holds: " + "; ".join(needs) + ".",
            *quantize_steps(kinds[-1].plan),
            "On the first node: `ray start --head`; on the others: `ray start "
            f"--address=HEAD:6379`. `ray status` must show {cards} NPU a node; where it does not, "
            f"add `--resources='{json.dumps({facts['app']['resource']: cards})}'`.",
            "`serve deploy serve.yaml`, then `serve status` until the application runs.",
            f"Requests go to port {door} of any node.",
        ],
        url=url_of(door),
        load="`./bench.sh` sends the plan's workload.",
        assumed=[
            "- Ray LLM has no NPU backend of its own: each replica holds its NPUs as a custom "
            "resource and starts vLLM's workers itself. Ray counts one CPU a replica.",
            "- Ray picks nodes for the replicas.",
            *ahead_words(kinds[-1].plan),
        ],
    )
