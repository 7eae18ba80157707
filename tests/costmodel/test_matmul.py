"""Matrix products: hand-worked bounds, growth with size, one element or a million."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib import resources
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.catalog import device_names, load_device
from shardplan.costmodel.fitting.common import held_out
from shardplan.costmodel.fitting.surface_fit import knot_weights
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.moe import grouped_matmul
from shardplan.costmodel.kernels.surface import knot_name, surface_of
from shardplan.models.errors import InputError, UnknownNameError

ASCEND = Machine.of(load_device("910b2"))
DTYPES = ("bf16", "fp16", "w8a16", "w8a8", "w8a8_static", "w4a16", "w4a8")
MACHINES = {name: Machine.of(load_device(name)) for name in ("910b2", "h100", "h200")}
SIZES = st.floats(min_value=0, max_value=7).map(lambda power: float(int(10**power)))


@pytest.mark.parametrize("name", MACHINES)
def test_one_cold_row_takes_at_least_the_weights_at_peak_bandwidth(name: str) -> None:
    device = MACHINES[name].device
    time = matmul(MACHINES[name], 1, 8192, 8192, "bf16", weights="cold")
    assert time.total_s >= 2 * 8192 * 8192 / device.hbm_bytes_per_s
    assert time.total_s < 3 * 2 * 8192 * 8192 / device.hbm_bytes_per_s
    assert time.memory_s > 0
    assert time.compute_s == 0


@pytest.mark.parametrize("name", MACHINES)
def test_a_huge_product_is_bound_by_the_matrix_units(name: str) -> None:
    device = MACHINES[name].device
    time = matmul(MACHINES[name], 16384, 16384, 8192, "bf16")
    ideal = 2 * 16384 * 16384 * 8192 / device.flop_per_s["bf16"]
    assert ideal <= time.total_s <= 1.6 * ideal
    assert time.compute_s > 0


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "measured_us"),
    [
        (16384, 16384, 7168, "bf16", 12172.8),
        (64, 8192, 4096, "bf16", 56.8),
        (4096, 8192, 8192, "w8a8", 1033.4),
        (1, 16384, 8192, "w8a8", 99.1),
    ],
)
def test_single_measurements_of_a_910b(
    m: int, n: int, k: int, dtype: str, measured_us: float
) -> None:
    # Cited single figures of hudingyi688/aiconfigurator-npu @ 90d7765a.
    assert matmul(ASCEND, m, n, k, dtype).total_s * 1e6 == pytest.approx(measured_us, rel=0.12)


@pytest.mark.parametrize(
    ("n", "k", "measured_us"),
    [(3200, 5120, 32.118), (5120, 1600, 18.760), (768, 5120, 11.040), (5120, 512, 8.633)],
)
def test_cold_weights_explain_kernels_inside_a_network(n: int, k: int, measured_us: float) -> None:
    # Qwen3-32B decode of 16 rows on an A3 die, Horacehxw/msModeling @ 39df672b: never fitted.
    machine = Machine.of(load_device("a3-die"))
    cold = matmul(machine, 16, n, k, "bf16", weights="cold").total_s * 1e6
    warm = matmul(machine, 16, n, k, "bf16").total_s * 1e6
    assert cold == pytest.approx(measured_us, rel=0.2)
    assert warm < cold


def test_small_weights_of_the_benchmark_come_from_l2_and_large_ones_do_not() -> None:
    for n, slower in ((1024, True), (16384, False)):
        rotated = matmul(ASCEND, 1, n, 8192, "bf16").total_s
        cold = matmul(ASCEND, 1, n, 8192, "bf16", weights="cold").total_s
        assert (cold > 1.1 * rotated) == slower


def test_narrow_weights_pay_off_where_weights_are_streamed_and_not_in_prefill() -> None:
    decode = {d: matmul(ASCEND, 16, 8192, 8192, d, weights="cold").total_s for d in DTYPES}
    assert decode["w4a16"] < decode["w8a16"] < decode["bf16"]
    assert decode["w8a8"] < decode["bf16"]
    prefill = {d: matmul(ASCEND, 8192, 8192, 8192, d).total_s for d in DTYPES}
    assert prefill["w8a16"] >= prefill["bf16"]
    assert prefill["w8a8"] < 0.75 * prefill["bf16"]


def test_the_quantization_kernel_is_overhead_that_grows_with_rows() -> None:
    few, many = (matmul(ASCEND, rows, 4096, 4096, "w8a8").overhead_s for rows in (16, 4096))
    plain = matmul(ASCEND, 4096, 4096, 4096, "bf16").overhead_s
    # 4096 x 4096 read in 2 bytes and written in 1, at the HBM's rate or slower.
    assert many - few > 0.5 * 3 * 4096 * 4096 / ASCEND.device.hbm_bytes_per_s
    assert few > plain


def test_half_the_cores_and_bandwidth_never_help() -> None:
    device = ASCEND.device
    slow = replace(
        device,
        cube_cores=device.cube_cores // 2,
        hbm_bytes_per_s=device.hbm_bytes_per_s / 2,
        flop_per_s=MappingProxyType({k: v / 2 for k, v in device.flop_per_s.items()}),
    )
    rng = np.random.default_rng(7)
    m, n, k = (np.floor(2 ** rng.uniform(0, 14, 2000)) for _ in range(3))
    fast_s = matmul(ASCEND, m, n, k, "bf16").total_s
    slow_s = matmul(Machine(slow, ASCEND.calibration), m, n, k, "bf16").total_s
    assert (slow_s >= fast_s * (1 - 1e-12)).all()


@pytest.mark.parametrize("name", MACHINES)
@given(m=SIZES, n=SIZES, k=SIZES)
@settings(max_examples=60, deadline=None)
def test_times_are_finite_and_parts_sum_to_the_total(
    name: str, m: float, n: float, k: float
) -> None:
    for dtype in DTYPES:
        time = matmul(MACHINES[name], m, n, k, dtype)
        assert np.isfinite(time.total_s)
        assert time.total_s > 0
        parts = time.compute_s + time.memory_s + time.overhead_s
        assert parts == pytest.approx(time.total_s, rel=1e-12)
        assert min(time.compute_s, time.memory_s, time.overhead_s) >= 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_doubled_size_is_hardly_ever_faster(dtype: str) -> None:
    # Measured kernels change at 16 rows, where some products do get faster: left out.
    rng = np.random.default_rng(11)
    m, n, k = (np.floor(2 ** rng.uniform(low, 13, 20000)) for low in (0, 8, 8))
    here = matmul(ASCEND, m, n, k, dtype).total_s
    same_kernel = ~((m < 16) & (2 * m >= 16))
    for larger, kept in (
        ((2 * m, n, k), same_kernel),
        ((m, 2 * n, k), True),
        ((m, n, 2 * k), True),
    ):
        drop = np.where(kept, 1.0 - matmul(ASCEND, *larger, dtype).total_s / here, 0.0)
        assert (drop > 0.011).mean() < 0.003
        assert drop.max() < 0.2


@pytest.mark.parametrize("name", device_names())
def test_every_device_prices_the_dtypes_it_declares(name: str) -> None:
    device = load_device(name)
    for dtype in device.weight_dtypes:
        dense = matmul(Machine.of(device), 64, 4096, 4096, dtype).total_s
        routed = grouped_matmul(Machine.of(device), 64, 8, 4096, 4096, dtype).total_s
        assert 0 < dense < routed


def test_broadcast_shape_and_one_element_is_the_same_as_many() -> None:
    m = np.asarray([[1.0], [64.0], [1000.0]])
    n = np.asarray([256.0, 4096.0, 7168.0, 50000.0])
    table = matmul(ASCEND, m, n, 5120, "w8a8")
    assert all(part.shape == (3, 4) for part in table)
    one = matmul(ASCEND, 1000, 7168, 5120, "w8a8")
    assert one.total_s.shape == ()
    assert one.total_s == table.total_s[2, 2]


def test_more_elements_than_a_chunk() -> None:
    m = np.arange(1.0, 40001.0)
    many = matmul(ASCEND, m, 4096, 4096, "bf16").total_s
    assert many[-1] == matmul(ASCEND, 40000, 4096, 4096, "bf16").total_s
    assert many[20000] == matmul(ASCEND, 20001, 4096, 4096, "bf16").total_s


def test_unknown_dtype_and_missing_unit_are_named() -> None:
    with pytest.raises(UnknownNameError, match="w8a8"):
        matmul(ASCEND, 1, 1, 1, "w8a9")
    with pytest.raises(InputError, match="no matrix unit"):
        matmul(ASCEND, 1, 1, 1, "fp8")


def test_surface_is_linear_between_knots_and_constant_outside() -> None:
    coef = {knot_name(m, n, 1): 1.0 * m + n for m in (1, 4) for n in (2, 8)}
    surface = surface_of(coef)
    places = [
        surface.coordinate(i, np.asarray(v)) for i, v in enumerate(([2.0, 99], [8.0, 1], [5.0, 5]))
    ]
    assert surface.at(places).tolist() == [10.5, 6.0]


def test_the_fit_and_the_formula_weigh_knots_alike() -> None:
    rng = np.random.default_rng(3)
    knots = ((1, 8, 64), (16, 256), (32, 64, 4096))
    names = [knot_name(m, n, k) for m in knots[0] for n in knots[1] for k in knots[2]]
    values = rng.normal(size=len(names))
    surface = surface_of(dict(zip(names, values.tolist(), strict=True)))
    m, n, k = (2 ** rng.uniform(-1, 14, 200) for _ in range(3))
    places = [surface.coordinate(axis, size) for axis, size in enumerate((m, n, k))]
    np.testing.assert_allclose(
        surface.at(places), knot_weights((m, n, k), knots) @ values, atol=1e-12
    )


def test_held_out_rows_are_a_fifth_and_do_not_depend_on_order() -> None:
    shapes = [(m, n) for m in range(50) for n in range(50)]
    mask = held_out(shapes)
    assert mask.mean() == pytest.approx(0.2, abs=0.03)
    assert (held_out(shapes[::-1])[::-1] == mask).all()


@pytest.mark.parametrize("name", MACHINES)
def test_fitted_sections_state_errors_on_rows_kept_out(name: str) -> None:
    text = resources.files("shardplan.costmodel") / "data" / "calibrations" / name / "matmul.toml"
    assert tomllib.loads(text.read_text(encoding="utf-8"))
    for key, section in load_calibration(name).sections.items():
        if key.startswith("matmul.") and section.kind == "fitted":
            assert section.rows_held_out >= 150
            assert section.median_error <= 0.08
