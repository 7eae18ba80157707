"""`analyze`: the best, the front and the worth of each dimension, against hand-made tables."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.search.plan_factory import make_trials

from shardplan.models.errors import InputError
from shardplan.search.analyze import (
    DIMENSIONS,
    Dimension,
    Summary,
    best_first,
    pareto_rows,
    row_name,
    summarise,
    to_json,
)
from shardplan.search.analyze_plots import draw_plots
from shardplan.search.analyze_tables import render_summary
from shardplan.search.trials import TRIAL_COLUMNS, read_trials, write_trials


def _table(*rows: dict[str, Any]) -> pd.DataFrame:
    """A hand-made table: feasible rows of tp1 that differ in what is given; rank by place."""
    base = make_trials(1).iloc[0].to_dict()
    base |= {"tp": 1, "pp": 1, "dp": 1, "sp": False, "batch": 8}
    table = [{**base, "rank": place, **row} for place, row in enumerate(rows, start=1)]
    return pd.DataFrame(table, columns=list(TRIAL_COLUMNS))


def _dimension(summary: Summary, name: str) -> Dimension:
    return next(item for item in summary.dimensions if item.name == name)


def test_the_worth_of_a_dimension_by_hand() -> None:
    """Best 100 at tp 4; forced to tp 2 at most 80 (20 % lost), forced to tp 1 at most 50."""
    summary = summarise(
        _table(
            {"tp": 4, "objective": 100.0},
            {"tp": 2, "objective": 80.0},
            {"tp": 4, "objective": 70.0},
            {"tp": 1, "objective": 50.0},
            {"tp": 8, "feasible": False, "limit": "memory", "objective": math.nan},
        )
    )
    tp = _dimension(summary, "tp")
    assert [item.value for item in tp.values] == [4, 2, 1, 8]
    assert [item.trials for item in tp.values] == [2, 1, 1, 1]
    assert [item.feasible for item in tp.values] == [2, 1, 1, 0]
    assert [item.loss for item in tp.values] == [0.0, pytest.approx(0.2), 0.5, None]
    assert tp.second_loss == pytest.approx(0.2)
    assert tp.worst_loss == 0.5
    assert tp.values[3].best is None
    assert summary.best is not None
    assert summary.best["objective"] == 100.0
    assert (summary.trials, summary.feasible) == (5, 4)


def test_the_share_of_variance_by_hand() -> None:
    """ln rates 0, 2 at tp 1 and 4, 6 at tp 2: between groups 16 of 20. kv_dtype explains none."""
    rates = {"output_tokens_per_s_per_card": 1.0}
    rows = [
        {"tp": tp, "output_tokens_per_s_per_card": math.exp(log), "attention": kernel}
        for tp, log, kernel in ((1, 0, "naive"), (1, 2, "flash"), (2, 4, "naive"), (2, 6, "flash"))
    ]
    summary = summarise(_table(*rows))
    assert _dimension(summary, "tp").variance_share == pytest.approx(16 / 20)
    assert _dimension(summary, "attention").variance_share == pytest.approx(4 / 20)
    assert _dimension(summary, "kv_dtype").variance_share == 0.0
    flat = summarise(_table(rates, rates))
    assert _dimension(flat, "tp").variance_share is None


def test_a_dimension_with_one_feasible_value_costs_nothing_to_fix() -> None:
    """There is no second-best value to be forced to."""
    tp = _dimension(summarise(_table({"objective": 3.0}, {"objective": 2.0})), "tp")
    assert tp.second_loss is None
    assert tp.worst_loss is None


def test_ties_go_to_the_better_rank_and_then_to_the_earlier_row() -> None:
    """So that the answer does not hang on how a table was sorted."""
    rows = ({"rank": 3, "batch": 8}, {"rank": 1, "batch": 16}, {"rank": 1, "batch": 32})
    summary = summarise(_table(*rows))
    assert summary.best is not None
    assert summary.best["batch"] == 16


def test_refused_trials_are_counted_by_limit() -> None:
    """Most first; no limit named counts as unknown."""
    refused = {"feasible": False, "objective": math.nan}
    summary = summarise(
        _table({}, refused | {"limit": "ttft"}, *[refused | {"limit": "memory"}] * 2, refused)
    )
    assert list(summary.infeasible.items()) == [("memory", 2), ("ttft", 1), ("unknown", 1)]


def test_nothing_feasible_has_no_best() -> None:
    """The counts are still told, on the terminal and as JSON."""
    summary = summarise(_table({"feasible": False, "limit": "memory", "objective": math.nan}))
    assert summary.best is None
    assert summary.pareto == ()
    assert "1 trials, 0 feasible" in _rendered(summary)
    assert json.loads(json.dumps(to_json(summary), allow_nan=False))["infeasible"] == {"memory": 1}


def test_an_empty_table_is_refused() -> None:
    """There is nothing to say of it."""
    with pytest.raises(InputError, match="at least one row"):
        summarise(make_trials(5).iloc[:0])


def test_the_front_by_hand() -> None:
    """Fast and late, slow and soon, and in between; a worse and a doubled one are left out."""
    points = ((10.0, 3.0, 1.0), (8.0, 2.0, 1.0), (8.0, 2.5, 1.0), (2.0, 9.0, 0.5), (8.0, 2.0, 1.0))
    rows = [
        {"output_tokens_per_s_per_card": rate, "tpot_s": tpot, "ttft_s": ttft}
        for rate, tpot, ttft in points
    ]
    assert pareto_rows(_table(*rows)).tolist() == [0, 1, 3]


_SMALL = st.integers(1, 5).map(float)


@given(st.lists(st.tuples(_SMALL, _SMALL, _SMALL), min_size=1, max_size=40))
def test_the_front_is_what_brute_force_finds(points: list[tuple[float, float, float]]) -> None:
    """Every pair compared; small whole numbers make many ties."""
    columns = ["output_tokens_per_s_per_card", "tpot_s", "ttft_s"]
    front = {points[place] for place in pareto_rows(pd.DataFrame(points, columns=columns))}
    costs = {(-rate, tpot, ttft) for rate, tpot, ttft in points}
    kept = {
        cost
        for cost in costs
        if not any(
            other != cost and all(mine >= its for mine, its in zip(cost, other, strict=True))
            for other in costs
        )
    }
    assert {(-rate, tpot, ttft) for rate, tpot, ttft in front} == kept


@given(st.integers(0, 2**16), st.integers(2, 60))
def test_losses_and_shares_are_what_a_plain_loop_finds(seed: int, rows: int) -> None:
    """Each dimension's best by value, and shares between 0 and 1."""
    frame = make_trials(rows, seed=seed)
    good = frame[frame["feasible"]].to_dict("records")
    summary = summarise(frame)
    best = max(row["objective"] for row in good)
    for item in summary.dimensions:
        expected: dict[Any, float] = {}
        for row in good:
            value = row[item.name]
            expected[value] = max(row["objective"], expected.get(value, -math.inf))
        found = {part.value: part.loss for part in item.values if part.best is not None}
        assert found == {
            value: pytest.approx((best - top) / best) for value, top in expected.items()
        }
        assert item.variance_share is None or 0 <= item.variance_share <= 1
        assert sum(part.trials for part in item.values) == len(frame)


def test_a_table_from_a_file_and_one_from_memory_say_the_same(tmp_path: Path) -> None:
    """Categories or plain words; nine digits are kept on the way."""
    frame = make_trials(300)
    write_trials(tmp_path / "trials.csv", frame)
    back = summarise(read_trials(tmp_path / "trials.csv"))
    here = summarise(frame)
    assert [row_name(row) for row in back.pareto] == [row_name(row) for row in here.pareto]
    for one, other in zip(back.dimensions, here.dimensions, strict=True):
        assert [item.value for item in one.values] == [item.value for item in other.values]
        assert one.worst_loss == (other.worst_loss and pytest.approx(other.worst_loss, rel=1e-6))


def test_the_summary_is_plain_json() -> None:
    """No NaN, no numpy numbers; every dimension and the rows as objects."""
    data = json.loads(json.dumps(to_json(summarise(make_trials(300))), allow_nan=False))
    assert [item["name"] for item in data["dimensions"]] == list(DIMENSIONS)
    assert set(data["best"]) == set(TRIAL_COLUMNS)
    assert data["pareto"][0] == data["best"]


def _rendered(summary: Summary, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    render_summary(summary, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_tables_fit_a_hundred_columns() -> None:
    """Nothing is cut off with an ellipsis, and the best strategy is told."""
    text = _rendered(summarise(make_trials(2_000)))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "tp8 dp4 sp bf16 batch 256 chunk 8192" in text
    assert "677.0 a card" in text


def test_names_from_a_file_are_not_read_as_markup() -> None:
    """`[bold]` in a dtype is a name, and a closing tag is no error."""
    frame = make_trials(50).assign(weight_dtype="[/bold][red]", limit="[/x]")
    assert "[/bold][red]" in _rendered(summarise(frame))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "tp8 dp4 sp bf16 batch 256 chunk 8192"),
        ({"tp": 1, "dp": 1, "sp": False}, "tp1 bf16 batch 256 chunk 8192"),
        ({"ep": 8, "exchange": "alltoall"}, "tp8 dp4 ep8 sp a2a bf16 batch 256 chunk 8192"),
        ({"kv_dtype": "int8", "sp": False}, "tp8 dp4 bf16/kv int8 batch 256 chunk 8192"),
        ({"attention": "naive", "sp": False}, "tp8 dp4 bf16 naive batch 256 chunk 8192"),
    ],
)
def test_a_strategy_has_a_short_name(changes: dict[str, Any], name: str) -> None:
    """What is 1 or off is left out."""
    best = summarise(make_trials(1)).best
    assert best is not None
    assert row_name({**best, **changes}) == name


def test_plots_are_pictures(tmp_path: Path) -> None:
    """Four PNG files of a size worth looking at, the same bytes each time."""
    frame = make_trials(400)
    paths = draw_plots(frame, tmp_path / "plots")
    assert [path.name for path in paths] == [
        "pareto.png",
        "worth.png",
        "tp_batch.png",
        "memory.png",
    ]
    first = [path.read_bytes() for path in paths]
    assert all(content.startswith(b"\x89PNG") and len(content) > 10_000 for content in first)
    assert [path.read_bytes() for path in draw_plots(frame, tmp_path / "plots")] == first


def test_plots_of_a_single_trial_are_drawn(tmp_path: Path) -> None:
    """No dimension varies and no axis has a width."""
    assert len(draw_plots(make_trials(1), tmp_path)) == 4


def test_plots_need_a_feasible_trial_and_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refusal says what to do; nothing is written."""
    frame = make_trials(50)
    with pytest.raises(InputError, match="feasible"):
        draw_plots(frame[~frame["feasible"]], tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'shardplan\[plots\]'"):
        draw_plots(frame, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_best_come_first() -> None:
    """Whatever the order of the table."""
    frame = make_trials(200).sample(frac=1.0, random_state=1)
    objective = best_first(frame)["objective"].to_numpy()
    assert (np.diff(objective) <= 0).all()
    assert len(objective) == int(frame["feasible"].sum())
