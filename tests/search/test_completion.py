"""Tab in a shell: commands, options and names, at once and from the shells' own scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.search.test_cli import HEAVY, ROOT

from shardplan.costmodel.catalog import cluster_names, device_names
from shardplan.costmodel.engines import engine_names
from shardplan.models.catalog import model_names
from shardplan.search.completion import SHELLS
from shardplan.search.main import app_of, run
from shardplan.search.targets import target_names

_OURS = tuple(name for name in HEAVY if name != "pydantic")  # newer versions of typer load that one
_TOLD = f"print(sorted({{*sys.modules}} & {{*{_OURS}}}), file=sys.stderr)"
_PROGRAM = (
    f"import atexit, sys; atexit.register(lambda: {_TOLD}); "
    "from shardplan.search.main import main; main()"
)
NAMES = {
    "--model": model_names(),
    "--cluster": cluster_names(),
    "--prefill-cluster": cluster_names(),
    "--device": device_names(),
    "--prefill-device": device_names(),
    "--engine-profile": engine_names(),
    "--target": target_names(),
}


def tab(shell: str, line: str) -> list[str]:
    """What is offered for the last word of a line; nothing heavy may be loaded for it."""
    words = line.split(" ")
    variables = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={
            **os.environ,
            **variables,
            "_SHARDPLAN_COMPLETE": f"complete_{shell}",
            "PYTHONPATH": str(ROOT / "src"),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("shardplan sea", ["search"]),
        ("shardplan search --engine-p", ["--engine-profile"]),
        (
            "shardplan search --model llama-3.1-",
            ["llama-3.1-405b", "llama-3.1-70b", "llama-3.1-8b"],
        ),
        ("shardplan search --model qwen3-8b --cluster atlas-800t", ["atlas-800t-a2"]),
        ("shardplan estimate --device 910b", ["910b1", "910b2", "910b3", "910b4"]),
        ("shardplan estimate --engine-profile mi", ["mindie"]),
        ("shardplan emit plan.json --target m", ["megatron", "mindie", "mindspore"]),
        ("shardplan clusters cloud", ["cloudmatrix-384"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_bash_offers(line: str, offered: list[str]) -> None:
    """Commands, options, and names that begin as the word does."""
    assert tab("bash", line) == offered


def test_a_word_that_begins_no_name_is_left_to_the_shell() -> None:
    """Which completes files: a model may be one."""
    assert tab("bash", "shardplan search --model ./conf") == [""]


def test_what_zsh_and_fish_offer() -> None:
    """In the form that each reads: a command for zsh to evaluate, words for fish."""
    (offer,) = tab("zsh", "shardplan search --cluster cloud")
    assert offer == "_arguments '*: :((\"cloudmatrix-384\"))'"
    assert tab("fish", "shardplan search --cluster cloud") == ["cloudmatrix-384"]


def test_every_option_that_takes_a_name_completes_it() -> None:
    """Also those of commands to come; a device of `profile` is a kind of machine, not a name."""
    group: Any = typer.main.get_command(app_of())
    seen = set()
    for command in group.commands.values():
        for option in command.params:
            known = [NAMES[name] for name in option.opts if name in NAMES]
            if not known or (command.name, option.name) == ("profile", "device"):
                continue
            context = command.make_context(command.name, [], resilient_parsing=True)
            offered = [item.value for item in option.shell_complete(context, "")]
            assert sorted(offered) == sorted(known[0]), f"{command.name} {option.opts}"
            seen |= {*option.opts}
    assert seen == {*NAMES}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_is_shown(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the program and asks for completions in that shell's form."""
    assert run(["--show-completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_SHARDPLAN_COMPLETE=complete_{shell}" in script


def test_the_users_own_shell_is_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SHELL names it."""
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert run(["--show-completion"]) == 0
    assert capsys.readouterr().out.startswith("complete --command shardplan")


@pytest.mark.parametrize("option", ["--show-completion", "--install-completion"])
def test_other_shells_are_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named, or found in SHELL, or not found at all."""
    for arguments, shell in (([option, "tcsh"], ""), ([option], "/bin/ksh"), ([option], "")):
        monkeypatch.setenv("SHELL", shell)
        assert run(arguments) == 2
        assert f"`shardplan {option} bash`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".bash_completions/shardplan.sh"),
        ("zsh", ".zfunc/_shardplan"),
        ("fish", ".config/fish/completions/shardplan.fish"),
    ],
)
def test_the_script_is_put_where_the_shell_reads_it(
    shell: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under the user's home; one that cannot be written is an error with the way round it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["--install-completion", shell]) == 0
    assert str(tmp_path / file) in capsys.readouterr().out
    script = (tmp_path / file).read_text(encoding="utf-8")
    assert "_SHARDPLAN_COMPLETE" in script
    assert ("loadautofunc ]] && _shardplan_completion" in script) is (shell == "zsh")
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("HOME", str(blocked / "home"))
    assert run(["--install-completion", shell]) == 2
    assert f"`shardplan --show-completion {shell}`" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself_completes_by_the_script(tmp_path: Path) -> None:
    """The script is sourced, and its function fills COMPREPLY through the program on the path."""
    program = tmp_path / "shardplan"
    entry = "from shardplan.search.main import main; main()"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{entry}' \"$@\"\n", "utf-8")
    program.chmod(0o755)
    script = """
source <(shardplan --show-completion bash)
COMP_WORDS=(shardplan search --model llama-6) COMP_CWORD=3
_shardplan_completion shardplan
echo "${COMPREPLY[@]}"
complete -p shardplan
"""
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reply, registered = done.stdout.splitlines()
    assert reply == "llama-65b"
    assert registered == "complete -o default -F _shardplan_completion shardplan"
