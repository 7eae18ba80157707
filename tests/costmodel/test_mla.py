"""Latent attention: one latent for all heads in decode, expanded heads in prefill."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.kernels.attention import attention_decode
from shardplan.costmodel.kernels.base import KernelTime, Machine
from shardplan.costmodel.kernels.mla import mla_decode, mla_prefill
from shardplan.models.errors import InputError


@pytest.fixture(scope="module")
def npu() -> Machine:
    return Machine.of(load_device("910b2"))


def _step(machine: Machine, batch: int, tokens: int, heads: int, dtype: str = "bf16") -> KernelTime:
    return mla_decode(machine, batch, tokens, heads, 512, 64, kernel="flash", kv_dtype=dtype)


def test_known_910b_kernels_are_priced_within_fifteen_percent(npu: Machine) -> None:
    """Published single figures: prefill 4 x 2048 x 32 heads, decode 128 x 16384 x 16 heads."""
    prefill = mla_prefill(npu, 4, 2048, 0, 32, 128, 64, 128, kernel="flash")
    assert prefill.total_s == pytest.approx(1532e-6, rel=0.15)
    assert _step(npu, 64, 16384, 16).total_s == pytest.approx(1390e-6, rel=0.15)


def test_heads_share_the_latent_so_tensor_parallelism_hardly_helps_decode(npu: Machine) -> None:
    all_heads, eighth = _step(npu, 64, 16384, 128), _step(npu, 64, 16384, 16)
    assert eighth.total_s < all_heads.total_s < 2.0 * eighth.total_s


def test_a_latent_cache_is_cheaper_to_read_than_a_full_one(npu: Machine) -> None:
    full = attention_decode(npu, 64, 16384, 128, 128, 128, kernel="flash", kv_dtype="bf16")
    assert _step(npu, 64, 16384, 128).total_s < 0.1 * full.total_s


def test_prefill_grows_with_the_square_and_with_the_prefix(npu: Machine) -> None:
    short, long = (
        float(mla_prefill(npu, 8, tokens, 0, 16, 128, 64, 128, kernel="flash").total_s)
        for tokens in (8192, 16384)
    )
    assert 3.3 < long / short < 4.1
    chunk = mla_prefill(npu, 8, 8192, 8192, 16, 128, 64, 128, kernel="flash")
    assert short < float(chunk.total_s) < long


@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
def test_flash_beats_naive(npu: Machine, tokens: int) -> None:
    flash, naive = (
        mla_prefill(npu, 4, tokens, 0, 16, 128, 64, 128, kernel=kernel)
        for kernel in ("flash", "naive")
    )
    assert flash.total_s < naive.total_s


def test_shapes_broadcast_and_a_scalar_equals_its_array_element(npu: Machine) -> None:
    batch, tokens = np.asarray([1, 16, 256])[:, None], np.asarray([128, 4096])
    many = mla_decode(npu, batch, tokens, 16, 512, 64, kernel="flash", kv_dtype="bf16")
    naive = mla_decode(npu, batch, tokens, 16, 512, 64, kernel="naive", kv_dtype="bf16")
    assert many.total_s.shape == naive.overhead_s.shape == (3, 2)
    assert _step(npu, 16, 4096, 16).total_s == pytest.approx(many.total_s[1, 1], rel=1e-12)


@given(
    batch=st.integers(1, 1_000_000),
    tokens=st.integers(1, 1_000_000),
    heads=st.sampled_from([1, 8, 16, 128]),
)
@pytest.mark.parametrize("device", ["910b2", "310p3", "h200"])
def test_decode_is_finite_sums_and_never_gets_faster(
    device: str, batch: int, tokens: int, heads: int
) -> None:
    machine = Machine.of(load_device(device))
    here = _step(machine, batch, tokens, heads, "fp16")
    assert np.isfinite(here.total_s)
    assert here.compute_s + here.memory_s + here.overhead_s == pytest.approx(here.total_s)
    floor = here.total_s * (1 - 1e-9)
    assert _step(machine, batch + 1, tokens, heads, "fp16").total_s >= floor
    assert _step(machine, batch, 2 * tokens, heads, "fp16").total_s >= floor


def test_unknown_kernels_are_named(npu: Machine) -> None:
    with pytest.raises(InputError, match="flash or naive"):
        mla_prefill(npu, 1, 1, 0, 1, 128, 64, 128, kernel="ring")  # type: ignore[arg-type]
