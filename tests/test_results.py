"""What is committed in results/ is what the code gives, and README.md says how."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardplan.search.main import run
from shardplan.search.plan import Plan
from shardplan.search.trials import read_trials

RESULTS = Path(__file__).resolve().parent.parent / "results"
README = (RESULTS / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
RELATIVE = 1e-6
LAST_DIGIT = 0.11
"""Of a page: numbers are rounded there, and a rounding may tip over."""


def load_script() -> ModuleType:
    """results/regenerate.py as a module."""
    spec = importlib.util.spec_from_file_location("regenerate", RESULTS / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()
PLANS = [RESULTS / path for path in SCRIPT.commands("plans/")]
SWEEPS = [RESULTS / path for path in SCRIPT.commands("serving/")]


def same(found: Any, kept: Any, where: str) -> None:
    """Numbers to a millionth, all else exactly."""
    if isinstance(kept, dict):
        assert list(found) == list(kept), where
        for key, value in kept.items():
            same(found[key], value, f"{where}.{key}")
    elif isinstance(kept, list):
        assert len(found) == len(kept), where
        for place, (one, other) in enumerate(zip(found, kept, strict=True)):
            same(one, other, f"{where}[{place}]")
    elif isinstance(kept, float) or isinstance(found, float):
        assert found == pytest.approx(kept, rel=RELATIVE), where
    else:
        assert found == kept, where


def same_words(found: str, kept: str) -> None:
    """Pages whose numbers agree to their last digit and whose words agree exactly."""
    assert NUMBER.sub("0", found) == NUMBER.sub("0", kept)
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(kept), strict=True):
        value, expected = (float(text.replace(",", "")) for text in (one, other))
        assert value == pytest.approx(expected, rel=RELATIVE, abs=LAST_DIGIT)


def cells(path: Path) -> list[list[Any]]:
    """A CSV with its numbers read."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            [float(cell) if NUMBER.fullmatch(cell) else cell for cell in row]
            for row in csv.reader(file)
        ]


def test_a_plan_is_what_its_command_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-65B on an Atlas 800T A2, searched again into another folder."""
    name = "plans/llama-65b_atlas-800t-a2"
    words = list(SCRIPT.commands()[name])
    words[words.index("--out") + 1] = str(tmp_path)
    assert run(words) == 0
    assert "plan:" in capsys.readouterr().out
    kept = RESULTS / name
    texts = [(folder / "plan.json").read_text(encoding="utf-8") for folder in (tmp_path, kept)]
    same(json.loads(texts[0]), json.loads(texts[1]), "plan.json")
    for table in ("trials.csv", "pareto.csv"):
        same(cells(tmp_path / table), cells(kept / table), table)
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in (tmp_path, kept)]
    same_words(*pages)


def test_the_ablation_is_what_its_command_gives(tmp_path: Path) -> None:
    """The page and its JSON, made again elsewhere."""
    page = tmp_path / SCRIPT.ABLATION.name
    SCRIPT.write_ablation(page)
    data = [
        json.loads(one.with_suffix(".json").read_text("utf-8")) for one in (page, SCRIPT.ABLATION)
    ]
    same(data[0], data[1], "ablation")
    same_words(page.read_text("utf-8"), SCRIPT.ABLATION.read_text("utf-8"))


def test_the_validation_is_what_its_command_gives(tmp_path: Path) -> None:
    """The page, the picture and the baseline, made again elsewhere."""
    page = tmp_path / SCRIPT.VALIDATION.name
    assert SCRIPT.write_validation(page) == 0
    for name in (page.name, "scatter.svg"):
        texts = [folder / name for folder in (tmp_path, SCRIPT.VALIDATION.parent)]
        same_words(*(one.read_text("utf-8") for one in texts))


def test_a_worse_validation_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The baseline of a better model beside the page: refused by name, until it is accepted."""
    page = tmp_path / SCRIPT.VALIDATION.name
    kept = json.loads((SCRIPT.VALIDATION.parent / "baseline.json").read_text("utf-8"))
    kept["910b2 matmul bf16"]["mape"] /= 2
    better = json.dumps(kept)
    (tmp_path / "baseline.json").write_text(better, encoding="utf-8")
    assert SCRIPT.write_validation(page) == 1
    assert "worse: 910b2 matmul bf16: mape was" in capsys.readouterr().err
    assert not page.exists()
    assert (tmp_path / "baseline.json").read_text("utf-8") == better
    assert SCRIPT.write_validation(page, accept=True) == 0
    assert page.exists()


@pytest.mark.parametrize("folder", PLANS, ids=lambda folder: folder.name)
def test_every_plan_is_whole(folder: Path) -> None:
    """Each file is there and is read by its reader; the plan is proven and optimal."""
    plan = Plan.load(folder / "plan.json")
    assert plan.proof.passed
    assert plan.certificate.gap == 0.0
    assert len(read_trials(folder / "trials.csv")) >= len(read_trials(folder / "pareto.csv")) > 0
    assert plan.model.name in (folder / "report.html").read_text(encoding="utf-8")
    assert plan.dumps() == (folder / "plan.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_every_crossover_is_that_of_its_sweep(folder: Path) -> None:
    """Gains of the page from the rows of the table beside it, and every combination is there."""
    rows = list(csv.DictReader((folder / "sweep.csv").open(encoding="utf-8", newline="")))
    names = list(rows[0])[1 : list(rows[0]).index("status")]
    found = {
        (row["serving"], *(row[name] for name in names)): float(row["objective"])
        for row in rows
        if row["status"] == "ok"
    }
    page = (folder / "crossover.md").read_text("utf-8").splitlines()
    last = list(dict.fromkeys(row[names[-1]] for row in rows))
    lines = [line.strip("| ").split(" | ") for line in page if line.startswith("|")][2:]
    told = 0
    for line in lines:
        fixed = line[: len(names) - 1]
        for value, gain in zip(last, line[len(fixed) :], strict=False):
            own = found["disagg", *fixed, value] / found["agg", *fixed, value]
            assert gain == f"{own:.2f}"
            told += 1
    assert told * 2 == len(rows)


def test_readme_names_every_result() -> None:
    """Every folder, and every plan and page with its command."""
    folders = [path for path in RESULTS.iterdir() if path.is_dir() and path.name != "runs"]
    folders = [path for path in folders if path.name != "__pycache__"]
    assert {"ablation", "calibration", "plans", "validation"} <= {path.name for path in folders}
    for folder in folders:
        assert f"## {folder.name}/" in README
    for folder in (RESULTS / "plans").iterdir():
        if folder.is_dir():
            assert f"`plans/{folder.name}/`" in README
            assert folder in PLANS
    assert sorted(path.name for path in PLANS) == sorted(
        path.name for path in (RESULTS / "plans").iterdir() if path.is_dir()
    )
    for folder in (RESULTS / "ablation", RESULTS / "validation"):
        for page in folder.iterdir():
            assert f"`{folder.name}/{page.name}`" in README


def test_a_name_without_a_result_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With those that there are; nothing is written."""
    assert SCRIPT.main(["nothing-of-this-name"]) == 2
    assert "plans/llama-65b_atlas-800t-a2" in capsys.readouterr().err
