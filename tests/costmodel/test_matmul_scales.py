"""fp8 products inside a model, beside those of the benchmark that quantizes in every call."""

from __future__ import annotations

import numpy as np
import pytest

from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.matmul import matmul

CAST_S = {"trtllm": 2.2e-6, "vllm": 2.3e-6}
SCALE_S = {"trtllm": 7.2e-6, "vllm": 0.0}
"""What a benchmark spends on the scale of a small input: vLLM's has it given."""
EVERY = [(name, engine) for name in ("h100", "h200") for engine in CAST_S]


@pytest.mark.parametrize(("name", "engine"), EVERY)
def test_served_products_leave_out_what_their_benchmark_spends_on_inputs(
    name: str, engine: str
) -> None:
    """Fed fp8, small ones take about as long as in bf16; the benchmark's 2 to 10 us longer."""
    machine = Machine.of(load_device(name), engine=engine)
    rows = np.asarray([1.0, 16.0, 64.0])
    bench = matmul(machine, rows, 1024, 1024, "fp8").total_s
    cast = matmul(machine, rows, 1024, 1024, "fp8", weights="cold").total_s
    fed = matmul(machine, rows, 1024, 1024, "fp8", weights="cold", quantized=True).total_s
    half = matmul(machine, rows, 1024, 1024, "bf16", weights="cold").total_s
    assert cast - fed == pytest.approx(CAST_S[engine], rel=0.3)
    assert bench - cast == pytest.approx(SCALE_S[engine], abs=1e-6)
    assert fed == pytest.approx(half, rel=0.45)


@pytest.mark.parametrize(("name", "engine"), EVERY)
def test_large_inputs_pass_hbm_for_each_kernel_that_quantizes_them(name: str, engine: str) -> None:
    """64 Mi elements: three bytes each are cast, two more are read for a scale."""
    machine = Machine.of(load_device(name), engine=engine)
    bench = matmul(machine, 8192, 8192, 8192, "fp8").total_s
    cast = matmul(machine, 8192, 8192, 8192, "fp8", weights="cold").total_s
    fed = matmul(machine, 8192, 8192, 8192, "fp8", weights="cold", quantized=True).total_s
    byte_s = 2.0**26 / (0.7 * machine.device.hbm_bytes_per_s)
    assert cast - fed >= 3.0 * byte_s
    assert 0.7 < fed / cast < 0.95
    found = 2.0 * byte_s + SCALE_S[engine] if SCALE_S[engine] else 0.0
    assert bench - cast == pytest.approx(found, abs=2e-6)
