"""Products whose inputs come with their scales, beside those of the benchmark that finds them."""

from __future__ import annotations

import pytest

from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.matmul import matmul

MACHINES = {name: Machine.of(load_device(name)) for name in ("h100", "h200")}


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_fp8_weights_of_a_model_come_with_the_scales_of_their_inputs(name: str) -> None:
    """The benchmark of TensorRT-LLM finds a scale in every call, 7.2 us; other types have none."""
    machine = MACHINES[name]
    for rows in (1.0, 64.0, 4096.0):
        bench, model = (
            matmul(machine, rows, 8192, 8192, "fp8", weights=state) for state in ("rotated", "cold")
        )
        assert bench.total_s - model.total_s == pytest.approx(7.2e-6, abs=2e-6)
        assert model.overhead_s >= 0
        assert model.memory_s + model.compute_s > 0
    small = matmul(machine, 1, 128, 128, "fp8").total_s
    assert matmul(machine, 1, 128, 128, "fp8", weights="cold").total_s >= 0.25 * small
    wide = [matmul(machine, 64, 8192, 8192, "bf16", weights=w).total_s for w in ("rotated", "cold")]
    assert wide[1] >= wide[0]
