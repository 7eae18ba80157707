"""A valid plan and a trial table for tests: Llama-3.1-70B on four Atlas 800T A2.

The numbers have the right size and agree with each other (sums, per-card rates); they come from
toy formulas, not from the cost model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from shardplan.search.plan import (
    BreakdownRow,
    Candidate,
    Certificate,
    ClusterInfo,
    Limits,
    MemoryRow,
    ModelInfo,
    Performance,
    Plan,
    ProofInfo,
    QuantizationRow,
    Request,
    StrategyInfo,
    Workload,
)
from shardplan.search.trials import TRIAL_COLUMNS

__all__ = ["CARDS", "make_plan", "make_strategy", "make_trials"]

CARDS = 32
INPUT_LEN = 2048
OUTPUT_LEN = 512
CAPACITY_BYTES = 0.9 * 64 * 2**30
WEIGHTS_BYTES = 141.1e9
KV_BYTES_PER_TOKEN = 327_680.0


def make_strategy(**changes: Any) -> StrategyInfo:
    """tp4 pp2 dp4, 40 layers a stage, in bf16."""
    values: dict[str, Any] = {
        "tp": 4,
        "pp": 2,
        "dp": 4,
        "ep": 1,
        "sp": False,
        "exchange": "allgather",
        "stage_layers": (40, 40),
        "attention": "flash",
        "weight_dtype": "bf16",
        "kv_dtype": "bf16",
        "batch": 128,
        "chunk": 8192,
    }
    return StrategyInfo(**{**values, **changes})


def _performance(ttft_s: float, tpot_s: float, concurrency: float) -> Performance:
    """Little's law ties the rates to the times."""
    end_to_end_s = ttft_s + (OUTPUT_LEN - 1) * tpot_s
    requests_per_s = concurrency / end_to_end_s
    return Performance(
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        end_to_end_s=end_to_end_s,
        output_tokens_per_s=requests_per_s * OUTPUT_LEN,
        output_tokens_per_s_per_card=requests_per_s * OUTPUT_LEN / CARDS,
        requests_per_s=requests_per_s,
        concurrency=concurrency,
        prefill_step_s=ttft_s / 2,
        decode_step_s=tpot_s,
    )


def _memory(strategy: StrategyInfo) -> tuple[MemoryRow, ...]:
    rows = []
    for stage, layers in enumerate(strategy.stage_layers):
        share = layers / sum(strategy.stage_layers)
        parts = {
            "weights_bytes": WEIGHTS_BYTES * share / strategy.tp,
            "kv_cache_bytes": 27.5e9 * share * 2,
            "activations_bytes": 1.9e9 if stage else 1.4e9,
            "communicators_bytes": 0.42e9,
            "reserve_bytes": 2.1e9,
        }
        rows.append(
            MemoryRow(
                stage=stage,
                layers=layers,
                **parts,
                total_bytes=sum(parts.values()),
                capacity_bytes=CAPACITY_BYTES,
            )
        )
    return tuple(rows)


_BREAKDOWN = (
    ("prefill", "matmul", 562, 0.2887, 0.0180, 0.0, 0.0040, "fitted"),
    ("prefill", "attention", 80, 0.0410, 0.0020, 0.0, 0.0006, "fitted"),
    ("prefill", "pointwise", 480, 0.0, 0.0170, 0.0, 0.0030, "derived"),
    ("prefill", "all_reduce", 161, 0.0, 0.0, 0.0880, 0.0016, "fitted"),
    ("prefill", "send_recv", 1, 0.0, 0.0, 0.0031, 0.0, "assumed"),
    ("decode", "matmul", 562, 0.0010, 0.0251, 0.0, 0.0022, "fitted"),
    ("decode", "attention", 80, 0.0004, 0.0061, 0.0, 0.0003, "measured"),
    ("decode", "pointwise", 480, 0.0, 0.0009, 0.0, 0.0019, "derived"),
    ("decode", "all_reduce", 161, 0.0, 0.0, 0.0029, 0.0006, "fitted"),
    ("decode", "send_recv", 1, 0.0, 0.0, 0.0001, 0.0, "assumed"),
    ("decode", "step", 1, 0.0, 0.0, 0.0, 0.0012, "assumed"),
)


def _breakdown() -> tuple[BreakdownRow, ...]:
    return tuple(
        BreakdownRow(
            phase=phase,  # type: ignore[arg-type]
            kind=kind,
            calls=calls,
            compute_s=compute_s,
            memory_s=memory_s,
            collective_s=collective_s,
            overhead_s=overhead_s,
            total_s=compute_s + memory_s + collective_s + overhead_s,
            basis=basis,
        )
        for phase, kind, calls, compute_s, memory_s, collective_s, overhead_s, basis in _BREAKDOWN
    )


def _candidate(ttft_s: float, tpot_s: float, concurrency: float, **changes: Any) -> Candidate:
    performance = _performance(ttft_s, tpot_s, concurrency)
    return Candidate(
        strategy=make_strategy(**changes),
        performance=performance,
        memory_bytes=55.3e9,
        objective=performance.output_tokens_per_s_per_card,
    )


def _candidates() -> tuple[Candidate, ...]:
    return (
        _candidate(0.934, 0.0427, 512),
        _candidate(0.71, 0.0402, 448, batch=112),
        _candidate(0.62, 0.0331, 320, tp=8, pp=1, stage_layers=(80,), batch=80),
        _candidate(0.41, 0.0250, 128, tp=8, pp=1, stage_layers=(80,), batch=32, chunk=4096),
    )


def _request() -> Request:
    return Request(
        objective="throughput",
        workload=Workload(input_len=INPUT_LEN, output_len=OUTPUT_LEN, concurrency=512),
        limits=Limits(ttft_s=2.0, tpot_s=0.05),
        cards=CARDS,
        weight_dtype="bf16",
        kv_dtype="bf16",
        attention="auto",
        engine="exact",
        engine_profile="vllm-ascend",
        serving="agg",
        seed=0,
    )


def _model() -> ModelInfo:
    return ModelInfo(
        name="llama-3.1-70b",
        architecture="LlamaForCausalLM",
        source="meta-llama/Llama-3.1-70B config.json",
        digest="sha256:" + "0123456789abcdef" * 4,
        parameters=70_553_706_496,
        active_parameters=70_553_706_496,
        layers=80,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        max_context=131_072,
    )


def _cluster() -> ClusterInfo:
    return ClusterInfo(
        name="atlas-800t-a2",
        title="Atlas 800T A2: 8 x 910B, 64 GB",
        device="910b2",
        soc_versions=("Ascend910B2", "Ascend910B2C"),
        ranks_per_node=8,
        nodes=4,
        ranks=CARDS,
        hbm_bytes=64.0 * 2**30,
    )


def _certificate(best: Candidate) -> Certificate:
    return Certificate(
        engine="exact",
        space={
            "tp": [1, 2, 4, 8],
            "pp": [1, 2, 4],
            "sp": [False, True],
            "attention": ["flash", "naive"],
            "batch": [8, 16, 32, 64, 80, 112, 128, 192, 256],
            "chunk": [2048, 4096, 8192],
        },
        space_size=48_384,
        evaluated=17_204,
        pruned=31_180,
        pruned_by={"divisibility": 9_072, "bound": 22_108},
        infeasible={"memory": 4_120, "ttft": 1_377},
        bound=best.objective,
        gap=0.0,
        wall_s=10.0,
    )


def _quantization() -> tuple[QuantizationRow, ...]:
    return (
        QuantizationRow(
            weight_dtype="w8a8",
            kv_dtype="bf16",
            objective=477.0,
            gain=1.32,
            strategy=make_strategy(weight_dtype="w8a8", pp=1, dp=8, stage_layers=(80,)),
        ),
        QuantizationRow(
            weight_dtype="bf16",
            kv_dtype="int8",
            objective=401.0,
            gain=1.11,
            strategy=make_strategy(kv_dtype="int8", batch=192),
        ),
        QuantizationRow(
            weight_dtype="w4a16", kv_dtype="bf16", objective=None, gain=None, strategy=None
        ),
    )


def make_plan(**changes: Any) -> Plan:
    """A valid plan; `changes` replace whole parts of it."""
    best, *others = _candidates()
    values: dict[str, Any] = {
        "shardplan_version": "0.1.0",
        "request": _request(),
        "model": _model(),
        "cluster": _cluster(),
        "strategy": best.strategy,
        "performance": best.performance,
        "memory": _memory(best.strategy),
        "largest_lever": "int8 KV cache frees 13.8 GiB a card",
        "breakdown": _breakdown(),
        "proof": ProofInfo(
            level=1,
            passed=True,
            checks=(
                "every weight element is owned once by each copy of the model",
                "bytes per rank equal the memory ledger",
                "outputs equal the unsharded model's within 1e-10 over prefill and 3 decode steps",
            ),
            failures=(),
        ),
        "certificate": _certificate(best),
        "pareto": (best, *others),
        "alternatives": tuple(others),
        "quantization": _quantization(),
        "notes": (
            "weights and KV cache stay in the checkpoint's bf16",
            "no prefix cache is assumed",
        ),
    }
    return Plan(**{**values, **changes})


def _strategies(rows: int, seed: int) -> pd.DataFrame:
    """Random points of a space of 32 cards; the first is the plan's own strategy."""
    random = np.random.default_rng(seed)
    tp = random.choice([1, 2, 4, 8], rows)
    pp = random.choice([1, 2, 4], rows)
    batch = random.choice([8, 16, 32, 64, 80, 112, 128, 192, 256], rows)
    tp[0], pp[0], batch[0] = 4, 2, 128
    layers = {1: "80", 2: "40,40", 4: "20,20,20,20"}
    dtype = random.choice(["bf16", "w8a8"], rows)
    dtype[0] = "bf16"
    return pd.DataFrame(
        {
            "tp": tp,
            "pp": pp,
            "dp": CARDS // (tp * pp),
            "ep": 1,
            "cp": 1,
            "sp": False,
            "exchange": "allgather",
            "stage_layers": [layers[int(size)] for size in pp],
            "attention": "flash",
            "weight_dtype": dtype,
            "kv_dtype": "bf16",
            "batch": batch,
            "chunk": 8192,
        }
    )


def _priced(frame: pd.DataFrame) -> pd.DataFrame:
    """Toy times: weights and KV cache are streamed, prompts computed, collectives added."""
    tp, pp, dp, batch = (frame[name].to_numpy(float) for name in ("tp", "pp", "dp", "batch"))
    width = np.where(frame["weight_dtype"] == "w8a8", 0.5, 1.0)
    weights = WEIGHTS_BYTES * width / (tp * pp)
    cache = batch * (INPUT_LEN + OUTPUT_LEN) * KV_BYTES_PER_TOKEN / (tp * pp)
    frame["memory_bytes"] = weights + cache + 4.5e9
    frame["memory_free_bytes"] = CAPACITY_BYTES - frame["memory_bytes"]
    frame["memory_s"] = (weights + cache) * pp / 1.4e12
    frame["compute_s"] = batch * 1.2e-4 / tp * width
    frame["collective_s"] = 2.2e-3 * np.log2(tp) + 3e-4 * (pp - 1)
    frame["overhead_s"] = 4e-3
    parts = ["memory_s", "compute_s", "collective_s", "overhead_s"]
    frame["tpot_s"] = frame[parts].sum(axis=1)
    frame["ttft_s"] = 0.1 + 0.02 * batch / tp * width + 0.05 * pp
    frame["end_to_end_s"] = frame["ttft_s"] + (OUTPUT_LEN - 1) * frame["tpot_s"]
    frame["requests_per_s"] = batch * dp / frame["end_to_end_s"]
    frame["output_tokens_per_s"] = frame["requests_per_s"] * OUTPUT_LEN
    frame["output_tokens_per_s_per_card"] = frame["output_tokens_per_s"] / CARDS
    return frame


def make_trials(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    """A trial table, best first, refused strategies last; row objective = tokens/s per card."""
    frame = _priced(_strategies(rows, seed))
    fits = frame["memory_free_bytes"] >= 0
    soon = frame["ttft_s"] <= 2.0
    frame["feasible"] = fits & soon
    frame["limit"] = np.select([~fits, ~soon], ["memory", "ttft"], "")
    frame["objective"] = frame["output_tokens_per_s_per_card"].where(frame["feasible"])
    frame["engine"] = "exact"
    frame = frame.sort_values("objective", ascending=False, kind="stable", na_position="last")
    frame["rank"] = np.where(frame["feasible"], np.arange(1, rows + 1), 0)
    return frame.loc[:, list(TRIAL_COLUMNS)].reset_index(drop=True)
