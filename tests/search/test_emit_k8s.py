"""Target `k8s`: objects that Kubernetes takes, and what their pods would run."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.search.emit_cases import emit_plan, moe, parser_of, run_script

from shardplan.models.errors import InputError
from shardplan.search.api import search
from shardplan.search.emit import emit
from shardplan.search.emit.schemas import schema
from shardplan.search.plan import Plan

yaml = pytest.importorskip("yaml")

KINDS = {
    "ConfigMap": "V1ConfigMap",
    "Deployment": "V1Deployment",
    "LeaderWorkerSet": "LeaderWorkerSet",
    "Service": "V1Service",
    "StatefulSet": "V1StatefulSet",
}
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
Object = dict[str, Any]


def _emitted(plan: Plan, folder: Path, **options: Any) -> tuple[list[Object], dict[str, str]]:
    """(objects, scripts), each object held against its schema by the reference implementation."""
    emit(plan, "k8s", folder / "out", force=True, **options)
    found: list[Object] = []
    for name in ("scripts.yaml", "serve.yaml"):
        found += yaml.safe_load_all((folder / "out" / name).read_text(encoding="utf-8"))
    for one in found:
        whole = {**schema("kubernetes"), "$ref": f"#/$defs/{KINDS[one['kind']]}"}
        jsonschema.Draft202012Validator(whole).validate(one)
        assert LABEL.fullmatch(one["metadata"]["name"])
    names = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(names) == len(set(names))
    (scripts,) = (one["data"] for one in found if one["kind"] == "ConfigMap")
    return found, scripts


def _pods(one: Object) -> list[tuple[Object, int]]:
    """(template, pods of it) of a workload."""
    spec = one["spec"]
    if one["kind"] != "LeaderWorkerSet":
        return [(spec["template"], spec["replicas"])]
    group, count = spec["leaderWorkerTemplate"], spec["replicas"]
    workers = count * (group["size"] - 1)
    return [(group["leaderTemplate"], count), (group["workerTemplate"], workers)]


def _workloads(objects: list[Object]) -> list[Object]:
    return [one for one in objects if one["kind"] not in ("ConfigMap", "Service")]


def _devices(objects: list[Object], resource: str = "huawei.com/Ascend910") -> int:
    """Devices that all pods ask for."""
    return sum(
        int(pod["spec"]["containers"][0]["resources"]["limits"][resource]) * count
        for one in _workloads(objects)
        for pod, count in _pods(one)
        if "resources" in pod["spec"]["containers"][0]
    )


def _told(objects: list[Object], scripts: dict[str, str], nodes: int) -> None:
    """Every pod finds the script of its place, and every Service pods of its labels."""
    labels = []
    for one in _workloads(objects):
        for pod, _ in _pods(one):
            labels.append(pod["metadata"]["labels"])
            command = pod["spec"]["containers"][0]["command"]
            if command[1] == "/scripts/start.sh":
                assert {f"{command[2]}-{index}.sh" for index in range(nodes)} <= set(scripts)
            mounted = {volume["name"] for volume in pod["spec"]["volumes"]}
            mounts = pod["spec"]["containers"][0]["volumeMounts"]
            assert {mount["name"] for mount in mounts} == mounted
    for one in objects:
        if one["kind"] == "Service":
            wanted = one["spec"]["selector"].items()
            own = {key: value for key, value in wanted if not key.endswith("-index")}
            assert any(own.items() <= found.items() for found in labels)


def _run(scripts: dict[str, str], folder: Path, label: str, **where: str) -> list[str]:
    """What a pod with these scripts would run, with stand-ins for vllm and the name server."""
    box = folder / "scripts"
    box.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (box / name).write_text(text.replace("/scripts/", f"{box}/"), encoding="utf-8")
        subprocess.run(["bash", "-n", str(box / name)], check=True)
    (box / "pod.sh").write_text(
        'getent() { echo "10.0.0.1 $2"; }\nexport -f getent\n'
        f'exec bash "{box}/start.sh" {label}\n',
        encoding="utf-8",
    )
    (call,) = run_script(box / "pod.sh", "vllm", MODEL="/models", NODE_ADDRESS="10.0.0.7", **where)
    assert call.words[:2] == ["serve", "/models"]
    return call.words[2:]


def test_replicas_are_one_deployment(tmp_path: Path) -> None:
    """dp 2 of tp 4: two pods of four cards behind a Service; a pod's devices count from 0."""
    objects, scripts = _emitted(emit_plan(tp=4, dp=2), tmp_path)
    assert [one["kind"] for one in objects] == ["ConfigMap", "Deployment", "Service"]
    assert objects[1]["spec"]["replicas"] == 2
    assert _devices(objects) == 8
    _told(objects, scripts, 1)
    flags = parser_of("vllm_flags", "serve").parse_args(_run(scripts, tmp_path, "server"))
    assert (flags.tensor_parallel_size, flags.port) == ("4", "8000")
    assert "ASCEND_RT_VISIBLE_DEVICES=0,1,2,3\n" in scripts["server-0.sh"]
    image = objects[1]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "quay.io/ascend/vllm-ascend:v0.23.0"


@pytest.mark.parametrize("workers", ["lws", "statefulset"])
def test_servers_over_nodes(tmp_path: Path, workers: str) -> None:
    """dp 32 with ep 16 on nodes of 8: two servers of two pods each; the second joins the head."""
    plan = emit_plan(tp=1, dp=32, ep=16, exchange="alltoall", model=moe())
    objects, scripts = _emitted(plan, tmp_path, workers=workers)
    kinds = [one["kind"] for one in objects]
    if workers == "lws":
        assert kinds == ["ConfigMap", "LeaderWorkerSet", "Service"]
        spec = objects[1]["spec"]
        assert (spec["replicas"], spec["leaderWorkerTemplate"]["size"]) == (2, 2)
        worker = spec["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]
        assert "readinessProbe" not in worker
        where = {"LWS_LEADER_ADDRESS": "head", "LWS_WORKER_INDEX": "1"}
    else:
        assert kinds == ["ConfigMap", *["StatefulSet", "Service"] * 2, "Service"]
        assert objects[2]["spec"]["clusterIP"] == "None"
        env = objects[1]["spec"]["template"]["spec"]["containers"][0]["env"]
        (host,) = (one["value"] for one in env if one["name"] == "HEAD_HOST")
        name, _, pods = host.partition(".")
        assert name == f"{objects[1]['metadata']['name']}-0"
        assert pods == objects[2]["metadata"]["name"] == objects[1]["spec"]["serviceName"]
        where = {"HEAD_HOST": "head", "POD_INDEX": "1"}
    assert _devices(objects) == 32
    _told(objects, scripts, 2)
    parse = parser_of("vllm_flags", "serve").parse_args
    worker_flags = parse(_run(scripts, tmp_path, "server", **where))
    assert worker_flags.headless
    assert worker_flags.data_parallel_address == "10.0.0.1"
    assert worker_flags.data_parallel_start_rank == "8"
    head = parse(_run(scripts, tmp_path, "server"))
    assert (head.headless, head.data_parallel_address) == (False, "10.0.0.7")


def test_a_supernode_of_a3(tmp_path: Path) -> None:
    """64 dies as four pods of 16, with the image for A3."""
    plan = emit_plan(soc="Ascend910_9382", tp=2, dp=32, ep=64, exchange="alltoall", model=moe())
    objects, scripts = _emitted(plan, tmp_path)
    assert _devices(objects) == 64
    _told(objects, scripts, 4)
    leader = objects[1]["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"][0]
    assert leader["image"].endswith("-a3")


def test_pools_have_a_proxy(tmp_path: Path) -> None:
    """An object and a Service an instance, which the proxy names; each has its connector name."""
    asked: dict[str, Any] = {"input_len": 1024, "output_len": 128, "ttft_ms": 800, "tpot_ms": 40}
    plan = search("llama-3.1-8b", "atlas-800t-a2", serving="disagg", **asked).plan
    objects, scripts = _emitted(plan, tmp_path)
    _told(objects, scripts, 1)
    services = {one["metadata"]["name"] for one in objects if one["kind"] == "Service"}
    instances = sum(pool.instances for pool in plan.pools)
    assert len(services) == instances + 1
    proxy = scripts["proxy.sh"]
    for name in services - {"llama-3-1-8b-proxy"}:
        assert f" {name}" in proxy
    configs = [
        json.loads(text.partition("--kv-transfer-config '")[2].partition("'")[0])
        for name, text in scripts.items()
        if "kv-transfer" in text and name != "proxy.sh"
    ]
    assert len({one["engine_id"] for one in configs}) == len(configs) == instances
    assert _devices(objects) == sum(pool.instances * pool.strategy.ranks for pool in plan.pools)
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "port-forward service/llama-3-1-8b-proxy 1999:1999" in readme


@pytest.mark.parametrize("name", ["'; touch pwned #", "a: b\n- c", "\ud800\x00", "", "-", "$(x)"])
def test_hostile_names_are_labels(tmp_path: Path, name: str) -> None:
    plan = emit_plan(model={"name": name, "source": name, "architecture": name})
    objects, scripts = _emitted(plan, tmp_path)
    _told(objects, scripts, 1)
    _run(scripts, tmp_path, "server")
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"namespace": "a b"}, "namespace of k8s"),
        ({"namespace": "-rf"}, "namespace of k8s"),
        ({"claim": "x\ny: z"}, "claim of k8s"),
        ({"claim": ""}, "claim of k8s"),
        ({"image": "a b"}, "image of k8s"),
        ({"image": "$(touch pwned)"}, "image of k8s"),
        ({"workers": "ray"}, "workers of k8s"),
    ],
)
def test_hostile_options_are_refused(tmp_path: Path, options: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        emit(emit_plan(), "k8s", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_options_are_taken(tmp_path: Path) -> None:
    given = {"namespace": "llm", "claim": "weights", "image": "r.local:5000/x/vllm@sha256:ab"}
    objects, _ = _emitted(emit_plan(), tmp_path, **given)
    assert {one["metadata"]["namespace"] for one in objects} == {"llm"}
    pod = objects[1]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == given["image"]
    assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == "weights"


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    """As by the engine's own target, and a device without a published image."""
    with pytest.raises(InputError, match="context parallelism"):
        emit(emit_plan(cp=2), "k8s", tmp_path / "out")
    new = emit_plan(soc="Ascend950PR_9589")
    with pytest.raises(InputError, match="no published image"):
        emit(new, "k8s", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    objects, _ = _emitted(new, tmp_path, image="mine:1")
    assert _devices(objects, "huawei.com/npu") == 8
