"""Calibrations: folders that stand on others, an engine's own kernels, measured shapes."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shardplan.costmodel import calibration
from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.errors import CalibrationError, DataFileError
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.nearby import ShapeTable, grid_factor, grid_name

PROFILE = Path(__file__).resolve().parents[2] / "results" / "profiles" / "h200_ops.csv"
SHAPES = "n,k,1,16,256\n1024,4096,0.2,,-0.2\n4096,4096,0.0,0.1,0.0\n"


def section(name: str, kind: str, **coefficients: float) -> str:
    """A section of a calibration file."""
    lines = [f"[{name}]", f'kind = "{kind}"', 'source = "by hand"', f"[{name}.coefficients]"]
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in coefficients.items())]) + "\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of calibrations in place of the shipped ones, with one that stands alone."""
    monkeypatch.setattr(calibration, "_root", lambda: tmp_path)
    load_calibration.cache_clear()
    (tmp_path / "one").mkdir()
    text = section("matmul.bf16", "fitted", a=1.0) + section("moe.bf16", "assumed", b=2.0)
    (tmp_path / "one" / "all.toml").write_text(text, encoding="utf-8")
    yield tmp_path
    load_calibration.cache_clear()


def test_a_folder_that_extends_another_lends_what_it_lacks_as_derived(root: Path) -> None:
    (root / "two").mkdir()
    (root / "two" / "extends.toml").write_text('base = "one"\nsource = "like it"\n', "utf-8")
    (root / "two" / "moe.toml").write_text(section("moe.bf16", "fitted", b=3.0), "utf-8")
    two = load_calibration("two")
    assert (two.section("matmul.bf16")["a"], two.section("matmul.bf16").kind) == (1.0, "derived")
    assert (two.section("moe.bf16")["b"], two.section("moe.bf16").kind) == (3.0, "fitted")


def test_a_folder_that_extends_another_says_why(root: Path) -> None:
    (root / "two").mkdir()
    (root / "two" / "extends.toml").write_text('base = "one"\n', "utf-8")
    with pytest.raises(DataFileError, match=r"`base` and a `source`"):
        load_calibration("two")


def test_an_engines_own_sections_count_for_that_engine_alone(root: Path) -> None:
    (root / "one" / "mine").mkdir()
    own = section("matmul.bf16", "fitted", a=5.0)
    (root / "one" / "mine" / "matmul.toml").write_text(own, "utf-8")
    mine, other = load_calibration("one", "mine"), load_calibration("one", "another")
    assert mine.section("matmul.bf16")["a"] == 5.0
    assert mine.section("moe.bf16")["b"] == 2.0
    assert other.section("matmul.bf16")["a"] == load_calibration("one").section("matmul.bf16")["a"]
    assert calibration.calibration_engines("one") == ("mine",)


def test_measured_shapes_need_their_reach_and_belong_to_their_section(root: Path) -> None:
    """An engine with products of its own and no shapes does not take those of the base."""
    (root / "one" / "matmul_shapes.csv").write_text(SHAPES, "utf-8")
    with pytest.raises(DataFileError, match="shapes_reach"):
        load_calibration("one")
    text = section("matmul.bf16", "fitted", a=1.0, shapes_reach=0.1)
    (root / "one" / "all.toml").write_text(text, "utf-8")
    (root / "one" / "mine").mkdir()
    own = section("matmul.bf16", "fitted", a=5.0)
    (root / "one" / "mine" / "matmul.toml").write_text(own, "utf-8")
    assert load_calibration("one").shapes is not None
    assert load_calibration("one", "another").shapes is not None
    assert load_calibration("one", "mine").shapes is None


def test_a_measured_shape_is_priced_as_measured_and_a_far_one_by_the_formula() -> None:
    """The gap at m = 16 lies halfway in ln m between 1 and 256."""
    table = ShapeTable.read(SHAPES, 0.1, "here")
    m = np.asarray([1.0, 16.0, 256.0, 9999.0])
    n, k = np.asarray(1024.0), np.asarray(4096.0)
    assert np.log(table.factor(m, n, k)) == pytest.approx([0.2, 0.0, -0.2, -0.2], abs=1e-9)
    assert np.log(table.factor(m, n * 64, k * 64)) == pytest.approx([0.0] * 4, abs=1e-5)


def test_a_shape_at_the_reach_of_one_measured_takes_half_of_its_correction() -> None:
    table = ShapeTable.read("n,k,1\n1000,1000,0.4\n", 0.1, "here")
    near = np.asarray(1000.0 * math.exp(0.1))
    found = table.factor(np.asarray(1.0), near, np.asarray(1000.0))
    assert math.log(float(found)) == pytest.approx(0.2)


def test_many_shapes_at_once_are_priced_as_one_by_one() -> None:
    table = ShapeTable.read(SHAPES, 0.3, "here")
    m, n = np.meshgrid([1.0, 7.0, 300.0], [900.0, 1024.0, 5000.0])
    k = np.full(m.shape, 4096.0)
    each = [
        float(table.factor(np.asarray(a), np.asarray(b), np.asarray(4096.0)))
        for a, b in zip(m.ravel(), n.ravel(), strict=True)
    ]
    assert table.factor(m, n, k).ravel() == pytest.approx(each)


@pytest.mark.parametrize(
    "text",
    ["n,k,1,16\n8,8,,\n", "n,k,16,1\n8,8,0,0\n", "n,k,1\n8,x,0\n", "n,k,1\n8,8,0,0\n", ""],
)
def test_a_table_of_shapes_that_breaks_a_rule_is_refused(text: str) -> None:
    with pytest.raises(DataFileError, match="here"):
        ShapeTable.read(text, 0.1, "here")


def test_a_grid_is_linear_between_its_knots_and_constant_outside() -> None:
    """Corners 0, 1, 2, 3 at (1 or 4, 1 or 16): the middle in logs is their mean."""
    knots = {(1, 1): 0.0, (1, 16): 1.0, (4, 1): 2.0, (4, 16): 3.0}
    coefficients = {grid_name(x, y): value for (x, y), value in knots.items()}
    x, y = np.asarray([2.0, 1.0, 100.0]), np.asarray([4.0, 16.0, 100.0])
    assert np.log(grid_factor(coefficients, x, y)) == pytest.approx([1.5, 1.0, 3.0])
    assert grid_factor({"floor_s": 1.0}, x, y) == 1.0
    del coefficients[grid_name(4, 1)]
    with pytest.raises(CalibrationError, match="3 of 4"):
        grid_factor(coefficients, x, y)


def test_the_graph_engine_prices_a_measured_product_as_it_was_measured() -> None:
    """A row of the committed profile; another engine has other kernels and another price."""
    device = load_device("h200")
    with PROFILE.open(encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["op"] == "matmul"
            and (row["dtype"], row["n"], row["k"]) == ("bf16", "6144", "4096")
        ]
    assert len(rows) > 5
    sizes = np.asarray([float(row["m"]) for row in rows])
    seconds = [float(row["time_s_median"]) for row in rows]
    own = matmul(Machine.of(device, "torch-graph"), sizes, 6144, 4096, "bf16", weights="cold")
    base = matmul(Machine.of(device), sizes, 6144, 4096, "bf16", weights="cold")
    assert own.total_s == pytest.approx(seconds, rel=2e-3)
    parts = own.compute_s + own.memory_s + own.overhead_s
    assert parts == pytest.approx(own.total_s)
    assert base.total_s != pytest.approx(seconds, rel=2e-3)
