"""Plans of pools with limits on 99th percentiles, simulated at the rate that they promise."""

from __future__ import annotations

import pytest

from shardplan.costmodel.simulate.lengths import Fixed
from shardplan.costmodel.simulate.workload import Demand
from shardplan.search.api import search
from shardplan.search.simulate import simulate_plan

_CASES = (
    ("llama-3.1-8b", "vllm-ascend", 1024, 256, 1000.0, 40.0),
    ("llama-3.1-8b", "mindie", 4096, 64, 2000.0, 40.0),
    ("qwen3-32b", "vllm-ascend", 2048, 512, 2000.0, 50.0),
    ("qwen3-30b-a3b", "vllm-ascend", 512, 512, 500.0, 40.0),
)
"""Model, engine, prompt and output, limits on TTFT and TPOT in ms."""


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_what_is_promised_is_simulated(case: tuple[str, str, int, int, float, float]) -> None:
    """TTFT p99 at most an eighth above its limit, TPOT p99 below its own, throughput 5 %."""
    model, engine, prompt, output, ttft_ms, tpot_ms = case
    plan = search(
        model,
        "atlas-800t-a2",
        serving="disagg",
        engine_profile=engine,
        input_len=prompt,
        output_len=output,
        ttft_p99_ms=ttft_ms,
        tpot_p99_ms=tpot_ms,
    ).plan
    demand = Demand(
        input_len=Fixed(prompt),
        output_len=Fixed(output),
        rate=plan.performance.requests_per_s,
        concurrency=None,
        count=8000,
    )
    found = simulate_plan(plan, demand, warmup=800).recorder.figures()
    assert found["ttft_s"]["p99"] <= 1.125 * ttft_ms / 1e3
    assert found["tpot_s"]["p99"] <= tpot_ms / 1e3
    told = plan.performance.output_tokens_per_s
    assert found["output_tokens_per_s"] == pytest.approx(told, rel=0.05)
