"""The simulator against the steady state, where both apply: closed loops, same steps."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "agreement_cases.py"


def load_cases() -> ModuleType:
    """What the benchmark runs."""
    spec = importlib.util.spec_from_file_location("agreement_cases", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CASES = load_cases()
CHOSEN = [
    (case, engine)
    for case in CASES.CASES
    for engine in case.engines
    if case.input_len < case.chunk and case.axes.get("pp", 1) == 1
]
LONG = (  # prompts, or many slots: what comes while a prompt is computed decides
    (("qwen2.5-14b", "atlas-800t-a2", {"tp": 2}, "bf16", 48, 4096, 3585, 139), "mindie", 0.5),
    (("qwen3-32b", "atlas-800i-a2", {"tp": 8}, "w8a8", 64, 5120, 4903, 254), "vllm-ascend", 0.7),
    (("qwen2.5-14b", "atlas-800t-a2", {"tp": 4}, "bf16", 64, 4096, 1578, 97), "vllm-ascend", 0.7),
    (("llama-3.1-8b", "atlas-800t-a2", {"tp": 1}, "bf16", 32, 2048, 249, 61), "mindie", 0.6),
)
MANY = (  # short prompts in many slots: those that come together are one prefill
    ("llama-3.1-8b", "atlas-800t-a2", {"tp": 2}, "bf16", 256, 8192, 256, 128),
    ("qwen3-32b", "atlas-800i-a2", {"tp": 4}, "w8a8", 96, 8192, 200, 100),
)


@pytest.mark.parametrize(
    ("case", "engine"), CHOSEN, ids=lambda one: one if isinstance(one, str) else one.model
)
def test_closed_loops_agree(case: object, engine: str) -> None:
    """Throughput and TPOT within 5 %, the median of TTFT within a fifth of the mean."""
    made = CASES.scorer(case, engine)
    flight = case.slots * made.model.groups * 3 // 4  # type: ignore[attr-defined]  # a case
    told = CASES.said(CASES.steady(case, made, flight=float(flight)))
    found = CASES.simulated(case, made, flight=flight, rate=None)
    assert found.requests_per_s == pytest.approx(told.requests_per_s, rel=0.05)
    assert found.tpot_s == pytest.approx(told.tpot_s, rel=0.05)
    assert found.ttft_p50_s == pytest.approx(told.ttft_mean_s, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", MANY, ids=lambda one: one[0])
def test_prompts_that_come_together_are_one_prefill(numbers: tuple[object, ...]) -> None:
    """Throughput, TPOT and mean TTFT of full slots."""
    case = CASES.Case(*numbers, ("mindie",))
    made, flight = CASES.scorer(case, "mindie"), case.slots * 9 // 10
    told = CASES.said(CASES.steady(case, made, flight=float(flight)))
    found = CASES.simulated(case, made, flight=flight, rate=None)
    assert told.requests_per_s == pytest.approx(found.requests_per_s, rel=0.05)
    assert told.tpot_s == pytest.approx(found.tpot_s, rel=0.05)
    assert told.ttft_mean_s == pytest.approx(found.ttft_mean_s, rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize(("numbers", "engine", "load"), LONG)
def test_random_arrivals_agree(
    numbers: tuple[object, ...], engine: str, load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TPOT within 5 %, the median of TTFT within 15 %, its mean within a fifth."""
    monkeypatch.setattr(CASES, "OPEN_REQUESTS", 12_000)
    case = CASES.Case(*numbers, (engine,))
    made = CASES.scorer(case, engine)
    slots = float(case.slots * made.model.groups)
    rate = load * CASES.said(CASES.steady(case, made, flight=slots)).requests_per_s
    told = CASES.said(CASES.steady(case, made, flight=slots, rate=rate))
    found = CASES.simulated(case, made, flight=None, rate=rate)
    assert told.tpot_s == pytest.approx(found.tpot_s, rel=0.05)
    assert told.ttft_p50_s == pytest.approx(found.ttft_p50_s, rel=0.15)
    assert told.ttft_mean_s == pytest.approx(found.ttft_mean_s, rel=0.2)
