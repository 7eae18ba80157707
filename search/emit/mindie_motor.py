"""Target `mindie` for a plan with prefill and decode pools: the files of MindIE Motor.

    user_config.json   counts and sizes of instances, and the settings of both roles
    mindie_env.json    environment of both roles
    quantize.sh, bench.sh, README.md   as of every serving target

Motor's `deploy_ac_job.py` makes the Kubernetes objects from them; which node an instance gets is
the scheduler's choice. A decode instance whose dp groups share experts is started a process a group
(`decode_distribute_enable`), as Motor's samples do. Sources: `motor` in `search/data/mindie.toml`.
Left out, and refused: pools of different hardware, which Motor keeps for two bins of A2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardplan.search.emit.common import model_name, printable, refuse, table, weights_folder
from shardplan.search.emit.mindie_config import (
    TARGET,
    checked,
    deploy_config,
    environment,
    groups_of,
    model_config,
    schedule_config,
    world_of,
)
from shardplan.search.emit.modelslim import quantize_script, quantize_steps
from shardplan.search.emit.pool_folder import pool_shapes
from shardplan.search.emit.pools import check_pools, instance_of
from shardplan.search.emit.rank_table import dump_json
from shardplan.search.emit.schemas import check
from shardplan.search.emit.serving_page import Page, ahead_words, bench, page
from shardplan.search.emit.vllm_readme import url_of
from shardplan.search.emit.vllm_schemes import Checkpoint
from shardplan.search.plan import Plan, Pool

__all__ = ["motor_files"]


def motor_files(plan: Plan, weights: str) -> dict[str, str]:
    """Texts by file name. `InputError` for pools that MindIE Motor cannot start."""
    check_pools(TARGET, plan)
    plans = [instance_of(plan, pool) for pool in plan.pools]
    found = [checked(one, pool.role) for one, pool in zip(plans, plan.pools, strict=True)]
    families = [family for family, _ in found]
    hardware = table("mindie")["motor"]["hardware"]
    if families[0] != families[1] or families[0] not in hardware:
        raise refuse(
            TARGET,
            "Motor starts pools on one kind of Atlas 800I A2 or A3",
            got=f"prefill on {families[0]}, decode on {families[1]}",
            hint="search with both pools on the same devices",
        )
    if plan.pools[1].strategy.cp > 1:
        raise refuse(
            TARGET,
            "the decode pool has no context parallelism",
            got=f"decode cp={plan.pools[1].strategy.cp}",
            hint="search with cp=1",
        )
    folder = weights_folder(plan, weights)
    config = _user_config(plan, plans, folder, hardware[families[0]])
    check(TARGET, "mindie", "UserConfig", config)
    made = {
        "user_config.json": dump_json(config),
        "mindie_env.json": dump_json(_env(plans)),
        **quantize_script(plans[1]),
        "bench.sh": bench(plans[1], found[1][1].shell, servers=_instances(plan), chat=True),
    }
    names = sorted({*made, "README.md"})
    made["README.md"] = page(plan, _page(plan, [one for _, one in found], folder, names))
    return made


def _instances(plan: Plan) -> int:
    return sum(pool.instances for pool in plan.pools)


def _pods(pool: Pool, one: Plan) -> tuple[int, int]:
    """(pods of an instance, devices of a pod)."""
    world, per_node = world_of(one), pool.cluster.ranks_per_node
    if one.strategy.parallelism().replicas > 1 or (world > per_node and world % per_node):
        raise refuse(
            TARGET,
            "an instance is one server that fits inside one node or fills whole nodes",
            got=f"{pool.role} dp={one.strategy.dp}, ep={one.strategy.ep}, ranks={world}",
            hint="plan replicas as instances",
        )
    pods = max(world // per_node, 1)
    return pods, world // pods


def _spread(pool: Pool, one: Plan) -> bool:
    """Whether each data-parallel group is a process of its own."""
    return pool.role == "decode" and groups_of(one) > 1


def _user_config(plan: Plan, plans: Sequence[Plan], folder: str, hardware: str) -> dict[str, Any]:
    facts = table("mindie")["motor"]
    sizes = [_pods(pool, one) for pool, one in zip(plan.pools, plans, strict=True)]
    spread = _spread(plan.pools[1], plans[1])
    slots = sum(math.ceil(pool.instances * pool.strategy.batch) for pool in plan.pools)
    roles = {
        f"mindie_server_{pool.role}_config": _role(pool, one, folder, size)
        for pool, one, size in zip(plan.pools, plans, sizes, strict=True)
    }
    return {
        "version": "v1.0",
        "deploy_config": {
            "p_instances_num": plan.pools[0].instances,
            "d_instances_num": plan.pools[1].instances,
            "single_p_instance_pod_num": sizes[0][0],
            "single_d_instance_pod_num": sizes[1][0],
            "p_pod_npu_num": sizes[0][1],
            "d_pod_npu_num": sizes[1][1],
            "p_instances_scale_num": 0,
            "d_instances_scale_num": 0,
            "model_id": "",
            "prefill_distribute_enable": 0,
            "decode_distribute_enable": int(spread),
            "image_name": facts["image"],
            "job_id": facts["job"],
            "hardware_type": hardware,
            "mindie_env_path": "./conf/mindie_env.json",
            "weight_mount_path": folder,
            "tls_config": _tls(),
        },
        "mindie_ms_controller_config": _controller(plan, sizes),
        "mindie_ms_coordinator_config": {
            "http_config": {
                "predict_ip": "127.0.0.1",
                "predict_port": facts["predict_port"],
                "manage_ip": "127.0.0.1",
                "manage_port": facts["manage_port"],
            },
            "request_limit": {"max_requests": max(slots, round(plan.performance.concurrency))},
        },
        **roles,
    }


def _tls() -> dict[str, Any]:
    """TLS off, with the paths that Motor reads all the same."""
    off = dict.fromkeys(("tls_enable", "cluster_tls_enable", "etcd_server_tls_enable"), False)
    paths = {
        name: {key: path for key, path in items.items() if key != "source"}
        for name, items in table("mindie")["motor"]["tls_items"].items()
    }
    return {**off, **paths}


def _controller(plan: Plan, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Limits of the plan in milliseconds; Motor's own where it has none."""
    facts, limits = table("mindie")["motor"], plan.request.limits
    several = any(pods > 1 for pods, _ in sizes)
    return {
        "deploy_mode": "pd_separate",
        "digs_prefill_slo": _limit_ms(limits.ttft_s, facts["digs_prefill_slo_ms"]),
        "digs_decode_slo": _limit_ms(limits.tpot_s, facts["digs_decode_slo_ms"]),
        "multi_node_infer_config": {"multi_node_infer_enable": several},
    }


def _limit_ms(limit_s: float | None, usual_ms: int) -> int:
    if limit_s is None or not math.isfinite(limit_s):
        return usual_ms
    return max(round(limit_s * 1e3), 1)


def _role(pool: Pool, one: Plan, folder: str, size: tuple[int, int]) -> dict[str, Any]:
    """Settings of one role's servers."""
    facts, (pods, devices) = table("mindie")["server"], size
    spread = _spread(pool, one)
    devices = one.strategy.tp if spread else devices
    model: Mapping[str, Any] = {
        **model_config(one, folder, devices),
        "kv_trans_timeout": facts["kv_trans_timeout"],
        "kv_link_timeout": facts["kv_link_timeout"],
    }
    schedule = schedule_config(one, pool.role)
    return {
        "ServerConfig": {
            "maxLinkNum": facts["maxLinkNum"],
            "inferMode": "dmi",
            "tokenTimeout": facts["tokenTimeout"],
            "e2eTimeout": facts["e2eTimeout"],
            "distDPServerEnabled": spread,
        },
        "BackendConfig": {
            "npuDeviceIds": [list(range(devices))],
            "tokenizerProcessNumber": 1 if spread else facts["tokenizerProcessNumber"],
            "multiNodesInferEnabled": pods > 1 and not spread,
            "ModelDeployConfig": deploy_config(one, model),
            "ScheduleConfig": {**schedule, "distributedEnable": True} if spread else schedule,
        },
    }


def _env(plans: Sequence[Plan]) -> dict[str, Any]:
    """Environment by role."""
    both = {
        f"mindie_server_{role}_env": environment(one)
        for role, one in zip(("prefill", "decode"), plans, strict=True)
    }
    empty: dict[str, Any] = {"mindie_ms_controller_env": {}, "mindie_ms_coordinator_env": {}}
    return {"version": "1.0.0", "mindie_common_env": {}, **empty, **both}


def _page(plan: Plan, checkpoints: Sequence[Checkpoint], folder: str, names: Sequence[str]) -> Page:
    facts = table("mindie")
    engine, motor = facts["engine"], facts["motor"]
    needs = dict.fromkeys(need for one in checkpoints for need in one.needs)
    written_for = (
        f"Written for MindIE LLM {engine['mindie_llm']} and MindIE Motor "
        f"{engine['mindie_motor']}. Files: {', '.join(names)}."
    )
    return Page(
        title=f"{model_name(plan)} with MindIE Motor: prefill and decode apart",
        about=[*pool_shapes(plan), "", written_for],
        steps=[
            f"Put the checkpoint at {folder} on every node (or emit again with `--option "
            "weights=FOLDER`). It holds: " + "; ".join(needs) + ".",
            *quantize_steps(plan),
            "In user_config.json put your image's name at image_name. Add what mindie_env.json "
            "says to Motor's own conf/mindie_env.json: paths of the image stay as they are there.",
            "In Motor's deploy scripts, on a node with kubectl and MindCluster: `kubectl create "
            f"namespace {motor['job']}`, then `python3 deploy_ac_job.py --user_config_path "
            "user_config.json`.",
            f"Requests go to the coordinator's port {motor['predict_port']} once all pods are "
            "ready.",
        ],
        url=url_of(int(motor["predict_port"]), "COORDINATOR"),
        load="`BASE_URL=http://COORDINATOR:PORT ./bench.sh` sends the plan's workload.",
        assumed=[
            f"- Priced for engine profile {printable(plan.request.engine_profile)}.",
            "- No TLS: tls_config turns it on.",
            "- Motor's scheduler picks the nodes; the plan packed instances side by side.",
            *ahead_words(plan),
        ],
        chat=True,
    )
