"""Commands killed at any moment (SIGKILL): each file is the old one or a whole new one.

A process writes two answers into the same place in turn, over and over, and is killed at moments
that are spread over that time; whatever it leaves is compared with what whole runs write.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from shardplan.search.main import run

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "costmodel" / "profiler_samples"
KILLS = 20
_LOOP = """
import itertools, json, os, signal, sys, time
from shardplan.search.main import run
seed, wait_s, *commands = json.loads(sys.argv[1])
from random import Random
chance = Random(seed)
said, sink = os.dup(1), os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.stderr = open(os.devnull, "w")
def once(words):
    assert run(words) == 0
for words in commands:
    once(words)
while sys.stdin.read(1):
    child = os.fork()
    if not child:
        for words in itertools.cycle(commands):
            once(words)
    time.sleep(chance.random() * wait_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.write(said, b"k")
"""
_WAIT_S = {"search": 0.8, "calibrate": 0.3}
"""Spread of the moments: about as long as one run."""


def _words(name: str, out: Path, plan: Path, way: int) -> list[str]:
    """A command line that writes into `out`; `way` 0 or 1, two different answers."""
    tokens = ("512", "256")[way]
    asked = ["--input-len", tokens, "--output-len", "16", "--concurrency", "4"]
    if name == "search":
        machine = ["--model", "qwen3-0.6b", "--cluster", "atlas-800t-a2", "--cards", "2"]
        return ["search", *machine, *asked, "--out", str(out), "--force"]
    if name == "simulate":
        more = ["--num-prompts", "50", "--timeline", "--out", str(out), "--force"]
        return ["simulate", str(plan), *asked, *more]
    if name == "emit":
        option = ["--option", f"cann={(7, 8)[way]}"]
        return ["emit", str(plan), "--target", "atc", "--out", str(out), "--force", *option]
    if name == "trace":
        return ["trace", str(plan), "--out", str(out / "trace.json"), "--ranks", ("0", "1")[way]]
    given = [str(SAMPLES / "kernel_details.csv"), "--device", "910b2", "--name", f"way{way}"]
    return ["calibrate", *given, "--out", str(out / "profile.toml"), "--force"]


def _held(folder: Path) -> dict[str, bytes]:
    """Files by name; temporary neighbours, which a kill may leave, begin with a dot."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name != "timing.json"
    }


def _killed(name: str, commands: Sequence[Sequence[str]]) -> Iterator[None]:
    """A process that runs the commands in turn, killed again and again.

    It is forked off one that has run both: to start one anew would take most of the time.
    """
    given = json.dumps([name, _WAIT_S.get(name, 0.15), *commands])
    process = subprocess.Popen(
        [sys.executable, "-c", _LOOP, given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "src"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        for _ in range(KILLS):
            process.stdin.write(b"g")
            assert process.stdout.read(1) == b"k"
            yield
        process.stdin.close()
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("name", ["search", "emit", "calibrate", "simulate", "trace"])
def test_a_killed_command_leaves_whole_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the answer before or of the one that was being written."""
    plan, out = tmp_path / "plan" / "plan.json", tmp_path / "out"
    assert run(_words("search", plan.parent, plan, 0)) == 0
    whole: list[dict[str, bytes]] = []
    for way in (0, 1):
        apart = tmp_path / f"whole{way}" / "out"
        assert run(_words(name, apart, plan, way)) == 0, capsys.readouterr().err
        whole.append(_held(apart))
    assert whole[0].keys() == whole[1].keys()
    assert whole[0] != whole[1]
    commands = [_words(name, out, plan, way) for way in (0, 1)]
    for _ in _killed(name, commands):
        held = _held(out)
        assert held.keys() == whole[0].keys()
        for file, content in held.items():
            assert content in (whole[0][file], whole[1][file]), file


def test_a_process_can_be_killed_inside_a_write(tmp_path: Path) -> None:
    """The file's temporary neighbour is what is left half written."""
    script = """
import os, sys
from pathlib import Path
from shardplan.models.atomic import written_atomically
with written_atomically(Path(sys.argv[1])) as file:
    file.write("half")
    file.flush()
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "file.txt"
    path.write_text("old", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "src"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_text(encoding="utf-8") == "old"
    left = [one for one in tmp_path.iterdir() if one != path]
    assert [one.read_text(encoding="utf-8") for one in left] == ["half"]
    assert all(one.name.startswith(".file.txt.") for one in left)
