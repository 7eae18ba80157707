"""How fast the search is: strategies a second, a cold process to its plan, help, proofs.

    python tests/benchmarks/bench_search.py [--out results/benchmarks/search.md] [--runs 3]

One strategy is one layout with its attention kernel, weight dtype, KV dtype, batch and chunk,
priced in full: TTFT, TPOT, throughput, the four parts of a step, and memory against every limit.
Those that rules or bounds left out are not counted. Each number is the best of several runs, in
one process that uses one core (numpy's threads have nothing to share here); cold processes are
timed from outside, start of the interpreter included, with files already in the page cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.models.catalog import load_model
from shardplan.models.parallel import Parallelism
from shardplan.search.evaluate import Question
from shardplan.search.exact import search_exact
from shardplan.search.kept import Outcome
from shardplan.search.plan import Limits, Workload
from shardplan.search.proof import prove_strategy
from shardplan.search.space import Choice, Space, batch_grid, build_space, chunk_grid

INPUT_LEN, OUTPUT_LEN, SLOTS = 1024, 256, 1024
SEARCHES = (
    ("llama-65b", "atlas-800t-a2", 8),
    ("qwen3-235b-a22b", "atlas-800t-a2", 16),
    ("deepseek-v3", "cloudmatrix-384", 32),
)
PROOFS = (
    ("llama-65b", Parallelism(tp=8)),
    ("llama-3.1-70b", Parallelism(tp=4, pp=2, sp=True)),
    ("qwen3-32b", Parallelism(tp=2, dp=4)),
    ("qwen3-235b-a22b", Parallelism(tp=4, dp=4, ep=16)),
    ("mixtral-8x7b", Parallelism(tp=2, pp=2, dp=2, ep=4, exchange="alltoall")),
    ("deepseek-v3", Parallelism(tp=4, dp=8, ep=32, exchange="alltoall")),
)
README_SEARCH = ("search", "--model", "llama-65b", "--cluster", "atlas-800t-a2")
_ENTRY = "import sys; from shardplan.search.main import main; sys.exit(main())"
_LAUNCHER = """
import os, sys, time
start = time.perf_counter()
both = [(os.POSIX_SPAWN_DUP2, 1, 2)]
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=both)
_, status, usage = os.wait4(child, 0)
wall_s = time.perf_counter() - start
code = os.waitstatus_to_exitcode(status)
print(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, code, file=sys.stderr)
"""
"""Times one command, its output on stdout; seconds, CPU seconds, peak, exit code on stderr."""
_MIB = 2.0**20
_KIB = 1024
"""`ru_maxrss` is in KiB on Linux and in bytes on macOS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One finished process."""

    wall_s: float
    cpu_s: float
    peak_bytes: float


def question_of(model: str, cluster: str, cards: int) -> tuple[Question, Space]:
    """A question over both kernels and each of two weight and two KV dtypes."""
    spec, machine = load_model(model), load_cluster(cluster, cards=cards)
    engine = load_engine(machine.device.engine_profiles[0])
    choices = tuple(
        Choice(attention=attention, weight_dtype=weight, kv_dtype=kv)
        for attention in ("flash", "naive")
        for weight in ("bf16", "w8a8")
        for kv in ("bf16", "int8")
    )
    space = build_space(
        spec,
        machine,
        engine,
        cards=cards,
        choices=choices,
        batches=batch_grid(SLOTS),
        chunks=chunk_grid(engine, INPUT_LEN, OUTPUT_LEN),
    )
    question = Question(
        spec=spec,
        cluster=machine,
        engine=engine,
        workload=Workload(input_len=INPUT_LEN, output_len=OUTPUT_LEN),
        limits=Limits(),
        objective="throughput",
        cards=cards,
    )
    return question, space


def best_seconds(action: Callable[[], object], runs: int) -> float:
    """Least wall time of several runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def cold(arguments: Sequence[str]) -> Process:
    """Run the command line in a process of its own; `SystemExit` with its output if it fails.

    A small process starts it: Linux counts the memory of the process that forks as the child's.
    """
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
    done = subprocess.run(
        [*launch, sys.executable, "-c", _ENTRY, *arguments],
        capture_output=True,
        check=True,
    )
    wall_s, cpu_s, peak, code = (float(number) for number in done.stderr.split())
    if code:
        raise SystemExit(f"{' '.join(arguments)}: {done.stdout.decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else _KIB
    return Process(wall_s=wall_s, cpu_s=cpu_s, peak_bytes=peak * unit)


def best_process(arguments: Sequence[str], runs: int) -> Process:
    """The fastest of several cold runs."""
    return min((cold(arguments) for _ in range(runs)), key=lambda one: one.wall_s)


def search_table(runs: int) -> list[str]:
    """Strategies a second of the exact search in one process."""
    lines = [
        "| model, cluster, cards | layouts | space | priced | seconds | priced a second |",
        "|---|---|---|---|---|---|",
    ]
    for model, cluster, cards in SEARCHES:
        question, space = question_of(model, cluster, cards)
        found: list[Outcome] = []
        seconds = best_seconds(
            lambda q=question, s=space, f=found: f.append(search_exact(q, s)),  # type: ignore[misc]  # defaults bind the loop's values
            runs,
        )
        priced = found[-1].tally.evaluated
        lines.append(
            f"| {model}, {cluster}, {cards} | {len(space.layouts)} | {space.size:,} | {priced:,} "
            f"| {seconds:.2f} | {priced / seconds:,.0f} |"
        )
    return lines


def process_table(runs: int) -> list[str]:
    """Cold processes: the README's search, and help."""
    lines = ["| command | wall s | CPU s | peak MiB |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for arguments, shown in (
            ((*README_SEARCH, "--force", "--out", folder), (*README_SEARCH, "--out DIR")),
            (("--help",), ("--help",)),
        ):
            one = best_process(arguments, runs)
            lines.append(
                f"| `shardplan {' '.join(shown)}` | {one.wall_s:.2f} | {one.cpu_s:.2f} "
                f"| {one.peak_bytes / _MIB:.0f} |"
            )
    return lines


def proof_table(runs: int) -> list[str]:
    """Level 1 proofs: the shrunk model run sharded and whole."""
    lines = ["| model, strategy | ranks | L1 proof s |", "|---|---|---|"]
    for model, par in PROOFS:
        spec = load_model(model)
        if not prove_strategy(spec, par).passed:
            raise SystemExit(f"{model} {par.describe()}: the proof failed")
        seconds = best_seconds(lambda s=spec, p=par: prove_strategy(s, p), runs)  # type: ignore[misc]  # as above
        lines.append(f"| {model}, {par.describe()} | {par.ranks} | {seconds:.3f} |")
    return lines


def report(runs: int, command: str) -> str:
    """The whole page."""
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, numpy {np.__version__}; best of {runs} runs"
    )
    intro = (
        "One strategy is one layout with its attention kernel, weight dtype, KV dtype, batch and "
        "chunk, priced in full (TTFT, TPOT, throughput, parts of a step, memory, every limit). "
        f"Prompts of {INPUT_LEN} and answers of {OUTPUT_LEN} tokens. Strategies that rules or "
        "bounds leave out are in the space and not among the priced."
    )
    parts = [
        ["# Speed of the search", "", where + ".", "", intro, ""],
        ["## Exact search, one process", "", *search_table(runs), ""],
        ["## Cold processes", "", *process_table(runs), ""],
        ["## Proofs", "", *proof_table(runs), ""],
        [f"Regenerate: `{command}`", ""],
    ]
    return "\n".join(line for part in parts for line in part)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/search.md"))
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    text = report(max(given.runs, 1), "python tests/benchmarks/bench_search.py")
    print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
