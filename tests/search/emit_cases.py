"""Plans of several shapes for the emitters' tests, and a way to see what their scripts would run.

The scripts are executed by bash with a stand-in for the tool they call, which writes down its
arguments and environment: what a shell makes of the quoting is tested, not how it looks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.search.plan_factory import make_plan

from shardplan.models.catalog import load_model, model_names
from shardplan.search.emit import emit
from shardplan.search.emit.common import table
from shardplan.search.plan import ClusterInfo, ModelInfo, Plan, StrategyInfo
from shardplan.search.proof import model_digest

__all__ = [
    "CLUSTERS",
    "Call",
    "emit_plan",
    "moe",
    "only",
    "parser_of",
    "run_script",
    "start",
    "tiny_llama",
    "toy_target",
]

CLUSTERS: dict[str, tuple[str, int, int]] = {
    "Ascend910B2": ("910b2", 8, 4),
    "Ascend910A": ("910a", 8, 4),
    "Ascend310P3": ("310p3", 8, 1),
    "Ascend910_9382": ("a3-die", 16, 4),
    "Ascend950PR_9589": ("950pr", 8, 4),
    "": ("h200", 8, 4),
}

_STRATEGY: dict[str, Any] = {
    "tp": 8,
    "pp": 1,
    "dp": 1,
    "ep": 1,
    "cp": 1,
    "sp": False,
    "exchange": "allgather",
    "stage_layers": (),
    "attention": "flash",
    "weight_dtype": "bf16",
    "kv_dtype": "bf16",
    "batch": 24,
    "chunk": 4096,
}

_WORKLOAD: dict[str, Any] = {
    "input_len": 1000,
    "output_len": 300,
    "concurrency": 24,
    "request_rate": None,
    "prefix_hit": 0.0,
}

_TOOL = """#!{python}
import json, os, sys, time
with open(os.environ["RECORD"], "a", encoding="utf-8") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
time.sleep(float(os.environ.get("LINGER", 0)))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One run of the tool."""

    words: list[str]
    environment: dict[str, str]


def emit_plan(
    *,
    soc: str = "Ascend910B2",
    model: dict[str, Any] | None = None,
    request: dict[str, Any] | None = None,
    workload: dict[str, Any] | None = None,
    **strategy: Any,
) -> Plan:
    """Llama-3.1-70B, 1000 tokens in and 300 out, tp 8 on one A2 node unless said otherwise."""
    base = make_plan()
    work = {**_WORKLOAD, **(workload or {})}
    asked = {"engine_profile": "vllm-ascend", **(request or {})}
    asked["workload"] = base.request.workload.model_copy(update=work)
    return base.model_copy(
        update={
            "strategy": StrategyInfo(**{**_STRATEGY, **strategy}),
            "cluster": _cluster(soc),
            "model": ModelInfo(**_bound({**base.model.model_dump(), **(model or {})})),
            "request": base.request.model_copy(update=asked),
        }
    )


def _bound(model: dict[str, Any]) -> dict[str, Any]:
    """With the digest of the preset or config.json that the plan names, where there is one."""
    known = model["name"] if model["name"] in model_names() else model["source"]
    if known not in model_names() and not Path(known).is_file():
        return model
    return {**model, "digest": model_digest(load_model(known))}


def tiny_llama(folder: Path, **changes: Any) -> dict[str, Any]:
    """Fields of a model of four layers, eight heads on four kv heads, in a config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **changes,
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return {"name": "tiny", "source": str(file), "layers": config["num_hidden_layers"]}


def _cluster(soc: str) -> ClusterInfo:
    device, per_node, nodes = CLUSTERS[soc]
    return ClusterInfo(
        name="test",
        title="a test server",
        device=device,
        soc_versions=(soc,) if soc else (),
        ranks_per_node=per_node,
        nodes=nodes,
        ranks=per_node * nodes,
        hbm_bytes=64.0 * 2**30,
    )


def moe(**changes: Any) -> dict[str, Any]:
    """Fields of a model with experts: a token touches a tenth of it."""
    return {
        "name": "qwen3-235b-a22b",
        "architecture": "Qwen3MoeForCausalLM",
        "parameters": 235_000_000_000,
        "active_parameters": 22_000_000_000,
        "layers": 94,
        **changes,
    }


def run_script(script: Path, tool: str, **environment: str) -> list[Call]:
    """What the script would run. Raises CalledProcessError when it ends with an error."""
    box = script.parent.parent / f"{script.parent.name}-tools"
    box.mkdir(exist_ok=True)
    (box / tool).write_text(_TOOL.format(python=sys.executable), encoding="utf-8")
    (box / tool).chmod(0o755)
    record = box / f"{script.name}.record"
    record.unlink(missing_ok=True)
    clean = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
    path = f"{box}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(script)],
        env={**clean, **environment, "PATH": path, "RECORD": str(record)},
        cwd=box,
        check=True,
        capture_output=True,
        timeout=60,
    )
    lines = record.read_text(encoding="utf-8").splitlines()
    return [Call(words=words, environment=env) for words, env in map(json.loads, lines)]


def parser_of(data: str, command: str) -> argparse.ArgumentParser:
    """A parser that knows the flags of the target's table and no other."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for group in table(data)["flags"]:
        if group["command"] == command:
            for name in (*group.get("names", ()), *group.get("values", ())):
                parser.add_argument(name)
            for name in group.get("switches", ()):
                parser.add_argument(name, action="store_true")
    return parser


def toy_target(plan: Plan, *, greeting: str = "hello") -> dict[str, str | bytes]:
    """A target as another package would register it; docs/emitters.md has one that works."""
    return {
        "parts/ranks.bin": bytes(range(plan.strategy.ranks)),
        "toy.sh": f"#!/bin/sh\necho {greeting}\n",
        "toy.txt": f"{plan.strategy.tp}\n",
    }


HERE = {
    "MODEL": "checkpoint",
    "HEAD_ADDRESS": "10.0.0.1",
    "NODE_ADDRESS": "10.0.0.2",
    "NIC": "eth0",
}


def start(plan: Plan, folder: Path, node: int = 0) -> list[tuple[argparse.Namespace, Call]]:
    """Emit, run one node's script, and parse what it started by device."""
    emit(plan, "vllm-ascend", folder / "out", force=True)
    script = folder / "out" / f"serve_node{node}.sh"
    together = script.read_text(encoding="utf-8").count("vllm serve") > 1
    linger = {"LINGER": "0.5"} if together else {}  # the first to end would end the others
    calls = run_script(script, "vllm", **HERE, **linger)
    parsed = []
    for call in sorted(calls, key=lambda one: one.environment["ASCEND_RT_VISIBLE_DEVICES"]):
        assert call.words[:2] == ["serve", HERE["MODEL"]]
        parsed.append((parser_of("vllm_flags", "serve").parse_args(call.words[2:]), call))
    return parsed


def only(plan: Plan, folder: Path, node: int = 0) -> tuple[argparse.Namespace, dict[str, str]]:
    ((flags, call),) = start(plan, folder, node)
    return flags, call.environment
