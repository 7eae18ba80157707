"""`shardplan validate`: figures that ship, a user's own table, and what is refused."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import shardplan.search.validate as validate_module
from shardplan.costmodel.calibration import load_calibration
from shardplan.models.errors import InputError
from shardplan.search.estimate import Prices, estimate_one, price_columns
from shardplan.search.main import run
from shardplan.search.validate import Report, read_figures, validate
from shardplan.search.validate_fit import unseen_median
from shardplan.search.validate_out import PAGE_MARKS, between, write_report
from shardplan.search.validate_plot import KINDS, kind_of, scatter_svg
from shardplan.search.validate_tables import worst_figures

DECODE = {
    "model": "llama-3.1-8b",
    "cluster": "atlas-800t-a2",
    "tp": "2",
    "phase": "decode",
    "batch": "8",
    "tokens": "1024",
}


def table(folder: Path, header: str, *rows: str) -> Path:
    """A CSV of a user."""
    path = folder / "mine.csv"
    path.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Three rows: twice the price of a step, half that of a matmul, a model nobody knows."""
    step = float(estimate_one(**DECODE)["step_s"])
    op = {"op": "matmul", "device": "910b2", "m": 16, "n": 4096, "k": 4096}
    product = float(estimate_one(**op)["step_s"])
    return table(
        tmp_path,
        "model,cluster,tp,phase,batch,tokens,op,device,m,n,k,measured_s,held_out",
        f"llama-3.1-8b,atlas-800t-a2,2,decode,8,1024,,,,,,{2 * step!r},",
        "",
        f",,,op,,,matmul,910b2,16,4096,4096,{product / 2!r},false",
        "llama-9,atlas-800t-a2,2,decode,8,1024,,,,,,0.01,",
    )


def test_a_table_of_ones_own(mine: Path) -> None:
    """Errors of -1/2 and +1; what cannot be priced is named with its line."""
    report = validate(mine)
    errors = {one.where: one.error for one in report.figures}
    assert errors["mine.csv:2"] == pytest.approx(-0.5)
    assert errors["mine.csv:4"] == pytest.approx(1.0)
    assert [one.where for one in report.unpriced] == ["mine.csv:5"]
    assert "llama-9" in report.unpriced[0].reason
    groups = {one.name: one for one in report.groups}
    assert groups["atlas-800t-a2 llama-3.1-8b tp2 decode"].held_out == 1
    assert groups["910b2 matmul"].held_out == 0
    assert {one.name for one in report.families} == {"910b2 matmul", "atlas-800t-a2 steps"}


def test_serving_figures_are_compared_each_with_its_own_column(tmp_path: Path) -> None:
    """A row of three figures: one group each; a rate twice too high has an error of +1."""
    point = {**DECODE, "phase": "serve", "input_len": "512", "output_len": "64"}
    for name in ("batch", "tokens"):
        del point[name]
    found = estimate_one(**point, concurrency=8)
    measured = [found["ttft_mean_s"], found["tpot_mean_s"] * 2, found["output_tokens_per_s"] / 2]
    names = "measured_ttft_s,measured_tpot_s,measured_output_tokens_per_s"
    path = table(
        tmp_path,
        f"{','.join(point)},concurrency,group,{names}",
        f"{','.join(point.values())},8,mine,{','.join(repr(float(v)) for v in measured)}",
    )
    errors = {one.name: one.bias for one in validate(path).groups}
    assert errors["mine, TTFT"] == pytest.approx(0.0, abs=1e-12)
    assert errors["mine, TPOT"] == pytest.approx(-0.5)
    assert errors["mine, tokens/s"] == pytest.approx(1.0)


def test_a_fit_says_what_it_has_not_seen(mine: Path) -> None:
    """The median error of the section behind an operator; none for a step or an unknown device."""
    section = load_calibration("910b2").section("matmul.bf16")
    found = {one.name: one.unseen for one in validate(mine).groups}
    assert found["910b2 matmul"] == section.median_error
    assert found["atlas-800t-a2 llama-3.1-8b tp2 decode"] is None
    assert unseen_median("matmul", "bf16", "910b9", "", "") is None
    assert unseen_median("matmul", "bf17", "910b2", "", "") is None
    assert unseen_median("all_reduce", "", "910b2", "", "") is None
    assert unseen_median("all_reduce", "", "", "atlas-800t-a2", "", "8.5") is None
    assert unseen_median("all_reduce", "", "", "atlas-800t-a2", "", "4") == pytest.approx(
        load_calibration("910b2").section("collectives.mesh.host.all_reduce").median_error
    )


def test_defaults_stand_in_for_empty_cells(tmp_path: Path) -> None:
    """As those of `estimate --points`: a calibrated device for all rows."""
    path = table(tmp_path, "op,m,n,k,measured_s", "matmul,16,4096,4096,1e-5")
    small, large = (
        validate(path, defaults={"device": device}).figures[0] for device in ("910b4", "910b2")
    )
    assert small.family == "910b4 matmul"
    assert small.predicted is not None
    assert large.predicted is not None
    assert small.predicted > large.predicted


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        ("op,device,m,n,k", "matmul,910b2,1,2,3", "needs a measured column"),
        ("op,device,measured_us", "matmul,910b2,3", "measured_us"),
        ("op,device,measured_s", "matmul,910b2,0", "line 2: measured_s='0'"),
        ("op,device,measured_s", "matmul,910b2,-1e-3", "line 2: measured_s='-1e-3'"),
        ("op,device,measured_s", "matmul,910b2,nan", "line 2: measured_s='nan'"),
        ("op,device,measured_s", "matmul,910b2,inf", "line 2: measured_s='inf'"),
        ("op,device,measured_s", "matmul,910b2,fast", "line 2: measured_s='fast'"),
        ("op,device,measured_s", "matmul,910b2,", "line 2"),
        ("op,device,measured_s", "matmul,910b2", "line 2"),
        ("op,device,measured_s,held_out", "matmul,910b2,1,maybe", "line 2: 'maybe'"),
        ("op,device,m,n,k,measured_s", "matmul,910b9,1,2,3,1", "mine.csv:2: unknown device"),
        ("tp,measured_s", "2,1", "needs the column `model`"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused(
    header: str, row: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clear line with the line of the file; exit 2."""
    assert run(["validate", str(table(tmp_path, header, row))]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


def test_the_band_of_an_estimate_is_checked(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where estimates carry a band: the share of figures that lie in it."""

    def banded(*arguments: Any, **named: Any) -> Prices:
        prices = price_columns(*arguments, **named)
        step = prices.numbers["step_s"]
        prices.numbers |= {"step_low_s": step * 0.9, "step_high_s": step * 3.0}
        return prices

    monkeypatch.setattr(validate_module, "price_columns", banded)
    inside = {one.name: one.inside for one in validate(mine).groups}
    assert inside == {
        "910b2 matmul": 0.0,
        "atlas-800t-a2 llama-3.1-8b tp2 decode": 1.0,
        "atlas-800t-a2 llama-9 tp2 decode": None,
    }


def test_a_figure_that_the_phase_does_not_have_is_named(tmp_path: Path) -> None:
    """TTFT of a matmul; the row's other figure counts."""
    path = table(
        tmp_path, "op,device,m,n,k,measured_s,measured_ttft_s", "matmul,910b2,16,64,64,1e-5,1"
    )
    report = validate(path)
    assert [one.reason for one in report.unpriced] == ["this phase has no ttft_mean_s"]
    assert sum(one.priced for one in report.groups) == 1


def test_runs_that_should_not_fit_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-65B on one card of 64 GB ran, says the table."""
    path = table(
        tmp_path, f"{','.join(DECODE)},measured_s", "llama-65b,atlas-800t-a2,1,decode,1,9,1"
    )
    assert run(["validate", str(path)]) == 0
    assert "should not fit the memory; the first is mine.csv:2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def report() -> Report:
    """All that ships."""
    return validate()


def test_what_ships_is_priced(report: Report) -> None:
    """Every family that the project claims to model has figures and errors."""
    names = {one.name for one in report.families if one.priced}
    for kind in ("matmul", "attention", "experts", "collectives"):
        assert f"910b2 {kind}" in names
    assert {"hgx-h200 steps", "atlas-800i-a3 steps"} <= names
    assert any(name.startswith("atlas-800i-a3 serving") for name in names)
    assert {one.family for one in report.figures} == {one.name for one in report.families}


def test_the_figures_are_those_of_estimate(report: Report) -> None:
    """The first steps of the H200 table, priced one by one."""
    steps = [one for one in report.figures if one.family == "hgx-h200 steps"][:3]
    for one in steps:
        point = dict(cell.split("=") for cell in one.what.split())
        assert one.predicted == pytest.approx(estimate_one(**point)["step_s"], rel=1e-12)


def test_a_group_is_picked_by_part_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its case; a name that nothing holds is refused with those that there are."""
    assert run(["validate", "--group", "MLA", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {one["name"].split(",")[0] for one in shown["groups"]} == {
        "910b2 mla_decode",
        "910b2 mla_prefill",
    }
    assert shown["figures"] == sum(one["figures"] for one in shown["groups"]) == len(shown["rows"])
    assert run(["validate", "--group", "nothing"]) == 2
    assert "910b2 attention" in capsys.readouterr().err


def test_the_tables_name_every_group_and_stay_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    """At most 100 columns, no number cut off."""
    assert run(["validate"]) == 0
    text = capsys.readouterr().out
    assert "910b2 matmul bf16" in text
    assert "worst figure of a group" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text


def test_files(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row a figure; a page with every group; the same bytes each time."""
    out = tmp_path / "out"
    assert run(["validate", "--out", str(out)]) == 0
    assert "validation.csv" in capsys.readouterr().err
    with (out / "validation.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.figures)
    one = rows[0]
    error = float(one["predicted"]) / float(one["measured"]) - 1.0
    assert float(one["error"]) == pytest.approx(error, abs=1e-7)
    page = (out / "validation.md").read_text(encoding="utf-8")
    assert all(f"| {group.name} |" in page for group in report.groups)
    write_report(report, tmp_path / "again")
    for name in ("validation.csv", "validation.md", "scatter.svg"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert run(["validate", "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err


def test_the_picture_has_a_mark_for_every_figure(report: Report) -> None:
    """And stays inside its frame; names from a table cannot break it."""
    root = ET.fromstring(scatter_svg(report.figures))
    space = "{http://www.w3.org/2000/svg}"
    marks = [one for one in root.iter() if one.tag in (f"{space}circle", f"{space}path")]
    titled = [one for one in marks if one.find(f"{space}title") is not None]
    assert len(titled) == len(report.figures) - len(report.unpriced)
    for one in titled:
        place = (one.get("cx"), one.get("cy")) if one.get("cx") else ()
        assert all(0.0 < float(value or 0.0) < 720.0 for value in place)
    assert {kind_of(one.family) for one in report.figures} == set(KINDS)


def test_the_worst_figures_are_the_worst(report: Report) -> None:
    """The largest error of all comes first, each group once."""
    worst = worst_figures(report, most=5)
    largest = max(abs(one.error) for one in report.figures if one.error is not None)
    assert abs(worst[0].error or 0.0) == largest
    assert len({one.group for one in worst}) == 5


def test_machines_of_shipped_figures_are_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    """A device option would compare one machine's figures with another's prices."""
    assert run(["validate", "--device", "910b4"]) == 2
    assert "--device" in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Refused like any points file."""
    with pytest.raises(InputError, match="cannot be read"):
        read_figures(tmp_path / "none.csv")


def test_a_table_goes_between_its_marks() -> None:
    """What is around stays; a page without marks is refused."""
    text = f"head\n{PAGE_MARKS[0]}\nold\n{PAGE_MARKS[1]}\ntail\n"
    found = between(text, PAGE_MARKS, "| new |\n")
    assert found == f"head\n{PAGE_MARKS[0]}\n\n| new |\n\n{PAGE_MARKS[1]}\ntail\n"
    assert between(found, PAGE_MARKS, "| new |") == found
    with pytest.raises(InputError, match="no place"):
        between("head", PAGE_MARKS, "new")
