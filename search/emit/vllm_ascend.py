"""Target `vllm-ascend`: one `vllm serve` script a node, a load test, and a README.

    serve_node<i>.sh   environment and command of node i; more flags may follow on its line
    balancer.conf      where there are several servers: nginx before them
    bench.sh           `vllm bench serve` with the plan's workload
    README.md          steps, assumptions, a first request, what the plan promises

Flags, environment and quantization schemes are those of `search/data/vllm_ascend.toml`, which
names the releases they were read from; how ranks become servers is in `vllm_layout`. Lengths are
rounded up to the KV block; modules split over data-parallel ranks are in `vllm_modules`. Left out,
and refused: context parallelism (the plugin has it for prefill and decode apart, for some models
and runners), unfused attention, dtypes without a scheme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from shardplan.costmodel.kernels.algorithms import AUTO
from shardplan.models.errors import InputError
from shardplan.search.algorithms import hccl_algo
from shardplan.search.emit.common import (
    Raw,
    check_algorithm,
    command_line,
    family_of,
    graph_batches,
    model_name,
    printable,
    refuse,
    table,
)
from shardplan.search.emit.vllm_layout import Launch, Split, has_experts, launches, split_servers
from shardplan.search.emit.vllm_modules import module_rules, module_sizes
from shardplan.search.emit.vllm_readme import balancer, bench, readme
from shardplan.search.emit.vllm_schemes import Checkpoint, checkpoint_of
from shardplan.search.legality import Role
from shardplan.search.plan import Plan

__all__ = ["Flag", "checked_family", "files", "script"]

_TARGET = "vllm-ascend"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

Flag = tuple[str, str | None]


def files(plan: Plan) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that vLLM on Ascend cannot run."""
    if plan.pools:
        from shardplan.search.emit.vllm_disagg import disagg_files

        return disagg_files(plan)
    family = checked_family(plan)
    checkpoint = checkpoint_of(plan, family)
    split = split_servers(plan)
    todo = launches(plan, split)
    nodes = sorted({one.slot.node for one in todo})
    made = {
        f"serve_node{node}.sh": script(
            plan, family, checkpoint, split, [one for one in todo if one.slot.node == node]
        )
        for node in nodes
    }
    if split.servers > 1:
        made["balancer.conf"] = balancer(todo)
    made["bench.sh"] = bench(plan, checkpoint, split)
    made["README.md"] = readme(plan, checkpoint, split, todo)
    return made


def checked_family(plan: Plan, role: Role = "mixed") -> str:
    """Family of the plan's device. `InputError` for a plan that vLLM on Ascend cannot run."""
    facts = table("vllm_ascend")
    hint = "its devices are 310P, A2, A3 and 950" + (
        "; use target atc" if plan.cluster.soc_versions else "; plan for an Ascend cluster"
    )
    family = family_of(plan, _TARGET, facts["families"], hint)
    _check_strategy(plan, family, role)
    return family


def _check_strategy(plan: Plan, family: str, role: Role) -> None:
    """`InputError` for what no flag of the engine says."""
    way, work = plan.strategy, plan.request.workload
    longest = work.input_len + work.output_len
    rules = (
        (way.cp > 1, "context parallelism", f"cp={way.cp}", "search with cp=1"),
        (
            way.attention == "naive",
            "its attention is always fused",
            "attention=naive",
            "search with flash attention",
        ),
        (
            way.sp and way.tp == 1,
            "sequence parallelism needs tensor parallelism",
            "sp=True, tp=1",
            "search with sp off",
        ),
        (
            way.sp and has_experts(plan) and way.ep == 1,
            "sequence parallelism of a model with experts needs expert parallelism",
            "sp=True, ep=1",
            f"try sp off, or ep={way.tp}",
        ),
        *_switch_rules(plan, family),
        *_ahead_rules(plan, role),
        *module_rules(plan),
        (
            0 < plan.model.max_context < longest,
            "requests must fit the model's context",
            f"input_len + output_len = {longest}, max_context = {plan.model.max_context}",
            "plan for shorter requests",
        ),
    )
    for broken, rule, got, hint in rules:
        if broken:
            raise refuse(_TARGET, rule, got=got, hint=hint)
    check_algorithm(_TARGET, plan)


def _ahead_rules(plan: Plan, role: Role) -> list[tuple[bool, str, str, str]]:
    """(broken, rule, got, hint) of tokens predicted ahead."""
    way, facts = plan.strategy, table("vllm_ascend")["speculative"]
    known, most = facts["architectures"], facts["most"]
    return [
        (
            way.mtp > most,
            f"at most {most} tokens are predicted ahead",
            f"mtp={way.mtp}",
            "search with a smaller mtp",
        ),
        (
            way.mtp > 0 and plan.model.architecture not in known,
            f"tokens are predicted ahead with {', '.join(known)}",
            f"mtp={way.mtp}, architecture={printable(plan.model.architecture)}",
            "search with mtp off",
        ),
        (
            way.mtp > 0 and way.pp > 1 and role != "prefill",
            "a server that predicts tokens ahead has one pipeline stage",
            f"mtp={way.mtp}, pp={way.pp}",
            "search with mtp off, or pp=1",
        ),
    ]


def _switch_rules(plan: Plan, family: str) -> list[tuple[bool, str, str, str]]:
    """(broken, rule, got, hint) of the plugin's switches that a plan sets."""
    way, facts = plan.strategy, table("vllm_ascend")["switches"]
    fused, prefetch = way.fused_collectives, way.weight_prefetch
    dense = not has_experts(plan)
    return [
        (
            fused and (family not in facts["fused_families"] or way.tp not in facts["fused_tp"]),
            "fused collectives run on Atlas A2 with tp 2, 4 or 8",
            f"fused_collectives=True, device family {family}, tp={way.tp}",
            "search with fused collectives off",
        ),
        (
            fused and (way.sp or way.weight_dtype not in _DTYPES),
            "fused collectives take 16-bit weights and no sequence parallelism",
            f"fused_collectives=True, sp={way.sp}, weight_dtype={printable(way.weight_dtype)}",
            "search with fused collectives off",
        ),
        (
            prefetch and family not in facts["prefetch_families"],
            "weight prefetch runs on Atlas A2, A3 and 950",
            f"weight_prefetch=True, device family {family}",
            "search with weight prefetch off",
        ),
        (
            prefetch and dense and not (way.sp or fused),
            "weight prefetch of a dense model needs sequence parallelism or fused collectives",
            "weight_prefetch=True, sp=False, fused_collectives=False",
            "search with weight prefetch off",
        ),
    ]


def script(
    plan: Plan,
    family: str,
    checkpoint: Checkpoint,
    split: Split,
    here: Sequence[Launch],
    more: Callable[[Launch], list[Flag]] = lambda _: [],
) -> str:
    """The script of one node: environment, then one command, or several side by side.

    `more`: further flags of a launch.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# Serves the plan's model on one node; README.md says in which order to start the nodes.",
        "set -euo pipefail",
        *checkpoint.shell,
        'case "$MODEL" in -*) echo "MODEL must not begin with a dash" >&2; exit 2 ;; esac',
        *_network(here),
        *_environment(plan, family, split),
        "",
    ]
    commands = [
        command_line("vllm_ascend", "serve", ["vllm", "serve", Raw('"$MODEL"')], flags)
        + ' \\\n  "$@"'
        for flags in ([*_flags(plan, family, checkpoint, split, one), *more(one)] for one in here)
    ]
    visible = [",".join(str(device) for device in one.slot.devices) for one in here]
    if len(commands) == 1:
        lines += [f"export ASCEND_RT_VISIBLE_DEVICES={visible[0]}", f"exec {commands[0]}"]
    else:
        lines.append("trap 'kill $(jobs -p) 2>/dev/null || true' EXIT")
        for devices, command in zip(visible, commands, strict=True):
            lines.append(f"ASCEND_RT_VISIBLE_DEVICES={devices} {command} &")
        lines.append("wait -n  # the first server to end ends all, so that none is missed")
    return "\n".join(lines) + "\n"


def _network(here: Sequence[Launch]) -> list[str]:
    """Addresses that a server of several nodes must be told."""
    if here[0].nodes == 1:
        return []
    head = here[0].head
    return [
        f': "${{HEAD_ADDRESS:?set HEAD_ADDRESS to the IP address of node {head}}}"',
        ': "${NODE_ADDRESS:?set NODE_ADDRESS to the IP address of this node}"',
        ': "${NIC:?set NIC to the network interface that has NODE_ADDRESS}"',
        'export HCCL_IF_IP="$NODE_ADDRESS" HCCL_SOCKET_IFNAME="$NIC"',
        'export GLOO_SOCKET_IFNAME="$NIC" TP_SOCKET_IFNAME="$NIC"',
    ]


def _environment(plan: Plan, family: str, split: Split) -> list[str]:
    facts = table("vllm_ascend")
    wanted = [
        (entry["name"], entry["value"])
        for entry in facts["environment"]
        if family in entry["families"]
    ]
    buffers = facts["hccl_buffsize_mib"]
    wanted.append(("HCCL_BUFFSIZE", str(buffers["experts" if split.experts else "plain"])))
    way = plan.strategy
    if way.collectives != AUTO:
        wanted.append(("HCCL_ALGO", hccl_algo(way.collectives)))
    if way.pp > 1 and way.stage_layers:
        layers = ",".join(str(count) for count in way.stage_layers)
        wanted.append(("VLLM_PP_LAYER_PARTITION", layers))
    return [f'export {name}="${{{name}:-{value}}}"' for name, value in wanted]


def _flags(
    plan: Plan, family: str, checkpoint: Checkpoint, split: Split, one: Launch
) -> list[Flag]:
    way = plan.strategy
    flags: list[Flag] = []
    if one.index == 0:
        port = table("vllm_ascend")["ports"]["serve"] + one.port_offset
        flags += [("--host", Raw('"${HOST:-0.0.0.0}"')), ("--port", str(port))]
    flags += [
        ("--served-model-name", model_name(plan)),
        ("--tensor-parallel-size", str(way.tp)),
        ("--pipeline-parallel-size", str(way.pp)),
        *_across_nodes(split, one, way.tp * way.pp),
    ]
    if way.tp * way.pp > 1:
        flags.append(("--distributed-executor-backend", "mp"))
    if split.experts:
        flags.append(("--enable-expert-parallel", None))
    flags += _sizes(plan)
    dtype = "float16" if family == "310p" else _DTYPES.get(way.weight_dtype)
    if dtype:
        flags.append(("--dtype", dtype))
    if checkpoint.quantized:
        flags.append(("--quantization", "ascend"))
    return [*flags, *_graphs(plan, family)]


def _across_nodes(split: Split, one: Launch, copy: int) -> list[Flag]:
    """How the server's processes find each other."""
    ports = table("vllm_ascend")["ports"]
    head = Raw('"$HEAD_ADDRESS"')
    if one.spans:
        flags: list[Flag] = [
            ("--nnodes", str(one.nodes)),
            ("--node-rank", str(one.index)),
            ("--master-addr", head),
            ("--master-port", str(ports["master"])),
        ]
    else:
        flags = [("--data-parallel-size", str(split.groups))]
        if one.nodes > 1:
            local = one.slot.ranks // copy
            flags.append(("--data-parallel-size-local", str(local)))
            if one.index:
                flags.append(("--data-parallel-start-rank", str(local * one.index)))
            flags += [
                ("--data-parallel-address", head),
                ("--data-parallel-rpc-port", str(ports["data_parallel_rpc"])),
            ]
    if one.index:
        flags.append(("--headless", None))
    return flags


def _sizes(plan: Plan) -> list[Flag]:
    """Batch, lengths and memory, in tokens and shares."""
    way, work = plan.strategy, plan.request.workload
    block = int(table("vllm_ascend")["block_size"]["value"])
    longest = -(-(work.input_len + work.output_len) // block) * block
    if plan.model.max_context:
        longest = min(longest, plan.model.max_context)
    least = way.batch * (1 + way.mtp)
    if way.chunk < least:
        raise InputError(
            "max_num_batched_tokens must be at least max_num_seqs"
            + (" times the tokens that a step verifies" if way.mtp else ""),
            got=f"chunk={way.chunk}, batch={way.batch}" + (f", mtp={way.mtp}" if way.mtp else ""),
            hint=f"plan with a chunk of at least {least} tokens",
        )
    flags: list[Flag] = [
        ("--max-num-seqs", str(way.batch)),
        ("--max-num-batched-tokens", str(way.chunk)),
        ("--max-model-len", str(longest)),
        ("--block-size", str(block)),
    ]
    if plan.memory:
        share = min(row.capacity_bytes for row in plan.memory) / plan.cluster.hbm_bytes
        text = f"{math.floor(share * 1e4 + 1e-6) / 1e4:g}"  # rounded down: never more than planned
        flags.append(("--gpu-memory-utilization", text))
    if work.prefix_hit > 0:
        flags.append(("--enable-prefix-caching", None))
    return flags


def _sent_across_roce(plan: Plan, family: str) -> bool:
    """Whether tokens are sent between supernodes: A3 then needs the hierarchical algorithm."""
    way, most = plan.strategy, plan.cluster.fast_ranks
    return family == "a3" and way.exchange == "alltoall" and 0 < most < way.ep


def _speculative(plan: Plan) -> list[Flag]:
    """Tokens that the model's own layer predicts ahead."""
    depth = plan.strategy.mtp
    if not depth:
        return []
    method = table("vllm_ascend")["speculative"]["method"]
    config = {"method": method, "num_speculative_tokens": depth}
    return [("--speculative-config", json.dumps(config))]


def _additional(plan: Plan, family: str) -> list[Flag]:
    """The plugin's own switches, one JSON object."""
    way, names = plan.strategy, table("vllm_ascend")["additional_config"]
    on: dict[str, object] = {}
    if way.sp:
        on[names["sequence_parallel"]] = True
    if way.weight_prefetch:
        on[names["weight_prefetch"]] = {"enabled": True}
    if way.fused_collectives:
        on[names["fused_collectives"]] = True
    if _sent_across_roce(plan, family):
        on[names["sent_across_roce"]] = True
    if modules := module_sizes(plan):
        on[names["module_ranks"]] = modules
    return [("--additional-config", json.dumps(on))] if on else []


def _graphs(plan: Plan, family: str) -> list[Flag]:
    """Decode graphs of the sizes that the plan meets, or none in eager mode."""
    way = plan.strategy
    flags = [*_speculative(plan), *_additional(plan, family)]
    if plan.request.engine_profile == "vllm-ascend-eager":
        return [*flags, ("--enforce-eager", None)]
    step, each = way.tp if way.sp else 1, 1 + way.mtp
    rounded = sorted({-(-size * each // step) * step for size in graph_batches(plan)})
    config = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": rounded}
    return [*flags, ("--compilation-config", json.dumps(config))]
