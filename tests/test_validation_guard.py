"""No error against measurements grows unseen: today's prices against results/validation."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from shardplan.costmodel.calibration import Calibration, load_calibration
from shardplan.costmodel.kernels import base
from shardplan.costmodel.validation import unguarded, worse
from shardplan.search.validate import Report, validate
from shardplan.search.validate_out import PAGE_MARKS
from shardplan.search.validate_tables import SHORT, summary_table

ROOT = Path(__file__).resolve().parent.parent
BASELINE = json.loads((ROOT / "results" / "validation" / "baseline.json").read_text("utf-8"))
PAGE = (ROOT / "results" / "validation" / "validation.md").read_text(encoding="utf-8")
HINT = "mend it, or `python results/regenerate.py validation --accept` if it shall be so"


@functools.cache
def today() -> Report:
    """All shipped figures at today's prices."""
    return validate()


def test_no_error_grew_by_more_than_a_tenth() -> None:
    """MAPE and median of each group, with 0.2 points on top for the smallest."""
    assert worse(BASELINE, today().groups) == [], HINT


def test_every_group_is_guarded() -> None:
    """New or changed figures have a baseline: `python results/regenerate.py validation`."""
    assert unguarded(BASELINE, today().groups) == []


def test_the_guard_sees_a_changed_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the HBM rate lost in one section fails that section's group and names it."""

    def slower(name: str, engine: str = "") -> Calibration:
        found = load_calibration(name, engine)
        section = found.section("matmul.bf16")
        changed = {**section.coefficients, "hbm": section.coefficients["hbm"] * 0.67}
        sections = {**found.sections, "matmul.bf16": replace(section, coefficients=changed)}
        return replace(found, sections=MappingProxyType(sections))

    monkeypatch.setattr(base, "load_calibration", slower)
    groups = validate(group="910b2 matmul").groups
    guarded = {one.name: BASELINE[one.name] for one in groups}
    lines = worse(guarded, groups)
    assert lines
    assert all(line.startswith("910b2 matmul bf16: ") for line in lines)


def _shown(page: str) -> list[str]:
    """Lines of the table that a page shows between its marks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.partition(PAGE_MARKS[0])[2].partition(PAGE_MARKS[1])[0].strip().splitlines()


def test_the_cost_model_shows_the_table_of_the_page() -> None:
    """Between its marks, word by word: it cannot go stale alone."""
    shown = _shown("docs/cost-model.md")
    assert shown[0] == summary_table(today()).splitlines()[0]
    assert "\n".join(shown) in PAGE


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_a_readme_shows_figures_of_the_page(page: str) -> None:
    """Its table is shorter: some numbers of Ascend families."""
    families = PAGE.partition("## By family")[2].partition("## By group")[0].strip().splitlines()
    head, *full = [line.strip("| ").split(" | ") for line in families]
    places = [0, *(head.index(name) for name in SHORT)]
    shown = [line.strip("| ").split(" | ") for line in _shown(page)[2:]]
    assert shown
    assert [row for row in shown if row not in [[one[n] for n in places] for one in full[1:]]] == []


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_every_error_that_a_readme_tells_is_one_of_the_page(page: str) -> None:
    """Its sentences too: a tenth of a per cent that the page lacks is stale."""
    told = re.findall(r"\d+\.\d%", (ROOT / page).read_text(encoding="utf-8"))
    assert told
    assert [one for one in told if one not in PAGE] == []
