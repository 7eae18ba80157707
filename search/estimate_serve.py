"""Rows of phase serve: a serving benchmark, priced for all rows of a layout at once.

    slots of a dp group = min(max_num_seqs, what the memory holds, ceil(concurrency / dp))
    memory holds        = (capacity - everything but the cache) // cache of input + output / 2
                          tokens, the mean length of a sequence in flight, in whole blocks

`max_num_seqs` and `max_num_batched_tokens` are those of one dp group (one engine) and default to
the engine profile's. Without `concurrency` a closed loop fills every slot. Times are those of
`shardplan.costmodel.run_out`; `step_s` and its parts are of one average step, and `memory_bytes`
is that of the slots in use. Fewer requests in flight than dp groups leave groups idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.run_out import Run, run_out
from shardplan.costmodel.serving import ServingInput
from shardplan.search.estimate_layout import Layout
from shardplan.search.estimate_steps import Step, fullest_bytes

__all__ = ["SERVE_ARRAYS", "Served", "memory_slots", "price_serving"]

SERVE_ARRAYS = (
    "input_len",
    "output_len",
    "concurrency",
    "request_rate",
    "num_prompts",
    "prefix_hit",
    "max_num_seqs",
    "max_num_batched_tokens",
)
"""Columns that enter as arrays; NaN where a cell is empty and has no default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What rows of one layout give, beside the parts of an average step."""

    step: Step
    columns: Mapping[str, Array]
    """The output columns of phase serve."""


def memory_slots(
    layout: Layout,
    *,
    weight_dtype: str,
    kv_dtype: str,
    attention: str,
    chunk: Array,
    context: Array,
) -> Array:
    """Sequences of `context` tokens that fit beside steps of `chunk` tokens; below 1 for none."""
    none = np.zeros_like(context)
    stages = layout.ledger.stages(
        layout.model.machine,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        attention=cast("AttentionKernel", attention),
        batch=none,
        tokens=chunk,
        context=context,
    )
    block = float(layout.engine.kv_block_tokens)
    held = np.ceil(context / block) * block
    most = np.full(context.shape, np.inf)
    for stage, memory in zip(layout.model.graphs["decode"].stages, stages, strict=True):
        each = held * layout.ledger.kv_bytes_per_token(stage, kv_dtype)
        free = layout.ledger.capacity_bytes - memory.total_bytes
        most = np.minimum(most, np.floor(free / each))
    return most


def _chosen(given: Mapping[str, Array], layout: Layout) -> tuple[Array, Array]:
    """(slots, step tokens) that the engine allows a dp group."""
    engine = layout.engine
    seqs, chunk = given["max_num_seqs"], given["max_num_batched_tokens"]
    seqs = np.where(np.isnan(seqs), float(engine.max_num_seqs), seqs)
    return seqs, np.where(np.isnan(chunk), float(engine.max_num_batched_tokens), chunk)


def price_serving(
    layout: Layout,
    *,
    weight_dtype: str,
    kv_dtype: str,
    attention: str,
    given: Mapping[str, Array],
) -> Served:
    """Price rows `[rows]` of one layout and choice of dtypes; `given` holds `SERVE_ARRAYS`."""
    kinds = {"weight_dtype": weight_dtype, "kv_dtype": kv_dtype, "attention": attention}
    slots, chunk = _chosen(given, layout)
    context = given["input_len"] + given["output_len"] / 2.0
    fits = memory_slots(layout, **kinds, chunk=chunk, context=context)
    slots = np.maximum(np.minimum(slots, fits), 1.0)
    in_flight = given["concurrency"] / layout.parallel.dp
    in_flight = np.where(np.isnan(in_flight), slots, in_flight)
    asked = ServingInput(
        batch=slots,
        chunk=chunk,
        input_len=given["input_len"],
        output_len=given["output_len"],
        prefix_hit=given["prefix_hit"],
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        attention=cast("AttentionKernel", attention),
        in_flight=np.maximum(in_flight, 1.0),
    )
    prompts = np.where(np.isnan(given["num_prompts"]), np.inf, given["num_prompts"])
    run = run_out(layout.model, asked, request_rate=given["request_rate"], num_prompts=prompts)
    batch = np.ceil(run.slots)
    memory = fullest_bytes(layout, **kinds, batch=batch, step_tokens=chunk, context=context)
    used = np.where(np.isfinite(given["request_rate"]), 1.0, np.minimum(in_flight, 1.0))
    return Served(step=_mean_step(run, memory), columns=_columns(run, used))


def _mean_step(run: Run, memory_bytes: Array) -> Step:
    """One average step; its parts sum to it."""
    mean = run.served
    compute = mean.compute_s + mean.memory_s
    overhead = np.maximum(mean.overhead_s, 0.0)
    return Step(
        step_s=compute + mean.collective_s + overhead,
        compute_s=compute,
        collective_s=mean.collective_s,
        overhead_s=overhead,
        memory_bytes=memory_bytes,
    )


def _columns(run: Run, used: Array) -> Mapping[str, Array]:
    """The output columns; `used` is the share of dp groups that have work."""
    return {
        "ttft_mean_s": run.ttft_mean_s,
        "ttft_p99_s": run.ttft_p99_s,
        "tpot_mean_s": run.tpot_mean_s,
        "tpot_p99_s": run.tpot_p99_s,
        "output_tokens_per_s": run.output_tokens_per_s * used,
        "requests_per_s": run.requests_per_s * used,
    }
