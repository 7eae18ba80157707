"""Bad input ends in one clear line and exit code 2: no traceback, no half-written file."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.emit_cases import emit_plan

from shardplan.search.estimate import price_columns
from shardplan.search.estimate_csv import MAX_POINTS_BYTES
from shardplan.search.estimate_points import INPUT_COLUMNS
from shardplan.search.main import run

MODEL = ["--model", "llama-3.1-8b"]
BOTH = [*MODEL, "--cluster", "atlas-800t-a2"]
ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that is refused: one line that holds `words`."""
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    for word in words:
        assert word in shown.err
    return shown.err


@pytest.mark.parametrize(
    "words",
    [
        ["lint", "FILE", "--cluster", "atlas-800t-a2"],
        ["analyze", "FILE"],
        ["search", *BOTH, "--cards", "1", "--out", "FILE"],
        ["simulate", "FILE"],
        ["explain", "FILE"],
        ["estimate", "--points", "FILE"],
    ],
    ids=lambda one: one[0],
)
def test_names_that_no_file_can_have(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(["8" * 400 if word == "FILE" else word for word in words], capsys, "888")


@pytest.mark.parametrize("command", ["search", "estimate"])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["--model", "llama-65", "--cluster", "atlas-800t-a2"], ("'llama-65'", "llama-65b")),
        ([*MODEL, "--cluster", "atlas-800t"], ("'atlas-800t'", "atlas-800t-a2")),
        ([*BOTH, "--device", "910b9"], ("'910b9'", "910b")),
        ([*BOTH, "--device", "h200"], ("vendor", "h200")),
        ([*BOTH, "--engine-profile", "vllm-asc"], ("'vllm-asc'", "vllm-ascend")),
        ([*BOTH, "--nodes", "0"], ("nodes", "0")),
        ([*BOTH, "--nodes", "100000"], ("nodes", "100000")),
        (["--model", "nowhere/config.json", "--cluster", "atlas-800t-a2"], ("nowhere",)),
        ([*MODEL, "--cluster", "nowhere.toml"], ("nowhere.toml",)),
        ([*MODEL, "--cluster", "910b2"], ("this is a device", "atlas-800t-a2")),
        ([*MODEL, "--cluster", "910b1"], ("this is a device", "--device 910b1")),
        (["--model", "org/qwen3-32", "--cluster", "atlas-800t-a2"], ("did you mean qwen3-32b",)),
        (["--model", "a\x1b[31m\nb", "--cluster", "atlas-800t-a2"], ("unknown model",)),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_names_that_do_not_resolve(
    command: str, names: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The value, the rule, and the nearest names that there are."""
    refused([command, *names], capsys, *words)


@pytest.mark.parametrize("name", ["--input-len", "--output-len", "--concurrency"])
@pytest.mark.parametrize("value", ["0", "-1", "2147483648", "99999999999999999999", "nan", "ten"])
def test_search_lengths(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero, negative, absurd, not a number."""
    refused(["search", *BOTH, name, value], capsys, value)


@pytest.mark.parametrize("name", ["--rate", "--ttft-ms", "--tpot-ms"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast"])
def test_search_limits(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit is a finite number above 0."""
    refused(["search", *BOTH, name, value], capsys, value)


def test_alternatives(capsys: pytest.CaptureFixture[str]) -> None:
    """A number of alternatives below none."""
    refused(["search", *BOTH, "--top", "-1"], capsys, "top=-1")


def test_cards_that_no_job_may_take(capsys: pytest.CaptureFixture[str]) -> None:
    """A node of eight takes 1, 2, 4 or 8."""
    refused(["search", *BOTH, "--cards", "7"], capsys, "cards=7", "try 4 or 8")


@pytest.mark.parametrize(
    "name", ["--objective", "--engine", "--attention", "--weight-dtype", "--kv-dtype", "--serving"]
)
def test_search_choices(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A word that is none of the choices."""
    refused(["search", *BOTH, name, "fastest"], capsys, "fastest")


@pytest.mark.parametrize("value", ["0", "-4", "2147483648", "nan", "inf", "4.5", "four", "1_000"])
@pytest.mark.parametrize("name", ["--tp", "--batch", "--tokens"])
def test_estimate_sizes(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options are read as the cells of their columns."""
    refused(["estimate", *BOTH, name, value], capsys, name[2:], value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", "3"], ("tp must divide", "tp=3")),
        (["--head-tp", "3"], ("head_tp", "tp times a divisor of dp")),
        (["--cp", "2", "--dp", "2", "--ffn-tp", "2"], ("contexts that are not split", "cp=2")),
        (["--ep", "2"], ("expert parallelism", "ep=2")),
        (["--tp", "8", "--pp", "2", "--nodes", "1"], ("ranks=16", "nodes=2")),
        (["--weight-dtype", "fp8"], ("fp8", "910b2")),
        (["--kv-dtype", "int4"], ("int4", "910b2")),
        (["--phase", "decoding"], ("'decoding'", "decode")),
        (["--phase", "op"], ("operator",)),
        (["--op", "matmul", "--m", "1", "--n", "16"], ("`k` is needed",)),
        (["--op", "all_reduce", "--ranks", "16", "--nodes", "1", "--message-bytes", "8"], ("16",)),
        (["--phase", "serve", "--prefix-hit", "1"], ("prefix_hit", "1")),
        (["--phase", "serve", "--request-rate", "0"], ("request_rate", "0")),
        (["--out", "x.csv"], ("--points",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_estimates_that_make_no_sense(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The rule, the values, and what to try."""
    refused(["estimate", *BOTH, *arguments], capsys, *words)


def test_estimate_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A model is needed, or an operator; a cluster too."""
    refused(["estimate"], capsys, "--model")
    refused(["estimate", *MODEL], capsys, "`cluster` is needed")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("header",)),
        (b"\n\n", ("header",)),
        (b"model,cluster\n", ("at least one row",)),
        (b"tp,batch\n4,1\n", ("column `model`", "tp, batch")),
        (b"model,tp,tp\nllama-65b,1,1\n", ("once", "tp")),
        (b"model,step_s\nllama-65b,1\n", ("step_s", "rename")),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", ("UTF-8",)),
        (b"model,\x00\n", ("binary",)),
        (b'model\n"' + b"a" * 200_000 + b'"\n', ("CSV",)),
    ],
    ids=["empty", "blank", "header", "no model", "twice", "answer", "binary", "nul", "huge cell"],
)
def test_points_files_that_are_none(
    content: bytes, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused as a whole, and nothing is written."""
    points, out = tmp_path / "in.csv", tmp_path / "out.csv"
    points.write_bytes(content)
    refused(["estimate", "--points", str(points), "--out", str(out)], capsys, *words)
    assert not out.exists()


def test_a_huge_points_file_is_refused_unread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 MB that take no space: only the size is looked at."""
    points = tmp_path / "in.csv"
    with points.open("wb") as file:
        file.truncate(200 * 10**6)
    refused(["estimate", "--points", str(points)], capsys, str(MAX_POINTS_BYTES), "200000000")


def test_points_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, a folder, a device, without permission."""
    refused(["estimate", "--points", str(tmp_path / "none.csv")], capsys, "none.csv")
    refused(["estimate", "--points", str(tmp_path)], capsys, "is a file")
    refused(["estimate", "--points", os.devnull], capsys, "is a file")
    if not ROOT_USER:
        secret = tmp_path / "secret.csv"
        secret.write_text("model\nllama-65b\n", encoding="utf-8")
        secret.chmod(0)
        refused(["estimate", "--points", str(secret)], capsys, "secret.csv")


def test_places_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found out before the work, not after it."""
    points = tmp_path / "in.csv"
    points.write_text("model\nllama-65b\n", encoding="utf-8")
    gone = Path("/proc/none/out.csv")  # nobody can write there, not even root
    for out in (tmp_path, points, points / "out.csv", *([gone] if Path("/proc").exists() else [])):
        refused(["estimate", "--points", str(points), "--out", str(out)], capsys, "--out")
    assert points.read_text(encoding="utf-8") == "model\nllama-65b\n"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept", encoding="utf-8")
    for place in (full, points, points / "run"):
        refused(["search", *BOTH, "--out", str(place)], capsys, "--out")
    assert [file.name for file in full.iterdir()] == ["mine.txt"]


def test_bad_rows_are_answered_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too few cells, too many, and cells that break a rule; the good row is priced."""
    points = tmp_path / "in.csv"
    rows = [
        "model,cluster,tp,batch",
        "llama-65b,atlas-800t-a2,8,1",
        "llama-65b,atlas-800t-a2",
        "llama-65b,atlas-800t-a2,8,1,9,9",
        "llama-65b,atlas-800t-a2,8,NaN",
        "llama-65b,atlas-800t-a2,7,1",
        "llama-66b,atlas-800t-a2,8,1",
    ]
    points.write_text("\n".join(rows), encoding="utf-8")
    assert run(["estimate", "--points", str(points), "--json"]) == 0
    found = [row["status"] for row in json.loads(capsys.readouterr().out)]
    bad = ["bad_input", "bad_input", "bad_input", "illegal_strategy", "unknown_name"]
    assert found == ["ok", *bad]


def test_a_misspelt_column_is_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is passed through, as any column that is not known, but not in silence."""
    points = tmp_path / "in.csv"
    points.write_text("model,cluster,batchs\nllama-3.1-8b,atlas-800t-a2,4\n", encoding="utf-8")
    assert run(["estimate", "--points", str(points)]) == 0
    assert "did you mean batch?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("cannot be read",)),
        (b"not json", ("JSON",)),
        (b"[]", ("schema",)),
        (b'{"schema_version": 1}', ("schema",)),
        (b"\xff\xfe", ("JSON",)),
        (b"[" * 100_000, ("JSON",)),
    ],
    ids=["missing", "text", "list", "empty plan", "binary", "deep"],
)
def test_plans_that_are_none(
    content: bytes | None,
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """verify and emit read the same file with the same rules."""
    plan = tmp_path / "plan.json"
    if content is not None:
        plan.write_bytes(content)
    refused(["verify", str(plan)], capsys, *words)
    out = tmp_path / "deploy"
    refused(["emit", str(plan), "--target", "atc", "--out", str(out)], capsys, *words)
    assert not out.exists()


def test_options_of_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NAME=VALUE, each once, and only the target's own."""
    plan, out = tmp_path / "plan.json", tmp_path / "deploy"
    emit_plan(tp=2).save(plan)
    words = ["emit", str(plan), "--target", "atc", "--out", str(out)]
    refused([*words, "--option", "door"], capsys, "NAME=VALUE")
    refused([*words, "--option", "cann=7", "--option", "cann=8"], capsys, "each name once")
    refused([*words, "--option", "force=1"], capsys, "NAME=VALUE")
    refused([*words, "--option", "width=2"], capsys, "no such option", "door")
    refused([*words, "--option", "cann=9"], capsys, "try 7")
    assert not out.exists()


def test_levels_that_need_an_extra_say_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And do so before anything is run."""
    for name in ("transformers", "torch") if find_spec("torch") else ("torch",):
        monkeypatch.setitem(sys.modules, name, None)
        refused(["verify", *MODEL, "--level", "2"], capsys, name, "shardplan[torch]")
        refused(["verify", *MODEL, "--level", "3"], capsys, "shardplan[torch]")


def test_verify_and_analyze_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing, and what to give."""
    refused(["verify"], capsys, "--model")
    refused(["verify", *MODEL, "--level", "4"], capsys, "level=4")
    refused(["verify", *MODEL, "--tp", "3"], capsys, "tp must divide")
    refused(["verify", *MODEL, "--stage-layers", "a,b"], capsys, "stage_layers")
    refused(["analyze"], capsys, "argument")
    refused(["analyze", "none.csv"], capsys, "none.csv")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serch"], ("'serch'", "did you mean search")),
        (["frobnicate"], ("'frobnicate'", "did you mean ")),
        (["xx"], ("'xx'", "known: ", "search")),
        (["estimate", "--batchs", "4"], ("--batchs", "--batch")),
        (["search"], ("--model",)),
        (["search", *MODEL], ("--cluster",)),
        (["models", "a", "b"], ("b",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_itself(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown commands and options come with a suggestion."""
    refused(arguments, capsys, *words)


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json stdout holds the error as an object, stderr the line for people."""
    for arguments, code in ((["devices", "910b9"], "unknown_name"), (["estimate", "-x"], "usage")):
        assert run([*arguments, "--json"]) == 2
        shown = capsys.readouterr()
        error = json.loads(shown.out)["error"]
        assert set(error) == {"code", "rule", "got", "hint", "message"}
        assert error["code"] == code
        assert shown.err == f"error: {error['message']}\n"


CELLS = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1e999", "nan", "inf", "1" * 400, "é", "'", "../..", "x" * 9000]
    ),
    st.integers(-5, 5000).map(str),
    st.text(max_size=6),
    st.sampled_from(["llama-3.1-8b", "qwen3-30b-a3b", "atlas-800t-a2", "910b2", "serve", "op"]),
)


@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(sorted(INPUT_COLUMNS)), CELLS, max_size=8),
        min_size=1,
        max_size=4,
    )
)
def test_any_cells_give_a_price_or_an_error_of_the_row(rows: list[dict[str, str]]) -> None:
    """Fuzzed points: each row ends ok with a finite time, or refused with a message."""
    columns = {name: [row.get(name, "") for row in rows] for name in INPUT_COLUMNS}
    prices = price_columns(columns, len(rows))
    for row in range(len(rows)):
        if prices.status(row) == "ok":
            assert math.isfinite(prices.numbers["step_s"][row])
            assert prices.numbers["step_s"][row] > 0
        else:
            assert prices.message(row)
            assert math.isnan(prices.numbers["step_s"][row])
