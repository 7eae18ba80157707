"""Tables of whole processes: seconds and memory from a cold start to a plan, and equal output.

Size of the space, strategies evaluated and gap are read from the plan that the process wrote. Two
runs are equal when every byte of the named files is; `PYTHONHASHSEED` differs between them, so that
an order taken from a set or a hash would show.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measuring import (  # type: ignore[import-not-found]  # beside this script
    MIB,
    against,
    best_process,
    cold,
    table,
)

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A `shardplan` command; `most_s`, `most_bytes`: what it shall not pass."""

    words: str
    most_s: float | None = None
    most_bytes: float | None = None
    writes: bool = True
    """Whether it writes a plan into a folder."""


README_SEARCH = "search --model llama-65b --cluster atlas-800t-a2"
DENSE_32 = "search --model llama-3.1-70b --cluster atlas-800t-a2 --nodes 4"
_DIES_384 = "search --model deepseek-v3 --cluster cloudmatrix-384 --cards 384"
_DIES_4096 = "search --model deepseek-v3 --cluster cloudmatrix-384 --nodes 256 --cards 4096"
COMMANDS = (
    Command(words=README_SEARCH),
    Command(words=DENSE_32, most_s=1.0),
    Command(words="search --model qwen3-235b-a22b --cluster atlas-800i-a3 --nodes 4", most_s=2.0),
    Command(words=f"{_DIES_384} --serving disagg", most_s=10.0),
    Command(words=_DIES_384),
    Command(words=_DIES_4096, most_bytes=GB),
    Command(words="--help", most_s=0.3, writes=False),
)
SWEEP = f"{README_SEARCH} --sweep input-len=512,1024 --sweep output-len=128,256 --no-plans"
_SEEDS = ("1", "2")
_PLAN_FILES = ("plan.json", "trials.csv", "pareto.csv")
_SWEEP_FILES = ("sweep.csv",)
_SEARCHES = (
    DENSE_32,
    "search --model deepseek-v3 --cluster cloudmatrix-384 --cards 64 --serving disagg",
)


def process_table(runs: int) -> list[str]:
    """Cold processes with their files written."""
    head = ["command", "space", "evaluated", "gap", "wall s", "user s", "peak MiB", "target"]
    lines: list[str] = table(head, [_process_row(command, runs) for command in COMMANDS])
    return lines


def _process_row(command: Command, runs: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        words = shlex.split(command.words)
        if command.writes:
            words += ["--force", "--out", folder]
        one = best_process(words, runs)
        proven = _certificate(Path(folder)) if command.writes else ["-", "-", "-"]
    targets = []
    if command.most_s is not None:
        targets.append(against(one.wall_s, command.most_s, f"{command.most_s:.1f} s"))
    if command.most_bytes is not None:
        shown = f"{command.most_bytes / GB:.0f} GB"
        targets.append(against(one.peak_bytes, command.most_bytes, shown))
    return [
        f"`shardplan {command.words}{' --out DIR' if command.writes else ''}`",
        *proven,
        f"{one.wall_s:.2f}",
        f"{one.user_s:.2f}",
        f"{one.peak_bytes / MIB:.0f}",
        ", ".join(targets) or "-",
    ]


def _certificate(folder: Path) -> list[str]:
    """Size of the space, strategies evaluated and gap of the plan in a folder."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    found = plan["certificate"]
    return [f"{found['space_size']:.1e}", f"{found['evaluated']:,}", f"{found['gap']:g}"]


def equal_table() -> list[str]:
    """Whether two processes write the same bytes."""
    rows = []
    for words in _SEARCHES:
        twice = [_files(words, _PLAN_FILES, seed) for seed in _SEEDS]
        rows.append(_equal_row(f"{words} --out DIR", "two processes", _PLAN_FILES, *twice))
    pair = [
        _files(f"{SWEEP} --jobs {jobs}", _SWEEP_FILES, seed)
        for jobs, seed in zip("12", _SEEDS, strict=True)
    ]
    words = f"{SWEEP} --jobs 1 or 2 --out DIR"
    rows.append(_equal_row(words, "1 and 2 jobs", _SWEEP_FILES, *pair))
    lines: list[str] = table(["command", "runs", "files", "identical", "target"], rows)
    return lines


def _equal_row(
    words: str, runs: str, names: tuple[str, ...], first: list[bytes], second: list[bytes]
) -> list[str]:
    identical = "yes" if first == second else "no"
    return [f"`shardplan {words}`", runs, ", ".join(names), identical, "yes"]


def _files(words: str, names: tuple[str, ...], seed: str) -> list[bytes]:
    """What one process writes under one seed of the hashes."""
    with tempfile.TemporaryDirectory() as folder:
        cold([*shlex.split(words), "--out", folder], {"PYTHONHASHSEED": seed})
        return [(Path(folder) / name).read_bytes() for name in names]
