"""The bounds that need no graph: the price of products never beats the machine's peak."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.catalog import device_names, load_device
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.models.catalog import load_model
from shardplan.models.counts import active_parameter_count
from shardplan.search.bounds import layer_flop_per_token, peak_flop_per_s

ROWS = np.unique(np.round(2.0 ** np.linspace(0.0, 14.0, 43)))


@pytest.mark.parametrize("name", device_names())
@given(st.data())
def test_no_product_is_priced_faster_than_the_peak(name: str, data: st.DataObject) -> None:
    """What makes `peak` a bound: operations over time never exceed the device's rate."""
    device = load_device(name)
    dtype = data.draw(st.sampled_from(device.weight_dtypes))
    n, k = (16 * data.draw(st.integers(4, 4096)) for _ in range(2))
    for engine in device.engine_profiles:
        time = matmul(Machine.of(device, engine), ROWS, float(n), float(k), dtype)
        floor = 2.0 * ROWS * n * k / peak_flop_per_s(device, dtype)
        assert (time.total_s >= floor).all()


@pytest.mark.parametrize("name", ["llama-65b", "qwen3-235b-a22b", "deepseek-v3"])
def test_operations_of_a_token_are_twice_the_active_weights(name: str) -> None:
    """Embedding and head left out, norms and biases are all that is missing: under 1 %."""
    spec = load_model(name)
    weights = active_parameter_count(spec) - 2 * spec.vocab * spec.hidden
    assert layer_flop_per_token(spec) == pytest.approx(2.0 * weights, rel=0.01)
    assert layer_flop_per_token(spec) <= 2.0 * weights
