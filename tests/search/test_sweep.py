"""Sweeps: values as typed, a row a combination, the same bytes by any number of processes."""

from __future__ import annotations

import csv
import io
import json
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.plan_factory import make_plan

from shardplan.models.errors import InfeasibleError, InputError, UnknownNameError
from shardplan.search import api, sweep
from shardplan.search.main import run
from shardplan.search.sweep import columns, run_sweep
from shardplan.search.sweep_out import sweep_json, write_sweep
from shardplan.search.sweep_plots import MOST_PLOTS, draw_sweep
from shardplan.search.sweep_values import parse_axes, parse_axis

BASE: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "atlas-800t-a2",
    "concurrency": 4,
    "output_len": 64,
}
COMMAND = ["search", "--model", "llama-3.1-8b", "--cluster", "atlas-800t-a2", "--concurrency", "4"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("input-len=1k,4k,16k", (1024, 4096, 16384)),
        ("--input_len=1.5k", (1536,)),
        ("concurrency=1k,2M", (1000, 2_000_000)),
        ("nodes=1:4", (1, 2, 3, 4)),
        ("nodes=1:16:x2", (1, 2, 4, 8, 16)),
        ("nodes=8, 1:3 ,2", (8, 1, 2, 3)),
        ("tpot-ms=20:21:0.25", (20.0, 20.25, 20.5, 20.75, 21.0)),
        ("rate=0.1:0.3:0.1", (0.1, 0.2, 0.3)),
        ("weight-dtype=bf16,w8a8", ("bf16", "w8a8")),
        ("robust=off,on", (False, True)),
        ("model=a.json,b/c.json", ("a.json", "b/c.json")),
    ],
)
def test_values_are_what_was_meant(text: str, values: tuple[Any, ...]) -> None:
    """Lists, ranges with both ends, factors, suffixes, words."""
    found = parse_axis(text).values
    assert found == pytest.approx(values) if isinstance(values[0], float) else found == values


@given(st.integers(1, 500), st.integers(0, 500), st.integers(1, 60))
def test_a_range_is_pythons_with_its_end(first: int, more: int, step: int) -> None:
    """For whole numbers."""
    found = parse_axis(f"cards={first}:{first + more}:{step}").values
    assert found == tuple(range(first, first + more + 1, step))


@given(st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=9, unique=True))
def test_a_list_of_numbers_stays_as_it_is(values: list[int]) -> None:
    """In the order given; whether a value makes sense is the search's to say."""
    assert parse_axis("seed=" + ",".join(map(str, values))).values == tuple(values)


@given(st.text(max_size=20), st.sampled_from(["", "nodes=", "tpot-ms=", "model=", "robust="]))
def test_no_text_breaks_the_parser(text: str, lead: str) -> None:
    """It is an axis or one clear error."""
    with suppress(InputError):
        assert parse_axis(lead + text).values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input-length=1", "did you mean input-len"),
        ("node=1:2", "did you mean nodes"),
        ("top=1", "unknown option to sweep"),
        ("nodes", "NAME=VALUES"),
        ("nodes=", "NAME=VALUES"),
        ("nodes=1,,2", "value between commas"),
        ("nodes=two", "whole numbers"),
        ("nodes=1.5", "whole numbers"),
        ("nodes=4:1", "rising"),
        ("nodes=1:8:0", "rising"),
        ("nodes=1:8:x1", "rising"),
        ("nodes=1:2:3:4", "a:b:step"),
        ("nodes=1:", "a:b:step"),
        ("tpot-ms=inf", "finite"),
        ("robust=maybe", "on or off"),
    ],
)
def test_bad_values_say_what_to_try(text: str, message: str) -> None:
    """The rule, what was typed, a hint."""
    with pytest.raises(InputError, match=message):
        parse_axis(text)


def test_an_option_is_swept_once_and_not_too_often() -> None:
    """Twice the same, or more combinations than there may be."""
    with pytest.raises(InputError, match="swept once"):
        parse_axes(["nodes=1", "nodes=2"])
    with pytest.raises(InputError, match="4,096 combinations"):
        parse_axes(["nodes=1:100", "input-len=1:100"])
    with pytest.raises(InputError, match="4,096 combinations"):
        parse_axes(["input-len=1:1M"])
    assert issubclass(UnknownNameError, InputError)


def test_rows_are_in_order_and_failures_stand_among_them(tmp_path: Path) -> None:
    """First option outermost; one that cannot be says which limit binds and stops no other."""
    axes = parse_axes(["input-len=256,1M", "cards=1,2"])
    found = run_sweep(BASE, axes, plans=tmp_path / "plans")
    keys = [(row["input_len"], row["cards"]) for row in found.rows]
    assert keys == [(256, 1), (256, 2), (1_048_576, 1), (1_048_576, 2)]
    assert [row["status"] for row in found.rows] == ["ok", "ok", "infeasible", "infeasible"]
    assert found.rows[2]["limit"] == "context"
    assert "1048576" in found.rows[2]["message"]
    alone = api.search(**BASE, input_len=256, cards=2)
    own = tmp_path / str(found.rows[1]["plan"])
    assert own.read_text() == alone.plan.dumps()
    assert found.rows[1]["output_tokens_per_s"] == alone.plan.performance.output_tokens_per_s
    write_sweep(found, tmp_path / "sweep.csv")
    table = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    assert list(table[0]) == columns(axes)
    assert [row["ranks"] for row in table] == ["1", "2", "", ""]


@pytest.mark.slow
def test_processes_do_not_change_a_byte(tmp_path: Path) -> None:
    """One and two of them: the table, the JSON, the plans."""
    axes = parse_axes(["input-len=256,1M", "cards=1,2"])
    texts = []
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        found = run_sweep(BASE, axes, jobs=jobs, plans=folder / "plans")
        write_sweep(found, folder / "sweep.csv")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        texts.append(
            [(str(path.relative_to(folder)), path.read_bytes()) for path in files]
            + [("json", json.dumps(sweep_json(found)).encode())]
        )
    assert texts[0] == texts[1]
    assert len(texts[0]) == 4


def _fake(monkeypatch: pytest.MonkeyPatch, stop_at: int = -1) -> None:
    """Plans without a search; odd prompts have none, and a key is pressed at one of them."""

    def found(input_len: int = 2, **_: Any) -> Any:
        if input_len == stop_at:
            raise KeyboardInterrupt
        if input_len % 2:
            raise InfeasibleError("no strategy meets the TPOT limit", got="tpot binds: 9 ms")
        return SimpleNamespace(plan=make_plan())

    monkeypatch.setattr(api, "search", found)


def test_an_interrupt_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest says so."""
    _fake(monkeypatch, stop_at=6)
    found = run_sweep({}, parse_axes(["input-len=2:8:2"]))
    assert found.interrupted
    assert [row["status"] for row in found.rows] == ["ok", "ok", "interrupted", "interrupted"]


def test_a_bug_in_one_combination_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named in its row."""

    def broken(**_: Any) -> Any:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(api, "search", broken)
    (row,) = run_sweep({}, parse_axes(["nodes=1"])).rows
    assert (row["status"], row["message"]) == ("bug", "ZeroDivisionError: by zero")


def test_a_swept_type_stands_beside_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked: auto. Chosen: what the plan has."""
    _fake(monkeypatch)
    (row,) = run_sweep({}, parse_axes(["weight-dtype=auto"])).rows
    assert (row["weight_dtype"], row["chosen_weight_dtype"]) == ("auto", "bf16")


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["input-len=2:5"], ["sweep_input_len"]),
        (["nodes=1:2", "input-len=2:4"], ["sweep_input_len_nodes"]),
        (
            ["nodes=1:2", "input-len=2:4", "kv-dtype=bf16,int8"],
            ["sweep_input_len_nodes_1", "sweep_input_len_nodes_2"],
        ),
    ],
)
def test_pictures_follow_the_number_of_options(
    texts: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line, a pair of heat maps, one pair for each of the others; the same bytes each time."""
    pytest.importorskip("matplotlib")
    _fake(monkeypatch)
    found = run_sweep({}, parse_axes(texts))
    paths, notes = draw_sweep(found, "throughput", tmp_path / "a", title="model on cluster")
    assert [path.name for path in paths] == [
        f"{n}.{kind}" for n in names for kind in ("png", "svg")
    ]
    assert not notes
    again, _ = draw_sweep(found, "throughput", tmp_path / "b", title="model on cluster")
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]


def test_pictures_are_bounded_and_of_more_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not drawn is said."""
    pytest.importorskip("matplotlib")
    _fake(monkeypatch)
    monkeypatch.setattr("shardplan.search.sweep_plots.save_figure", lambda _, stem: [stem])
    texts = ["nodes=1:4", "input-len=2:5", "seed=1:4", "trials=1:4"]
    paths, notes = draw_sweep(run_sweep({}, parse_axes(texts)), "cards", tmp_path)
    assert len(paths) == MOST_PLOTS
    assert notes == ["the first 12 of 16 heat maps are drawn"]
    assert draw_sweep(run_sweep({}, parse_axes(["nodes=1"])), "cards", tmp_path)[0] == []


def test_the_command_writes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A count before, a table after, JSON alone on stdout; without matplotlib a note."""
    _fake(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    sweep_ = ["--sweep", "input-len=2:5", "--jobs", "1", "--out", str(out)]
    assert run([*COMMAND, *sweep_]) == 0
    shown = capsys.readouterr()
    assert "4 combinations (4 input-len), 1 at a time" in shown.err
    assert "pip install 'shardplan[plots]'" in shown.err
    assert "4 combinations: 2 ok, 2 infeasible" in shown.out
    assert (out / "sweep.csv").is_file()
    assert run([*COMMAND, *sweep_, "--force", "--json", "--no-plans"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"ok": 2, "infeasible": 2}
    assert found["rows"][0]["plan"] is None
    assert run([*COMMAND, "--sweep", "input-len=3", "--jobs", "1", "--out", str(out)]) == 2
    capsys.readouterr()
    assert run([*COMMAND, "--sweep", "input-len=3,5", "--jobs", "1", "--force", *sweep_[-2:]]) == 3
    assert "no combination of the sweep has a plan" in capsys.readouterr().err
    assert run([*COMMAND, "--sweep", "nods=1"]) == 2
    assert "did you mean nodes" in capsys.readouterr().err


def test_an_interrupted_command_writes_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code is that of an interrupt."""
    _fake(monkeypatch, stop_at=4)
    out = tmp_path / "out"
    assert run([*COMMAND, "--sweep", "input-len=2,4", "--jobs", "1", "--out", str(out)]) == 130
    rows = list(csv.DictReader(io.StringIO((out / "sweep.csv").read_text())))
    assert [row["status"] for row in rows] == ["ok", "interrupted"]
    assert sweep.columns(parse_axes(["input-len=2"]))[0] == "input_len"
