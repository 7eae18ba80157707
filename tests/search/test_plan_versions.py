"""Plans of earlier schema versions are read and used; those of later ones are refused clearly.

`plans/version_N.json` is a plan as a shardplan of that version wrote it, never edited.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from shardplan.models.errors import InputError
from shardplan.models.parallel import AXES
from shardplan.search.emit import emit
from shardplan.search.plan import Plan, plan_schema
from shardplan.search.plan_versions import PLAN_VERSION
from shardplan.search.proof import verify_plan

FOLDER = Path(__file__).parent / "plans"
EARLIER = range(1, PLAN_VERSION)
OLD = [FOLDER / f"version_{version}.json" for version in EARLIER]


def holds(now: Any, then: Any, where: str = "plan") -> None:
    """Everything that a plan said then is said now, at the same place; more may be."""
    if isinstance(then, dict):
        for key, value in then.items():
            holds(now[key], value, f"{where}.{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for place, (one, other) in enumerate(zip(now, then, strict=True)):
            holds(one, other, f"{where}[{place}]")
    else:
        assert now == then, where


def test_every_earlier_version_has_a_plan_that_was_written_then() -> None:
    """Whoever raises the version commits one of the version before."""
    written = [json.loads(path.read_text(encoding="utf-8")) for path in OLD]
    assert [plan["schema_version"] for plan in written] == list(EARLIER)
    assert sorted(FOLDER.iterdir()) == OLD


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_an_earlier_plan_is_read_whole(path: Path, tmp_path: Path) -> None:
    """All it says is kept; saved again it is a plan of today's schema."""
    plan = Plan.load(path)
    plan.save(tmp_path / "plan.json")
    now = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(plan_schema()).validate(now)
    assert now["schema_version"] == PLAN_VERSION
    then = json.loads(path.read_text(encoding="utf-8"))
    holds(now, {**then, "schema_version": PLAN_VERSION})
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_an_earlier_plan_is_proven_and_emitted(path: Path, tmp_path: Path) -> None:
    """Its model is still the same by its digest, and its strategy means the same."""
    plan = Plan.load(path)
    proof = verify_plan(plan, level=1)
    assert proof.passed
    assert proof.failures == ()
    files = emit(plan, "vllm-ascend", tmp_path)
    start = next(file for file in files if file.name.startswith("serve_"))
    assert f"--tensor-parallel-size {plan.strategy.tp}" in start.read_text(encoding="utf-8")


def test_what_an_earlier_plan_does_not_say_is_not_made_up() -> None:
    """A plan of version 1 had no band of confidence, and no strategy had its axes reordered."""
    plan = Plan.load(FOLDER / "version_1.json")
    assert plan.confidence is None
    assert plan.robustness is None
    assert plan.pools == ()
    assert plan.strategy.order == AXES


@pytest.mark.parametrize("version", [PLAN_VERSION + 1, 10**400])
def test_a_plan_of_a_later_version_is_refused(version: int, tmp_path: Path) -> None:
    """With its version, that of the program that wrote it, and what to do."""
    path = tmp_path / "plan.json"
    later = {"schema_version": version, "shardplan_version": "9.1", "cards": {"of": "tomorrow"}}
    path.write_text(json.dumps(later), encoding="utf-8")
    with pytest.raises(InputError, match=f"schema version {PLAN_VERSION} and earlier") as caught:
        Plan.load(path)
    assert f"schema_version={str(version)[:40]}, of shardplan '9.1'" in caught.value.got
    assert "a later one" in caught.value.hint
