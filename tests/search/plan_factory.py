"""A valid plan and a trial table for tests: Llama-3.1-70B on four Atlas 800T A2.

The numbers have the right size and agree with each other (sums, per-card rates); they come from
toy formulas, not from the cost model.
"""

from __future__ import annotations

import functools
import itertools
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
from shardplan.search.trials import LATER_COLUMNS, TRIAL_COLUMNS

__all__ = ["CARDS", "make_plan", "make_strategy", "make_trials"]

CARDS = 32
INPUT_LEN = 2048
OUTPUT_LEN = 512
CAPACITY_BYTES = 0.9 * 64 * 2**30
WEIGHTS_BYTES = 141.1e9
KV_BYTES_PER_TOKEN = 327_680.0
TTFT_LIMIT_S = 2.0
TPOT_LIMIT_S = 0.05


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


def _candidate(row: Any) -> Candidate:
    """A row of the toy space as a candidate."""
    strategy = make_strategy(
        **{name: getattr(row, name) for name in ("tp", "pp", "dp", "sp", "attention")},
        stage_layers=tuple(int(layers) for layers in row.stage_layers.split(",")),
        batch=row.batch,
        chunk=row.chunk,
    )
    performance = Performance(
        **{name: getattr(row, name) for name in Performance.model_fields if name in TRIAL_COLUMNS},
        concurrency=row.batch * row.dp,
        prefill_step_s=row.ttft_s / 2,
        decode_step_s=row.tpot_s,
    )
    return Candidate(
        strategy=strategy,
        performance=performance,
        memory_bytes=row.memory_bytes,
        objective=row.objective,
    )


@functools.cache
def _toy_space() -> pd.DataFrame:
    return _priced(_strategies())


@functools.cache
def _candidates() -> tuple[Candidate, ...]:
    """The best of all, then the best of other (tp, pp)."""
    feasible = _toy_space()[_toy_space()["feasible"]]
    return tuple(_candidate(row) for row in feasible.drop_duplicates(["tp", "pp"]).itertuples())


@functools.cache
def _front() -> tuple[Candidate, ...]:
    """Part of the Pareto front: the best strategy, then smaller batches."""
    rows = _toy_space().query("tp == 8 and pp == 1 and sp and attention == 'flash'")
    rows = rows[rows["feasible"] & (rows["chunk"] == 8192) & (rows["batch"] % 32 == 0)]
    return tuple(_candidate(row) for row in rows.itertuples())


def _memory(candidate: Candidate) -> tuple[MemoryRow, ...]:
    """Every stage alike; what the formulas leave over is KV cache."""
    strategy = candidate.strategy
    rest = {
        "weights_bytes": WEIGHTS_BYTES / (strategy.tp * strategy.pp),
        "activations_bytes": 1.2e9,
        "communicators_bytes": 0.4e9,
        "reserve_bytes": 1.9e9,
    }
    cache_bytes = candidate.memory_bytes - sum(rest.values())
    return tuple(
        MemoryRow(
            stage=stage,
            layers=layers,
            **rest,
            kv_cache_bytes=cache_bytes,
            total_bytes=candidate.memory_bytes,
            capacity_bytes=CAPACITY_BYTES,
        )
        for stage, layers in enumerate(strategy.stage_layers)
    )


_BREAKDOWN = (
    ("prefill", "matmul", 562, 0.62, 0.04, 0.0, 0.008, "fitted"),
    ("prefill", "attention", 80, 0.09, 0.004, 0.0, 0.001, "fitted"),
    ("prefill", "pointwise", 480, 0.0, 0.04, 0.0, 0.006, "derived"),
    ("prefill", "all_reduce", 161, 0.0, 0.0, 0.18, 0.004, "fitted"),
    ("prefill", "send_recv", 1, 0.0, 0.0, 0.007, 0.0, "assumed"),
    ("decode", "matmul", 562, 0.02, 0.59, 0.0, 0.05, "fitted"),
    ("decode", "attention", 80, 0.01, 0.14, 0.0, 0.01, "measured"),
    ("decode", "pointwise", 480, 0.0, 0.02, 0.0, 0.045, "derived"),
    ("decode", "all_reduce", 161, 0.0, 0.0, 0.065, 0.015, "fitted"),
    ("decode", "send_recv", 1, 0.0, 0.0, 0.005, 0.0, "assumed"),
    ("decode", "step", 1, 0.0, 0.0, 0.0, 0.03, "assumed"),
)
"""Phase, kind, calls, then shares of the phase's step: compute, memory, collective, overhead."""


def _breakdown(performance: Performance) -> tuple[BreakdownRow, ...]:
    steps = {"prefill": performance.prefill_step_s, "decode": performance.decode_step_s}
    names = ("compute_s", "memory_s", "collective_s", "overhead_s")
    rows = []
    for phase, kind, calls, *shares, basis in _BREAKDOWN:
        parts = {
            name: float(share) * steps[phase] for name, share in zip(names, shares, strict=True)
        }
        row = {"phase": phase, "kind": kind, "calls": calls, "basis": basis, **parts}
        rows.append(BreakdownRow.model_validate({**row, "total_s": sum(parts.values())}))
    return tuple(rows)


def _request() -> Request:
    return Request(
        objective="throughput",
        workload=Workload(input_len=INPUT_LEN, output_len=OUTPUT_LEN, concurrency=1024),
        limits=Limits(ttft_s=TTFT_LIMIT_S, tpot_s=TPOT_LIMIT_S),
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
        source="https://huggingface.co/meta-llama/Llama-3.1-70B/blob/main/config.json",
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
            **{name: list(values) for name, values in _GRID.items()},
            "weight_dtype": ["bf16"],
        },
        space_size=4_608,
        evaluated=2_304,
        pruned=2_304,
        pruned_by={"divisibility": 768, "bound": 1_536},
        infeasible={"memory": 700, "ttft": 20},
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
        "memory": _memory(best),
        "largest_lever": "int8 KV cache frees 13.8 GiB a card",
        "breakdown": _breakdown(best.performance),
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
        "pareto": _front(),
        "alternatives": tuple(others),
        "quantization": _quantization(),
        "notes": (
            "weights and KV cache stay in the checkpoint's bf16",
            "no prefix cache is assumed",
        ),
    }
    return Plan(**{**values, **changes})


_LAYERS = {1: "80", 2: "40,40", 4: "20,20,20,20"}
_GRID: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4, 8),
    "pp": (1, 2, 4),
    "sp": (False, True),
    "attention": ("flash", "naive"),
    "batch": tuple(range(8, 264, 8)),
    "chunk": (2048, 4096, 8192),
}


def _strategies() -> pd.DataFrame:
    """The whole toy space on 32 cards."""
    frame = pd.DataFrame(list(itertools.product(*_GRID.values())), columns=list(_GRID))
    return frame.assign(
        dp=CARDS // (frame["tp"] * frame["pp"]),
        ep=1,
        cp=1,
        exchange="allgather",
        stage_layers=frame["pp"].map(_LAYERS),
        weight_dtype="bf16",
        kv_dtype="bf16",
    )


def _priced(frame: pd.DataFrame) -> pd.DataFrame:
    """Toy times: weights and KV cache are streamed, prompts computed, collectives added."""
    tp, pp, dp, batch, chunk = (
        frame[name].to_numpy(float) for name in ("tp", "pp", "dp", "batch", "chunk")
    )
    naive = (frame["attention"] == "naive").to_numpy(float)
    weights = WEIGHTS_BYTES / (tp * pp)
    cache = batch * (INPUT_LEN + OUTPUT_LEN) * KV_BYTES_PER_TOKEN / (tp * pp)
    frame["memory_bytes"] = weights + cache + 3.5e9 + 2e5 * chunk
    frame["memory_free_bytes"] = CAPACITY_BYTES - frame["memory_bytes"]
    frame["memory_s"] = (weights + cache * (1 + 0.4 * naive)) * pp / 1.4e12
    frame["compute_s"] = batch * 1.2e-4 / tp * (1 + 0.2 * naive)
    frame["collective_s"] = 2.2e-3 * np.log2(tp) * np.where(frame["sp"], 0.9, 1) + 3e-4 * (pp - 1)
    frame["overhead_s"] = 4e-3 + 2.0 / chunk
    parts = ["memory_s", "compute_s", "collective_s", "overhead_s"]
    frame["tpot_s"] = frame[parts].sum(axis=1)
    frame["ttft_s"] = 0.1 + (0.02 + 2.0 / chunk) * batch / tp + 0.05 * pp
    frame["end_to_end_s"] = frame["ttft_s"] + (OUTPUT_LEN - 1) * frame["tpot_s"]
    frame["requests_per_s"] = batch * dp / frame["end_to_end_s"]
    frame["output_tokens_per_s"] = frame["requests_per_s"] * OUTPUT_LEN
    frame["output_tokens_per_s_per_card"] = frame["output_tokens_per_s"] / CARDS
    late = frame["ttft_s"] > TTFT_LIMIT_S
    slow = frame["tpot_s"] > TPOT_LIMIT_S
    fits = frame["memory_free_bytes"] >= 0
    frame["feasible"] = fits & ~late & ~slow
    frame["limit"] = np.select([~fits, late, slow], ["memory", "ttft", "tpot"], "")
    frame["objective"] = frame["output_tokens_per_s"].where(frame["feasible"])
    return frame.sort_values("objective", ascending=False, kind="stable", na_position="last")


def make_trials(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    """A trial table, best first, refused strategies last; the first is the plan's own.

    Rows are drawn from the toy space with repetition. Objective: output tokens/s.
    """
    space = _toy_space()
    places = np.random.default_rng(seed).integers(0, len(space), rows)
    places[0] = 0
    frame = space.iloc[np.sort(places)].reset_index(drop=True)
    frame["rank"] = np.where(frame["feasible"], np.arange(1, rows + 1), 0)
    frame["engine"] = "exact"
    frame = frame.assign(**LATER_COLUMNS)
    return frame.loc[:, list(TRIAL_COLUMNS)]
