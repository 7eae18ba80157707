"""The command line: its surface, what it prints, where it prints it, and its exit codes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from shardplan import __version__
from shardplan.models.errors import InfeasibleError
from shardplan.search import cli_estimate, main
from shardplan.search.main import app_of, run

ROOT = Path(__file__).resolve().parent.parent.parent
SURFACE = Path(__file__).parent / "cli_surface.json"
DECODE = ["--model", "llama-3.1-8b", "--cluster", "atlas-800t-a2", "--tp", "4", "--batch", "16"]
SEARCH = ["search", "--model", "llama-3.1-8b", "--cluster", "atlas-800t-a2", "--cards", "2"]


_ENTRY = "from shardplan.search.main import main; main()"


def launch(*arguments: str, code: str = _ENTRY, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    paths = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=paths,
        timeout=60,
        check=False,
        **options,
    )


def surface() -> dict[str, list[str]]:
    """Commands with the names of their options and arguments."""
    group = typer.main.get_command(app_of())
    commands: dict[str, Any] = group.commands  # type: ignore[attr-defined]  # a group
    found = {"": sorted(name for p in group.params for name in p.opts)}
    for name, command in commands.items():
        found[name] = sorted(option for p in command.params for option in p.opts)
    return found


def test_the_surface_is_what_was_promised() -> None:
    """Scripts depend on these names: a change is made on purpose, in `cli_surface.json` too."""
    assert surface() == json.loads(SURFACE.read_text(encoding="utf-8"))


HEAVY = ("numpy", "pandas", "pydantic", "optuna", "networkx", "scipy", "rich.console", "torch")
"""Packages that take longer to import than a page of help may take."""


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    """How fast it is: `tests/benchmarks/bench_search.py`."""
    told = f"print(sorted({{*sys.modules}} & {{*{HEAVY}}}), file=sys.stderr)"
    code = f"import atexit, sys; atexit.register(lambda: {told}); {_ENTRY}"
    done = launch("--help", code=code)
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in surface() if name)
    assert "..." not in done.stdout.partition("Commands:")[2], (
        "a command's first line is too long to be shown whole"
    )
    assert done.stderr.strip() == "[]"


def test_alone_it_prints_a_guide_whose_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What to type first, short enough for any terminal."""
    assert run([]) == 0
    guide = capsys.readouterr().out.splitlines()
    assert len(guide) < 24
    assert max(map(len, guide)) <= 100
    told = [line.partition("shardplan ")[2] for line in guide if line.startswith("  ")]
    commands = [line.partition("  ")[0].split() for line in told]
    assert [command[0] for command in commands] == ["models", "search", "emit"]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert run(command) == 0, command


def test_a_search_of_a_model_and_a_cluster_asks_nothing_and_states_its_defaults(
    tmp_path: Path,
) -> None:
    """Nobody is there to answer; each default is in the notes, of the table and of plan.json."""
    question = ["search", "--model", "llama-3.1-8b", "--cluster", "atlas-800t-a2"]
    done = launch(*question, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    (plan,) = (tmp_path / "results" / "runs").rglob("plan.json")
    told = " ".join(json.loads(plan.read_text(encoding="utf-8"))["notes"])
    shown = " ".join(done.stdout.split())
    for words in (
        "cards was not given: all 8 of atlas-800t-a2",
        "input_len was not given: 1024 tokens",
        "output_len was not given: 256 tokens",
        "no concurrency or rate was given",
        "no limit on TTFT or TPOT was given: 2000 ms and 100 ms",
        "engine profile vllm-ascend",
        "weights keep the checkpoint's type: bf16",
        "the KV cache keeps",
        "attention as vllm-ascend runs it: flash",
        "prefill and decode share the cards",
    ):
        assert words in told
        assert words in shown


def test_it_runs_as_a_module() -> None:
    """`python -m shardplan`, where no script is on the path."""
    code = "import runpy; runpy.run_module('shardplan', run_name='__main__', alter_sys=True)"
    done = launch("--version", code=code)
    assert (done.returncode, done.stdout) == (0, f"shardplan {__version__}\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """One line."""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"shardplan {__version__}\n"


@pytest.mark.parametrize("command", ["models", "devices", "clusters"])
def test_listings(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON of all, JSON of one, and tables of both."""
    assert run([command, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    names = [one["name"] for one in listed]
    assert names == sorted(names)
    assert run([command, names[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == listed[0]
    for arguments in ([command], [command, names[0]]):
        assert run(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert names[0] in "".join(lines)
        assert max(len(line) for line in lines) <= 100


def test_models_say_what_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """The published size of Llama-65B, and its cache: 2 * 80 layers * 8192 * 2 bytes."""
    assert run(["models", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert listed["llama-65b"]["parameters"] == 65_285_660_672
    assert listed["llama-65b"]["active_parameters"] == 65_285_660_672
    assert listed["llama-65b"]["kv_bytes_per_token"] == 2 * 80 * 8192 * 2
    assert all(one["source"].startswith("https://") for one in listed.values())


def test_estimate_of_one_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, JSON for machines, with the same numbers."""
    assert run(["estimate", *DECODE, "--phase", "decode", "--tokens", "2048"]) == 0
    table = capsys.readouterr().out
    assert run(["estimate", *DECODE, "--phase", "decode", "--tokens", "2048", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{found['step_s'] * 1e3:.2f} ms" in table
    assert f"{found['memory_bytes'] / 2**30:.2f} GiB" in table
    assert "all_reduce" in table
    assert max(len(line) for line in table.splitlines()) <= 100


def test_estimate_of_a_serving_run_and_of_an_operator(capsys: pytest.CaptureFixture[str]) -> None:
    """The other two phases print what they have."""
    assert run(["estimate", *DECODE, "--phase", "serve", "--concurrency", "8"]) == 0
    assert "TTFT mean" in capsys.readouterr().out
    operator = ["--op", "matmul", "--device", "910b2", "--m", "1", "--n", "4096", "--k", "4096"]
    assert run(["estimate", *operator]) == 0
    assert "us" in capsys.readouterr().out


def test_points_from_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options are defaults of the columns; answers follow the input's own columns."""
    points, out = tmp_path / "in.csv", tmp_path / "deep" / "out.csv"
    points.write_text("id,phase,tokens\n007,decode,100\nb,prefill,\nc,decode,-1\n", "utf-8")
    assert run(["estimate", *DECODE, "--points", str(points), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "1 of 3 rows refused" in shown.err
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["id", "phase", "tokens", "status", "message"]
    assert [row["id"] for row in rows] == ["007", "b", "c"]
    assert [row["status"] for row in rows] == ["ok", "ok", "bad_input"]
    assert float(rows[0]["step_s"]) < float(rows[1]["step_s"])
    assert rows[2]["step_s"] == ""
    again = tmp_path / "again.csv"
    assert run(["estimate", *DECODE, "--points", str(points), "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_points_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CSV without --out; with --json one array, in which a missing number is null."""
    points = tmp_path / "in.csv"
    points.write_text("phase\ndecode\nserving\n", "utf-8")
    assert run(["estimate", *DECODE, "--points", str(points)]) == 0
    assert capsys.readouterr().out.startswith("phase,status,message,step_s,")
    assert run(["estimate", *DECODE, "--points", str(points), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["ok", "unknown_name"]
    assert rows[1]["step_s"] is None


def test_search_writes_its_files_and_says_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From search to verify, analyze and emit with the commands that it prints."""
    monkeypatch.chdir(tmp_path)
    assert run(SEARCH) == 0
    text = capsys.readouterr().out
    for words in ("certificate:", "TTFT mean", "memory of one rank", "what quantizing would buy"):
        assert words in text
    folder = tmp_path / "results" / "runs" / "llama-3.1-8b-atlas-800t-a2-2"
    assert {file.name for file in folder.iterdir()} >= {
        "plan.json",
        "trials.csv",
        "pareto.csv",
        "report.html",
    }
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("  shardplan ")]
    assert [command[0] for command in commands] == ["verify", "emit", "analyze"]
    for command in commands:
        assert run(command) == 0, command


def test_search_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan on stdout is the plan in the file."""
    assert run([*SEARCH, "--json", "--out", str(tmp_path / "run")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    names = {"space_size", "evaluated", "pruned", "bound", "gap", "wall_s"}
    assert names <= set(shown["certificate"])


def test_an_ablation_says_what_each_feature_buys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table, the same as JSON, and as a file."""
    out = tmp_path / "ablation.json"
    assert run([*SEARCH, "--ablation", "--out", str(out)]) == 0
    assert "auto batching" in capsys.readouterr().out
    assert run([*SEARCH, "--ablation", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(out.read_text(encoding="utf-8"))
    assert shown["rows"][0]["step"] == "baseline"


def test_a_question_without_an_answer_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    """405B on one card: says what binds and how many cards would do."""
    question = ["search", "--model", "llama-3.1-405b", "--cluster", "atlas-800t-a2", "--cards", "1"]
    assert run([*question, "--json"]) == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["code"] == "infeasible"
    assert "memory" in shown.err


def test_verify_of_a_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    """Each check is printed; level 0 has fewer."""
    assert run(["verify", "--model", "llama-3.1-8b", "--tp", "2", "--pp", "2"]) == 0
    both = capsys.readouterr().out
    assert run(["verify", "--model", "llama-3.1-8b", "--cp", "2", "--tp", "2"]) == 0
    assert run(["verify", "--model", "llama-3.1-8b", "--dp", "4", "--head-tp", "4"]) == 0
    assert "head4, level 1" in capsys.readouterr().out
    assert run(["verify", "--model", "llama-3.1-8b", "--tp", "2", "--level", "0", "--json"]) == 0
    shapes = json.loads(capsys.readouterr().out)
    assert shapes["passed"]
    assert 0 < len(shapes["checks"]) < both.count("  ok ")


@pytest.mark.slow
def test_verify_of_a_plan_on_graphs_and_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Level 3 runs all that the lower levels do, on the plan's own model made small."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    asked = ["--model", "qwen3-8b", "--cluster", "atlas-800t-a2", "--cards", "2"]
    assert run(["search", *asked, "--serving", "agg", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert run(["verify", str(tmp_path / "plan.json"), "--level", "3", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [one[:2] for one in checks if one[:2] in ("L2", "L3")] == ["L2", "L2", "L3"]


def test_an_infeasible_question_exits_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Apart from bad input, so that a script can tell."""

    def refuse(_cells: object, _json: bool) -> None:
        raise InfeasibleError("nothing fits", got="70 GiB of 57 GiB", hint="use 2 cards")

    monkeypatch.setattr(cli_estimate, "_one", refuse)
    assert run(["estimate", *DECODE]) == 3
    assert capsys.readouterr().err == "error: nothing fits (70 GiB of 57 GiB); use 2 cards\n"


def test_a_bug_is_named_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1 and a few frames; SHARDPLAN_DEBUG shows the whole traceback."""

    def fail(_cells: object, _json: bool) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(cli_estimate, "_one", fail)
    monkeypatch.delenv("SHARDPLAN_DEBUG", raising=False)
    assert run(["estimate", *DECODE]) == 1
    short = capsys.readouterr().err
    assert "this is a bug: ZeroDivisionError: by nothing" in short
    assert "Traceback" not in short
    monkeypatch.setenv("SHARDPLAN_DEBUG", "1")
    assert run(["estimate", *DECODE]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell expects of Ctrl-C."""

    def interrupt(_cells: object, _json: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_estimate, "_one", interrupt)
    assert run(["estimate", *DECODE]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    """`shardplan models --json | head -1`."""
    code = "from shardplan.search.main import main; main()"
    command = f"'{sys.executable}' -c '{code}' models --json | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        timeout=60,
        check=False,
    )
    assert done.stdout == "[\n"
    assert done.stderr == ""


def test_the_entry_point_exits_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` is what the installed script calls."""
    monkeypatch.setattr(sys, "argv", ["shardplan", "devices", "910b9"])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 2
