"""Target `docker-compose`: a Compose file a node, with the scripts that its containers run.

    compose_node<i>.yaml         one service a server that node i holds, or a part of
    <role>-<server>_node<i>.sh   its script, as target `vllm-ascend` writes it
    compose_balancer.yaml, balancer.conf   nginx before several servers
    compose_proxy.yaml, proxy.sh           the proxy before pools
    quantize.sh, bench.sh, README.md       as of every serving target

Containers share their host's network, as the engine's guides start them, and get the devices of
their server alone, which they count from 0. MODEL and addresses are variables of Compose. Options:
`image`. Files are checked against `schemas/compose.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardplan.search.emit.common import model_name, table
from shardplan.search.emit.containers import (
    Servers,
    app_name,
    image_of,
    on_host,
    servers_of,
)
from shardplan.search.emit.modelslim import quantize_script, quantize_steps
from shardplan.search.emit.pool_folder import address_lists, front_settings
from shardplan.search.emit.schemas import check
from shardplan.search.emit.serving_page import Page, ahead_words, bench, page
from shardplan.search.emit.vllm_disagg import proxy_script
from shardplan.search.emit.vllm_layout import Launch
from shardplan.search.emit.vllm_readme import balancer, shape_of, url_of
from shardplan.search.emit.yaml_text import yaml_text
from shardplan.search.plan import Plan

__all__ = ["files"]

_TARGET = "docker-compose"
_Object = dict[str, Any]


def files(plan: Plan, *, image: str = "") -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that vLLM on Ascend cannot run."""
    kinds = servers_of(plan)
    name = image_of(_TARGET, kinds, image)
    made: dict[str, str] = {}
    for kind in kinds:
        for one in kind.launches:
            made[f"{_label(kind, one)}_node{one.slot.node}.sh"] = kind.text(on_host(one))
    todo = [(kind, one) for kind in kinds for one in kind.launches]
    for node in sorted({one.slot.node for _, one in todo}):
        here = {_label(kind, one): (kind, one) for kind, one in todo if one.slot.node == node}
        services = {label: _service(kind, one, name) for label, (kind, one) in here.items()}
        made[f"compose_node{node}.yaml"] = _text(plan, f"node{node}", services)
    made |= _front(plan, kinds, name)
    made |= quantize_script(kinds[-1].plan)
    alone = not plan.pools and kinds[0].count == 1
    made["bench.sh"] = bench(
        kinds[-1].plan,
        kinds[-1].checkpoint.shell,
        url=url_of(_door(plan, kinds)) if alone else "",
        servers=sum(kind.count for kind in kinds),
    )
    listed = sorted({*made, "README.md"})
    made["README.md"] = page(plan, _page(plan, kinds, listed))
    return made


def _label(kind: Servers, one: Launch) -> str:
    return f"{kind.role}-{one.server}"


def _text(plan: Plan, part: str, services: Mapping[str, _Object]) -> str:
    """A Compose file, checked."""
    whole = {"name": f"{app_name(plan)}-{part}", "services": dict(services)}
    check(_TARGET, "compose", "Compose", whole)
    return yaml_text("README.md says which variables it asks for.", whole)


def _service(kind: Servers, one: Launch, image: str) -> _Object:
    """One server, or its part on this node."""
    facts = table("containers")
    inside, card = facts["inside"], facts["devices"]["card"]
    devices = [*(f"{card}{i}" for i in one.slot.devices), *facts["devices"]["others"]]
    told = {"MODEL": inside["model"]}
    if one.nodes > 1:
        told |= {name: _asked(name) for name in ("HEAD_ADDRESS", "NODE_ADDRESS", "NIC")}
    script = f"{inside['scripts']}/{_label(kind, one)}_node{one.slot.node}.sh"
    made: _Object = {
        "image": image,
        "network_mode": "host",
        "shm_size": f"{facts['shared_memory']['size_gib']}gb",
        "devices": [f"{device}:{device}" for device in devices],
        "volumes": [
            f"./:{inside['scripts']}:ro",
            f"{_asked('MODEL')}:{inside['model']}:ro",
            *(f"{mount['path']}:{mount['path']}:ro" for mount in facts["mounts"]),
        ],
        "environment": told,
        "command": ["bash", script],
        "restart": "on-failure",
    }
    return made if one.index else {**made, "healthcheck": _alive(one)}


def _asked(name: str) -> str:
    """A variable of Compose that must be set."""
    return f"${{{name}:?see README.md}}"


def _alive(one: Launch) -> _Object:
    """Whether a server answers; it may take an hour to load."""
    loading, port = table("containers")["loading"], table("vllm_ascend")["ports"]["serve"]
    where = url_of(port + one.port_offset)
    ask = f"import urllib.request as u; u.urlopen('{where}/health', timeout=5)"
    return {
        "test": ["CMD", "python3", "-c", ask],
        "interval": f"{loading['period_s']}s",
        "start_period": f"{loading['period_s'] * loading['tries']}s",
    }


def _front(plan: Plan, kinds: Sequence[Servers], image: str) -> dict[str, str]:
    """What stands before several servers."""
    facts = table("containers")
    if plan.pools:
        sides = [kind.side for kind in kinds if kind.side is not None]
        proxy: _Object = {
            "image": image,
            "network_mode": "host",
            "volumes": [f"./:{facts['inside']['scripts']}:ro"],
            "environment": {
                "PROXY": facts["inside"]["proxy"],
                **{name: _asked(name) for name in address_lists(plan)},
            },
            "command": ["bash", f"{facts['inside']['scripts']}/proxy.sh"],
            "restart": "on-failure",
        }
        text = _text(plan, "proxy", {"proxy": proxy})
        return {"proxy.sh": proxy_script(plan, sides), "compose_proxy.yaml": text}
    if kinds[0].count == 1:
        return {}
    nginx: _Object = {
        "image": facts["balancer"]["image"],
        "network_mode": "host",
        "volumes": ["./balancer.conf:/etc/nginx/conf.d/default.conf:ro"],
        "restart": "on-failure",
    }
    port = table("vllm_ascend")["ports"]["serve"]
    return {
        "balancer.conf": balancer(kinds[0].launches, port),
        "compose_balancer.yaml": _text(plan, "balancer", {"balancer": nginx}),
    }


def _door(plan: Plan, kinds: Sequence[Servers]) -> int:
    """Port that takes requests."""
    facts = table("vllm_ascend")
    if plan.pools:
        found: int = facts["kv_transfer"]["proxy_port"]
    else:
        found = (facts["ports"]["serve"], facts["balancer"]["port"])[kinds[0].count > 1]
    return found


def _page(plan: Plan, kinds: Sequence[Servers], listed: Sequence[str]) -> Page:
    engine, alone = table("vllm_ascend")["engine"], not plan.pools and kinds[0].count == 1
    what = ", ".join(f"{kind.count} {kind.role}(s)" for kind in kinds)
    return Page(
        title=f"{model_name(plan)} with Docker Compose: "
        + ("prefill and decode apart" if plan.pools else shape_of(plan)),
        about=[
            f"{what} of vllm {engine['vllm']} with vllm-ascend {engine['vllm_ascend']}. Files: "
            f"{', '.join(listed)}."
        ],
        steps=_steps(plan, kinds),
        url=url_of(_door(plan, kinds)),
        load="`./bench.sh` sends the plan's workload"
        + ("." if alone else "; set BASE_URL to what stands before the servers."),
        assumed=[
            "- The Ascend driver is on every node, its files where the engine's guide has them.",
            "- A server that ends with an error is started again; one over several nodes then has "
            "to be started anew on all of them.",
            *ahead_words(kinds[-1].plan),
        ],
    )


def _steps(plan: Plan, kinds: Sequence[Servers]) -> list[str]:
    needs = dict.fromkeys(need for kind in kinds for need in kind.checkpoint.needs)
    todo = [one for kind in kinds for one in kind.launches]
    steps = [
        "Put the checkpoint on every node at one path, and this folder too. It holds: "
        + "; ".join(needs)
        + ".",
        *quantize_steps(kinds[-1].plan),
    ]
    for node in sorted({one.slot.node for one in todo}):
        here = [one for one in todo if one.slot.node == node and one.nodes > 1]
        told, head = "MODEL=FOLDER ", ""
        if here:
            told += "HEAD_ADDRESS=IP NODE_ADDRESS=IP NIC=INTERFACE "
            head = f" (HEAD_ADDRESS: node {here[0].head})"
        command = f"docker compose -f compose_node{node}.yaml up -d"
        steps.append(f"On node {node}: `{told}{command}`{head}")
    door = _door(plan, kinds)
    if plan.pools:
        steps.append(
            "Once all are healthy (`docker compose ps`), on one node: "
            f"`{front_settings(plan)} docker compose -f compose_proxy.yaml up -d`; requests go to "
            f"port {door} there."
        )
    elif kinds[0].count > 1:
        steps.append(
            "Where NODE<i> stands in balancer.conf put the address of node i. Once all are "
            "healthy, on one node: `docker compose -f compose_balancer.yaml up -d`; requests go to "
            f"port {door} there."
        )
    else:
        steps.append(f"Requests go to {url_of(door, 'NODE0')} once it is healthy.")
    return steps
