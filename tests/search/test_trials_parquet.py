"""Trial tables in Parquet files: the same table as from a CSV, and faults by row and column."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tests.search.plan_factory import make_trials

from shardplan.models.errors import InputError
from shardplan.search.main import run
from shardplan.search.trials import LATER_COLUMNS, TRIAL_COLUMNS, read_trials, write_trials


def _written(path: Path, frame: pd.DataFrame) -> Path:
    pytest.importorskip("pyarrow")
    frame.to_parquet(path, index=False)
    return path


def test_a_parquet_file_is_the_table_that_its_csv_is(tmp_path: Path) -> None:
    """Types, categories and numbers; further columns are dropped, later ones filled in."""
    frame = make_trials(300)
    write_trials(tmp_path / "t.csv", frame)
    expected = read_trials(tmp_path / "t.csv")
    more = expected.assign(remark="x").drop(columns=list(LATER_COLUMNS))
    for given in (expected, more):
        back = read_trials(_written(tmp_path / "t.parquet", given))
        pd.testing.assert_frame_equal(back, expected, check_categorical=False)
    assert tuple(back.columns) == TRIAL_COLUMNS
    wide = expected.astype({"tp": "int64", "limit": "str", "memory_bytes": "float32"})
    assert read_trials(_written(tmp_path / "w.parquet", wide))["tp"].dtype == "int32"


@pytest.mark.parametrize(
    ("column", "value", "part"),
    [
        ("tp", 0, "row 3, tp='0'"),
        ("tp", 2**40, "row 3, tp='1099511627776'"),
        ("tp", 1.5, "row 3, tp='1.5'"),
        ("tpot_s", -1.0, "row 3, tpot_s='-1'"),
        ("tpot_s", None, "row 3, tpot_s=''"),
        ("tpot_s", float("inf"), "row 3, tpot_s='inf'"),
        ("feasible", None, "row 3, feasible=''"),
        ("sp", "yes", "sp='yes'"),
        ("rank", -1, "row 3, rank='-1"),
    ],
)
def test_a_cell_that_breaks_a_rule_is_named(
    tmp_path: Path, column: str, value: Any, part: str
) -> None:
    """With the file, the row and the column."""
    frame = make_trials(20)
    cells = frame[column].astype(object).tolist()
    cells[2] = value
    if isinstance(value, str):
        cells = [str(cell) for cell in cells[:2]] + [value] + [str(cell) for cell in cells[3:]]
        part = f"{column}="
    path = _written(tmp_path / "t.parquet", frame.assign(**{column: pd.Series(cells)}))
    with pytest.raises(InputError) as told:
        read_trials(path)
    assert part in str(told.value)
    assert str(path) in str(told.value)


def test_files_that_are_none_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No Parquet file, no rows, no such column, no file."""
    pytest.importorskip("pyarrow")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nothing")
    _written(tmp_path / "empty.parquet", make_trials(5).iloc[:0])
    _written(tmp_path / "less.parquet", make_trials(5).drop(columns=["tp"]))
    for name, part in (
        ("no", "in that format"),
        ("empty", "at least one row"),
        ("less", "missing tp"),
        ("none", "cannot be read"),
    ):
        assert run(["analyze", str(tmp_path / f"{name}.parquet")]) == 2
        told = capsys.readouterr().err
        assert part in told
        assert len(told.splitlines()) == 1


@pytest.mark.slow
def test_a_damaged_file_is_told_in_words(tmp_path: Path) -> None:
    """Wherever a byte is wrong: in the pages, or in the description at the end."""
    path = _written(tmp_path / "t.parquet", make_trials(60))
    whole = path.read_bytes()
    for place in range(100, len(whole), max(len(whole) // 400, 1)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        told = ""
        try:
            read_trials(path)
        except InputError as error:
            told = str(error)
        assert "None" not in told


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And CSV still works."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"pip install 'shardplan\[parquet\]'"):
        read_trials(tmp_path / "t.parquet")
