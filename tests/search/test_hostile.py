"""Hostile names of models, folders and options: text in a page, never a path, a shell or markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.search.emit_cases import tiny_llama

from shardplan.search.cli_search import _slug
from shardplan.search.main import run

MACHINE = ["--cluster", "atlas-800t-a2", "--cards", "1", "--input-len", "64", "--output-len", "8"]
NAMES = [
    "$(touch hit)",
    "`touch hit`; touch hit #",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a\nb\x1b[31m",
    "..%2f..",
    "' or 1=1 --",
    "=cmd|' /C calc'!A0",
]


def _model(folder: Path, name: str) -> Path:
    """A model in a folder whose name is hostile: the model is called like the folder."""
    place = folder / "models" / name.replace("/", "\u2215")
    place.mkdir(parents=True)
    tiny_llama(place)
    return place


def _everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_model_stays_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files lie in results/runs, the page has no tag of the name, the terminal no escape."""
    monkeypatch.chdir(tmp_path)
    model = _model(tmp_path, name)
    before = _everything(tmp_path)
    assert run(["search", "--model", str(model), *MACHINE]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    new = _everything(tmp_path) - before
    (folder,) = {Path(one).parent for one in new}
    assert folder.parent == Path("results/runs")
    assert {Path(one).name for one in new} >= {"plan.json", "trials.csv", "report.html"}
    page = (tmp_path / folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page
    plan = json.loads((tmp_path / folder / "plan.json").read_bytes())
    assert plan["model"]["layers"] == 4
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("name", ["..", ".", "../..", "/", "//", "-rf", "", "a/../../b", *NAMES])
def test_a_default_folder_has_a_plain_name(name: str) -> None:
    """One part, no dots alone, no leading dash, nothing for a shell to see."""
    made = _slug(name)
    assert made
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert made.strip(".") == made
    assert not made.startswith("-")


SCRIPT = """\
export MODEL=$(touch hit)
`touch hit`
touch hit; vllm serve llama-3.1-8b -tp 2 --served-model-name "$(touch hit)" --max-num-seqs 8
vllm serve "llama-3.1-8b" -tp 4 --nonsense "<script>alert(1)</script>\x1b[31m" | touch hit
"""


@pytest.mark.parametrize("as_json", [True, False])
def test_a_script_is_read_and_never_run(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Substitutions, pipes and commands beside the server's are text."""
    monkeypatch.chdir(tmp_path)
    Path("serve.sh").write_text(SCRIPT, encoding="utf-8")
    words = ["lint", "serve.sh", "--cluster", "atlas-800t-a2", "--no-best"]
    assert run([*words, "--json"] if as_json else words) in (0, 3)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["serve.sh"]
    command = "vllm serve llama-3.1-8b --x $(touch hit) -tp 2"
    assert run(["lint", command, "--cluster", "atlas-800t-a2", "--no-best"]) in (0, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["serve.sh"]


@pytest.mark.parametrize(
    "words",
    [
        ["search", "--model", "\x1b[31mx", "--cluster", "y"],
        ["search", "--model", "llama-3.1-8b", "--cluster", "$(touch hit)"],
        ["search", "--model", "llama-3.1-8b", "--cluster", "atlas-800t-a2", "--study", "x\x1b"],
        ["emit", "\x1b[2J", "--target", "$(touch hit)", "--out", "o"],
        ["lint", "vllm serve \x1b[31m", "--cluster", "../../etc/\x1b"],
        ["estimate", "--op", "\x1b[31m"],
        ["models", "\x1b[31m\u202e"],
    ],
    ids=lambda words: words[0],
)
def test_what_is_refused_is_shown_as_text(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line, without an escape for the terminal; nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert run(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert "\x1b" not in shown.err
    assert list(tmp_path.iterdir()) == []
