"""Rows of phase serve: a serving benchmark, priced for all points of a fleet at once.

    slots of a dp group = min(max_num_seqs, what the memory holds, ceil(concurrency / dp))
    memory holds        = (capacity - everything but the cache) // cache of input + output / 2
                          tokens, the mean length of a sequence in flight, in whole blocks

A closed loop of `concurrency` requests runs ten prompts for each, as published benchmarks do
(InferenceMAX: --num-prompts of ten times --max-concurrency), unless `num_prompts` says otherwise.
`max_num_seqs` and `max_num_batched_tokens` are those of one dp group (one engine) and default to
the engine profile's. Without `concurrency` a closed loop fills every slot, in steady state. Times
are those of `shardplan.costmodel.run_out`; `step_s` and its parts are of one average step, and
`memory_bytes` is that of the slots in use. Fewer requests in flight than dp groups leave groups
idle. Of tokens predicted ahead (`mtp`) the share `mtp_acceptance` is kept, by default the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from shardplan.costmodel.acceptance import default_acceptance
from shardplan.costmodel.bulk import Fleet
from shardplan.costmodel.bulk_memory import FleetMemory
from shardplan.costmodel.confidence import Confidence, serving_confidence
from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.run_out import Run, run_out
from shardplan.costmodel.serving import ServingInput
from shardplan.search.estimate_steps import Step

__all__ = ["SERVE_ARRAYS", "Served", "price_serving"]

SERVE_ARRAYS = (
    "input_len",
    "output_len",
    "concurrency",
    "request_rate",
    "num_prompts",
    "prefix_hit",
    "mtp_acceptance",
    "max_num_seqs",
    "max_num_batched_tokens",
)
"""Columns that enter as arrays; NaN where a cell is empty and has no default."""
_PROMPTS_EACH = 10.0
"""Prompts of a closed loop for each request in flight, where nothing is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What each point gives, beside the parts of an average step."""

    step: Step
    columns: Mapping[str, Array]
    """The output columns of phase serve."""


def _chosen(given: Mapping[str, Array], engine: EngineProfile) -> tuple[Array, Array]:
    """(slots, step tokens) that the engine allows a dp group."""
    seqs, chunk = given["max_num_seqs"], given["max_num_batched_tokens"]
    seqs = np.where(np.isnan(seqs), float(engine.max_num_seqs), seqs)
    return seqs, np.where(np.isnan(chunk), float(engine.max_num_batched_tokens), chunk)


def _prompts(given: Mapping[str, Array], groups: ArrayLike) -> Array:
    """Prompts of the run, were no dp group idle; infinity for a steady state."""
    closed = np.isinf(given["request_rate"]) & ~np.isnan(given["concurrency"])
    in_flight = np.maximum(given["concurrency"], as_array(groups))
    usual = np.where(closed, _PROMPTS_EACH * in_flight, np.inf)
    return np.where(np.isnan(given["num_prompts"]), usual, given["num_prompts"])


def _acceptance(fleet: Fleet, asked: Array) -> Array:
    """Share of the tokens predicted ahead that are kept; the model's own where nothing is said."""
    specs = [model.graphs["decode"].model.spec for model in fleet.models]
    own = np.asarray([default_acceptance(one.architecture).value for one in specs])
    return np.where(np.isnan(asked), own[fleet.which], asked)


def price_serving(fleet: Fleet, memory: FleetMemory, given: Mapping[str, Array]) -> Served:
    """Price a benchmark on each point `[points]` of a fleet; `given` holds `SERVE_ARRAYS`."""
    slots, chunk = _chosen(given, fleet.engine)
    context = given["input_len"] + given["output_len"] / 2.0
    fits = memory.slots(chunk=chunk, context=context)
    allowed, slots = slots, np.maximum(np.minimum(slots, fits), 1.0)
    in_flight = given["concurrency"] / fleet.groups
    in_flight = np.where(np.isnan(in_flight), slots, in_flight)
    asked = ServingInput(
        batch=slots,
        chunk=chunk,
        input_len=given["input_len"],
        output_len=given["output_len"],
        prefix_hit=given["prefix_hit"],
        in_flight=np.maximum(in_flight, 1.0),
        mtp=fleet.mtp,
        acceptance=_acceptance(fleet, given["mtp_acceptance"]),
        **fleet.choices[0]._asdict(),
    )
    prompts = _prompts(given, fleet.groups)
    run = run_out(
        fleet,
        asked,
        request_rate=given["request_rate"],
        num_prompts=prompts,
        allowed=allowed,
    )
    held = memory.fullest_bytes(batch=np.ceil(run.slots), step_tokens=chunk, context=context)
    used = np.where(np.isfinite(given["request_rate"]), 1.0, np.minimum(in_flight, 1.0))
    state = replace(asked, batch=run.slots, in_flight=None)
    sure = serving_confidence(fleet, state, run.served)
    columns = _columns(run, used)
    return Served(
        step=_mean_step(run, held, sure),
        columns={**columns, **_rates(run, columns, given, sure, used)},
    )


def _rates(
    run: Run,
    columns: Mapping[str, Array],
    given: Mapping[str, Array],
    sure: Confidence,
    used: Array,
) -> Mapping[str, Array]:
    """The band of the output rate: as wide as that of the steps, but never above what is offered.

    Where fewer requests are offered than the slots can serve, the rate falls only if the slots
    could serve less than that.
    """
    rate = columns["output_tokens_per_s"]
    offered = given["request_rate"] * given["output_len"]
    most = run.capacity_requests_per_s * given["output_len"] * used
    spare = most > offered
    low = np.where(spare, np.minimum(rate, most / sure.high), rate / sure.high)
    high = np.where(spare, rate, np.minimum(rate / sure.low, np.maximum(offered, rate)))
    return {"output_tokens_per_s_low": low, "output_tokens_per_s_high": high}


def _mean_step(run: Run, memory_bytes: Array, sure: Confidence) -> Step:
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
        sure=sure,
    )


def _columns(run: Run, used: Array) -> Mapping[str, Array]:
    """The output columns; `used` is the share of dp groups that have work."""
    return {
        "ttft_mean_s": run.ttft_mean_s,
        "ttft_p50_s": run.ttft_p50_s,
        "ttft_p90_s": run.ttft_p90_s,
        "ttft_p99_s": run.ttft_p99_s,
        "tpot_mean_s": run.tpot_mean_s,
        "tpot_p50_s": run.tpot_p50_s,
        "tpot_p90_s": run.tpot_p90_s,
        "tpot_p99_s": run.tpot_p99_s,
        "output_tokens_per_s": run.output_tokens_per_s * used,
        "requests_per_s": run.requests_per_s * used,
    }
