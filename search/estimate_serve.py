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
from numpy.typing import NDArray

from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.run_out import run_out
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
    slots: Array
    held_back: NDArray[np.bool_]
    """Whether memory, not the engine or the client, limits the slots."""
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
    dp = layout.parallel.dp
    kinds = {"weight_dtype": weight_dtype, "kv_dtype": kv_dtype, "attention": attention}
    allowed, chunk = _chosen(given, layout)
    context = given["input_len"] + given["output_len"] / 2.0
    fits = memory_slots(layout, **kinds, chunk=chunk, context=context)
    wanted = np.ceil(given["concurrency"] / dp)
    wanted = np.where(np.isnan(wanted), allowed, wanted)
    slots = np.maximum(np.minimum(allowed, fits), 1.0)
    in_flight = np.where(np.isnan(given["concurrency"]), slots, given["concurrency"] / dp)
    run = run_out(
        layout.model,
        ServingInput(
            batch=slots,
            chunk=chunk,
            input_len=given["input_len"],
            output_len=given["output_len"],
            prefix_hit=given["prefix_hit"],
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
            attention=cast("AttentionKernel", attention),
            in_flight=np.maximum(in_flight, 1.0),
        ),
        request_rate=given["request_rate"],
        num_prompts=np.where(np.isnan(given["num_prompts"]), np.inf, given["num_prompts"]),
    )
    memory = fullest_bytes(
        layout, **kinds, batch=np.ceil(run.slots), step_tokens=chunk, context=context
    )
    used = np.where(np.isfinite(given["request_rate"]), 1.0, np.minimum(in_flight, 1.0))
    mean = run.served
    compute = mean.compute_s + mean.memory_s
    total = compute + mean.collective_s + mean.overhead_s
    return Served(
        step=Step(
            step_s=total,
            compute_s=compute,
            collective_s=mean.collective_s,
            overhead_s=mean.overhead_s,
            memory_bytes=memory,
        ),
        slots=run.slots,
        held_back=fits < np.minimum(allowed, wanted),
        columns={
            "ttft_mean_s": run.ttft_mean_s,
            "ttft_p99_s": run.ttft_p99_s,
            "tpot_mean_s": run.tpot_mean_s,
            "tpot_p99_s": run.tpot_p99_s,
            "output_tokens_per_s": run.output_tokens_per_s * used,
            "requests_per_s": run.requests_per_s * used,
        },
    )
