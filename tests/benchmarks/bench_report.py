"""How fast a report is written and how large it is; how fast tables of a million trials are read.

    python tests/benchmarks/bench_report.py [--out results/benchmarks/report.md] [--runs 3]
        [--trials 100000] [--rows 1000000]

Reports are written in this process, from trials in memory to the file: of the committed plans, with
a table of the tests' toy space. `shardplan analyze` and `trace` run as cold processes. All of it is
one thread: CPU seconds are what a core takes that nothing else wants, so the targets are held
against them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from measuring import (  # type: ignore[import-not-found]  # beside this script
    MIB,
    against,
    best_process,
    machine,
    table,
)

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.search.plan_factory import make_trials  # noqa: E402  # the root is on the path now

from shardplan.models.atomic import write_atomically  # noqa: E402
from shardplan.search.plan import Plan  # noqa: E402
from shardplan.search.report import write_report  # noqa: E402
from shardplan.search.trial_table import TrialTable  # noqa: E402
from shardplan.search.trials import write_trials  # noqa: E402

PLANS = ROOT / "results" / "plans"
MOST_S, MOST_BYTES, MOST_PEAK_BYTES = 1.0, 2e6, 1e9


def reports(folder: Path, trials: int, runs: int) -> list[list[str]]:
    """A row a committed plan: seconds and bytes."""
    held = TrialTable.of(make_trials(trials))
    path = folder / "report.html"
    rows = []
    for file in sorted(PLANS.glob("*/plan.json")):
        plan = Plan.load(file)
        wall_s, cpu_s = min(_timed(plan, held, path) for _ in range(runs))
        size = path.stat().st_size
        rows.append(
            [
                file.parent.name,
                f"{wall_s:.2f}",
                f"{cpu_s:.2f}",
                against(cpu_s, MOST_S, "1 s"),
                f"{size / 1e3:,.0f}",
                against(size, MOST_BYTES, "2 MB"),
            ]
        )
    return rows


def _timed(plan: Plan, held: TrialTable, path: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one report."""
    begin = time.perf_counter(), time.process_time()
    write_report(plan, held, path)
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def tables(folder: Path, rows: int, runs: int) -> list[list[str]]:
    """A row a way of asking; one seed a run."""
    for seed, name in enumerate(("one", "two")):
        write_trials(folder / name / "trials.csv", make_trials(rows, seed=seed))
    one, two = (str(folder / name) for name in ("one", "two"))
    questions = {
        "summary": [one],
        "by tp and batch": [one, "--by", "tp,batch"],
        "by TPOT in ten groups": [one, "--by", "tpot_s"],
        "against a base of as many rows": [two, "--against", one],
    }
    found = []
    for name, words in questions.items():
        done = best_process(["analyze", *words, "--json"], runs)
        found.append(
            [
                name,
                f"{done.wall_s:.1f}",
                f"{done.cpu_s:.1f}",
                f"{done.peak_bytes / MIB:,.0f}",
                against(done.peak_bytes, MOST_PEAK_BYTES, "1 GB"),
            ]
        )
    return found


def traces(folder: Path, runs: int) -> list[list[str]]:
    """A row a committed plan."""
    rows = []
    for file in sorted(PLANS.glob("*/plan.json")):
        out = folder / "trace.json"
        done = best_process(["trace", str(file), "--out", str(out)], runs)
        text = out.read_text(encoding="utf-8")
        events = json.loads(text)["otherData"]["events"]
        rows.append(
            [
                file.parent.name,
                f"{done.wall_s:.2f}",
                f"{done.cpu_s:.2f}",
                f"{events:,}",
                f"{len(text) / 1e6:.1f}",
            ]
        )
    return rows


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "report.md")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    asked = parser.parse_args()
    lines = ["# Speed and size of reports, traces and tables of trials", ""]
    lines += [f"{machine()}; best of {asked.runs} runs. CPU seconds are those of one thread.", ""]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines += [f"`report.html` of a plan and {asked.trials:,} trials, written from memory:", ""]
        head = ["plan", "wall s", "CPU s", "target", "kB", "target"]
        lines += table(head, reports(folder, asked.trials, asked.runs))
        lines += ["", f"`shardplan analyze`, cold, on a CSV of {asked.rows:,} rows:", ""]
        head = ["what", "wall s", "CPU s", "peak MiB", "target"]
        lines += table(head, tables(folder, asked.rows, asked.runs))
        lines += ["", "`shardplan trace`, cold:", ""]
        head = ["plan", "wall s", "CPU s", "events", "MB"]
        lines += table(head, traces(folder, asked.runs))
    lines += ["", "Regenerate: `python tests/benchmarks/bench_report.py`", ""]
    write_atomically(asked.out, "\n".join(lines))


if __name__ == "__main__":
    main()
