"""Streaming kernels: floors, rates in L2 and past it, kernels measured inside a network."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.pointwise import pointwise, pointwise_kinds
from shardplan.models.errors import UnknownNameError

MACHINES = {name: Machine.of(load_device(name)) for name in ("910b2", "a3-die", "h100", "h200")}
KINDS = [
    "rmsnorm",
    "add_rmsnorm",
    "rope",
    "qk_norm_rope",
    "swiglu",
    "add",
    "mul",
    "bias",
    "quantize",
    "quantize_static",
    "embedding",
    "kv_append",
    "topk_router",
    "softmax_sample",
    "slice",
    "copy",
]


@pytest.mark.parametrize("name", MACHINES)
def test_every_calibration_prices_every_kind(name: str) -> None:
    assert set(KINDS) <= set(pointwise_kinds(MACHINES[name]))


@pytest.mark.parametrize(
    ("kind", "elements", "bytes_moved", "measured_us"),
    [
        ("add_rmsnorm", 16 * 5120, 16 * 5120 * 8, 5.304),
        ("add_rmsnorm", 2565 * 5120, 2565 * 5120 * 8, 126.369),
        ("swiglu", 41040 * 1600, 41040 * 1600 * 6, 343.050),
        ("kv_append", 41040 * 256, 41040 * 256 * 4, 178.301),
        ("softmax_sample", 16 * 151936, 16 * 151936 * 4, 511.1),
    ],
)
def test_kernels_measured_inside_a_network(
    kind: str, elements: int, bytes_moved: int, measured_us: float
) -> None:
    # Horacehxw/msModeling @ 39df672b, Qwen3-32B on an A3 die.
    time = pointwise(MACHINES["a3-die"], kind, elements, bytes_moved).total_s * 1e6
    assert time == pytest.approx(measured_us, rel=0.15)


def test_nothing_moved_costs_the_floor() -> None:
    machine = MACHINES["910b2"]
    time = pointwise(machine, "mul", 0, 0)
    assert time.total_s == machine.calibration.section("pointwise.mul")["floor_s"]
    assert time.overhead_s == time.total_s


def test_what_exceeds_l2_goes_at_the_rate_of_hbm() -> None:
    machine = MACHINES["910b2"]
    coef = machine.calibration.section("pointwise.copy")
    l2 = machine.device.l2_bytes
    small = pointwise(machine, "copy", 0, l2).memory_s
    large = pointwise(machine, "copy", 0, 2 * l2).memory_s
    assert small == pytest.approx(l2 / (coef["l2"] * machine.device.l2_bytes_per_s))
    rate = l2 / (large - small)
    assert rate == pytest.approx(coef["hbm"] * machine.device.hbm_bytes_per_s)


def test_arithmetic_binds_when_it_is_slower_than_memory() -> None:
    time = pointwise(MACHINES["910b2"], "swiglu", 1e9, 1e3, "fp32")
    # 6 FLOP an element at half the 2-byte rate.
    assert time.compute_s == pytest.approx(6 * 1e9 * 2 / MACHINES["910b2"].device.vector_flop_per_s)
    assert time.memory_s == 0


@given(
    kind=st.sampled_from(KINDS),
    elements=st.floats(0, 1e12),
    bytes_moved=st.floats(0, 1e13),
    name=st.sampled_from(sorted(MACHINES)),
)
def test_more_work_is_never_faster_and_parts_sum(
    kind: str, elements: float, bytes_moved: float, name: str
) -> None:
    here = pointwise(MACHINES[name], kind, elements, bytes_moved)
    more = pointwise(MACHINES[name], kind, 2 * elements, 2 * bytes_moved)
    assert np.isfinite(here.total_s)
    assert more.total_s >= here.total_s
    parts = here.compute_s + here.memory_s + here.overhead_s
    assert parts == pytest.approx(here.total_s)


def test_one_element_is_the_same_as_many() -> None:
    sizes = np.asarray([1e3, 1e6, 1e9])
    many = pointwise(MACHINES["910b2"], "add", sizes, 6 * sizes[:, None])
    assert all(part.shape == (3, 3) for part in many)
    assert many.total_s[1, 1] == pointwise(MACHINES["910b2"], "add", 1e6, 6e6).total_s


def test_unknown_names_are_named() -> None:
    with pytest.raises(UnknownNameError, match="swiglu"):
        pointwise(MACHINES["910b2"], "swigl", 1, 1)
    with pytest.raises(UnknownNameError, match="dtype"):
        pointwise(MACHINES["910b2"], "add", 1, 1, "bf17")
