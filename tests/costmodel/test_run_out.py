"""A benchmark run: what it has beside the steady state, on a layout that is easy to follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.run_out import Run, run_out
from shardplan.costmodel.serving import ServingInput, serve
from shardplan.costmodel.step import StepModel
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.parallel import Parallelism

PROMPT, OUTPUT = 1024, 128


def _model(engine: str) -> StepModel:
    spec = load_model("llama-3.1-8b")
    graphs = {
        "prefill": apply(build_graph(spec, "prefill"), Parallelism()),
        "decode": apply(build_graph(spec, "decode"), Parallelism()),
    }
    return StepModel.of(graphs, load_cluster("atlas-800t-a2"), load_engine(engine))  # type: ignore[arg-type]  # phases are literals


CHUNKED, PREFILL_FIRST = _model("vllm-ascend"), _model("mindie")


def _given(slots: float, in_flight: float | None = None) -> ServingInput:
    flight = None if in_flight is None else np.asarray([in_flight])
    return ServingInput(
        batch=np.asarray([slots]),
        chunk=np.asarray([2048.0]),
        input_len=PROMPT,
        output_len=OUTPUT,
        in_flight=flight,
    )


def _makespan_s(run: Run, prompts: float) -> float:
    return prompts / float(run.requests_per_s[0])


def test_one_prompt_takes_one_latency() -> None:
    """Nothing to share with: prefill, then a decode step a token."""
    alone = serve(CHUNKED, _given(1.0))
    run = run_out(CHUNKED, _given(1.0), num_prompts=1)
    assert _makespan_s(run, 1) == pytest.approx(float(alone.end_to_end_s[0]), rel=0.02)


def test_one_at_a_time_takes_all_latencies() -> None:
    """Ten prompts in one slot are ten times one prompt."""
    once = run_out(CHUNKED, _given(1.0), num_prompts=1)
    ten = run_out(CHUNKED, _given(1.0), num_prompts=10)
    assert _makespan_s(ten, 10) == pytest.approx(10 * _makespan_s(once, 1), rel=1e-9)


def test_a_run_is_no_faster_than_its_steady_state() -> None:
    """And loses less the longer it is."""
    steady = float(serve(CHUNKED, _given(32.0)).requests_per_s[0])
    rates = [
        float(run_out(CHUNKED, _given(32.0), num_prompts=n).requests_per_s[0])
        for n in (32, 320, 3200, 320_000)
    ]
    assert rates == sorted(rates)
    assert rates[-1] <= steady * (1 + 1e-9)
    assert rates[-1] == pytest.approx(steady, rel=1e-3)


def test_the_first_burst_waits_for_its_turn() -> None:
    """32 prompts at once, two to a step of 2048 tokens: the mean waits for half of 16 steps."""
    run = run_out(CHUNKED, _given(32.0), num_prompts=32)
    full = 16 * float(CHUNKED.host_s("prefill"))
    assert float(run.ttft_mean_s[0]) > full / 2
    assert float(run.ttft_p99_s[0]) > 1.5 * float(run.ttft_mean_s[0])


def test_a_rate_far_above_capacity_queues_without_end() -> None:
    """The wait grows with the prompts: the last of N waits N (1/r - 1/R)."""
    capacity = float(serve(CHUNKED, _given(16.0)).requests_per_s[0])
    short = run_out(CHUNKED, _given(16.0), request_rate=10 * capacity, num_prompts=1000)
    long = run_out(CHUNKED, _given(16.0), request_rate=10 * capacity, num_prompts=2000)
    grown = float(long.ttft_mean_s[0] - short.ttft_mean_s[0])
    assert grown == pytest.approx(500 * (1 / capacity - 0.1 / capacity), rel=1e-6)


@pytest.mark.parametrize("model", [CHUNKED, PREFILL_FIRST], ids=["chunked", "prefill first"])
@given(
    slots=st.integers(1, 128),
    prompts=st.one_of(st.just(math.inf), st.integers(1, 5000).map(float)),
    share=st.one_of(st.just(math.inf), st.floats(0.05, 4.0)),
)
def test_percentiles_are_no_better_than_means(
    model: StepModel, slots: int, prompts: float, share: float
) -> None:
    """For any run; and nothing is negative, infinite or undefined."""
    capacity = float(serve(model, _given(float(slots))).requests_per_s[0])
    run = run_out(model, _given(float(slots)), request_rate=share * capacity, num_prompts=prompts)
    assert run.ttft_p99_s[0] >= run.ttft_mean_s[0] > 0
    assert run.tpot_p99_s[0] >= run.tpot_mean_s[0] > 0
    assert 0 < run.requests_per_s[0] <= capacity * min(share, 1.0) * (1 + 1e-6)
    assert run.output_tokens_per_s[0] == pytest.approx(OUTPUT * run.requests_per_s[0])
    assert 1 <= run.slots[0] <= slots
