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
from numpy.typing import NDArray

from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.catalog import device_names, load_device
from shardplan.costmodel.errors import CalibrationError
from shardplan.costmodel.fitting.common import cross_validated, held_out
from shardplan.costmodel.fitting.separable_fit import SeparableProblem, coefficients_of
from shardplan.costmodel.fitting.surface_fit import knot_weights
from shardplan.costmodel.kernels.base import Array, Machine, as_array
from shardplan.costmodel.kernels.matmul import WeightState, matmul
from shardplan.costmodel.kernels.moe import grouped_matmul
from shardplan.costmodel.kernels.surface import (
    factor_name,
    knot_name,
    padded_surface_of,
    surface_of,
)
from shardplan.models.errors import InputError, UnknownNameError

ASCEND = Machine.of(load_device("910b2"))
DTYPES = ("bf16", "fp16", "w8a16", "w8a8", "w8a8_static", "w4a16", "w4a8")
MICROSCALED = ("mxfp8", "mxfp4", "w4a8_mxfp")
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
    # Qwen3-32B decode of 16 rows on an A3 die, Horacehxw/msModeling @ 39df672b: not fitted here.
    machine = Machine(load_device("a3-die"), ASCEND.calibration)
    cold = matmul(machine, 16, n, k, "bf16", weights="cold").total_s * 1e6
    warm = matmul(machine, 16, n, k, "bf16").total_s * 1e6
    assert cold == pytest.approx(measured_us, rel=0.2)
    assert warm < cold


def test_small_weights_of_the_benchmark_come_from_l2_and_large_ones_do_not() -> None:
    for n, slower in ((1024, True), (16384, False)):
        rotated = matmul(ASCEND, 16, n, 8192, "bf16").total_s
        cold = matmul(ASCEND, 16, n, 8192, "bf16", weights="cold").total_s
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


@pytest.mark.parametrize("weights", ["rotated", "cold"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_doubled_size_is_hardly_ever_faster(dtype: str, weights: WeightState) -> None:
    # The benchmark's library changes kernels below 16 rows, where larger products do get faster.
    rng = np.random.default_rng(11)
    least = 4 if weights == "rotated" else 0
    m, n, k = (np.floor(2 ** rng.uniform(low, 13, 20000)) for low in (least, 8, 8))
    here = matmul(ASCEND, m, n, k, dtype, weights=weights).total_s
    # A few rows times 1024 columns were measured slower than times 2048 in w8a8; the surface of
    # w8a8_static is that of w8a8, whose overhead grows with the rows.
    share = 0.03 if dtype == "w8a8_static" else 0.01
    for larger in ((2 * m, n, k), (m, 2 * n, k), (m, n, 2 * k)):
        drop = 1.0 - matmul(ASCEND, *larger, dtype, weights=weights).total_s / here
        assert (drop > 0.02).mean() < share
        assert drop.max() < 0.12


@pytest.mark.parametrize("dtype", ["bf16", "w8a8", "w8a16"])
def test_more_rows_inside_a_network_hardly_ever_cost_less(dtype: str) -> None:
    rng = np.random.default_rng(3)
    n, k = (np.floor(2 ** rng.uniform(8, 14, 1500)) for _ in range(2))
    rows = np.unique(np.round(2 ** np.arange(0, 14.01, 0.125)))
    times = matmul(ASCEND, rows[:, None], n, k, dtype, weights="cold").total_s
    fall = 1.0 - times / np.maximum.accumulate(times, axis=0)
    assert (fall > 0.02).mean() < 0.005
    assert fall.max() < 0.08
    assert fall[rows <= 32].max() < 1e-9


@pytest.mark.parametrize("name", ["910a", "310p3", "910b4", "950pr", "a3-die"])
@pytest.mark.parametrize("dtype", ["fp16", "w8a8"])
def test_where_the_surface_is_borrowed_measured_row_counts_stay_in_order(
    name: str, dtype: str
) -> None:
    features = np.asarray([512.0, 2048, 4096, 8192, 16384])
    rows = np.power(2.0, np.arange(15.0))
    n, k = np.meshgrid(features, features)
    machine = Machine.of(load_device(name))
    times = matmul(machine, rows[:, None, None], n, k, dtype, weights="cold").total_s
    # What cold weights add to a body weighs less where the surface lets the body grow.
    fall = 1.0 - times[1:] / times[:-1]
    assert fall.max() < 0.05
    assert (fall > 1e-9).mean() < 0.01


@pytest.mark.parametrize(("device", "measured_us"), [("910b1", 3515.0), ("950pr", 2558.0)])
def test_a_published_cube_of_8192_on_two_parts(device: str, measured_us: float) -> None:
    # FP16, 86 % of peak on a 910B1 and 99.7 % on a 950PR: matmul_high_performance samples of
    # mirror-cann/asc-devkit @ 82b89a15. The 950PR has no calibration of its own.
    time = matmul(Machine.of(load_device(device)), 8192, 8192, 8192, "fp16").total_s
    assert time * 1e6 == pytest.approx(measured_us, rel=0.07)


@pytest.mark.parametrize("name", ["910a", "310p3", "910b4", "950pr", "950dt"])
def test_borrowed_coefficients_respect_each_devices_limits(name: str) -> None:
    machine = Machine.of(load_device(name))
    device = machine.device
    large = matmul(machine, 8192, 8192, 8192, "fp16").total_s
    assert 1.0 <= large / (2 * 8192**3 / device.flop_per_s["fp16"]) < 1.35
    streamed = matmul(machine, 1, 8192, 8192, "fp16", weights="cold").total_s
    assert 1.1 < streamed / (2 * 8192**2 / device.hbm_bytes_per_s) < 1.8


def test_a_known_scale_is_cheaper_than_one_found_for_each_row() -> None:
    rows = np.asarray([1.0, 64.0, 4096.0])
    found = matmul(ASCEND, rows, 4096, 4096, "w8a8", weights="cold").total_s
    known = matmul(ASCEND, rows, 4096, 4096, "w8a8_static", weights="cold").total_s
    given = matmul(ASCEND, rows, 4096, 4096, "w8a8", weights="cold", quantized=True).total_s
    assert (known < found).all()
    assert (given < known).all()


def test_microscaled_weights_stream_their_scales_and_need_a_950() -> None:
    machine = Machine.of(load_device("950pr"))
    cold = {
        dtype: matmul(machine, 1, 16384, 16384, dtype, weights="cold").memory_s
        for dtype in ("fp8", *MICROSCALED)
    }
    assert cold["mxfp8"] / cold["fp8"] == pytest.approx(1 + 1 / 32, rel=2e-3)
    assert cold["mxfp4"] / cold["fp8"] == pytest.approx(0.5 + 1 / 32, rel=5e-3)
    bound = {d: matmul(machine, 8192, 8192, 8192, d).compute_s for d in ("mxfp8", "mxfp4")}
    assert bound["mxfp4"] < 0.6 * bound["mxfp8"]
    for other in ("910b2", "h100"):
        for dtype in MICROSCALED:
            with pytest.raises(InputError, match="cannot run weights of this dtype"):
                matmul(Machine.of(load_device(other)), 1, 256, 256, dtype)


def test_compressed_weights_read_fewer_bytes_on_the_310p_alone() -> None:
    machine = Machine.of(load_device("310p3"))
    static, compressed = (
        matmul(machine, 1, 8192, 8192, dtype, weights="cold").memory_s
        for dtype in ("w8a8_static", "w8a8sc")
    )
    assert compressed / static == pytest.approx(0.75, abs=0.01)
    with pytest.raises(InputError, match="cannot run weights of this dtype"):
        matmul(ASCEND, 1, 256, 256, "w8a8sc")


def test_one_core_for_both_units_unpacks_before_it_multiplies() -> None:
    machine = Machine.of(load_device("310p3"))
    device = machine.device
    apart = replace(device, vector_cores=device.cube_cores)
    serial = matmul(machine, 256, 4096, 4096, "w8a16").total_s
    beside = matmul(Machine(apart, machine.calibration), 256, 4096, 4096, "w8a16").total_s
    assert serial > beside
    assert serial - beside < 2 * 3 * 4096**2 / device.vector_flop_per_s


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


def test_a_factored_surface_is_the_sum_of_products_of_its_lines() -> None:
    lines = {
        1: {"m": {1: 0.5, 16: 1.0}, "n": {256: 1.0, 1024: 2.0}, "k": {256: 1.0}},
        2: {"m": {1: 1.0}, "n": {256: 0.5, 4096: 1.5}, "k": {64: -1.0, 256: 0.0}},
    }
    names = {
        factor_name(rank, axis, size): value
        for rank, axes in lines.items()
        for axis, knots in axes.items()
        for size, value in knots.items()
    }
    surface = surface_of(names)
    rng = np.random.default_rng(5)
    sizes = [2 ** rng.uniform(-1, 14, 300) for _ in range(3)]
    expected = np.zeros(300)
    for axes in lines.values():
        product = np.ones(300)
        for size, knots in zip(sizes, axes.values(), strict=True):
            logs = np.log2(np.maximum(size, 1.0))
            product *= np.interp(logs, np.log2(list(knots)), list(knots.values()))
        expected += product
    assert surface.whole
    np.testing.assert_allclose(np.log(surface.factor(sizes)), expected, atol=1e-12)
    del names["u2_k64"], names["u2_k256"]
    with pytest.raises(CalibrationError, match="m, n and k"):
        surface_of(dict(names))


def test_few_rows_may_be_padded_to_thirty_two() -> None:
    values = {1: 0.4, 16: 0.1, 32: 0.2, 64: -0.5}
    names = {factor_name(1, "m", size): value for size, value in values.items()}
    names |= {factor_name(1, axis, 1): 1.0 for axis in "nk"}
    assert padded_surface_of(names).values.tolist() == [0.1, 0.1, 0.2, -0.5]


def test_a_separable_fit_recovers_a_surface_and_fades_where_nothing_was_measured() -> None:
    knots = ((1, 4, 16, 64), (1, 8, 64, 512), (1, 32))
    rng = np.random.default_rng(2)
    m, n = np.power(4.0, rng.integers(0, 4, 400)), np.power(8.0, rng.integers(0, 3, 400))
    sizes = (as_array(m), as_array(n), np.ones(400))
    grid = (np.ones(1), np.ones(1), np.ones(1))
    found = SeparableProblem(
        base=lambda s: s[0] * s[1],
        knots=knots,
        sizes=sizes,
        measured_s=sizes[0] * sizes[1] * np.exp(0.2 * np.log2(sizes[0]) - 0.3),
        grid=grid,
        larger=(),
        rank=3,
        reach=(4.0, 1.0, 1.0),
        noise=1e-3,
    ).solve()
    surface = surface_of(coefficients_of(found, knots))
    inside = surface.factor([np.asarray([4.0, 64.0]), np.asarray([8.0, 8.0]), np.ones(2)])
    np.testing.assert_allclose(np.log(inside), [0.1, 0.9], atol=0.02)
    far = surface.factor([np.asarray([64.0]), np.asarray([512.0]), np.asarray([32.0])])
    assert abs(float(np.log(far)[0])) < 0.1


def test_cross_validation_predicts_every_row_without_seeing_it() -> None:
    shapes = [(row,) for row in range(40)]
    seconds = np.arange(1.0, 41.0)
    seen: list[int] = []

    def predict(left_out: NDArray[np.bool_]) -> Array:
        seen.extend(np.flatnonzero(left_out).tolist())
        return 2.0 * seconds[left_out]

    stats = cross_validated(shapes, seconds, predict, seeds=(0, 1))
    assert sorted(seen) == sorted([*range(40), *range(40)])
    assert (stats.rows, stats.median, stats.bias) == (40, 1.0, 1.0)


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
