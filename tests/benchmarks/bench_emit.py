"""How long it takes to write a plan for each serving engine: cold processes, files on disk.

    python tests/benchmarks/bench_emit.py [--out results/benchmarks/emit.md] [--runs 5]

The plans are those committed in results/plans, one of a server and one of two pools on 384 dies, so
that anyone can run the same. A target that cannot express a plan refuses it, and the rule is named.
The process has one thread, so its CPU seconds are what it takes on a core of its own; wall seconds
beside them are those of the machine as it was, whose load the page tells.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from measuring import (  # type: ignore[import-not-found]  # beside this script
    against,
    best_process,
    machine,
    table,
)

from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError
from shardplan.search.emit import emit
from shardplan.search.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
PLANS = ("llama-65b_atlas-800t-a2", "deepseek-v3_cloudmatrix-384_disagg")
TARGETS = ("vllm-ascend", "sglang", "mindie", "k8s", "docker-compose", "ray")
MOST_S = 0.5
RUNS = 5


def _row(name: str, target: str, runs: int) -> list[str]:
    """One plan for one target."""
    plan = f"results/plans/{name}/plan.json"
    with tempfile.TemporaryDirectory() as folder:
        try:
            count = str(len(emit(Plan.load(ROOT / plan), target, Path(folder) / "out")))
        except InputError as error:
            return [f"`{name}`", target, f"refused: {error.rule.partition(': ')[2]}", "-", "-", "-"]
        words = ["emit", str(ROOT / plan), "--target", target, "--force", "--out", folder]
        one = best_process(words, runs)
    met = against(one.cpu_s, MOST_S, f"{MOST_S} s")
    return [f"`{name}`", target, count, f"{one.wall_s:.2f}", f"{one.cpu_s:.2f}", met]


def page(runs: int) -> str:
    """The page in Markdown."""
    where = machine()
    head = ["plan", "target", "files", "wall s", "CPU s", "target of CPU s"]
    rows = [_row(name, target, runs) for name in PLANS for target in TARGETS]
    lines = [
        "# Speed of the emitters",
        "",
        f"{where}; best of {runs} runs.",
        "",
        "`shardplan emit results/plans/NAME/plan.json --target TARGET --out DIR`, a cold process "
        "of one thread: CPU seconds are what it takes on a core of its own, wall seconds what it "
        "took under that load.",
        "",
        *table(head, rows),
        "",
        "Regenerate: `python tests/benchmarks/bench_emit.py`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "emit.md")
    parser.add_argument("--runs", type=int, default=RUNS)
    asked = parser.parse_args()
    write_atomically(asked.out, page(asked.runs))


if __name__ == "__main__":
    main()
