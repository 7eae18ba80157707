"""Rows of phase serve: closed loops and offered rates, what a row leaves open."""

from __future__ import annotations

from typing import Any

import pytest

from shardplan.search.estimate import estimate_one

LONG = 10**6
"""Prompts of a run whose start and end hardly count."""
SERVE: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "atlas-800t-a2",
    "phase": "serve",
    "input_len": 1024,
    "output_len": 256,
}


def test_serving_in_closed_loop_obeys_littles_law() -> None:
    """Requests in flight = rate * latency, for requests that never queue outside."""
    found = estimate_one(**SERVE, concurrency=32, num_prompts=LONG)
    latency = found["ttft_mean_s"] + 255 * found["tpot_mean_s"]
    assert found["requests_per_s"] * latency == pytest.approx(32, rel=0.02)
    assert found["output_tokens_per_s"] == pytest.approx(256 * found["requests_per_s"])
    assert found["ttft_p99_s"] >= found["ttft_mean_s"]
    assert found["tpot_p99_s"] >= found["tpot_mean_s"]


def test_requests_beyond_the_slots_wait() -> None:
    """Throughput stays, time to first token grows by what queues over the rate."""
    slots = {**SERVE, "max_num_seqs": 16, "num_prompts": LONG}
    full, queued = estimate_one(**slots, concurrency=16), estimate_one(**slots, concurrency=32)
    assert queued["requests_per_s"] == pytest.approx(full["requests_per_s"], rel=0.02)
    waited = queued["ttft_mean_s"] - full["ttft_mean_s"]
    assert waited == pytest.approx(16 / full["requests_per_s"], rel=0.02)


def test_an_offered_rate_below_capacity_is_what_is_served() -> None:
    """Above it, the deployment serves what it can."""
    capacity = estimate_one(**SERVE)["requests_per_s"]
    calm = estimate_one(**SERVE, request_rate=capacity / 4)
    assert calm["requests_per_s"] == pytest.approx(capacity / 4, rel=1e-6)
    assert calm["tpot_mean_s"] < estimate_one(**SERVE)["tpot_mean_s"]
    swamped = estimate_one(**SERVE, request_rate=capacity * 4)
    assert swamped["requests_per_s"] == pytest.approx(capacity, rel=1e-6)


def test_a_longer_run_comes_closer_to_the_steady_state() -> None:
    """The start and the end of a run cost throughput; the first burst costs time to first token."""
    steady = estimate_one(**SERVE, max_num_seqs=64)
    runs = [estimate_one(**SERVE, concurrency=64, num_prompts=n) for n in (64, 640, 64000)]
    rates = [run["output_tokens_per_s"] for run in runs]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(steady["output_tokens_per_s"], rel=0.01)
    assert runs[0]["ttft_mean_s"] > runs[1]["ttft_mean_s"] > steady["ttft_mean_s"]


def test_a_client_sends_ten_prompts_for_each_in_flight() -> None:
    """Unless the row says how many, offers a rate, or names no client at all."""
    usual = estimate_one(**SERVE, concurrency=64)
    assert usual == estimate_one(**SERVE, concurrency=64, num_prompts=640) | {
        name: usual[name] for name in usual if name in SERVE or name == "num_prompts"
    }
    rate = usual["requests_per_s"] / 4
    offered = estimate_one(**SERVE, concurrency=64, request_rate=rate)
    assert offered["requests_per_s"] == pytest.approx(rate, rel=1e-6)


def test_an_engine_may_take_the_type_of_the_cache_from_the_weights() -> None:
    """fp8 weights of a 16-bit model under TensorRT-LLM; not where the checkpoint itself is fp8."""
    one = {"cluster": "hgx-h200", "phase": "decode", "batch": 32, "tokens": 8192, "tp": 8}

    def step_s(model: str, **more: Any) -> float:
        found = estimate_one(**one, model=model, **more)["step_s"]
        return float(found)

    for model, engine, own in (
        ("llama-3.1-70b", "trtllm", "fp8"),
        ("llama-3.1-70b", "vllm", "bf16"),
        ("deepseek-v3", "trtllm", "bf16"),
    ):
        asked = {"engine_profile": engine, "weight_dtype": "fp8"}
        assert step_s(model, **asked) == step_s(model, **asked, kv_dtype=own)
    assert step_s("llama-3.1-70b", engine_profile="trtllm") == step_s(
        "llama-3.1-70b", engine_profile="trtllm", kv_dtype="bf16"
    )


def test_prefix_hits_and_replicas_help() -> None:
    """Half of the prompts found in the cache; four replicas with four times the requests."""
    plain = estimate_one(**SERVE, concurrency=32)
    hit = estimate_one(**SERVE, concurrency=32, prefix_hit=0.5)
    assert hit["requests_per_s"] > plain["requests_per_s"]
    wide = estimate_one(**SERVE, concurrency=128, dp=4)
    assert wide["requests_per_s"] == pytest.approx(4 * plain["requests_per_s"], rel=1e-6)
    alone = estimate_one(**SERVE, concurrency=1)
    assert estimate_one(**SERVE, concurrency=1, dp=4)["requests_per_s"] == pytest.approx(
        alone["requests_per_s"]
    )
