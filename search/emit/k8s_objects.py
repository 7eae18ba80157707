"""The Kubernetes objects of target `k8s`, as Python values.

Every pod mounts the scripts, the checkpoint, shared memory and the driver's files, and asks the
device plugin for its devices. What a pod is told: its address, its place among its server's pods
(LeaderWorkerSet injects it, a StatefulSet labels it) and which scripts are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardplan.search.emit.common import table
from shardplan.search.emit.containers import Servers

__all__ = [
    "Names",
    "config_map",
    "deployment",
    "leader_worker_set",
    "proxy_deployment",
    "service",
    "stateful_set",
]

_INDEX = "metadata.labels['apps.kubernetes.io/pod-index']"
_Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names that all objects of a deployment share."""

    app: str
    namespace: str
    claim: str
    image: str

    def meta(self, own: str, **labels: str) -> _Object:
        """Metadata of an object; `own` follows the app's name."""
        name = f"{self.app}-{own}" if own else self.app
        return {"name": name, "namespace": self.namespace, "labels": {"app": self.app, **labels}}


def config_map(names: Names, scripts: Mapping[str, str]) -> _Object:
    """The scripts."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": names.meta("scripts"),
        "data": dict(sorted(scripts.items())),
    }


def service(names: Names, own: str, selector: Mapping[str, str], port: int) -> _Object:
    """The address of the pods with some labels."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": names.meta(own),
        "spec": {
            "selector": {"app": names.app, **selector},
            "ports": [{"name": "http", "port": port, "targetPort": port}],
        },
    }


def deployment(names: Names, kind: Servers, own: str, label: str, replicas: int) -> _Object:
    """Servers inside one node each."""
    labels = {"role": kind.role, "server": own}
    spec = _pod(names, kind, label, [], _probes(_http()))
    return _deployment(names, own, labels, replicas, spec)


def _deployment(
    names: Names, own: str, labels: Mapping[str, str], replicas: int, spec: Mapping[str, Any]
) -> _Object:
    match = {"app": names.app, **labels}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": names.meta(own, **labels),
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": match},
            "strategy": {"type": "Recreate"},  # a node has no devices to spare for a second one
            "template": {"metadata": {"labels": match}, "spec": dict(spec)},
        },
    }


def leader_worker_set(names: Names, kind: Servers, own: str, label: str, replicas: int) -> _Object:
    """Servers over several nodes: a leader and its workers each."""
    labels = {"role": kind.role, "server": own}
    match = {"labels": {"app": names.app, **labels}}
    return {
        "apiVersion": table("containers")["kubernetes"]["leader_worker_set"],
        "kind": "LeaderWorkerSet",
        "metadata": names.meta(own, **labels),
        "spec": {
            "replicas": replicas,
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": kind.launches[0].nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": {
                    "metadata": match,
                    "spec": _pod(names, kind, label, [], _probes(_http())),
                },
                "workerTemplate": {"metadata": match, "spec": _pod(names, kind, label, [], {})},
            },
        },
    }


def stateful_set(names: Names, kind: Servers, own: str, label: str) -> list[_Object]:
    """One server over several nodes, and the headless Service by which its pods find the head."""
    labels, pods = {"role": kind.role, "server": own}, f"{own}-pods"
    match = {"app": names.app, **labels}
    head = f"{names.app}-{own}-0.{names.app}-{pods}"
    told: list[_Object] = [
        {"name": "POD_INDEX", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}},
        {"name": "HEAD_HOST", "value": head},
    ]
    port = table("vllm_ascend")["ports"]["serve"]
    ask = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health', timeout=5)"
    alive = f'[ "$POD_INDEX" != 0 ] || python3 -c "{ask}"'
    headless = service(names, pods, {"server": own}, port)
    headless["spec"] |= {"clusterIP": "None", "publishNotReadyAddresses": True}
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": names.meta(own, **labels),
            "spec": {
                "replicas": kind.launches[0].nodes,
                "serviceName": f"{names.app}-{pods}",
                "podManagementPolicy": "Parallel",
                "selector": {"matchLabels": match},
                "template": {
                    "metadata": {"labels": match},
                    "spec": _pod(
                        names,
                        kind,
                        label,
                        told,
                        _probes({"exec": {"command": ["bash", "-c", alive]}}),
                    ),
                },
            },
        },
        headless,
    ]


def _http() -> _Object:
    return {"httpGet": {"path": "/health", "port": table("vllm_ascend")["ports"]["serve"]}}


def _probes(how: Mapping[str, Any]) -> _Object:
    """A long start, then a short leash."""
    loading = table("containers")["loading"]
    every = {"periodSeconds": loading["period_s"]}
    return {
        "startupProbe": {**how, **every, "failureThreshold": loading["tries"]},
        "readinessProbe": {**how, **every},
    }


def _pod(
    names: Names,
    kind: Servers,
    label: str,
    told: Sequence[Mapping[str, Any]],
    probes: Mapping[str, Any],
) -> _Object:
    """A pod of a server."""
    facts = table("containers")
    devices = {facts["resources"][kind.family]: str(kind.launches[0].slot.ranks)}
    mounts = facts["mounts"]
    address = {"fieldRef": {"fieldPath": "status.podIP"}}
    container = {
        "name": "vllm",
        "image": names.image,
        "command": ["bash", f"{facts['inside']['scripts']}/start.sh", label],
        "env": [
            {"name": "MODEL", "value": facts["inside"]["model"]},
            {"name": "NODE_ADDRESS", "valueFrom": address},
            *told,
        ],
        "ports": [{"name": "http", "containerPort": table("vllm_ascend")["ports"]["serve"]}],
        "resources": {"limits": devices, "requests": devices},
        **probes,
        "volumeMounts": [
            {"name": "scripts", "mountPath": facts["inside"]["scripts"]},
            {"name": "checkpoint", "mountPath": facts["inside"]["model"], "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": m["name"], "mountPath": m["path"], "readOnly": True} for m in mounts),
        ],
    }
    size = f"{facts['shared_memory']['size_gib']}Gi"
    return {
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [
            _script_volume(names),
            {
                "name": "checkpoint",
                "persistentVolumeClaim": {"claimName": names.claim, "readOnly": True},
            },
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}},
            *({"name": m["name"], "hostPath": {"path": m["path"]}} for m in mounts),
        ],
    }


def _script_volume(names: Names) -> _Object:
    return {"name": "scripts", "configMap": {"name": f"{names.app}-scripts"}}


def proxy_deployment(names: Names, kinds: Sequence[Servers]) -> tuple[_Object, str]:
    """The proxy before prefill and decode instances, and its script."""
    facts, port = table("containers")["inside"], table("vllm_ascend")["ports"]["serve"]
    door = table("vllm_ascend")["kv_transfer"]["proxy_port"]
    words = [f"--host 0.0.0.0 --port {door}"]
    for kind, option in zip(kinds, ("prefiller", "decoder"), strict=True):
        hosts = [f"{names.app}-{kind.role}-{server}" for server in range(kind.count)]
        words.append(f"--{option}-hosts {' '.join(hosts)}")
        words.append(f"--{option}-ports {' '.join([str(port)] * kind.count)}")
    lines = [
        "#!/usr/bin/env bash",
        "# Sends each request to a prefill instance, then to a decode instance.",
        "set -euo pipefail",
        "exec " + " \\\n  ".join([f"python3 {facts['proxy']}", *words]),
    ]
    container = {
        "name": "proxy",
        "image": names.image,
        "command": ["bash", f"{facts['scripts']}/proxy.sh"],
        "ports": [{"name": "http", "containerPort": door}],
        "volumeMounts": [{"name": "scripts", "mountPath": facts["scripts"]}],
    }
    spec = {
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [_script_volume(names)],
    }
    made = _deployment(names, "proxy", {"role": "proxy", "server": "proxy"}, 1, spec)
    return made, "\n".join(lines) + "\n"
