"""Target `megatron`: the parallelism arguments of Megatron-LM in a start script.

    megatron.sh   torchrun of a Megatron script with the plan's arguments; the rest are the user's
    README.md     what they mean, what is not set

Ranks: Megatron's default order tp-cp-ep-dp-pp (tp fastest) is the plan's pp>dp>cp>tp, and
--use-tp-pp-dp-mapping its dp>pp>cp>tp. Experts over ep ranks: within a tp group ep comes after
expert tp, beyond it the experts are whole on a rank (--expert-tensor-parallel-size 1).
Source: NVIDIA/Megatron-LM megatron/training/arguments.py and
megatron/core/parallel_state.py (`RankGenerator`). Left out, and refused: modules over other ranks
than tp, stage cuts that are uneven in the middle, tokens sent to experts without sequence
parallelism (Megatron asks for it), other rank orders.
"""

from __future__ import annotations

from shardplan.models.apply import ShardedGraph
from shardplan.models.parallel import AXES, Axis
from shardplan.search.emit.common import (
    Raw,
    command_line,
    model_name,
    place,
    predicted,
    printable,
    refuse,
)
from shardplan.search.emit.placing import TARGET_ORDER
from shardplan.search.emit.weights import applied, check_modules_alike
from shardplan.search.plan import Plan

__all__ = ["files"]

_TARGET = "megatron"
_ORDERS: dict[tuple[Axis, ...], bool] = {AXES: False, TARGET_ORDER: True}
"""Rank orders, and whether each needs the flag."""


def files(plan: Plan) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that Megatron's arguments cannot express."""
    graph = applied(plan, _TARGET)
    _check(plan)
    return {"megatron.sh": _script(plan, graph), "README.md": _readme(plan)}


def _check(plan: Plan) -> None:
    way = plan.strategy
    check_modules_alike(plan, _TARGET, "Megatron splits all modules over the same ranks")
    if way.mtp:
        rule = "drafting with a prediction layer is no option of its inference"
        raise refuse(_TARGET, rule, got=f"mtp={way.mtp}", hint="search with mtp off")
    if way.ep > 1 and way.tp > 1 and not way.sp:
        raise refuse(
            _TARGET,
            "experts over ranks beside tensor parallelism need sequence parallelism",
            got=f"ep={way.ep}, tp={way.tp}, sp=off",
            hint="search with --only sp=on, or --only tp=1",
        )
    if way.order not in _ORDERS:
        raise refuse(
            _TARGET,
            "ranks are numbered pp>dp>cp>tp or dp>pp>cp>tp",
            got=f"order={'>'.join(way.order)}",
            hint="search with one of them",
        )


def _stage_flags(graph: ShardedGraph) -> list[tuple[str, str | None]]:
    """Layers of the first and the last stage, where they are not those of the middle."""
    layers = [stage.last - stage.first for stage in graph.stages]
    if len(set(layers)) == 1:
        return []
    middle = layers[1:-1]
    if len(set(middle)) > 1:
        raise refuse(
            _TARGET,
            "all stages but the first and the last hold as many layers",
            got=f"stage_layers={','.join(map(str, layers))}",
            hint="search with a pp that divides the layers",
        )
    return [
        ("--decoder-first-pipeline-num-layers", str(layers[0])),
        ("--decoder-last-pipeline-num-layers", str(layers[-1])),
    ]


def _flags(plan: Plan, graph: ShardedGraph) -> list[tuple[str, str | None]]:
    way = plan.strategy
    flags: list[tuple[str, str | None]] = [
        ("--tensor-model-parallel-size", str(way.tp)),
        ("--pipeline-model-parallel-size", str(way.pp)),
        *_stage_flags(graph),
        ("--context-parallel-size", str(way.cp)),
    ]
    if graph.model.spec.moe is not None:
        flags.append(("--expert-model-parallel-size", str(way.ep)))
        flags.append(("--expert-tensor-parallel-size", str(max(way.tp // way.ep, 1))))
    if way.sp and way.tp > 1:
        flags.append(("--sequence-parallel", None))
    if _ORDERS[way.order] and way.pp > 1 and way.dp > 1:
        flags.append(("--use-tp-pp-dp-mapping", None))
    return flags


def _script(plan: Plan, graph: ShardedGraph) -> str:
    way, per_node = plan.strategy, plan.cluster.ranks_per_node
    (slots,) = place(_TARGET, groups=1, ranks=way.ranks, per_node=per_node)
    flags: list[tuple[str, str | None]] = [
        ("--nnodes", str(len(slots))),
        ("--nproc-per-node", str(slots[0].ranks)),
        ("--node-rank", Raw('"${NODE_RANK:-0}"')),
        ("--master-addr", Raw('"${MASTER_ADDR:-127.0.0.1}"')),
        ("--master-port", Raw('"${MASTER_PORT:-6000}"')),
    ]
    start = command_line("megatron", "megatron", ["torchrun"], flags)
    script = command_line("megatron", "megatron", [Raw('"$SCRIPT"')], _flags(plan, graph))
    lines = [
        "#!/usr/bin/env bash",
        "# Starts one node's ranks; the arguments of the model follow on the command line.",
        "set -euo pipefail",
        ': "${SCRIPT:?set SCRIPT to the Megatron script to run}"',
        "",
        f'exec {start} \\\n  {script} \\\n  "$@"',
    ]
    return "\n".join(lines) + "\n"


def _readme(plan: Plan) -> str:
    way = plan.strategy
    lines = [
        f"# {model_name(plan)} with Megatron-LM: {way.parallelism().describe()}",
        "",
        f"For {printable(plan.cluster.title)}, {way.ranks} ranks.",
        "",
        "`SCRIPT=tools/run_text_generation_server.py ./megatron.sh MODEL_ARGUMENTS` on every node, "
        "with NODE_RANK, MASTER_ADDR and MASTER_PORT set where there are several. Data-parallel "
        f"groups ({way.dp}) are what is left of the world beside the sizes given.",
        "",
        "- Sizes, checkpoint and tokenizer of the model are yours to give.",
        "- Megatron pads the vocabulary to a multiple of 128 times tp "
        "(--make-vocab-size-divisible-by); the plan priced it unpadded.",
        "",
        "## What the plan promises",
        "",
        *predicted(plan),
        f"- priced for engine profile {printable(plan.request.engine_profile)}",
    ]
    return "\n".join(lines) + "\n"
