"""Pools of a plan as the cost model takes them."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.disagg import step_prompts
from shardplan.costmodel.disagg_serve import Pools
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.step_mix import computed_prompt
from shardplan.search.plan import Plan, Pool

__all__ = ["pools_of"]


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
