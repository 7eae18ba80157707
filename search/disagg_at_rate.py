"""Pools of a plan as the cost model takes them, and what requests see of them at the asked rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardplan.costmodel.disagg import step_prompts
from shardplan.costmodel.disagg_run import DecodeSteps, run_pools
from shardplan.costmodel.disagg_serve import Pools
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.step_mix import computed_prompt
from shardplan.search.disagg_pools import columns_alone, role_input
from shardplan.search.disagg_space import Pool as Side
from shardplan.search.plan import Plan, Pool
from shardplan.search.plan_at_rate import AtRate, SpreadTimes
from shardplan.search.space import Choice

__all__ = ["decode_steps", "pools_at_rate", "pools_of"]

_SIZES = 24
"""Numbers of sequences that decode steps are priced at."""


def pools_of(plan: Plan, gone: tuple[int, int] = (0, 0)) -> Pools | None:
    """The pools of a plan without so many instances of each role; None where none is left.

    A plan that does not tell the seconds of a step with one prompt has full steps only.
    """
    prefill, decode = plan.pools
    x, y = (pool.instances - lost for pool, lost in zip(plan.pools, gone, strict=True))
    transfer, work = plan.transfer, plan.request.workload
    if transfer is None or min(x, y) < 1:
        return None

    def part_s(pool: Pool) -> Array:
        """Of a prompt's cache, what one rank sends or takes."""
        share = pool.strategy.ranks // pool.strategy.dp
        return np.array(transfer.request_bytes / share / transfer.link_bytes_per_s)

    prompt = computed_prompt(work.input_len, work.prefix_hit)
    held, _, _ = step_prompts(np.array(float(prefill.strategy.chunk)), prompt)
    times, known = prefill.times, prefill.times.one_s is not None
    ranks = min(x * prefill.strategy.ranks, y * decode.strategy.ranks)
    return Pools(
        prefill_instances=np.array(float(x)),
        prefill_per_s=np.array(x * times.requests_per_s),
        busy_s=np.array(times.step_s),
        one_s=np.array(times.one_s if known else times.step_s),
        prompts=held if known else np.ones(()),
        service_s=np.array(times.service_s),
        decode_per_s=np.array(y * decode.times.requests_per_s),
        step_s=np.array(decode.times.step_s),
        later_s=np.array(decode.times.service_s - decode.times.step_s),
        setup_s=np.array(transfer.setup_s),
        sent_s=part_s(prefill),
        received_s=part_s(decode),
        transfer_per_s=np.array(ranks * transfer.link_bytes_per_s / transfer.request_bytes),
    )


def decode_steps(side: Side, decode: Pool) -> DecodeSteps:
    """How long the steps of a plan's decode instances take, of any number of sequences."""
    way, choice = decode.strategy.parallelism(), Choice.of(decode.strategy)
    spread = np.round(np.geomspace(1.0, decode.strategy.batch, _SIZES)).astype(np.int64)
    sizes = tuple(dict.fromkeys(spread.tolist()))
    columns = columns_alone(replace(side, grid=sizes), way, choice)
    given = role_input(side, way, choice)
    return DecodeSteps(
        sequences=np.array(sizes, dtype=np.float64),
        step_s=np.broadcast_to(columns["step_s"], (len(sizes),)),
        instances=decode.instances,
        groups=decode.instances * way.dp,
        passes=1.0 + float(given.decode_steps),
        per_token=float(given.steps_per_token) if side.workload.output_len > 1 else 0.0,
    )


def _spread(seconds: tuple[float, float, float, float]) -> SpreadTimes:
    return SpreadTimes(**dict(zip(SpreadTimes.model_fields, seconds, strict=True)))


def pools_at_rate(side: Side, plan: Plan) -> Plan:
    """The plan with what requests see at the asked rate, where one is; `side`: of decode."""
    rate, pools = plan.request.workload.request_rate, pools_of(plan)
    if rate is None or pools is None:
        return plan
    steps = decode_steps(side, plan.pools[1])
    run = run_pools(pools, steps, rate)
    found = AtRate(
        requests_per_s=rate,
        used=max(rate / float(most) for most in (pools.prefill_per_s, pools.decode_per_s)),
        concurrency=run.in_flight,
        end_to_end_s=run.end_to_end_s,
        ttft=_spread(run.ttft_s),
        tpot=_spread(run.tpot_s),
    )
    return plan.model_copy(update={"at_rate": found})
