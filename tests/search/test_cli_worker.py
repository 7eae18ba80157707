"""`shardplan worker`: what it is told, how it ends, what it says."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import optuna
import pytest
from tests.search.servers import start

from shardplan.search.api import search
from shardplan.search.main import run
from shardplan.search.storage import open_storage


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A study `s` of two finished trials that is asked for many more."""
    address = f"journal:{tmp_path / 'study.log'}"
    search(
        "llama-3.1-8b", "atlas-800t-a2", cards=2, engine="random", trials=2, seed_trials=0,
        storage=address, study="s",
    )  # fmt: skip
    _study(address).set_user_attr("shardplan_trials", 10_000)
    return address


def _study(address: str) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=open_storage(address))


def test_it_needs_the_address_and_the_name_alone(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["worker", "--storage", url, "--study", "s", "--trials", "3", "--json"]) == 0
    out, said = capsys.readouterr()
    summary = json.loads(out)
    assert summary.pop("wall_s") > 0
    assert summary == {
        "study": "s", "storage": url, "engine": "random", "made": 3, "finished": 5,
        "wanted": 10_000, "ended": "its own trials are made",
    }  # fmt: skip
    assert said.splitlines()[-1].startswith("3 trials made, 5 of 10000 in the study")
    assert all("worker" in one.user_attrs for one in _study(url).trials)


def test_it_ends_when_the_study_is_full(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    _study(url).set_user_attr("shardplan_trials", 4)
    assert run(["worker", "--storage", url, "--study", "s", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["made"], summary["finished"]) == (2, 4)
    assert summary["ended"] == "the study is full"


def test_it_ends_when_time_is_up(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["worker", "--storage", url, "--study", "s", "--timeout", "0.5", "--json"]
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["ended"] == "time is up"
    assert {one.state.name for one in _study(url).trials} == {"COMPLETE"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_trial_in_hand_finished(url: str, number: signal.Signals) -> None:
    process = start("worker", "--storage", url, "--study", "s", "--json")
    end = time.monotonic() + 60
    while len(_study(url).trials) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    summary = json.loads(out)
    assert summary["ended"] == "a signal asked it to end"
    trials = _study(url).trials
    assert {one.state.name for one in trials} == {"COMPLETE"}
    assert len(trials) == 2 + summary["made"] >= 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--study", "t"), "no study 't'; there are s"),
        (("--study", "s", "--trials", "0"), "at least one trial"),
        (("--study", "s", "--trials", "x"), "whole number"),
        (("--study", "s", "--timeout", "-1"), "`--timeout` is above 0"),
        (("--study", "s", "--timeout", "nan"), "`--timeout` is above 0"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    url: str, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["worker", "--storage", url, *more]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert len(errors.splitlines()) == 1
    assert said in errors
