"""What plans of pools tell of requests at the asked rate, beside the simulator."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shardplan.costmodel.disagg_run import DecodeSteps, run_pools
from shardplan.costmodel.simulate.lengths import Fixed
from shardplan.costmodel.simulate.workload import Demand
from shardplan.search.api import search
from shardplan.search.disagg_at_rate import pools_of
from shardplan.search.plan import Plan
from shardplan.search.simulate import simulate_plan

_CASES = (
    ("llama-3.1-8b", "vllm-ascend", 2048, 128, 12.0),
    ("qwen3-32b", "mindie", 1024, 256, 4.0),
    ("qwen3-32b", "vllm-ascend", 3000, 400, 2.0),
)
"""Model, engine, prompt and output, requests a second."""


def _plan(model: str, engine: str, prompt: int, output: int, rate: float) -> Plan:
    return search(
        model,
        "atlas-800t-a2",
        serving="disagg",
        engine_profile=engine,
        input_len=prompt,
        output_len=output,
        rate=rate,
        ttft_ms=3000,
    ).plan


@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_what_is_told_is_simulated(case: tuple[str, str, int, int, float]) -> None:
    """Mean TPOT within 5 %, median of TTFT within 15 %, its 99th percentile within 25 %."""
    plan = _plan(*case)
    told = plan.at_rate
    assert told is not None
    assert told.requests_per_s == case[-1]
    demand = Demand(
        input_len=Fixed(case[2]),
        output_len=Fixed(case[3]),
        rate=case[-1],
        concurrency=None,
        count=6000,
    )
    found = simulate_plan(plan, demand, warmup=600).recorder.figures()
    assert told.tpot.mean_s == pytest.approx(found["tpot_s"]["mean"], rel=0.05)
    assert told.ttft.p50_s == pytest.approx(found["ttft_s"]["p50"], rel=0.15)
    assert told.ttft.p99_s == pytest.approx(found["ttft_s"]["p99"], rel=0.25)
    assert told.end_to_end_s == pytest.approx(found["end_to_end_s"]["mean"], rel=0.08)
    assert told.ttft.mean_s <= plan.performance.ttft_s


def test_more_requests_wait_longer() -> None:
    """Of one deployment, up to what it serves."""
    plan = _plan("llama-3.1-8b", "vllm-ascend", 1024, 64, 10.0)
    pools = pools_of(plan)
    assert pools is not None
    most = float(min(pools.prefill_per_s, pools.decode_per_s))
    slots = np.array([1.0, float(plan.strategy.batch)])
    steps = DecodeSteps(slots, np.array([0.01, float(pools.step_s)]), 1, 4, 64.0, 1.0)
    runs = [run_pools(pools, steps, share * most) for share in (0.1, 0.5, 0.8, 0.95)]
    for slow, fast in zip(runs[1:], runs, strict=False):
        assert slow.ttft_s[0] > fast.ttft_s[0]
        assert slow.tpot_s[3] >= fast.tpot_s[3]
        assert slow.in_flight > fast.in_flight
    for one in runs:
        assert list(one.ttft_s[1:]) == sorted(one.ttft_s[1:])


def test_pools_that_are_lost_are_left_out() -> None:
    plan = _plan("llama-3.1-8b", "vllm-ascend", 1024, 64, 10.0)
    whole, none = pools_of(plan), pools_of(plan, (plan.pools[0].instances, 0))
    assert whole is not None
    assert none is None
    old = plan.model_copy(
        update={
            "pools": tuple(
                pool.model_copy(update={"times": pool.times.model_copy(update={"one_s": None})})
                for pool in plan.pools
            )
        }
    )
    full = pools_of(old)
    assert full is not None
    assert float(full.one_s) == float(full.busy_s)
    assert {one.name for one in dataclasses.fields(full)} >= {"one_s", "prompts"}
