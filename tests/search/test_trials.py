"""trials.csv: what is written is what is read, and what breaks a rule is named with its place."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.plan_factory import make_trials

from shardplan.models.errors import InputError
from shardplan.search import trials as module
from shardplan.search.trials import (
    LATER_COLUMNS,
    NUMBER_COLUMNS,
    TRIAL_COLUMNS,
    WORD_COLUMNS,
    read_trials,
    write_trials,
)


def _written(tmp_path: Path, frame: pd.DataFrame) -> Path:
    path = tmp_path / "trials.csv"
    write_trials(path, frame)
    return path


def _edited(tmp_path: Path, column: str, cell: str, *, line: int = 2) -> Path:
    """A good table with one cell changed; line 2 is the first row, a feasible one."""
    path = _written(tmp_path, make_trials(20))
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.loc[line - 2, column] = cell
    frame.to_csv(path, index=False)
    return path


def test_the_columns_are_those_that_are_promised() -> None:
    """Others read these files by name and by place."""
    assert ",".join(TRIAL_COLUMNS) == (
        "rank,feasible,limit,objective,tp,pp,dp,ep,cp,sp,exchange,stage_layers,attention,"
        "weight_dtype,kv_dtype,batch,chunk,ttft_s,tpot_s,end_to_end_s,output_tokens_per_s,"
        "output_tokens_per_s_per_card,requests_per_s,memory_bytes,memory_free_bytes,compute_s,"
        "memory_s,collective_s,overhead_s,engine,weight_prefetch,fused_collectives,"
        "o_tp,ffn_tp,shared_tp,head_tp,embed_tp,order,mtp,collectives,"
        "serving,prefill_instances,decode_instances,prefill_cards,decode_cards,prefill_tp,"
        "prefill_pp,prefill_dp,prefill_ep,prefill_chunk"
    )


def test_a_table_of_the_first_releases_has_its_switches_off(tmp_path: Path) -> None:
    """Files written before the switches of the engine were searched are still read."""
    path = _written(tmp_path, make_trials(20))
    old = pd.read_csv(path, dtype=str, keep_default_na=False)
    old.drop(columns=list(LATER_COLUMNS)).to_csv(path, index=False)
    back = read_trials(path)
    assert tuple(back.columns) == TRIAL_COLUMNS
    for name, value in LATER_COLUMNS.items():
        assert set(back[name]) == {value}


def test_a_table_comes_back_as_it_went_in(tmp_path: Path) -> None:
    """Words and counts exactly, floats to nine digits, what is not there as not there."""
    frame = make_trials(200)
    back = read_trials(_written(tmp_path, frame))
    assert tuple(back.columns) == TRIAL_COLUMNS
    for name in TRIAL_COLUMNS:
        if name in NUMBER_COLUMNS:
            np.testing.assert_allclose(back[name], frame[name], rtol=5e-9)
        else:
            assert back[name].tolist() == frame[name].tolist(), name
    assert back["objective"].isna().any()


def test_reading_and_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """With LF at the end of each line, whatever the platform."""
    path = _written(tmp_path, make_trials(500))
    first = path.read_bytes()
    write_trials(path, read_trials(path))
    assert path.read_bytes() == first
    assert first.startswith(b"rank,feasible,limit,")
    assert first.endswith(b"\n")
    assert b"\r" not in first


@given(
    st.lists(st.floats(min_value=1e-300, max_value=1e300), min_size=1, max_size=20),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
)
def test_any_number_and_any_word_survive(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], word: str
) -> None:
    """Nine digits of each number are kept exactly; commas, quotes and line ends are quoted."""
    frame = make_trials(len(values)).assign(tpot_s=values, limit=word)
    back = read_trials(_written(tmp_path_factory.mktemp("trials"), frame))
    assert [f"{value:.9g}" for value in back["tpot_s"]] == [f"{value:.9g}" for value in values]
    assert set(back["limit"]) == {word}


def test_words_are_not_taken_for_numbers(tmp_path: Path) -> None:
    """A stage list of one stage is "80", and "NA" is a word like any other."""
    frame = make_trials(10).assign(stage_layers="80", engine="NA")
    back = read_trials(_written(tmp_path, frame))
    assert set(back["stage_layers"]) == {"80"}
    assert set(back["engine"]) == {"NA"}
    assert all(isinstance(back[name].dtype, pd.CategoricalDtype) for name in WORD_COLUMNS)


def test_what_is_no_finite_number_is_an_empty_cell(tmp_path: Path) -> None:
    """A refused strategy may have no TTFT at all."""
    frame = make_trials(30)
    refused = ~frame["feasible"]
    frame.loc[refused, "ttft_s"] = math.inf
    frame["limit"] = frame["limit"].where(refused, None)
    back = read_trials(_written(tmp_path, frame))
    assert back.loc[refused, "ttft_s"].isna().all()
    assert set(back.loc[~refused, "limit"]) == {""}


def test_further_columns_and_another_order_are_accepted(tmp_path: Path) -> None:
    """Later versions may add columns; spreadsheets may move them and mark the file's start."""
    path = tmp_path / "other.csv"
    frame = read_trials(_written(tmp_path, make_trials(20))).assign(remark="x")
    for name in ("feasible", "sp"):
        frame[name] = frame[name].map({True: "true", False: "false"})
    columns = [*reversed(TRIAL_COLUMNS), "remark"]
    frame.loc[:, columns].to_csv(path, index=False, encoding="utf-8-sig")
    assert tuple(read_trials(path).columns) == TRIAL_COLUMNS


def test_a_table_longer_than_a_chunk_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and writing in parts changes nothing."""
    frame = make_trials(100)
    whole = _written(tmp_path, frame).read_bytes()
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)
    path = _written(tmp_path, frame)
    assert path.read_bytes() == whole
    assert read_trials(path)["rank"].tolist() == frame["rank"].tolist()


@pytest.mark.parametrize(
    ("column", "cell", "rule"),
    [
        ("tp", "four", "whole number of at least 1"),
        ("tp", "", "whole number of at least 1"),
        ("tp", "2.5", "whole number of at least 1"),
        ("batch", "0", "whole number of at least 1"),
        ("chunk", "99999999999", "whole number of at least 1"),
        ("rank", "-1", "whole number of at least 0"),
        ("rank", "1.5", "whole number of at least 0"),
        ("feasible", "yes", "true or false"),
        ("sp", "", "true or false"),
        ("tpot_s", "fast", "is a number"),
        ("tpot_s", "inf", "is a number"),
        ("tpot_s", "", "every number"),
        ("objective", "", "every number"),
        ("ttft_s", "-0.5", "above 0"),
        ("output_tokens_per_s", "0", "above 0"),
    ],
)
def test_a_bad_cell_is_named_with_its_place(
    tmp_path: Path, column: str, cell: str, rule: str
) -> None:
    """File, line, column and value: what a user needs to find it."""
    path = _edited(tmp_path, column, cell)
    with pytest.raises(InputError) as caught:
        read_trials(path)
    message = str(caught.value)
    assert rule in message
    assert f"{path}, line 2, {column}={cell!r}" in message


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "columns of trials.csv"),
        (b"rank,feasible\n1,true\n", "missing limit, objective"),
        (b"not a table at all\n", "columns of trials.csv"),
        (b"\xff\xfe\x00r\x00a", "UTF-8"),
        (",".join(TRIAL_COLUMNS).encode() + b"\n", "at least one row"),
        (",".join((*TRIAL_COLUMNS, "tp")).encode() + b"\n1\n", "stands there once"),
        (",".join(TRIAL_COLUMNS).encode() + b"\n1,true\n", "a cell for each column"),
        (",".join(TRIAL_COLUMNS).encode() + b'\n1,true,"open\n', "CSV in UTF-8"),
        (",".join(TRIAL_COLUMNS).encode() + b"\n1,true,\xff\n", "CSV in UTF-8"),
    ],
)
def test_what_is_no_trial_table_is_refused(tmp_path: Path, content: bytes, rule: str) -> None:
    """One clear line, never a traceback of the parser."""
    path = tmp_path / "trials.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rule):
        read_trials(path)


@given(st.binary(max_size=300))
def test_random_bytes_end_in_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """Behind a good header too."""
    path = tmp_path_factory.mktemp("fuzz") / "trials.csv"
    for head in (b"", ",".join(TRIAL_COLUMNS).encode() + b"\n"):
        path.write_bytes(head + content)
        with pytest.raises(InputError):
            read_trials(path)


def test_a_file_that_is_missing_or_a_folder_or_huge_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of it is read."""
    with pytest.raises(InputError, match="cannot be read"):
        read_trials(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_trials(tmp_path)
    path = _written(tmp_path, make_trials(20))
    monkeypatch.setattr(module, "MAX_TRIALS_BYTES", 100)
    with pytest.raises(InputError, match="at most"):
        read_trials(path)


def test_a_table_without_its_columns_is_not_written(tmp_path: Path) -> None:
    """And no file is left behind."""
    with pytest.raises(InputError, match="missing tp"):
        write_trials(tmp_path / "trials.csv", make_trials(5).drop(columns="tp"))
    assert list(tmp_path.iterdir()) == []
