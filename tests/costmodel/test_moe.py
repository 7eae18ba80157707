"""Routed experts: how many are touched, what they stream, what a block costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.moe import (
    expected_active,
    grouped_matmul,
    moe_block,
    routing_draws,
)
from shardplan.models.errors import InputError

ASCEND = Machine.of(load_device("910b2"))
DTYPES = ("bf16", "fp16", "w8a16", "w4a16", "w8a8", "w8a8_static", "w4a8")


def test_expected_number_of_experts_by_hand() -> None:
    assert expected_active(1, 8) == 1
    assert expected_active(2, 2) == 1.5  # both rows on one expert half of the time
    assert expected_active(5, 1) == 1
    assert expected_active(0, 8) == 0
    assert expected_active(100000, 8) == pytest.approx(8)


def test_a_few_rows_cost_the_weights_of_the_experts_they_touch() -> None:
    floor_s = ASCEND.calibration.section("moe.bf16")["floor_s"]
    one = grouped_matmul(ASCEND, 8, 64, 4096, 4096, "bf16", active=1).total_s - floor_s
    eight = grouped_matmul(ASCEND, 8, 64, 4096, 4096, "bf16", active=8).total_s - floor_s
    assert eight == pytest.approx(8 * one, rel=0.02)
    assert one >= 2 * 4096 * 4096 / ASCEND.device.hbm_bytes_per_s


@pytest.mark.parametrize(
    ("tokens", "sizes", "dtype", "measured_us"),
    [
        (256, (7168, 2048, 256, 8, 8), "bf16", 2075.8),
        (128, (2048, 1024, 128, 8, 4), "bf16", 322.3),
        (128, (7168, 2048, 256, 8, 8), "w8a8", 1009.0),
        (64, (3584, 2560, 64, 8, 1), "w8a8", 1212.0),
    ],
)
def test_single_measurements_of_blocks(
    tokens: int, sizes: tuple[int, int, int, int, int], dtype: str, measured_us: float
) -> None:
    # Cited single figures of hudingyi688/aiconfigurator-npu @ 90d7765a.
    time = moe_block(ASCEND, tokens, *sizes, dtype).total_s * 1e6
    assert time == pytest.approx(measured_us, rel=0.15)


def test_wide_experts_stream_slower_and_small_ones_at_one_rate() -> None:
    floor_s = ASCEND.calibration.section("moe.bf16")["floor_s"]

    def rate(n: int, k: int) -> float:
        time = grouped_matmul(ASCEND, 8, 8, n, k, "bf16", active=8)
        return float(8 * 2 * n * k / (time.total_s - floor_s))

    assert rate(2048, 2048) == pytest.approx(rate(4096, 4096), rel=0.02)
    assert 0.7 < rate(14336, 8192) / rate(4096, 4096) < 0.97


def test_microscaled_experts_need_a_950_and_compressed_ones_a_310p() -> None:
    machine = Machine.of(load_device("950dt"))
    wide, narrow = (grouped_matmul(machine, 16, 16, 7168, 4096, d) for d in ("mxfp8", "mxfp4"))
    assert narrow.memory_s / wide.memory_s == pytest.approx((0.5 + 1 / 32) / (1 + 1 / 32), rel=0.02)
    duo = Machine.of(load_device("310p3"))
    static, compressed = (
        grouped_matmul(duo, 16, 16, 4096, 4096, d).memory_s for d in ("w8a8_static", "w8a8sc")
    )
    assert compressed / static == pytest.approx(0.75, abs=0.02)
    for dtype in ("mxfp8", "mxfp4", "w4a8_mxfp", "w8a8sc"):
        with pytest.raises(InputError, match="cannot run weights of this dtype"):
            moe_block(ASCEND, 64, 2048, 1024, 64, 8, 8, dtype)


def test_many_rows_an_expert_reach_most_of_the_matrix_rate() -> None:
    rows = 8 * 4096
    time = grouped_matmul(ASCEND, rows, 8, 8192, 8192, "bf16")
    ideal = 2 * rows * 8192 * 8192 / ASCEND.device.flop_per_s["bf16"]
    assert ideal <= time.total_s <= 2.5 * ideal


def test_expert_parallel_ranks_split_the_experts() -> None:
    alone = moe_block(ASCEND, 256, 7168, 2048, 256, 8, 8, "w8a8").total_s
    wide = moe_block(ASCEND, 256, 7168, 2048, 256, 8, 32, "w8a8").total_s
    assert wide < alone / 2


def test_one_expert_takes_every_row() -> None:
    block = moe_block(ASCEND, 64, 4096, 4096, 1, 1, 1, "bf16")
    assert np.isfinite(block.total_s)
    assert block.memory_s > 3 * 2 * 4096 * 4096 / ASCEND.device.hbm_bytes_per_s


@given(
    tokens=st.floats(1, 1e6),
    hidden=st.integers(64, 16384),
    ffn=st.integers(64, 16384),
    experts=st.sampled_from([8, 64, 256]),
    topk=st.sampled_from([1, 2, 8]),
    ep=st.sampled_from([1, 4, 8]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=100, deadline=None)
def test_blocks_grow_with_every_size_and_their_parts_sum(
    tokens: float, hidden: int, ffn: int, experts: int, topk: int, ep: int, dtype: str
) -> None:
    here = moe_block(ASCEND, tokens, hidden, ffn, experts, topk, ep, dtype)
    assert np.isfinite(here.total_s)
    parts = here.compute_s + here.memory_s + here.overhead_s
    assert parts == pytest.approx(here.total_s, rel=1e-9)
    for bigger in ((2 * tokens, hidden, ffn), (tokens, 2 * hidden, ffn), (tokens, hidden, 2 * ffn)):
        more = moe_block(ASCEND, *bigger, experts, topk, ep, dtype).total_s
        assert more >= 0.99 * here.total_s


def test_one_element_is_the_same_as_many() -> None:
    tokens = np.asarray([1.0, 16.0, 4096.0])
    many = moe_block(ASCEND, tokens[:, None], 2048, 1024, np.asarray([64.0, 128.0]), 8, 4, "bf16")
    assert many.total_s.shape == (3, 2)
    one = moe_block(ASCEND, 16, 2048, 1024, 128, 8, 4, "bf16")
    assert one.total_s == many.total_s[1, 1]
    rows = grouped_matmul(ASCEND, tokens, 8, 2048, 1024, "w8a8")
    assert all(part.shape == (3,) for part in rows)


@pytest.mark.parametrize("name", ["h100", "h200", "a3-die"])
def test_other_devices_price_the_block(name: str) -> None:
    machine = Machine.of(load_device(name))
    time = moe_block(machine, 256, 7168, 2048, 256, 8, 8, "w8a8").total_s
    weights = 32 * 3 * 7168 * 2048
    assert time >= weights / machine.device.hbm_bytes_per_s


def test_a_token_chooses_its_experts_once_unless_the_calibration_says_otherwise() -> None:
    device = load_device("h200")
    assert routing_draws(ASCEND, "bf16") == 1
    assert routing_draws(Machine.of(device), "fp8") == 1
    vllm = Machine(device=device, calibration=load_calibration("h200", "vllm"))
    assert routing_draws(vllm, "fp8") > 1
