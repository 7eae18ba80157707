"""Attention: what a call costs, worked by hand on a plain machine, and what must never happen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.calibration import Calibration, Section
from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.kernels.attention import (
    attention_decode,
    attention_prefill,
    attention_workspace_bytes,
)
from shardplan.costmodel.kernels.base import KernelTime, Machine
from shardplan.costmodel.kernels.flash import causal_scores
from shardplan.models.errors import InputError

_SIZES = st.integers(1, 1_000_000)
_ZERO_SURFACE = dict.fromkeys(
    ("e", "e_x", "e_xx", "e_y", "e_yy", "e_xy", "e_g", "e_gx", "e_gxx", "e_d"), 0.0
) | {"keys_min": 1.0, "keys_max": 1e6, "tiles_min": 0.1, "tiles_max": 1e3}
_PLAIN_DECODE = {
    **dict.fromkeys(
        ("e", "e_x", "e_xx", "e_g", "e_gg", "e_k", "e_gk", "e_grouped", "e_gx", "e_t"), 0.0
    ),
    "floor_s": 1e-5,
    "batch_s": 0.0,
    "keys_s": 0.0,
    "task_s": 0.0,
    "task_g": 0.0,
    "softmax_flop": 0.0,
    "compute_efficiency": 1.0,
    "l2_efficiency": 1.0,
    "l2_full": 0.5,
    "l2_none": 1.0,
    "hbm_shift": 0.0,
    "l2_hidden": 0.0,
    "l2_hidden_g": 0.0,
    "floor_g": 0.0,
    "hbm_waves": 0.0,
    "keys_min": 1.0,
    "keys_max": 1e6,
    "group_max": 64.0,
    "streams_max": 64.0,
    "batch_max": 512.0,
    "share_min": 0.01,
}


@pytest.fixture(scope="module")
def npu() -> Machine:
    return Machine.of(load_device("910b2"))


def _plain(name: str, coefficients: dict[str, float]) -> Machine:
    """A 910B2 whose kernel reaches the peak: time is the formula alone."""
    section = Section(
        name=name,
        kind="assumed",
        source="hand-worked case",
        rows_fitted=0,
        rows_held_out=0,
        median_error=0.0,
        p90_error=0.0,
        coefficients=coefficients,
    )
    return Machine(load_device("910b2"), Calibration(name="plain", sections={name: section}))


def _flash(
    machine: Machine, batch: float, tokens: float, heads: int = 8, kv: int = 1
) -> KernelTime:
    return attention_prefill(
        machine,
        batch,
        tokens,
        0,
        heads,
        kv,
        128,
        kernel="flash",
        kv_dtype="bf16",
    )


def test_causal_scores_are_half_the_square_plus_the_diagonal_tile() -> None:
    four = np.asarray(4.0)
    none = np.asarray(0.0)
    assert causal_scores(four, none, None, 1.0) == pytest.approx(1 + 2 + 3 + 4)
    assert causal_scores(four, np.asarray(10.0), None, 1.0) == pytest.approx(11 + 12 + 13 + 14)
    assert causal_scores(four, none, None, 4.0) == pytest.approx(16.0)


def test_a_window_bounds_the_scores_and_a_wide_one_changes_nothing() -> None:
    tokens, none = np.asarray(8192.0), np.asarray(0.0)
    full = causal_scores(tokens, none, None, 256.0)
    assert causal_scores(tokens, none, 16384, 256.0) == full
    near = causal_scores(tokens, none, 1024, 256.0)
    assert near == pytest.approx(
        512 * 1024 + (8192 - 1024) * 1024 + 1024 * 512 - 512 * 1024 + 8192 * 256
    )


def test_prefill_on_a_perfect_machine_is_flop_over_peak_plus_the_floor() -> None:
    machine = _plain(
        "attention.prefill",
        _ZERO_SURFACE
        | {"floor_s": 1e-5, "fill_keys": 0.0, "tail": 0.0, "tile_scale": 1.0, "softmax_flop": 1.0},
    )
    time = _flash(machine, 1, 8192, heads=32, kv=32)
    scores = 32 * (8192 * 8192 / 2 + 8192 * 256 / 2)
    assert time.compute_s == pytest.approx(scores * 4 * 128 / machine.device.flop_per_s["bf16"])
    assert time.overhead_s == 1e-5
    assert time.memory_s == 0.0


def test_a_unified_core_adds_what_separate_cores_overlap() -> None:
    machine = _plain(
        "attention.prefill",
        _ZERO_SURFACE
        | {"floor_s": 0.0, "fill_keys": 0.0, "tail": 0.0, "tile_scale": 1.0, "softmax_flop": 32.0},
    )
    apart = float(_flash(machine, 1, 8192).total_s)
    unified = dataclasses.replace(machine.device, vector_cores=0)
    together = float(_flash(Machine(unified, machine.calibration), 1, 8192).total_s)
    cube = 512 / machine.device.flop_per_s["bf16"]
    vector = 32 / machine.device.vector_flop_per_s
    assert together / apart == pytest.approx((cube + vector) / max(cube, vector))


def test_decode_streams_the_cache_once_from_hbm() -> None:
    machine = _plain("attention.decode", _PLAIN_DECODE)
    time = attention_decode(machine, 64, 16384, 8, 8, 128, kernel="flash", kv_dtype="bf16")
    cache = 2 * 64 * 8 * 16384 * 128 * 2
    assert time.memory_s == pytest.approx(cache / machine.device.hbm_bytes_per_s, rel=0.02)
    assert time.overhead_s == 1e-5


def test_decode_within_the_l2_is_streamed_at_the_l2_rate() -> None:
    machine = _plain("attention.decode", _PLAIN_DECODE)
    time = attention_decode(machine, 8, 1024, 8, 8, 128, kernel="flash", kv_dtype="bf16")
    cache = 2 * 8 * 8 * 1024 * 128 * 2
    assert time.memory_s == pytest.approx(cache / machine.device.l2_bytes_per_s, rel=0.05)


def test_naive_moves_twenty_four_bytes_a_score_and_pays_a_launch_a_kernel(npu: Machine) -> None:
    time = attention_prefill(npu, 1, 8192, 0, 32, 32, 128, kernel="naive", kv_dtype="bf16")
    scores = 32 * 8192 * 8192
    section = npu.calibration.section("attention.naive")
    slowest = scores * 24 / (npu.device.hbm_bytes_per_s * section["hbm_efficiency"])
    assert slowest < float(time.total_s) < 1.3 * slowest
    # two batched products and four vector kernels; keys and values are not repeated (32 of 32)
    floor = 2 * section["matmul_floor_s"] + 4 * section["vector_floor_s"]
    assert time.overhead_s == pytest.approx(floor)


@pytest.mark.parametrize("batch", [16, 64, 256])
def test_naive_decode_is_not_faster_than_flash_once_the_cache_is_streamed(
    npu: Machine, batch: int
) -> None:
    sizes = (batch, 4096, 8, 8, 128)
    naive = attention_decode(npu, *sizes, kernel="naive", kv_dtype="bf16")
    assert attention_decode(npu, *sizes, kernel="flash", kv_dtype="bf16").total_s <= naive.total_s


@pytest.mark.parametrize("tokens", [1024, 2048, 8192, 65536])
@pytest.mark.parametrize(("batch", "heads", "kv"), [(1, 4, 1), (1, 8, 8), (1, 40, 8), (32, 64, 8)])
def test_flash_beats_naive_from_1k_tokens_on(
    npu: Machine, tokens: int, batch: int, heads: int, kv: int
) -> None:
    naive = attention_prefill(
        npu, batch, tokens, 0, heads, kv, 128, kernel="naive", kv_dtype="bf16"
    )
    assert _flash(npu, batch, tokens, heads, kv).total_s <= naive.total_s


def test_the_gain_of_flash_comes_from_traffic(npu: Machine) -> None:
    fast = dataclasses.replace(npu.device, hbm_bytes_per_s=1e15)
    sizes = (4, 8192, 0, 32, 8, 128)
    slow_gain, fast_gain = (
        float(
            attention_prefill(machine, *sizes, kernel="naive", kv_dtype="bf16").total_s
            / attention_prefill(machine, *sizes, kernel="flash", kv_dtype="bf16").total_s
        )
        for machine in (npu, Machine(fast, npu.calibration))
    )
    assert fast_gain < 0.5 * slow_gain


def test_known_910b_kernels_are_priced_within_ten_percent(npu: Machine) -> None:
    """Single published figures: seconds of prefill 16 x 4096 x 40 heads, decode 64 x 4096 x 8."""
    prefill = attention_prefill(npu, 16, 4096, 0, 40, 4, 128, kernel="flash", kv_dtype="bf16")
    decode = attention_decode(npu, 64, 4096, 8, 8, 128, kernel="flash", kv_dtype="bf16")
    assert prefill.total_s == pytest.approx(22.3e-3, rel=0.1)
    assert decode.total_s == pytest.approx(970e-6, rel=0.1)


def test_chunks_of_a_prompt_cost_a_little_more_than_the_prompt(npu: Machine) -> None:
    whole = float(_flash(npu, 1, 8192, 32, 8).total_s)
    chunks = attention_prefill(
        npu, 1, 2048, np.arange(4) * 2048, 32, 8, 128, kernel="flash", kv_dtype="bf16"
    )
    assert whole < float(chunks.total_s.sum()) < 1.35 * whole


def test_a_window_makes_long_prefill_and_decode_cheaper(npu: Machine) -> None:
    sizes = (4, 32768, 0, 8, 8, 128)
    full = attention_prefill(npu, *sizes, kernel="flash", kv_dtype="bf16")
    near = attention_prefill(npu, *sizes, kernel="flash", kv_dtype="bf16", window=4096)
    assert near.total_s < 0.4 * full.total_s
    step = attention_decode(npu, 64, 32768, 8, 8, 128, kernel="flash", kv_dtype="bf16")
    short = attention_decode(
        npu, 64, 32768, 8, 8, 128, kernel="flash", kv_dtype="bf16", window=4096
    )
    same = attention_decode(npu, 64, 4096, 8, 8, 128, kernel="flash", kv_dtype="bf16")
    assert short.total_s == same.total_s < step.total_s


def test_int8_cache_halves_the_traffic_of_a_long_decode(npu: Machine) -> None:
    wide, narrow = (
        attention_decode(npu, 64, 32768, 8, 8, 128, kernel="flash", kv_dtype=dtype)
        for dtype in ("bf16", "int8")
    )
    assert narrow.memory_s == pytest.approx(0.5 * wide.memory_s, rel=0.1)


def test_int8_cache_is_widened_on_the_vector_cores(npu: Machine) -> None:
    slow = dataclasses.replace(npu.device, vector_flop_per_s=1e9)
    machine = Machine(slow, npu.calibration)
    wide, narrow = (
        attention_decode(machine, 8, 4096, 8, 8, 128, kernel="flash", kv_dtype=dtype)
        for dtype in ("bf16", "int8")
    )
    assert narrow.compute_s > wide.compute_s


def test_workspace_is_the_score_matrix_for_naive_and_a_few_tiles_for_flash(npu: Machine) -> None:
    naive = attention_workspace_bytes(npu, 2, 4096, 4096, 8, 128, kernel="naive")
    flash = attention_workspace_bytes(npu, 2, 4096, 4096, 8, 128, kernel="flash")
    assert naive == 6 * 2 * 8 * 4096 * 4096
    assert flash == 24 * 2 * 4 * 128 * 130


@pytest.mark.parametrize("kernel", ["flash", "naive"])
def test_shapes_broadcast_and_a_scalar_equals_its_array_element(npu: Machine, kernel: str) -> None:
    batch, tokens = np.asarray([1, 4, 64])[:, None], np.asarray([1, 128, 1000, 65536])
    many = attention_prefill(npu, batch, tokens, 0, 32, 8, 128, kernel=kernel, kv_dtype="bf16")  # type: ignore[arg-type]
    steps = attention_decode(npu, batch, tokens, 32, 8, 128, kernel=kernel, kv_dtype="int8")  # type: ignore[arg-type]
    for part in (*many, *steps):
        assert part.shape == (3, 4)
    one = attention_prefill(npu, 4, 1000, 0, 32, 8, 128, kernel=kernel, kv_dtype="bf16")  # type: ignore[arg-type]
    step = attention_decode(npu, 64, 65536, 32, 8, 128, kernel=kernel, kv_dtype="int8")  # type: ignore[arg-type]
    assert one.total_s == pytest.approx(many.total_s[1, 2], rel=1e-12)
    assert step.total_s == pytest.approx(steps.total_s[2, 3], rel=1e-12)


@given(batch=_SIZES, tokens=_SIZES, prefix=st.integers(0, 1_000_000), heads=st.integers(1, 128))
def test_prefill_is_finite_and_its_parts_sum(
    npu: Machine, batch: int, tokens: int, prefix: int, heads: int
) -> None:
    for kernel in ("flash", "naive"):
        time = attention_prefill(
            npu,
            batch,
            tokens,
            prefix,
            heads,
            1,
            128,
            kernel=kernel,
            kv_dtype="int8",
        )
        assert np.isfinite(time.total_s)
        assert time.total_s > 0
        assert time.compute_s + time.memory_s + time.overhead_s == pytest.approx(time.total_s)


@given(batch=_SIZES, tokens=_SIZES, group=st.sampled_from([1, 2, 4, 8, 64]))
@pytest.mark.parametrize("device", ["910b2", "910a", "310p3", "h200", "h100"])
def test_decode_never_gets_faster_with_batch_or_context(
    device: str, batch: int, tokens: int, group: int
) -> None:
    machine = Machine.of(load_device(device))

    def step(sequences: int, context: int) -> float:
        time = attention_decode(
            machine, sequences, context, 8 * group, 8, 128, kernel="flash", kv_dtype="fp16"
        )
        return float(time.total_s)

    # The surface of the 910B is fitted with a price on falling, not a bound.
    least = 1 - (1e-9 if device.startswith("h") else 0.02)
    here = step(batch, tokens)
    assert np.isfinite(here)
    assert step(batch + 1, tokens) >= here * least
    assert step(batch, tokens + max(1, tokens // 8)) >= here * least


@given(batch=st.integers(1, 512), tokens=_SIZES)
def test_int8_cache_never_moves_more_bytes(batch: int, tokens: int) -> None:
    machine = _plain("attention.decode", _PLAIN_DECODE)
    wide, narrow = (
        attention_decode(machine, batch, tokens, 8, 8, 128, kernel="flash", kv_dtype=dtype)
        for dtype in ("bf16", "int8")
    )
    assert narrow.total_s <= wide.total_s * (1 + 1e-9) or narrow.memory_s == 0.0


def test_unknown_kernels_and_types_are_named(npu: Machine) -> None:
    with pytest.raises(InputError, match="flash or naive"):
        attention_prefill(npu, 1, 1, 0, 1, 1, 128, kernel="paged", kv_dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="int4"):
        attention_decode(npu, 1, 1, 1, 1, 128, kernel="flash", kv_dtype="int4")
