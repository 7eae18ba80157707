"""The environment and flags of one `vllm serve`, for every target that starts vLLM on Ascend.

Values come from `search/data/vllm_ascend.toml`, with their sources. Lengths are rounded up to the
KV block; decode graphs are captured for powers of two up to the batch, in whole steps: what a
sequence verifies, and with sequence parallelism tp.
"""

from __future__ import annotations

import json
import math

from shardplan.models.errors import InputError
from shardplan.search.emit.common import Raw, algorithm_variable, model_name, round_up, table
from shardplan.search.emit.vllm_layout import Launch, Split
from shardplan.search.emit.vllm_modules import module_sizes
from shardplan.search.emit.vllm_schemes import Checkpoint
from shardplan.search.plan import Plan

__all__ = [
    "DTYPES",
    "Flag",
    "capture_sizes",
    "environment",
    "longest_request",
    "serve_flags",
]

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""16-bit types as the engine calls them."""

Flag = tuple[str, str | None]
"""Name and value; None for a switch."""


def environment(plan: Plan, family: str, split: Split) -> list[tuple[str, str]]:
    """(variable, value) of a server."""
    facts = table("vllm_ascend")
    wanted = [
        (entry["name"], entry["value"])
        for entry in facts["environment"]
        if family in entry["families"]
    ]
    buffers = facts["hccl_buffsize_mib"]
    wanted.append(("HCCL_BUFFSIZE", str(buffers["experts" if split.experts else "plain"])))
    way = plan.strategy
    wanted += algorithm_variable(plan).items()
    if way.pp > 1 and way.stage_layers:
        layers = ",".join(str(count) for count in way.stage_layers)
        wanted.append(("VLLM_PP_LAYER_PARTITION", layers))
    return wanted


def serve_flags(
    plan: Plan, family: str, checkpoint: Checkpoint, split: Split, one: Launch
) -> list[Flag]:
    """Flags of one `vllm serve`."""
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
    dtype = "float16" if family == "310p" else DTYPES.get(way.weight_dtype)
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


def longest_request(plan: Plan, block: int) -> int:
    """Tokens of the longest request in whole blocks, at most the model's context."""
    work = plan.request.workload
    longest = round_up(work.input_len + work.output_len, block)
    return min(longest, plan.model.max_context) if plan.model.max_context else longest


def capture_sizes(plan: Plan) -> list[int]:
    """Batches of decode graphs, ascending: the plan's, else powers of two, and the largest."""
    batch, sized = plan.strategy.batch, plan.batching
    if sized is not None and sized.decode is not None:
        return sorted({*(size for size in sized.decode.sizes if size < batch), batch})
    return sorted({*(2**i for i in range(batch.bit_length()) if 2**i < batch), batch})


def _sizes(plan: Plan) -> list[Flag]:
    """Batch, lengths and memory, in tokens and shares."""
    way, work = plan.strategy, plan.request.workload
    block = int(table("vllm_ascend")["block_size"]["value"])
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
        ("--max-model-len", str(longest_request(plan, block))),
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
    each = 1 + way.mtp
    step = math.lcm(each, way.tp if way.sp else 1)
    rounded = sorted({round_up(size * each, step) for size in capture_sizes(plan)})
    config = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": rounded}
    return [*flags, ("--compilation-config", json.dumps(config))]
