"""Runs side by side, groups by any column, one run against another: against hand-made tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.plan_factory import make_trials
from tests.search.test_analyze import _table

from shardplan.models.errors import InputError
from shardplan.search.groups import BINS, by_columns
from shardplan.search.main import run
from shardplan.search.regressions import METRICS, compare
from shardplan.search.runs import Run, as_one, best_place, read_runs, side_by_side
from shardplan.search.trials import TRIAL_COLUMNS, write_trials

REFUSED = {"feasible": False, "limit": "memory", "objective": math.nan}


def _run(*rows: dict[str, Any], name: str = "a") -> Run:
    return Run(name, Path(name), _table(*rows))


def _files(folder: Path, **frames: pd.DataFrame) -> list[str]:
    """A folder a run, each with its trials.csv."""
    for name, frame in frames.items():
        write_trials(folder / name / "trials.csv", frame)
    return [str(folder / name) for name in frames]


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    """The folder of a trials.csv, longer where two are alike, a number for the same file twice."""
    paths = [tmp_path / "x" / "one", tmp_path / "y" / "one", tmp_path / "two"]
    for path in paths:
        write_trials(path / "trials.csv", make_trials(5))
    other = tmp_path / "spare.csv"
    write_trials(other, make_trials(5))
    assert [one.name for one in read_runs(paths[1:])] == ["one", "two"]
    assert [one.name for one in read_runs([*paths[:2], other])][:2] == ["x/one", "y/one"]
    assert read_runs([other])[0].name == "spare.csv"
    twice = [one.name for one in read_runs([other, other])]
    assert twice[0] != twice[1]


def test_a_folder_without_a_table_and_no_run_at_all_are_refused(tmp_path: Path) -> None:
    """With what to name."""
    with pytest.raises(InputError, match=r"holds trials\.csv"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match="at least one"):
        read_runs([])


def test_several_tables_are_one(tmp_path: Path) -> None:
    """Words stay categories even where the files hold different ones; each row knows its run."""
    frames = {
        "p": make_trials(40).assign(engine="exact"),
        "q": make_trials(30).assign(engine="tpe"),
    }
    frame = as_one(read_runs([Path(one) for one in _files(tmp_path, **frames)]))
    assert len(frame) == 70
    assert frame["engine"].value_counts().to_dict() == {"exact": 40, "tpe": 30}
    assert isinstance(frame["engine"].dtype, pd.CategoricalDtype)
    assert frame["run"].value_counts().to_dict() == {"p": 40, "q": 30}
    assert tuple(frame.columns) == (*TRIAL_COLUMNS, "run")


def test_runs_side_by_side_by_hand() -> None:
    """120 against 100 is a fifth more; a run in which nothing is feasible has no gain."""
    runs = [
        _run({"objective": 100.0}, {"objective": 90.0}),
        _run({"objective": 120.0, "tp": 2}, REFUSED, name="b"),
        _run(REFUSED, name="c"),
    ]
    rows = side_by_side(runs)
    assert [row.gain for row in rows] == [0.0, pytest.approx(0.2), None]
    assert [(row.trials, row.feasible) for row in rows] == [(2, 2), (2, 1), (1, 0)]
    assert rows[1].best is not None
    assert rows[1].best["tp"] == 2
    assert rows[2].best is None


@given(st.integers(0, 2**16), st.integers(1, 60))
def test_the_best_place_is_that_of_the_best_row(seed: int, rows: int) -> None:
    """A loop over the rows finds the same."""
    frame = make_trials(rows, seed=seed).sample(frac=1.0, random_state=seed)
    best: tuple[float, float, int] | None = None
    for place, row in enumerate(frame.to_dict("records")):
        own = (-row["objective"], row["rank"], place)
        if row["feasible"] and (best is None or own < best):
            best = own
    assert best_place(frame) == (None if best is None else best[2])


def test_groups_by_hand() -> None:
    """By tp: best of tp 2 loses a fifth, tp 8 has nothing feasible and comes last."""
    frame = _table(
        {"tp": 4, "objective": 100.0, "output_tokens_per_s_per_card": 10.0, "tpot_s": 0.02},
        {"tp": 2, "objective": 80.0},
        {"tp": 4, "objective": 70.0, "output_tokens_per_s_per_card": 6.0, "tpot_s": 0.01},
        {**REFUSED, "tp": 8},
    )
    four, two, eight = by_columns(frame, ["tp"])
    assert (four.values, two.values, eight.values) == (("4",), ("2",), ("8",))
    assert (four.loss, eight.loss) == (0.0, None)
    assert two.loss == pytest.approx(0.2)
    assert four.median_throughput == 8.0
    assert four.least_tpot_s == 0.01
    assert (four.trials, four.feasible, eight.trials, eight.feasible) == (2, 2, 1, 0)
    assert four.best is not None
    assert four.best["objective"] == 100.0
    pairs = by_columns(frame, ["tp", "feasible"])
    assert [group.values for group in pairs] == [("4", "on"), ("2", "on"), ("8", "off")]


@given(
    st.integers(0, 2**16),
    st.integers(1, 80),
    st.lists(st.sampled_from(TRIAL_COLUMNS), min_size=1, max_size=3, unique=True),
)
def test_groups_of_any_columns_are_what_pandas_groups(
    seed: int, rows: int, columns: list[str]
) -> None:
    """Every row is in one group; a group a value but for numbers of many values."""
    frame = make_trials(rows, seed=seed)
    groups = by_columns(frame, columns)
    assert sum(group.trials for group in groups) == rows
    assert sum(group.feasible for group in groups) == int(frame["feasible"].sum())
    if frame[columns].nunique(dropna=False).max() <= BINS:
        assert len(groups) == frame.groupby(columns, dropna=False, observed=True).ngroups
    losses = [group.loss for group in groups if group.loss is not None]
    assert losses == sorted(losses)
    assert not losses or losses[0] == 0.0


def test_numbers_of_many_values_are_cut_into_parts_of_like_size() -> None:
    """Ten groups of TPOT, told from where to where."""
    frame = make_trials(2_000)
    groups = by_columns(frame, ["tpot_s"])
    assert len(groups) == BINS
    assert all(150 <= group.trials <= 250 for group in groups)
    assert " to " in groups[0].values[0]
    refused = by_columns(frame, ["objective"])
    assert refused[-1].values == ("no number",)


def test_a_column_that_is_none_is_refused() -> None:
    """With a near one to try."""
    with pytest.raises(InputError, match="weight_dtype"):
        by_columns(make_trials(5), ["weight_dtyp"])


def test_a_comparison_by_hand() -> None:
    """Matched by strategy, whatever the order of the rows: slower, faster, lost, won, new, gone."""
    base = _run(
        {"tp": 1, "tpot_s": 0.010, "objective": 10.0},
        {"tp": 2, "tpot_s": 0.010, "objective": 20.0},
        {"tp": 4, "objective": 30.0},
        {**REFUSED, "tp": 8},
        {"tp": 16},
    )
    now = _run(
        {"tp": 32},
        {"tp": 8, "objective": 15.0},
        {**REFUSED, "tp": 4, "limit": "ttft"},
        {"tp": 2, "tpot_s": 0.008, "objective": 20.0},
        {"tp": 1, "tpot_s": 0.012, "objective": 10.0},
        name="b",
    )
    found = compare(base, now, 0.01)
    assert (found.both, found.base_only, found.now_only) == (4, 1, 1)
    assert (found.lost, found.won, dict(found.lost_by)) == (1, 1, {"ttft": 1})
    assert found.lost_best[0].startswith("tp4 ")
    assert not found.same_best
    assert found.regressed
    tpot = next(one for one in found.metrics if one.metric == "tpot_s")
    assert (tpot.worse, tpot.better, tpot.same) == (1, 1, 0)
    assert tpot.worst[0].worse == pytest.approx(0.2)
    assert tpot.worst[0].strategy.startswith("tp1 ")
    assert tpot.median == pytest.approx(0.0)
    objective = next(one for one in found.metrics if one.metric == "objective")
    assert (objective.worse, objective.better, objective.same) == (0, 0, 2)


def test_a_run_against_itself_is_the_same() -> None:
    """Whatever the order; doubled strategies count once."""
    frame = make_trials(500)
    mixed = frame.sample(frac=1.0, random_state=3)
    found = compare(Run("a", Path("a"), frame), Run("b", Path("b"), mixed), 0.0)
    assert found.both > 100
    assert (found.base_only, found.now_only, found.lost, found.won) == (0, 0, 0, 0)
    assert all(one.worse == one.better == 0 for one in found.metrics)
    assert found.same_best
    assert not found.regressed


@given(st.integers(0, 2**16), st.floats(1.02, 3.0), st.sampled_from(sorted(METRICS)))
def test_a_metric_that_is_scaled_is_found(seed: int, factor: float, name: str) -> None:
    """All of it worse where it grows for the worse, better where not, the others the same."""
    frame = make_trials(40, seed=seed)
    scaled = frame.assign(**{name: frame[name] * factor})
    found = compare(Run("a", Path("a"), frame), Run("b", Path("b"), scaled), 0.01)
    for one in found.metrics:
        count = one.worse + one.better + one.same
        expected = count if one.metric == name else 0
        down = METRICS[name] < 0
        assert one.worse == (expected if down else 0)
        assert one.better == (0 if down else expected)


def test_runs_without_a_common_strategy_are_not_compared() -> None:
    """They are named."""
    with pytest.raises(InputError, match="in common"):
        compare(_run({"tp": 1}), _run({"tp": 2}, name="b"), 0.01)


def test_the_command_shows_each_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Side by side, by group, against a base: as tables and as JSON."""
    slower = make_trials(300)
    slower["tpot_s"] *= 1.5
    first, second = _files(tmp_path, first=make_trials(300), second=slower)
    assert run(["analyze", first, second]) == 0
    told = capsys.readouterr().out
    assert "2 runs side by side" in told
    assert "600 trials" in told
    assert run(["analyze", first, second, "--json"]) == 0
    assert [one["run"] for one in json.loads(capsys.readouterr().out)["runs"]] == [
        "first",
        "second",
    ]
    assert run(["analyze", first, second, "--by", "run,tp"]) == 0
    assert "groups by run, tp" in capsys.readouterr().out
    assert run(["analyze", first, "--by", "tp", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert sum(group["trials"] for group in groups) == 300
    assert run(["analyze", second, "--against", first]) == 0
    told = capsys.readouterr().out
    assert "most worse in tpot_s" in told
    assert "50.0%" in told
    assert run(["analyze", second, "--against", first, "--tolerance", "60", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["regressed"] is False
    assert found["tolerance"] == pytest.approx(0.6)


def test_a_regression_fails_the_command_where_that_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3 beyond the tolerance, 0 within it; the comparison is told all the same."""
    slower = make_trials(100)
    slower["tpot_s"] *= 1.5
    first, second = _files(tmp_path, first=make_trials(100), second=slower)
    asked = ["analyze", second, "--against", first, "--fail-on-regression"]
    assert run([*asked, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["regressed"] is True
    assert run(asked) == 3
    assert "most worse in tpot_s" in capsys.readouterr().out
    assert run([*asked, "--tolerance", "60"]) == 0
    assert run(["analyze", first, "--against", second, "--fail-on-regression"]) == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["a", "b", "--against", "a"], "one run with one base"),
        (["a", "--against", "b", "--by", "tp"], "one run with one base"),
        (["a", "--tolerance", "1"], "beside --against"),
        (["a", "--against", "b", "--tolerance", "-1"], "from 0 to 1000"),
        (["a", "--fail-on-regression"], "goes with `--against`"),
        (["a", "--against", "b", "--out", "c.csv"], "without `--against`"),
        (["a", "--by", "nonsense"], "nonsense"),
        (["a", "--by", ""], "column"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_questions_are_told(
    words: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2 and one line."""
    _files(tmp_path, a=make_trials(5), b=make_trials(5))
    monkeypatch.chdir(tmp_path)
    assert run(["analyze", *words]) == 2
    told = capsys.readouterr().err
    assert part in told
    assert len(told.splitlines()) == 1


def test_the_front_of_each_run_is_that_of_its_feasible_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rising TPOT, each point with more throughput than all before it."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from shardplan.search import analyze_runs_plots

    points = [(0.03, 30.0), (0.01, 10.0), (0.02, 9.0), (0.02, 20.0), (0.04, 30.0)]
    rows = [{"tpot_s": t, "output_tokens_per_s_per_card": rate} for t, rate in points]
    drawn: list[tuple[list[float], list[float]]] = []

    def draw(path: Path, drawing: Any) -> Path:
        axes = pyplot.figure().subplots()
        drawing(axes)
        drawn.extend((list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines)
        pyplot.close("all")
        return path

    monkeypatch.setattr(analyze_runs_plots, "draw", draw)
    frame = _table(*rows, {**REFUSED, "tpot_s": 0.001})
    analyze_runs_plots.draw_runs([Run("a", Path("a"), frame)], tmp_path)
    assert drawn == [([10.0, 20.0, 30.0], [10.0, 20.0, 30.0])]


@pytest.mark.slow
def test_pictures_of_runs_and_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PNG files of a size worth looking at; names with a dollar are no formulas."""
    pytest.importorskip("matplotlib")
    first, second = _files(
        tmp_path, **{"first$x$": make_trials(300), "b": make_trials(200, seed=1)}
    )
    out = str(tmp_path / "plots")
    assert run(["analyze", first, second, "--plots", out]) == 0
    assert run(["analyze", first, second, "--by", "run,tp, tp", "--plots", out]) == 0
    assert run(["analyze", first, "--against", second, "--plots", out]) == 0
    capsys.readouterr()
    names = {one.name: one.read_bytes() for one in (tmp_path / "plots").iterdir()}
    assert {"pareto.png", "worth.png", "runs.png", "groups.png"} <= set(names)
    assert all(held.startswith(b"\x89PNG") and len(held) > 10_000 for held in names.values())


def test_groups_of_nothing_feasible_have_no_picture(tmp_path: Path) -> None:
    """And are told without a loss."""
    frame = _table(REFUSED, REFUSED)
    (group,) = by_columns(frame, ["tp"])
    assert (group.loss, group.best) == (None, None)
    pytest.importorskip("matplotlib")
    from shardplan.search.analyze_runs_plots import draw_groups, draw_runs

    with pytest.raises(InputError, match="feasible"):
        draw_groups(["tp"], [group], tmp_path)
    with pytest.raises(InputError, match="feasible"):
        draw_runs([Run("a", Path("a"), frame)], tmp_path)


def test_keys_do_not_run_out_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many different values in many columns: numbers of rows are made small in between."""
    from shardplan.search import regressions

    monkeypatch.setattr(regressions, "_WIDEST", 50)
    frame = make_trials(200)
    found = compare(Run("a", Path("a"), frame), Run("b", Path("b"), frame.iloc[::-1]), 0.0)
    key = [name for name in regressions.KEY if name in frame]
    assert found.both == len(frame.drop_duplicates(key))
    assert np.isfinite(found.both)
