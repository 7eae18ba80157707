"""What a person reads and runs of target `atc`: the build script and its README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardplan.search.emit.common import (
    Raw,
    command_line,
    model_name,
    predicted,
    printable,
    round_up,
    table,
)
from shardplan.search.emit.onnx_slices import OnnxFile, file_name
from shardplan.search.plan import Plan

__all__ = ["assumed", "atc_readme", "build_script", "loading", "no_table", "switches"]


def _shapes(plan: Plan) -> dict[str, str]:
    """`--input_shape` of both builds. Inputs are [batch, tokens], the mask [batch, context]."""
    step = int(table("atc")["sequence_block"]["value"])
    work, way = plan.request.workload, plan.strategy
    prompt = round_up(work.input_len, step)
    context = round_up(work.input_len + work.output_len, step)
    together = min(way.batch, max(1, way.chunk // prompt))
    sizes = {"prefill": (together, prompt, prompt), "decode": (way.batch, 1, context)}
    return {
        phase: f"input_ids:{b},{t};attention_mask:{b},{s};position_ids:{b},{t}"
        for phase, (b, t, s) in sizes.items()
    }


def no_table() -> str:
    return (
        "- No rank table is written: it needs the address of each device's network port. Read "
        "them with `hccn_tool -i DEVICE_ID -ip -g` and emit again with `device_addresses`."
    )


def build_script(plan: Plan, soc: str, model: OnnxFile | None = None) -> str:
    """atc.sh: both phases of models that the user exports, or the one ONNX file that is given."""
    if model is not None:
        return _one_build(plan, soc, file_name(model))
    flags: list[tuple[str, str | None]] = [
        ("--model", Raw('"$1"')),
        ("--framework", str(table("atc")["framework_onnx"]["value"])),
        ("--output", Raw('"$here/$2"')),
        ("--input_shape", Raw('"$3"')),
        ("--soc_version", soc),
        *_split_flags(plan),
    ]
    shapes = _shapes(plan)
    lines = [
        "#!/usr/bin/env bash",
        "# Builds the prefill and the decode model; README.md says what the files must hold.",
        "set -euo pipefail",
        'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
        ': "${PREFILL_MODEL:?set PREFILL_MODEL to the ONNX file of the prompt phase}"',
        ': "${DECODE_MODEL:?set DECODE_MODEL to the ONNX file of the decode phase}"',
        *(f"{phase}_shape='{shape}'" for phase, shape in shapes.items()),
        "",
        "build() {",
        "  " + command_line("atc", "atc", ["atc"], flags).replace("\n", "\n  "),
        "}",
        "",
        'build "$PREFILL_MODEL" prefill "${PREFILL_SHAPE:-$prefill_shape}"',
        'build "$DECODE_MODEL" decode "${DECODE_SHAPE:-$decode_shape}"',
    ]
    return "\n".join(lines) + "\n"


def _split_flags(plan: Plan) -> list[tuple[str, str | None]]:
    if plan.strategy.tp == 1:
        return []
    return [
        ("--distributed_cluster_build", "1"),
        ("--cluster_config", Raw('"$here/numa_config.json"')),
        ("--enable_graph_parallel", Raw('"1"')),
        ("--graph_parallel_option_path", Raw('"$here/parallel_option.json"')),
    ]


def _one_build(plan: Plan, soc: str, name: str) -> str:
    flags: list[tuple[str, str | None]] = [
        ("--model", Raw(f'"$here/model/{name}.onnx"')),
        ("--framework", str(table("atc")["framework_onnx"]["value"])),
        ("--output", Raw(f'"$here/{name}"')),
        ("--soc_version", soc),
        *_split_flags(plan),
    ]
    words = ["atc", Raw('${INPUT_SHAPE:+"--input_shape=$INPUT_SHAPE"}')]
    lines = [
        "#!/usr/bin/env bash",
        "# Builds the model; INPUT_SHAPE fixes inputs of dynamic shape, as x:8,1024.",
        "set -euo pipefail",
        'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
        "",
        command_line("atc", "atc", words, flags),
    ]
    return "\n".join(lines) + "\n"


def atc_readme(
    plan: Plan,
    release: Mapping[str, Any],
    soc: str,
    names: Sequence[str],
    left: Sequence[str],
    model: OnnxFile | None = None,
) -> str:
    """README.md of door `split`."""
    way = plan.strategy
    if model is not None:
        return _one_readme(plan, release, soc, names, left)
    held = printable(f"{way.weight_dtype} weights, {way.kv_dtype} KV cache")
    lines = [
        f"# {model_name(plan)} with ATC: tp {way.tp}, {way.dp} replica(s)",
        "",
        f"For {printable(plan.cluster.title)}, soc_version {printable(soc)}, CANN "
        f"{release['versions']} ({release['pages']} of the ATC guide). Files: {', '.join(names)}.",
        "",
        "## Steps",
        "",
        f"1. Export the model to ONNX twice, prompt phase and decode phase, holding {held}. ATC "
        "quantizes nothing: do that before exporting, and set --precision_mode where its default "
        "is not the precision of the plan.",
        "2. Load the CANN environment (`source set_env.sh` of the toolkit).",
        "3. `PREFILL_MODEL=prefill.onnx DECODE_MODEL=decode.onnx ./atc.sh` writes the offline "
        "models `prefill` and `decode` beside it. Names of files and folders hold letters, "
        "digits and `_-.` only.",
        *loading(way.tp, way.dp),
        "",
        "## Assumed",
        "",
        *assumed(plan),
        *left,
        "- Not run on a device by the tool that wrote this.",
        "",
        "## What the plan promises",
        "",
        *predicted(plan),
        f"- priced for engine profile {printable(plan.request.engine_profile)}",
    ]
    return "\n".join(lines) + "\n"


def _one_readme(
    plan: Plan, release: Mapping[str, Any], soc: str, names: Sequence[str], left: Sequence[str]
) -> str:
    way = plan.strategy
    lines = [
        f"# {model_name(plan)} with ATC: tp {way.tp}, {way.dp} replica(s)",
        "",
        f"For {printable(plan.cluster.title)}, soc_version {printable(soc)}, CANN "
        f"{release['versions']} ({release['pages']} of the ATC guide). Files: {', '.join(names)}.",
        "",
        "## Steps",
        "",
        "1. Load the CANN environment (`source set_env.sh` of the toolkit).",
        "2. `./atc.sh` builds the model that lies in `model`.",
        "3. Check its report for operators that were left whole.",
        *loading(way.tp, way.dp),
        "",
        "## Assumed",
        "",
        "- The compiler's solver chooses the split of each operator.",
        *left,
        "- Not run on a device by the tool that wrote this.",
    ]
    return "\n".join(lines) + "\n"


def assumed(plan: Plan) -> list[str]:
    way = plan.strategy
    return [
        "- The ONNX inputs are `input_ids` and `position_ids` [batch, tokens] and "
        "`attention_mask` [batch, context]; KV-cache inputs have static shapes in the file. Other "
        "names or inputs: set PREFILL_SHAPE and DECODE_SHAPE.",
        f"- Shapes are static: prefill {_shapes(plan)['prefill']}, decode "
        f"{_shapes(plan)['decode']}. Prompts are padded to the prefill length.",
        "- The compiler's solver chooses the split of each operator; the plan priced Megatron's "
        + ("with sequence parallelism." if way.sp else "without sequence parallelism."),
        f"- Attention is what the ONNX file and the compiler's fusion make it; the plan priced "
        f"{way.attention} attention.",
        *switches(plan),
    ]


def switches(plan: Plan) -> list[str]:
    way = plan.strategy
    if not (way.weight_prefetch or way.fused_collectives):
        return []
    return [
        "- The plan priced weight prefetch or fused collectives, which are an engine's switches; "
        "whether the compiler does the like is its own choice."
    ]


def loading(tp: int, dp: int) -> list[str]:
    if tp == 1:
        load = "4. Load the offline models with aclmdlLoadFromFile on one device"
        return [load + (f", once on each of {dp} devices." if dp > 1 else ".")]
    load = (
        "4. Load with a GE session (LoadGraph, then RunGraph); aclmdlLoadFromFile does not take "
        "a distributed build."
    )
    if dp == 1:
        return [load]
    return [
        load,
        f"5. Repeat step 4 in {dp} processes, one a replica, each with "
        f"ASCEND_RT_VISIBLE_DEVICES set to its own {tp} devices of one node (consecutive, from "
        "device 0 of node 0 on), and spread the requests over them.",
    ]
