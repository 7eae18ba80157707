"""The folder of a search: whole or not at all, and never over what someone else keeps there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shardplan.models.errors import InputError
from shardplan.search.api import SearchResult, search
from shardplan.search.output import FILES, check_out, write_result
from shardplan.search.plan import Plan
from shardplan.search.trials import read_trials

ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="module")
def result() -> SearchResult:
    """A small search: one card, few slots."""
    return search("qwen3-0.6b", "atlas-800t-a2", cards=1, concurrency=4)


def test_a_search_leaves_five_files(result: SearchResult, tmp_path: Path) -> None:
    """Each is what its reader reads, and nothing else lies there."""
    out = tmp_path / "deep" / "run"
    paths = write_result(result, out)
    assert [path.name for path in paths] == list(FILES)
    assert sorted(os.listdir(out)) == sorted(FILES)
    assert Plan.load(out / "plan.json").dumps() == result.plan.dumps()
    assert len(read_trials(out / "trials.csv")) == len(result.trials)
    assert len(read_trials(out / "pareto.csv")) == len(result.pareto)
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    timing = json.loads((out / "timing.json").read_text(encoding="utf-8"))
    assert timing == result.timing


def test_a_folder_in_use_is_kept(result: SearchResult, tmp_path: Path) -> None:
    """Unless it is forced, and then only the files of a search are replaced."""
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(InputError, match="new or empty") as caught:
        write_result(result, tmp_path)
    assert "--force" in caught.value.hint
    assert os.listdir(tmp_path) == ["mine.txt"]
    write_result(result, tmp_path, force=True)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep"
    assert set(os.listdir(tmp_path)) == {"mine.txt", *FILES}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """Nor does a folder fit below one."""
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="is a folder"):
        check_out(file, force=True)
    with pytest.raises(InputError, match="folder"):
        check_out(file / "below")


@pytest.mark.skipif(ROOT_USER, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    """Before anything is searched."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written"):
        check_out(closed / "run")


def test_refused_strategies_stand_last_without_a_rank() -> None:
    """A limit that only some meet: the others keep their numbers and say what they break."""
    trials = search("llama-65b", "atlas-800t-a2", tpot_ms=40, concurrency=64).trials
    feasible = trials["feasible"].tolist()
    assert feasible == sorted(feasible, reverse=True)
    assert not all(feasible)
    refused = trials[~trials["feasible"]]
    assert set(refused["rank"]) == {0}
    assert set(refused["limit"]) <= {"memory", "step", "ttft", "tpot"}
    assert (refused.loc[refused["limit"] == "tpot", "tpot_s"] > 0.04).all()
    assert (trials.loc[trials["feasible"], "tpot_s"] <= 0.04).all()
