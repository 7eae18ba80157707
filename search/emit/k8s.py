"""Target `k8s`: Kubernetes manifests of vLLM servers on Ascend.

    scripts.yaml   ConfigMap: the start scripts, as target `vllm-ascend` writes them
    serve.yaml     workloads and Services; proxy of pools
    quantize.sh, bench.sh, README.md   as of every serving target

A server inside one node is a Deployment, one over several a LeaderWorkerSet (`workers=lws`, the
default) or a StatefulSet with a headless Service (`workers=statefulset`, plain Kubernetes). Servers
of an aggregated plan are replicas behind one Service. Instances of pools have names of their own,
because each names itself in its connector, and a Service each for the proxy.
Devices come from the Ascend device plugin; the checkpoint from a PersistentVolumeClaim. Options:
`image`, `namespace`, `claim`, `workers`. Objects are checked against `schemas/kubernetes.json`.
Left out: a gateway, autoscaling, node selectors and gang scheduling, which differ by cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardplan.models.errors import InputError
from shardplan.search.emit.common import model_name, refuse, table
from shardplan.search.emit.containers import (
    Servers,
    app_name,
    image_of,
    in_pod,
    servers_of,
    word,
)
from shardplan.search.emit.k8s_objects import (
    Names,
    config_map,
    deployment,
    leader_worker_set,
    proxy_deployment,
    service,
    stateful_set,
)
from shardplan.search.emit.modelslim import quantize_script, quantize_steps
from shardplan.search.emit.schemas import check
from shardplan.search.emit.serving_page import Page, ahead_words, bench, page
from shardplan.search.emit.vllm_readme import shape_of, url_of
from shardplan.search.emit.yaml_text import yaml_text
from shardplan.search.plan import Plan

__all__ = ["files"]

_TARGET = "k8s"
_WORKERS = ("lws", "statefulset")
_MOST_BYTES = 2**20
"""Of a ConfigMap (Kubernetes documentation, ConfigMap: its data cannot exceed 1 MiB)."""
_KINDS = {
    "ConfigMap": "V1ConfigMap",
    "Deployment": "V1Deployment",
    "LeaderWorkerSet": "LeaderWorkerSet",
    "Service": "V1Service",
    "StatefulSet": "V1StatefulSet",
}
_START = """\
#!/usr/bin/env bash
# Starts this pod's part of a server: who is the head, where it is, then the script of its place.
set -euo pipefail
index="${POD_INDEX:-${LWS_WORKER_INDEX:-0}}"
head="${HEAD_HOST:-${LWS_LEADER_ADDRESS:-}}"
export NIC="${NIC:-eth0}"
HEAD_ADDRESS="$NODE_ADDRESS"
if [ "$index" != 0 ]; then
  until HEAD_ADDRESS="$(getent hosts "$head" | awk '{ print $1; exit }')" && [ -n "$HEAD_ADDRESS" ]
  do
    sleep 2
  done
fi
export HEAD_ADDRESS
exec bash "/scripts/$1-$index.sh"
"""

_Objects = list[dict[str, Any]]


def files(
    plan: Plan,
    *,
    image: str = "",
    namespace: str = "default",
    claim: str = "checkpoint",
    workers: str = "lws",
) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that vLLM on Ascend cannot run."""
    if workers not in _WORKERS:
        raise InputError(
            "workers of k8s is lws or statefulset", got=repr(workers[:100]), hint="workers=lws"
        )
    kinds = servers_of(plan)
    names = Names(
        app=app_name(plan),
        namespace=word(_TARGET, "namespace", namespace),
        claim=word(_TARGET, "claim", claim),
        image=image_of(_TARGET, kinds, image),
    )
    scripts, objects = _scripts(kinds), _workloads(plan, kinds, names, workers)
    if plan.pools:
        proxy, words = proxy_deployment(names, kinds)
        scripts["proxy.sh"] = words
        objects += [proxy, service(names, "proxy", {"role": "proxy"}, _door(plan))]
    config = config_map(names, scripts)
    _check([config, *objects], scripts)
    made = {
        "scripts.yaml": yaml_text("kubectl apply -f scripts.yaml -f serve.yaml", config),
        "serve.yaml": yaml_text("README.md says what the cluster must have before.", *objects),
        **quantize_script(kinds[-1].plan),
    }
    door = _door(plan)
    made["bench.sh"] = bench(kinds[-1].plan, kinds[-1].checkpoint.shell, url=url_of(door))
    listed = sorted({*made, "README.md"})
    made["README.md"] = page(plan, _page(plan, kinds, names, objects, listed))
    return made


def _door(plan: Plan) -> int:
    """Port that takes requests."""
    facts = table("vllm_ascend")
    found: int = facts["kv_transfer"]["proxy_port"] if plan.pools else facts["ports"]["serve"]
    return found


def _check(objects: Sequence[dict[str, Any]], scripts: dict[str, str]) -> None:
    for one in objects:
        check(_TARGET, "kubernetes", _KINDS[one["kind"]], one)
    size = sum(len(text.encode()) for text in scripts.values())
    if size > _MOST_BYTES:
        raise refuse(
            _TARGET,
            "a ConfigMap holds at most 1 MiB of scripts",
            got=f"{len(scripts)} scripts, {size} bytes",
            hint="plan fewer instances, or use target vllm-ascend",
        )


def _unlike(kind: Servers) -> bool:
    """Whether each server has a script of its own."""
    return kind.side is not None


def _label(kind: Servers, server: int) -> str:
    """Name of a server's scripts: of all alike, or of one."""
    return f"{kind.role}-{server}" if _unlike(kind) else kind.role


def _scripts(kinds: Sequence[Servers]) -> dict[str, str]:
    """Scripts by name: `<label>-<place>.sh`, and what picks one."""
    made = {"start.sh": _START}
    for kind in kinds:
        for server in range(kind.count if _unlike(kind) else 1):
            for one in kind.of(server):
                made[f"{_label(kind, server)}-{one.index}.sh"] = kind.text(in_pod(one))
    return made


def _workloads(plan: Plan, kinds: Sequence[Servers], names: Names, workers: str) -> _Objects:
    port = table("vllm_ascend")["ports"]["serve"]
    made: _Objects = []
    for kind in kinds:
        nodes = kind.launches[0].nodes
        apart = _unlike(kind) or (nodes > 1 and workers == "statefulset")
        for server in range(kind.count if apart else 1):
            label = _label(kind, server)
            replicas = 1 if apart else kind.count
            own = f"{kind.role}-{server}" if apart else kind.role
            if nodes == 1:
                made.append(deployment(names, kind, own, label, replicas))
            elif workers == "lws":
                made.append(leader_worker_set(names, kind, own, label, replicas))
            else:
                made += stateful_set(names, kind, own, label)
            if _unlike(kind):
                made.append(service(names, own, _heads(own, kind, workers), port))
        if not _unlike(kind):
            made.append(service(names, "", _heads("", kind, workers), port))
    return made


def _heads(own: str, kind: Servers, workers: str) -> dict[str, str]:
    """Labels of the pods that take requests; `own` for those of one server."""
    found = {"server": own} if own else {"role": kind.role}
    if kind.launches[0].nodes == 1:
        return found
    index = (
        "leaderworkerset.sigs.k8s.io/worker-index"
        if workers == "lws"
        else "apps.kubernetes.io/pod-index"
    )
    return {**found, index: "0"}


def _page(
    plan: Plan,
    kinds: Sequence[Servers],
    names: Names,
    objects: Sequence[dict[str, Any]],
    listed: Sequence[str],
) -> Page:
    engine, door = table("vllm_ascend")["engine"], _door(plan)
    what = ", ".join(f"{kind.count} {kind.role}(s)" for kind in kinds)
    front = f"{names.app}-proxy" if plan.pools else names.app
    return Page(
        title=f"{model_name(plan)} on Kubernetes: "
        + ("prefill and decode apart" if plan.pools else shape_of(plan)),
        about=[
            f"{what} of vllm {engine['vllm']} with vllm-ascend {engine['vllm_ascend']}; objects of "
            f"Kubernetes client {table('containers')['kubernetes']['client']}. Files: "
            f"{', '.join(listed)}."
        ],
        steps=_steps(kinds, names, objects, front, door),
        url=url_of(door),
        load="`./bench.sh` sends the plan's workload, while the port is forwarded.",
        assumed=[
            "- A pod's network interface is eth0 (NIC), and pods of one server reach each other on "
            "all ports; device ports are configured on every node (/etc/hccn.conf).",
            "- The scheduler picks nodes; the plan packed servers side by side. Where links differ "
            "by node (supernodes, racks), add affinity.",
            *ahead_words(kinds[-1].plan),
        ],
    )


def _steps(
    kinds: Sequence[Servers],
    names: Names,
    objects: Sequence[dict[str, Any]],
    front: str,
    door: int,
) -> list[str]:
    resource = table("containers")["resources"][kinds[0].family]
    needs = dict.fromkeys(need for kind in kinds for need in kind.checkpoint.needs)
    steps = [
        f"The cluster has the Ascend device plugin (resource {resource}) and driver on its nodes"
        + (
            ", and the LeaderWorkerSet controller."
            if any(one["kind"] == "LeaderWorkerSet" for one in objects)
            else "."
        ),
        f"A PersistentVolumeClaim {names.claim} in namespace {names.namespace}, readable from all "
        "nodes, holds the checkpoint at its root: " + "; ".join(needs) + ".",
        *quantize_steps(kinds[-1].plan),
        "`kubectl apply -f scripts.yaml -f serve.yaml`",
        f"`kubectl -n {names.namespace} get pods -l app={names.app} -w` until all are ready.",
        f"`kubectl -n {names.namespace} port-forward service/{front} {door}:{door}`; inside the "
        f"cluster requests go to http://{front}.{names.namespace}:{door}.",
    ]
    return steps
