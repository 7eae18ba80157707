"""Tables as Parquet: what the CSV holds, with types; without pyarrow the extra is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
from tests.search.plan_factory import make_trials

from shardplan.models.errors import InputError
from shardplan.search.main import run
from shardplan.search.parquet_out import write_table
from shardplan.search.trials import read_trials, trials_csv, write_trials

SEARCH = ["search", "--model", "llama-3.1-8b", "--cluster", "atlas-800i-a2", "--cards", "2"]


def test_a_trial_table_comes_back_as_its_csv_does(tmp_path: Path) -> None:
    """Words that look like numbers stay words, empty numbers stay empty; the same bytes twice."""
    pytest.importorskip("pyarrow")
    text = trials_csv(make_trials(300))
    for name in ("t.csv", "t.parquet", "again.parquet"):
        write_table(tmp_path / name, text)
    expected = read_trials(tmp_path / "t.csv")
    found = read_trials(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(found, expected, check_categorical=False)
    assert expected["stage_layers"].astype(str).str.isdigit().any()
    assert (tmp_path / "t.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()


def test_any_table_keeps_its_cells(tmp_path: Path) -> None:
    """Commas and lines within a cell, no row at all, a type that only the last row tells."""
    pytest.importorskip("pyarrow")
    rows = "".join(f"{place},\n" for place in range(50_000))
    write_table(tmp_path / "t.parquet", 'n,message\n"1","a, b\nc"\n' + rows + "0.5,\n")
    found = pd.read_parquet(tmp_path / "t.parquet")
    assert found["message"][0] == "a, b\nc"
    assert (str(found["n"].dtype), len(found)) == ("float64", 50_002)
    assert found["n"].iloc[-1] == 0.5
    write_table(tmp_path / "none.parquet", "n,message\n")
    assert list(pd.read_parquet(tmp_path / "none.parquet")) == ["n", "message"]


def test_estimate_writes_what_its_csv_holds(tmp_path: Path) -> None:
    """Status and numbers of good and bad rows."""
    pytest.importorskip("pyarrow")
    points = tmp_path / "in.csv"
    points.write_text(
        "model,cluster,tp,phase,batch,tokens\n"
        "llama-3.1-8b,atlas-800i-a2,2,decode,4,512\n"
        "llama-3.1-8b,atlas-800i-a2,3,decode,4,512\n"
    )
    for name in ("out.csv", "out.parquet"):
        assert run(["estimate", "--points", str(points), "--out", str(tmp_path / name)]) == 0
    expected = pd.read_csv(tmp_path / "out.csv")
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert list(found) == list(expected)
    assert found["status"].tolist() == expected["status"].tolist()
    assert found["step_s"].tolist()[0] == expected["step_s"].tolist()[0]


def test_a_search_writes_both(tmp_path: Path) -> None:
    """Beside each CSV; the Parquet file is read by `analyze`."""
    pytest.importorskip("pyarrow")
    assert run([*SEARCH, "--out", str(tmp_path / "plan"), "--parquet"]) == 0
    for name in ("trials", "pareto"):
        pair = [read_trials(tmp_path / "plan" / f"{name}{end}") for end in (".csv", ".parquet")]
        pd.testing.assert_frame_equal(pair[1], pair[0], check_categorical=False)


@pytest.mark.parametrize("option", ["--ablation", "--explain-space"])
def test_parquet_without_a_table_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What writes none says so."""
    assert run([*SEARCH, option, "--parquet"]) == 2
    assert f"goes with tables ({option})" in capsys.readouterr().err


def test_analyze_joins_runs_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All rows of all runs, as CSV or Parquet by the name."""
    pytest.importorskip("pyarrow")
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path, rows in zip(files, (40, 30), strict=True):
        write_trials(path, make_trials(rows, seed=rows))
    for name in ("all.csv", "all.parquet"):
        assert run(["analyze", *map(str, files), "--out", str(tmp_path / name)]) == 0
        assert f"wrote {tmp_path / name}" in capsys.readouterr().err
    joined = [read_trials(tmp_path / name) for name in ("all.csv", "all.parquet")]
    pd.testing.assert_frame_equal(joined[1], joined[0], check_categorical=False)
    assert len(joined[0]) == 70


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is searched or priced; nothing is left behind."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'shardplan\[parquet\]'"):
        write_table(tmp_path / "t.parquet", "a\n1\n")
    points = tmp_path / "in.csv"
    points.write_text("model\nllama-3.1-8b\n")
    for words in (
        [*SEARCH, "--out", str(tmp_path / "plan"), "--parquet"],
        ["estimate", "--points", str(points), "--out", str(tmp_path / "out.parquet")],
    ):
        assert run(words) == 2
        told = capsys.readouterr().err
        assert "shardplan[parquet]" in told
        assert len(told.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]
