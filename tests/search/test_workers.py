"""Many processes on one study: nothing finished is lost, and the count is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from tests.search.servers import postgres, start

from shardplan.search.main import run
from shardplan.search.storage import open_storage

MODEL = ("--model", "llama-3.1-8b", "--cluster", "atlas-800t-a2")
WANTED = 40
PATIENCE_S = 90.0
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@pytest.fixture(params=["journal", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A storage that processes share: a file, or a server."""
    if request.param == "journal":
        yield f"journal:{tmp_path / 'study.log'}"
    else:
        with postgres() as address:
            yield address


def search(url: str, folder: Path, *more: str, trials: int = WANTED) -> subprocess.Popen[str]:
    return start(
        *("search", *MODEL, "--engine", "random", "--trials", str(trials), "--seed-trials", "2"),
        *("--storage", url, "--study", "s", "--out", str(folder), "--force", *more),
    )


def until(what: Callable[[], bool]) -> None:
    """Wait for something that other processes do."""
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def finished(storage: optuna.storages.BaseStorage) -> list[FrozenTrial]:
    """Finished trials of the study `s`; none where it is not made yet."""
    if not any("shardplan_trials" in one.user_attrs for one in storage.get_all_studies()):
        return []
    study = storage.get_study_id_from_name("s")
    return storage.get_all_trials(study, deepcopy=False, states=DONE)


def every_trial(storage: optuna.storages.BaseStorage) -> list[FrozenTrial]:
    """Trials of the study `s` in any state."""
    return storage.get_all_trials(storage.get_study_id_from_name("s"), deepcopy=False)


def ends_well(process: subprocess.Popen[str]) -> str:
    out, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal:{}/study.log", "sqlite:///{}/study.db"])
def test_a_search_that_is_killed_goes_on_as_if_it_had_not_been(kind: str, tmp_path: Path) -> None:
    """SIGKILL in the middle, then --resume: the plan and the trials of a search in one go.

    Only a trial that was killed between its number and its first draw is not drawn again.
    """
    url, engine = kind.format(tmp_path), ("--engine", "tpe")
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    question = ("search", *MODEL, *engine, "--trials", "24")
    assert run([*question, "--out", str(whole)]) == 0
    again = (*question, "--storage", url, "--study", "s")
    first = start(*again, "--out", str(rest))
    storage = open_storage(url)
    until(lambda: len(finished(storage)) >= 10)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = {trial.number for trial in finished(storage)}
    ends_well(start(*again, "--resume", "--out", str(rest), "--force"))
    assert before <= {trial.number for trial in finished(storage)}
    assert len(finished(storage)) == 24
    if any(one.state.name == "FAIL" and not one.params for one in every_trial(storage)):
        return  # killed before its first draw: the number of that trial is gone, and its luck
    for name in ("trials.csv", "pareto.csv"):
        assert (rest / name).read_bytes() == (whole / name).read_bytes()
    assert _plan(rest) == _plan(whole)


def _plan(folder: Path) -> dict[str, Any]:
    """The plan of a search, without the bound of its wall time, which a busy machine moves."""
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    del plan["certificate"]["wall_s"]
    return plan


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_no_finished_trial(url: str, tmp_path: Path) -> None:
    """A search and four workers, one of them killed at work: exactly the asked number, all kept."""
    leader = search(url, tmp_path / "out")
    storage = open_storage(url)
    until(lambda: bool(finished(storage)))
    workers = [start("worker", "--storage", url, "--study", "s", "--json") for _ in range(4)]
    until(lambda: len(finished(storage)) >= WANTED // 4)
    before = {trial.number: trial.user_attrs["result"] for trial in finished(storage)}
    workers[0].send_signal(signal.SIGKILL)
    workers[0].communicate()
    said = [json.loads(ends_well(one)) for one in workers[1:]]
    ends_well(leader)
    after = {trial.number: trial.user_attrs["result"] for trial in finished(storage)}
    assert len(after) == WANTED
    assert before.items() <= after.items()
    assert {one["ended"] for one in said} == {"the study is full"}
    study = optuna.load_study(study_name="s", storage=storage)
    assert {trial.state for trial in study.get_trials()} <= {*DONE, TrialState.FAIL}
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["certificate"]["evaluated"] <= WANTED
