"""A study that was changed from outside is told in words, and nothing goes on for ever."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.search.shared_study import search_small

from shardplan.models.errors import InputError
from shardplan.search.joined import draw_for
from shardplan.search.study import Place


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A study of three trials."""
    file = tmp_path / "study.db"
    search_small(Place(storage=f"sqlite:///{file}", name="s"), 3)
    return file


def _go_on(file: Path) -> Any:
    return search_small(Place(storage=f"sqlite:///{file}", name="s", resume=True), 5)


def _change(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as held:
        for one in statements:
            held.execute(one)
        held.commit()


def _result(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The result of the first trial, changed."""
    where = "key = 'result' AND trial_id = 1"
    with closing(sqlite3.connect(file)) as held:
        (text,) = held.execute(
            f"SELECT value_json FROM trial_user_attributes WHERE {where}"
        ).fetchone()
        told = json.loads(text)
        told = change(told) or told
        held.execute(
            f"UPDATE trial_user_attributes SET value_json = ? WHERE {where}", (json.dumps(told),)
        )
        held.commit()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda told: told.pop("state") and None, "trial 0: ValidationError"),
        (lambda told: told.update(state="lost"), "state"),
        (lambda told: told.update(state="feasible", reason="memory"), "reason='memory'"),
        (lambda told: told.update(state="infeasible", reason="?"), "reason='\\?'"),
        (lambda told: told["columns"].pop("tpot_s") and None, "no tpot_s"),
        (lambda told: told["columns"].update(tpot_s="soon"), "tpot_s"),
        (lambda _: [1, 2], "ValidationError"),
    ],
)
def test_a_result_that_says_nothing_is_told(
    database: Path, change: Callable[[dict[str, Any]], Any], match: str
) -> None:
    """With the trial."""
    _result(database, change)
    with pytest.raises(InputError, match=match) as told:
        _go_on(database)
    assert "says what became of its strategy" in str(told.value)


def test_a_result_that_is_gone_is_told(database: Path) -> None:
    """Its row was removed."""
    _change(database, "DELETE FROM trial_user_attributes WHERE key = 'result' AND trial_id = 1")
    with pytest.raises(InputError, match="says what became"):
        _go_on(database)


def test_a_trial_that_is_gone_is_made_again(database: Path) -> None:
    """Numbers with a gap are no reason to draw for ever."""
    _change(
        database,
        "DELETE FROM trials WHERE trial_id = 1",
        *(
            f"DELETE FROM {table} WHERE trial_id = 1"
            for table in ("trial_params", "trial_values", "trial_user_attributes")
        ),
    )
    assert len(_go_on(database).kept) >= 1


def test_a_study_without_objectives_is_told(database: Path) -> None:
    """Each trial would fail, one after another."""
    _change(database, "DELETE FROM study_directions")
    with pytest.raises(InputError, match="0 objectives"):
        _go_on(database)


@pytest.mark.parametrize(
    ("key", "value"),
    [("shardplan_trials", '"many"'), ("shardplan_engine", '["random"]'), ("shardplan_engine", "7")],
)
def test_a_worker_is_told_what_a_study_does_not_say(database: Path, key: str, value: str) -> None:
    """One line for what is of the wrong type."""
    _change(
        database, f"UPDATE study_user_attributes SET value_json = '{value}' WHERE key = '{key}'"
    )
    with pytest.raises(InputError, match=f"what it was made for.*{key}"):
        draw_for(f"sqlite:///{database}", "s", most=1)


def test_what_a_storage_cannot_read_is_told(database: Path) -> None:
    """A parameter that is no number, which Optuna turns into one."""
    _change(database, "UPDATE trial_params SET param_value = CAST('x' AS BLOB)")
    with pytest.raises(InputError, match="cannot be read or written"):
        _go_on(database)
