"""Names of the targets of `shardplan emit`, and where each one's function is: ours and plug-ins'.

Apart from `shardplan.search.emit`, which loads plans and tables, so that a shell completes the
names at once. pyproject.toml lists ours in the same group for others to see.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

__all__ = ["BUILT_IN", "GROUP", "OF_GRAPHS", "OURS", "SERVING", "registered", "target_names"]

GROUP = "shardplan.emitters"
BUILT_IN: Mapping[str, str] = {
    "atc": "shardplan.search.emit.atc:files",
    "docker-compose": "shardplan.search.emit.compose:files",
    "jax": "shardplan.search.emit.jax_specs:files",
    "k8s": "shardplan.search.emit.k8s:files",
    "megatron": "shardplan.search.emit.megatron:files",
    "mindie": "shardplan.search.emit.mindie:files",
    "mindspore": "shardplan.search.emit.mindspore_strategy:files",
    "ray": "shardplan.search.emit.ray_serve:files",
    "sglang": "shardplan.search.emit.sglang:files",
    "torch": "shardplan.search.emit.torch_plan:files",
    "vllm-ascend": "shardplan.search.emit.vllm_ascend:files",
}
SERVING = ("vllm-ascend", "mindie", "sglang", "k8s", "docker-compose", "ray")
"""Targets that serve, pools too, the nearest to Ascend first."""
OF_GRAPHS: Mapping[str, str] = {"onnx": "shardplan.search.emit.onnx_ranks:files"}
"""Targets that are cut from a model file; they take plans of operators, too."""
OURS: Mapping[str, str] = {**BUILT_IN, **OF_GRAPHS}


def registered() -> dict[str, EntryPoint]:
    """Targets of other packages by name."""
    found = entry_points(group=GROUP)
    return {point.name: point for point in found if point.name not in OURS}


def target_names() -> tuple[str, ...]:
    """Names of all targets, sorted: ours and those of installed packages."""
    return tuple(sorted({*OURS, *registered()}))
