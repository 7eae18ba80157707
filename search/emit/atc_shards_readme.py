"""What a person reads and runs of the sharded-model door of target `atc`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardplan.models.parallel import balanced_stages
from shardplan.search.emit.atc_readme import loading, switches
from shardplan.search.emit.atc_shards import AIR, World
from shardplan.search.emit.common import (
    Raw,
    command_line,
    model_name,
    predicted,
    printable,
    table,
)
from shardplan.search.emit.onnx_slices import OnnxFile, file_name
from shardplan.search.plan import Plan
from shardplan.search.proof import model_of

__all__ = ["shard_readme", "shard_script", "slice_pattern"]


def slice_pattern(model: OnnxFile | None) -> str:
    """Name of a slice, `{rank}` in it."""
    return AIR if model is None else f"{file_name(model)}_rank{{rank}}.onnx"


def shard_script(soc: str, marks: Sequence[str], model: OnnxFile | None) -> str:
    """atc.sh: one build a stage and phase, or one of the ONNX slices that lie in `shards`."""
    facts = table("atc")
    framework = facts["framework_air" if model is None else "framework_onnx"]["value"]
    flags: list[tuple[str, str | None]] = [
        ("--distributed_cluster_build", "1"),
        ("--shard_model_dir", Raw('"$1"')),
        ("--model_relation_config", Raw('"$here/model_relation_config$3.json"')),
        ("--cluster_config", Raw('"$here/numa_config$3.json"')),
        ("--framework", str(framework)),
        ("--soc_version", soc),
        ("--output", Raw('"$here/$2"')),
    ]
    lines = [
        "#!/usr/bin/env bash",
        "# Builds each stage from the slices of its ranks; README.md says what they must hold.",
        "set -euo pipefail",
        'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
        *_needs(model),
        "",
        "build() {",
        "  " + command_line("atc", "atc", ["atc"], flags).replace("\n", "\n  "),
        "}",
        "",
        *_builds(marks, model),
    ]
    return "\n".join(lines) + "\n"


def _needs(model: OnnxFile | None) -> list[str]:
    if model is not None:
        return []
    return [
        ': "${PREFILL_SHARDS:?set PREFILL_SHARDS to the folder of slices of the prompt phase}"',
        ': "${DECODE_SHARDS:?set DECODE_SHARDS to the folder of slices of the decode phase}"',
    ]


def _builds(marks: Sequence[str], model: OnnxFile | None) -> list[str]:
    if model is not None:
        return [f'build "$here/shards" {file_name(model)} ""']
    return [
        f'build "${phase.upper()}_SHARDS{"/" + mark[1:] if mark else ""}" {phase}{mark} "{mark}"'
        for phase in ("prefill", "decode")
        for mark in marks
    ]


def shard_readme(
    plan: Plan,
    release: Mapping[str, Any],
    soc: str,
    names: Sequence[str],
    left: Sequence[str],
    model: OnnxFile | None,
    world: World,
) -> str:
    """README.md of door `shards`; `world` is that of any stage."""
    way = plan.strategy
    lines = [
        f"# {model_name(plan)} with ATC, from slices: {way.parallelism().describe()}",
        "",
        f"For {printable(plan.cluster.title)}, soc_version {printable(soc)}, CANN "
        f"{release['versions']} ({release['pages']} of the ATC guide). Files: {', '.join(names)}.",
        "",
        "## Steps",
        "",
        *(_export(plan) if model is None else _cut(way.tp)),
        *loading(world.ranks, len(world.replicas)),
        "",
        "## Assumed",
        "",
        *(_assumed(plan) if model is None else []),
        *switches(plan),
        *left,
        "- Not run on a device by the tool that wrote this.",
    ]
    if model is None:
        lines += ["", "## What the plan promises", "", *predicted(plan)]
        lines.append(f"- priced for engine profile {printable(plan.request.engine_profile)}")
    return "\n".join(lines) + "\n"


def _cut(ranks: int) -> list[str]:
    return [
        f"1. `shards` holds the model cut for {ranks} ranks: each weight that divides is sliced, "
        "AllGather and AllReduce (domain com.microsoft) make the outputs whole. The guide shows "
        "this door with .air slices; if your ATC does not know these two operators, map them to "
        "HcomAllGather and HcomAllReduce with a parser plug-in.",
        "2. Load the CANN environment (`source set_env.sh` of the toolkit).",
        "3. `./atc.sh` builds one distributed model from the slices.",
    ]


def _export(plan: Plan) -> list[str]:
    layers = balanced_stages(model_of(plan), plan.strategy.parallelism())
    where = "PREFILL_SHARDS and DECODE_SHARDS"
    if len(layers) > 1:
        where += " (sub-folders stage0, stage1, ...)"
    ends = [sum(layers[: i + 1]) for i in range(len(layers))]
    holds = [f"stage {i}: layers {end - layers[i]} to {end - 1}" for i, end in enumerate(ends)]
    return [
        "1. Export one graph a rank and phase, holding the plan's slices of the weights "
        f"(target mindspore slices a checkpoint so) and its collectives, as {AIR.format(rank=0)}, "
        f"{AIR.format(rank=1)}, ... (torchair.dynamo_export), into {where}."
        + (f" {'; '.join(holds)}." if len(holds) > 1 else ""),
        "2. Name the groups of the collectives as comm_group in model_relation_config does, or "
        "write your export's names there; then load the CANN environment.",
        "3. `PREFILL_SHARDS=prefill DECODE_SHARDS=decode ./atc.sh` writes the offline models. "
        "Names of files and folders hold letters, digits and `_-.` only.",
    ]


def _assumed(plan: Plan) -> list[str]:
    lines = [
        "- Ranks count data-parallel groups that share experts, then context parts, then tp.",
        f"- The plan priced {plan.strategy.attention} attention.",
    ]
    if plan.strategy.pp > 1:
        lines.append(
            "- Each stage is a model of its own, loaded in a session on its own devices: the "
            "application passes the hidden state from one to the next, and keeps as many "
            "microbatches in flight as there are stages."
        )
    return lines
