"""What to run next: the plan written for each engine and compiler, proven, simulated, explained."""

from __future__ import annotations

from shardplan.search.plan import Plan
from shardplan.search.report.frame import commands
from shardplan.search.report.markup import Html, tag
from shardplan.search.targets import BUILT_IN, SERVING

__all__ = ["next_section"]

_WHAT = {
    "atc": "CANN's compiler: build scripts, parallel_option.json, rank tables",
    "docker-compose": "Docker: a Compose file by node with its scripts",
    "jax": "jax: a PartitionSpec for each weight, and the mesh",
    "k8s": "Kubernetes: deployments, services, a ConfigMap of the scripts",
    "megatron": "Megatron-LM: its arguments",
    "mindie": "MindIE: configuration and start script by node, rank tables",
    "mindspore": "MindSpore: the strategy file that slices a checkpoint",
    "ray": "Ray Serve: serve.yaml with servers as replicas",
    "sglang": "SGLang: start scripts by node, router",
    "torch": "PyTorch: DTensor styles by module, and the device mesh",
    "vllm-ascend": "vLLM on Ascend: start scripts by node, balancer, load test",
}


def next_section(plan: Plan) -> Html:
    """Commands, each with what it is for; run where plan.json lies."""
    names = SERVING if plan.pools else dict.fromkeys((*SERVING, *sorted(BUILT_IN)))
    lines = [
        (
            _WHAT[name],
            f"shardplan emit plan.json --target {name} --out deploy-{name}",
        )
        for name in names
    ]
    lines += [
        ("Prove it again", "shardplan verify plan.json"),
        ("Simulate its requests one by one", "shardplan simulate plan.json --out simulated"),
        ("Each kernel of each rank, for Perfetto", "shardplan trace plan.json --out trace.json"),
        ("What each dimension is worth", "shardplan analyze trials.csv"),
        ("Why this plan, and what would change it", "shardplan explain plan.json"),
    ]
    return tag(
        "section",
        tag("h2", "Deploy it"),
        tag(
            "p",
            "Run where plan.json lies. A target that cannot express the plan says why and writes"
            " nothing.",
        ),
        commands(lines),
    )
