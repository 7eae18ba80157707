"""Corrections: the fit, what it refuses, the profile it makes, and prices with and without it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.costmodel.catalog import load_cluster, load_device
from shardplan.costmodel.correct import FamilyFit, correct
from shardplan.costmodel.correction import ALL, Correction
from shardplan.costmodel.devices import device_summary
from shardplan.costmodel.errors import DataFileError
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.attention import attention_decode
from shardplan.costmodel.kernels.base import KernelTime, Machine
from shardplan.costmodel.kernels.collectives import collective
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.pointwise import pointwise
from shardplan.costmodel.placement import group_tiers
from shardplan.costmodel.price_measured import Priced, check_plausible, price_measured
from shardplan.costmodel.profile_toml import profile_text
from shardplan.costmodel.profiler_files.measurement import Measurement
from shardplan.models.errors import InputError

NPU = load_device("910b2")
SIZES = list(
    itertools.product((1, 16, 64, 256, 1024, 4096), (1024, 4096, 8192), (1024, 5120, 8192))
)
Truth = Callable[[KernelTime], object]


def measured(sizes: dict[str, float], seconds: float, op: str = "matmul") -> Measurement:
    """One measurement of a file."""
    return Measurement(
        op=op,
        dtype="bf16",
        sizes=tuple((name, float(size)) for name, size in sizes.items()),
        seconds=seconds,
        count=3,
        file="kernel_details.csv",
        line=2,
        kernel="MatMulV2",
    )


def products(truth: Truth, sizes: list[tuple[int, int, int]]) -> list[Priced]:
    """Products on a machine whose times follow from the model's by `truth`."""
    m, n, k = (np.asarray(axis, dtype=np.float64) for axis in zip(*sizes, strict=True))
    time = matmul(Machine.of(NPU), m, n, k, "bf16", weights="cold")
    seconds = np.asarray(truth(time), dtype=np.float64)
    rows = [
        measured({"m": a, "n": b, "k": c}, float(s))
        for (a, b, c), s in zip(sizes, seconds, strict=True)
    ]
    priced, refused = price_measured(NPU, None, rows)
    assert refused == {}
    return priced


def only(fits: list[FamilyFit]) -> FamilyFit:
    """The fit of the one section."""
    (found,) = fits
    return found


def change(factor: float = 1.0, **values: object) -> Correction:
    """A correction with the given numbers."""
    plain = Correction(
        name="matmul.bf16",
        floor_factor=1.0,
        knots_s=(1e-6,),
        factors=(factor,),
        kind="fitted",
        source="a test",
        rows_fitted=3,
        rows_held_out=0,
        median_error_before=math.nan,
        p90_error_before=math.nan,
        median_error=math.nan,
        p90_error=math.nan,
    )
    return replace(plain, **values)  # type: ignore[arg-type]  # fields by name


def with_changes(**changes: Correction) -> Device:
    """The device with corrections; `all` or a section with its dot as `_`."""
    named = {name.replace("_", ".", 1): one for name, one in changes.items()}
    return replace(NPU, corrections={n: replace(c, name=n) for n, c in named.items()})


def test_a_machine_a_fifth_slower_is_found_out() -> None:
    """Every kernel takes 1.2 times as long: one factor, and no error is left on held-out rows."""
    found = only(correct(products(lambda time: 1.2 * time.total_s, SIZES)))
    assert found.correction is not None
    assert found.form == "scale"
    assert found.correction.factor == pytest.approx(1.2, rel=0.01)
    assert found.before.median == pytest.approx(1 / 6, abs=0.01)
    assert found.after.p90 < 0.01
    assert found.correction.rows_held_out + found.correction.rows_fitted == len(SIZES)


def test_a_slower_launch_is_told_from_a_slower_machine() -> None:
    """The floor alone is three times what the calibration has."""
    found = only(correct(products(lambda t: t.compute_s + t.memory_s + 3 * t.overhead_s, SIZES)))
    assert found.correction is not None
    assert found.form == "floor"
    assert found.correction.floor_factor == pytest.approx(3.0, rel=0.1)
    assert found.correction.factor == pytest.approx(1.0, abs=0.03)
    assert found.after.median < 0.02


def test_an_error_that_changes_with_size_gets_a_curve() -> None:
    """Small bodies take as long as priced, large ones 1.8 times; beyond it stays 1.8."""

    def truth(time: KernelTime) -> object:
        body = time.compute_s + time.memory_s
        return body * np.interp(np.log(body), np.log([1e-5, 3e-4]), [1.0, 1.8]) + time.overhead_s

    found = only(correct(products(truth, SIZES)))
    assert found.correction is not None
    assert found.form == "curve"
    assert found.correction.factors[-1] == pytest.approx(1.8, rel=0.05)
    assert found.after.median < 0.25 * found.before.median


def test_odd_rows_do_not_pull_the_curve() -> None:
    """One row in nine is four times off."""

    def truth(time: KernelTime) -> object:
        odd = np.where(np.arange(len(SIZES)) % 9 == 4, 4.0, 1.0)
        return 1.3 * time.total_s * odd

    found = only(correct(products(truth, SIZES)))
    assert found.correction is not None
    assert found.correction.factor == pytest.approx(1.3, rel=0.03)


def test_a_right_calibration_is_left_alone() -> None:
    """Measurements that scatter around the model say nothing."""
    noise = np.exp(np.random.default_rng(1).normal(0.0, 0.05, len(SIZES)))
    found = only(correct(products(lambda time: time.total_s * noise, SIZES)))
    assert found.correction is None
    assert "no gain" in found.reason


def test_two_shapes_are_too_few() -> None:
    """Said, with what is needed; the error before is still shown."""
    found = only(correct(products(lambda time: 2.0 * time.total_s, SIZES[:2])))
    assert found.correction is None
    assert "under 3 shapes" in found.reason
    assert found.before.median == pytest.approx(0.5)


def test_few_scattered_rows_move_the_price_little() -> None:
    """Three agreeing rows are believed almost whole, three scattered ones less."""
    agree = only(correct(products(lambda time: 1.5 * time.total_s, SIZES[:3])))
    spread = np.asarray([1.1, 1.5, 4.0])
    scattered = only(correct(products(lambda time: spread * time.total_s, SIZES[:3])))
    assert agree.correction is not None
    assert scattered.correction is not None
    assert agree.correction.factor == pytest.approx(1.5, rel=0.01)
    assert 1.2 < scattered.correction.factor < 1.48


def test_the_order_of_rows_does_not_matter() -> None:
    """Which are held out follows from their shapes."""
    part = products(lambda time: 1.2 * time.total_s, SIZES)[0]
    turned = products(lambda time: 1.2 * time.total_s, SIZES[::-1])[0]
    one, two = only(correct([part])), only(correct([turned]))
    assert one.correction is not None
    assert two.correction is not None
    assert one.correction.factor == pytest.approx(two.correction.factor, rel=1e-9)
    assert one.before.rows == two.before.rows


@pytest.mark.parametrize(("scale", "says"), [(1e-3, "faster"), (1e3, "slower")])
def test_a_wrong_unit_is_impossible_for_the_device(scale: float, says: str) -> None:
    """ms read as us, and ns."""
    priced = products(lambda time: scale * time.total_s, SIZES)
    with pytest.raises(DataFileError, match=says) as caught:
        check_plausible(NPU, priced)
    assert "kernel_details.csv" in caught.value.got


def test_one_kernel_above_the_peak_is_refused_with_its_line() -> None:
    """4096 x 8192 x 8192 at 376 TFLOP/s takes 1.46 ms."""
    with pytest.raises(DataFileError, match="peak") as caught:
        check_plausible(NPU, price_measured(
            NPU, None, [measured({"m": 4096, "n": 8192, "k": 8192}, 1e-3)]
        )[0])  # fmt: skip
    assert "kernel_details.csv:2" in caught.value.got


def test_collectives_need_their_cluster() -> None:
    """Without one they are not priced, and it is said why."""
    rows = [measured({"message_bytes": 2.0**24, "ranks": 8}, 4e-4, op="all_reduce")]
    priced, refused = price_measured(NPU, None, rows)
    assert priced == []
    assert list(refused) == ["collectives need the cluster they ran on"]
    (part,), _ = price_measured(NPU, load_cluster("atlas-800t-a2"), rows)
    assert part.section == "collectives.mesh.graph.all_reduce"


def test_a_dtype_without_coefficients_shares_its_lenders_section() -> None:
    """fp16 products are priced as bf16 ones, so they are corrected together."""
    row = replace(measured({"m": 16, "n": 4096, "k": 4096}, 3e-5), dtype="fp16")
    (part,), _ = price_measured(NPU, None, [row])
    assert part.section == "matmul.bf16"


def test_without_a_correction_prices_are_the_same_to_the_bit() -> None:
    """A correction of one section leaves the others as they were, too."""
    plain, fixed = Machine.of(NPU), Machine.of(with_changes(matmul_bf16=change(factor=1.5)))
    before = pointwise(plain, "swiglu", 1e6, 6e6)
    after = pointwise(fixed, "swiglu", 1e6, 6e6)
    assert [part.tobytes() for part in before] == [part.tobytes() for part in after]


def test_a_correction_scales_body_and_overhead_apart() -> None:
    """By hand: total = 2 body + 3 overhead; fp16 borrows bf16's coefficients and its correction."""
    fixed = Machine.of(with_changes(matmul_bf16=change(factor=2.0, floor_factor=3.0)))
    for dtype in ("bf16", "fp16"):
        was = matmul(Machine.of(NPU), 64, 4096, 4096, dtype)
        now = matmul(fixed, 64, 4096, 4096, dtype)
        body = was.compute_s + was.memory_s
        assert now.total_s == pytest.approx(2.0 * body + 3.0 * was.overhead_s)
        assert now.compute_s + now.memory_s + now.overhead_s == pytest.approx(now.total_s)


def test_all_stands_for_every_section_without_its_own() -> None:
    """The step's attention and collectives, but not the product that was measured."""
    both = with_changes(matmul_bf16=change(factor=1.1, floor_factor=1.1), all=change(
        factor=2.0, floor_factor=2.0
    ))  # fmt: skip
    plain, fixed = Machine.of(NPU), Machine.of(both)
    sizes = (8, 4096, 32, 8, 128)
    was = attention_decode(plain, *sizes, kernel="flash", kv_dtype="bf16").total_s
    now = attention_decode(fixed, *sizes, kernel="flash", kv_dtype="bf16").total_s
    assert now == pytest.approx(2.0 * was)
    spans = group_tiers(load_cluster("atlas-800t-a2"), group=8, stride=1)
    slow = [
        float(collective("all_reduce", spans, 1e6, one.calibration, launch="graph").total_s)
        for one in (plain, fixed)
    ]
    assert slow[1] == pytest.approx(2.0 * slow[0])
    products_s = [float(matmul(one, 1, 64, 64, "bf16").total_s) for one in (plain, fixed)]
    assert products_s[1] == pytest.approx(1.1 * products_s[0])


@settings(max_examples=60, deadline=None)
@given(
    factor=st.floats(0.1, 10),
    floor=st.floats(0.1, 10),
    fall=st.floats(-0.95, 0.95),
    low=st.floats(1e-7, 1e-5),
    span=st.floats(1.1, 20),
)
def test_a_corrected_bigger_kernel_still_takes_longer(
    factor: float, floor: float, fall: float, low: float, span: float
) -> None:
    """Whatever the correction, time grows with the bytes and stays positive."""
    knots = (low, low * span, low * span * span)
    factors = (factor, factor * span**fall, factor)
    one = change(floor_factor=floor, knots_s=knots, factors=factors)
    machine = Machine.of(with_changes(pointwise_swiglu=one))
    elements = np.logspace(2, 9, 40)
    time = pointwise(machine, "swiglu", elements, 6.0 * elements).total_s
    assert time[0] > 0
    assert np.all(np.diff(time) >= -1e-12 * time[1:])


def write(path: Path, corrections: list[Correction], **changes: str) -> Path:
    """A profile file."""
    text = profile_text(
        name="mine",
        title="my machine",
        base="910b2",
        cluster=changes.pop("cluster", "atlas-800t-a2"),
        version="1",
        options={},
        files=[],
        corrections=corrections,
    )
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_profile_is_a_device_and_a_cluster(tmp_path: Path) -> None:
    """Its name, its base's numbers, its corrections; what is written is what is read."""
    one = change(factor=1.25, median_error=0.04)
    path = write(tmp_path / "p.toml", [one])
    device = load_device(path)
    assert (device.name, device.flop_per_s) == ("mine", NPU.flop_per_s)
    assert device.corrections["matmul.bf16"].factor == 1.25
    assert device.corrections["matmul.bf16"].median_error == 0.04
    assert math.isnan(device.corrections["matmul.bf16"].p90_error)
    assert load_cluster(path).device == load_cluster("atlas-800t-a2", device=str(path)).device
    section = Machine.of(device).calibration.section("matmul.bf16")
    assert (section.kind, section.source) == ("fitted", "a test")
    assert "corrections" in device_summary(path)
    assert "corrections" not in device_summary("910b2")


def test_a_correction_of_one_engines_kernels_leaves_anothers_alone(tmp_path: Path) -> None:
    """torch-graph has matmul kernels of its own on the H200; those of MLA are shared."""
    edits = {'base = "910b2"': 'base = "h200"\nengine_profile = "torch-graph"'}
    both = [change(factor=2.0), change(name="mla.decode", factor=2.0)]
    device = load_device(write(tmp_path / "p.toml", both, **edits))
    own, other = (Machine.of(device, engine).calibration for engine in ("torch-graph", "trtllm"))
    assert own.correction("matmul.bf16") == both[0]
    assert other.correction("matmul.bf16") is None
    assert own.correction("mla.decode") == other.correction("mla.decode") == both[1]


def test_a_cluster_file_may_name_a_profile_beside_it(tmp_path: Path) -> None:
    """As it names any device file."""
    write(tmp_path / "p.toml", [change(factor=1.25)])
    shipped = Path(__file__).parents[2] / "costmodel/data/clusters/atlas-800t-a2.toml"
    text = shipped.read_text(encoding="utf-8").replace('device = "910b2"', 'device = "./p.toml"')
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    assert load_cluster(tmp_path / "c.toml").device.name == "mine"


BROKEN = {
    "unknown section": ({"matmul.bf16": "matmul.bf17"}, "no section"),
    "unknown key": ({"knots_s = [": "knot_s = ["}, "unknown or missing"),
    "factor": ({"factors = [1.0]": "factors = [0.0]"}, "must lie between"),
    "floor": ({"floor_factor = 1.0": "floor_factor = 99.0"}, "must lie between"),
    "lengths": ({"factors = [1.0]": "factors = [1.0, 1.0]"}, "as many"),
    "below 0": ({"[1e-06]": "[-1.0]"}, "above 0"),
    "order": ({"[1e-06]": "[1e-6, 1e-7]", "[1.0]": "[1.0, 1.0]"}, "ascend"),
    "fall": ({"[1e-06]": "[1e-6, 2e-6]", "[1.0]": "[1.0, 0.4]"}, "fall as fast"),
    "number": ({"factors = [1.0]": "factors = [nan]"}, "finite number"),
    "large": ({"factors = [1.0]": f"factors = [1{'0' * 400}]"}, "finite number"),
    "list": ({"factors = [1.0]": "factors = 1.0"}, "list of numbers"),
    "kind": ({'kind = "fitted"': 'kind = "guessed"'}, "fitted or derived"),
    "source": ({'source = "a test"': 'source = " "'}, "source"),
    "count": ({"rows_fitted = 3": "rows_fitted = -3"}, "count"),
    "base": ({'base = "910b2"': 'base = "911"'}, "unknown device"),
    "key": ({'title = "my machine"': 'titel = "my machine"'}, "unknown key"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_profile_is_refused(case: str, tmp_path: Path) -> None:
    """With the file and the rule."""
    changes, reason = BROKEN[case]
    path = write(tmp_path / "p.toml", [change()], **changes)
    with pytest.raises(InputError, match=reason):
        load_device(path)


def test_a_profile_without_a_cluster_is_no_cluster(tmp_path: Path) -> None:
    """It says what to do."""
    path = write(tmp_path / "p.toml", [change()], **{'cluster = "atlas-800t-a2"\n': ""})
    with pytest.raises(DataFileError, match="only when it names one"):
        load_cluster(path)


def test_a_profile_of_a_profile_is_refused(tmp_path: Path) -> None:
    """Corrections do not pile up."""
    write(tmp_path / "one.toml", [change()])
    path = write(tmp_path / "two.toml", [], **{'base = "910b2"': 'base = "./one.toml"'})
    with pytest.raises(DataFileError, match="based on a device"):
        load_device(path)


def test_all_is_not_a_section() -> None:
    """A correction of everything needs no section of that name."""
    device = with_changes(all=change(factor=2.0))
    assert ALL in device.corrections
    assert ALL not in Machine.of(device).calibration.sections
