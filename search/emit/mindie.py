"""Target `mindie`: MindIE Server's `config.json`, start scripts, a load test and a README.

    config_node<i>.json   settings of node i, one instance a replica that lies there
    start_node<i>.sh      environment and start of node i
    rank_table<k>.json    of instance k where it fills several nodes and device addresses are given
    balancer.conf, quantize.sh, bench.sh, README.md   as of every serving target

Options: `weights`, the checkpoint's folder (it stands in config.json); `addresses`, one a node, and
`device_addresses`, one a rank, for instances of several nodes. Plans with pools are written for
MindIE Motor (`mindie_motor`), which starts them in Kubernetes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardplan.search.emit.common import (
    Slot,
    model_name,
    printable,
    refuse,
    table,
    weights_folder,
)
from shardplan.search.emit.mindie_config import (
    TARGET,
    checked,
    deploy_config,
    environment,
    model_config,
    schedule_config,
    world_of,
)
from shardplan.search.emit.modelslim import quantize_script, quantize_steps
from shardplan.search.emit.placing import in_order
from shardplan.search.emit.rank_table import dump_json, instance_tables, listed
from shardplan.search.emit.schemas import check
from shardplan.search.emit.serving_page import Page, ahead_words, bench, page
from shardplan.search.emit.vllm_layout import Launch
from shardplan.search.emit.vllm_readme import about, balancer, shape_of, url_of
from shardplan.search.emit.vllm_schemes import Checkpoint
from shardplan.search.plan import Plan

__all__ = ["files"]

_Instances = tuple[tuple[Slot, ...], ...]


def files(
    plan: Plan, *, weights: str = "", addresses: str = "", device_addresses: str = ""
) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that MindIE cannot run."""
    if plan.pools:
        from shardplan.search.emit.mindie_motor import motor_files

        return motor_files(plan, weights)
    family, checkpoint = checked(plan)
    world = world_of(plan)
    placed = in_order(TARGET, plan, groups=plan.strategy.ranks // world, ranks=world)
    _check_nodes(placed, family)
    folder = weights_folder(plan, weights)
    nodes = sorted({slot.node for slots in placed for slot in slots})
    hosts = listed(addresses, "addresses", max(nodes) + 1)
    ports = listed(device_addresses, "device_addresses", plan.strategy.ranks)
    made = _rank_tables(placed, hosts, ports, plan.cluster.ranks_per_node)
    tables = bool(made)
    for node in nodes:
        here = [slot for slots in placed for slot in slots if slot.node == node]
        config = _config(plan, folder, here, spans=len(placed[0]) > 1)
        check(TARGET, "mindie", "Config", config)
        made[f"config_node{node}.json"] = dump_json(config)
        made[f"start_node{node}.sh"] = _start(plan, placed, node, tables=tables)
    heads = _heads(placed)
    port = table("mindie")["ports"]["serve"]
    if len(heads) > 1:
        made["balancer.conf"] = balancer(heads, port)
    made |= quantize_script(plan)
    alone = len(heads) == 1
    made["bench.sh"] = bench(
        plan,
        checkpoint.shell,
        url=url_of(port) if alone else "",
        servers=len(heads),
        chat=True,
    )
    names = sorted({*made, "README.md"})
    made["README.md"] = page(plan, _page(plan, checkpoint, folder, placed, names))
    return made


def _check_nodes(placed: _Instances, family: str) -> None:
    """`InputError` for instances over more nodes, or more of them on one, than MindIE starts."""
    facts = table("mindie")
    over, most = len(placed[0]), facts["nodes"]["most"]
    if over > 1 and (family not in facts["nodes"]["families"] or over > most):
        raise refuse(
            TARGET,
            f"an instance fills at most {most} nodes, of A2 or A3",
            got=f"nodes={over}",
            hint="plan a smaller instance, or pools with --serving disagg",
        )
    here = max(
        sum(slots[0].node == node for slots in placed) for node in {s[0].node for s in placed}
    )
    if here > facts["instances"]["most"]:
        raise refuse(
            TARGET,
            f"a server runs at most {facts['instances']['most']} instances",
            got=f"{here} a node",
            hint="search with a larger tp",
        )


def _heads(placed: _Instances) -> list[Launch]:
    """One server a node that takes requests."""
    firsts = {slots[0].node: slots for slots in reversed(placed)}
    return [
        Launch(
            server=number,
            slot=slots[0],
            head=node,
            index=0,
            nodes=len(slots),
            spans=len(slots) > 1,
            port_offset=0,
        )
        for number, (node, slots) in enumerate(sorted(firsts.items()))
    ]


def _config(plan: Plan, folder: str, here: Sequence[Slot], *, spans: bool) -> dict[str, Any]:
    """`config.json` of one node."""
    facts = table("mindie")
    ports, server = facts["ports"], facts["server"]
    model = model_config(plan, folder, world_of(plan))
    return {
        "Version": "1.0.0",
        "ServerConfig": {
            "ipAddress": "127.0.0.1",
            "managementIpAddress": "127.0.0.2",
            "port": ports["serve"],
            "managementPort": ports["management"],
            "metricsPort": ports["metrics"],
            "allowAllZeroIpListening": False,
            "maxLinkNum": server["maxLinkNum"],
            "httpsEnabled": False,
            "inferMode": "standard",
            "openAiSupport": "vllm",
            "tokenTimeout": server["tokenTimeout"],
            "e2eTimeout": server["e2eTimeout"],
            "distDPServerEnabled": False,
        },
        "BackendConfig": {
            "backendName": "mindieservice_llm_engine",
            "modelInstanceNumber": len(here),
            "npuDeviceIds": [list(slot.devices) for slot in here],
            "tokenizerProcessNumber": server["tokenizerProcessNumber"],
            "multiNodesInferEnabled": spans,
            "multiNodesInferPort": ports["nodes"],
            "interNodeTLSEnabled": False,
            "ModelDeployConfig": deploy_config(plan, model),
            "ScheduleConfig": schedule_config(plan),
        },
    }


def _rank_tables(
    placed: _Instances, hosts: tuple[str, ...], ports: tuple[str, ...], per_node: int
) -> dict[str, str]:
    """A table an instance of several nodes; none where addresses are not given.

    `ports` are in the plan's order: that of the nodes, `per_node` on each, and their devices.
    """
    if len(placed[0]) == 1 or not (hosts and ports):
        return {}
    made = {}
    at = {divmod(place, per_node): address for place, address in enumerate(ports)}
    for number, found in enumerate(instance_tables(placed, hosts, at)):
        for entry in found["server_list"]:
            entry["container_ip"] = entry["server_id"]
        made[f"rank_table{number}.json"] = dump_json(found)
    return made


def _start(plan: Plan, placed: _Instances, node: int, *, tables: bool) -> str:
    """The start script of one node."""
    number, slots = next(
        (i, slots) for i, slots in enumerate(placed) if node in {slot.node for slot in slots}
    )
    lines = [
        "#!/usr/bin/env bash",
        "# Starts MindIE Server on one node; README.md says what must be there before.",
        "set -euo pipefail",
        'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
        f'chmod 640 "$here/config_node{node}.json"  # the server reads no other',
        f'export MIES_CONFIG_JSON_PATH="${{MIES_CONFIG_JSON_PATH:-$here/config_node{node}.json}}"',
    ]
    if len(slots) > 1:
        lines += _several(number, node, slots[0].node, tables=tables)
    else:
        lines.append("unset RANK_TABLE_FILE RANKTABLEFILE  # of other jobs")
        lines.append('[ -z "${NODE_ADDRESS:-}" ] || export MIES_CONTAINER_IP="$NODE_ADDRESS"')
    lines += [f'export {name}="${{{name}:-{value}}}"' for name, value in environment(plan).items()]
    return "\n".join([*lines, "", 'exec "${MINDIE_SERVER:-mindie_llm_server}" "$@"']) + "\n"


def _several(number: int, node: int, head: int, *, tables: bool) -> list[str]:
    """Addresses and rank table of an instance of several nodes."""
    name = f"rank_table{number}.json"
    lines = [
        f': "${{NODE_ADDRESS:?set NODE_ADDRESS to the IP address of node {node}}}"',
        f': "${{HEAD_ADDRESS:?set HEAD_ADDRESS to the IP address of node {head}}}"',
    ]
    if tables:
        lines.append(f'chmod 640 "$here/{name}"')
        lines.append(f'export RANK_TABLE_FILE="${{RANK_TABLE_FILE:-$here/{name}}}"')
    else:
        lines.append(': "${RANK_TABLE_FILE:?set RANK_TABLE_FILE to the rank table (README.md)}"')
    return [
        *lines,
        'export RANK_TABLE_FILE MIES_CONTAINER_IP="$NODE_ADDRESS" MASTER_IP="$HEAD_ADDRESS"',
        'export HCCL_DETERMINISTIC="${HCCL_DETERMINISTIC:-true}"',
    ]


def _page(
    plan: Plan, checkpoint: Checkpoint, folder: str, placed: _Instances, names: Sequence[str]
) -> Page:
    facts = table("mindie")
    nodes = sorted({slot.node for slots in placed for slot in slots})
    engine, port = facts["engine"]["mindie_llm"], facts["ports"]["serve"]
    several = len(_heads(placed)) > 1
    before = "; set BASE_URL to what stands before the servers" if several else ""
    return Page(
        title=f"{model_name(plan)} with MindIE: {shape_of(plan)}",
        about=about(plan, len(nodes), f"MindIE LLM {engine}", names),
        steps=_steps(plan, checkpoint, folder, placed, names),
        url=url_of(port),
        load=f"`./bench.sh` sends the plan's workload{before}.",
        assumed=_assumed(plan),
        chat=True,
    )


def _steps(
    plan: Plan, checkpoint: Checkpoint, folder: str, placed: _Instances, names: Sequence[str]
) -> list[str]:
    steps = [
        f"Put the checkpoint at {folder} on every node (or emit again with `--option "
        f"weights=FOLDER`), owned by the user who starts the server. It holds: "
        + "; ".join(checkpoint.needs)
        + ".",
        *quantize_steps(plan),
    ]
    spans = len(placed[0]) > 1
    if spans and not any(name.startswith("rank_table") for name in names):
        steps.append(
            "Read each device's address with `hccn_tool -i DEVICE_ID -ip -g`, and emit again with "
            "`--option addresses=IP,IP,... --option device_addresses=IP,IP,...` (one a node, one a "
            "rank in the plan's order): that writes the rank tables."
        )
    where = "NODE_ADDRESS=IP HEAD_ADDRESS=IP " if spans else "NODE_ADDRESS=IP "
    steps += [
        f"On node {node}: `{where}./start_node{node}.sh`"
        for node in sorted({slot.node for slots in placed for slot in slots})
    ]
    port = table("mindie")["ports"]["serve"]
    heads = [url_of(port, f"NODE{one.head}") for one in _heads(placed)]
    if len(heads) == 1:
        return [*steps, f"Requests go to {heads[0]} once it prints Daemon start success."]
    return [
        *steps,
        f"Servers with all weights each: {', '.join(heads)}. balancer.conf is an nginx before "
        f"them, on port {table('vllm_ascend')['balancer']['port']}.",
    ]


def _assumed(plan: Plan) -> list[str]:
    lines = [
        f"- Priced for engine profile {printable(plan.request.engine_profile)}; MindIE runs "
        "prompts in steps of their own.",
        "- Plain HTTP on NODE_ADDRESS (127.0.0.1 without it): put certificates in place and "
        "httpsEnabled on before others can reach it.",
        "- maxBatchSize counts the sequences of one data-parallel group.",
    ]
    if plan.strategy.cp > 1:
        lines.append(
            "- Context parallelism brings sp=tp: the cache is split over tp too, which leaves more "
            "room than the plan counted."
        )
    return [*lines, *ahead_words(plan)]
