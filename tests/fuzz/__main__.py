"""All readers under both drivers: `python -m tests.fuzz --out results/fuzz`, from the root.

Writes `fuzz.md` (counts, machine, command) and, for every finding, the input under `findings/`. A
few thousand inputs at a time run in a process of their own, one process at a time. Exit code 1
where there are findings. `--driver atheris` needs the package atheris (`pip install atheris`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.fuzz.drive import DRIVERS, Report
from tests.fuzz.judge import MOST_BYTES, MOST_S
from tests.fuzz.targets import TARGETS, Target

_ROOT = Path(__file__).resolve().parents[2]
_BATCH = 2500
"""Most inputs of one process: what hypothesis and shardplan's caches remember stays small."""
_SHARED = ("hypothesis", "atheris", "torch", "onnx", "numpy")


def _asked(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets and drivers")
    parser.add_argument("--driver", choices=sorted(DRIVERS), action="append")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_ROOT / "results" / "runs" / "fuzz")
    return parser.parse_args(words)


def _installed(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is not None]


def shares(targets: Sequence[Target], inputs: int) -> dict[str, int]:
    """Inputs of each target, which sum to `inputs`."""
    whole, given, found = sum(one.share for one in targets), 0, {}
    for place, one in enumerate(targets):
        until = (
            inputs
            if place == len(targets) - 1
            else round(inputs * sum(other.share for other in targets[: place + 1]) / whole)
        )
        found[one.name], given = until - given, until
    return found


def _batches(count: int, start: int) -> Iterator[tuple[int, int]]:
    """(inputs, seed) of each process."""
    for number, begin in enumerate(range(0, count, _BATCH)):
        yield min(_BATCH, count - begin), start + 1000 * number


def run_batch(name: str, driver: str, inputs: int, start: int, kept: Path) -> Report:
    """One process; inputs that make findings are copied to `kept`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = [sys.executable, "-m", "tests.fuzz.drive", name, driver, str(inputs), str(start)]
        path = os.pathsep.join([str(_ROOT / "src"), str(_ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*words, place],
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        report = _report_of(folder, name, driver)
        if done.returncode or report is None:
            report = report or Report(target=name, driver=driver)
            held = next((folder / "run").glob("a/b/c/model*"), None)
            file = f"{name.replace(' ', '-')}-ended-{driver}-{start}"
            _keep(kept, file, b"" if held is None else held.read_bytes())
            text = done.stderr[-2000:]
            where = f"the process ended with {done.returncode}"
            report.findings.append(
                {"kind": "end", "where": where, "text": text, "file": file, "inputs": "1"}
            )
        for one in (folder / "findings").glob("*"):
            _keep(kept, one.name, one.read_bytes())
        return report


def _report_of(folder: Path, name: str, driver: str) -> Report | None:
    file = folder / "report.json"
    return Report(**json.loads(file.read_bytes())) if file.exists() else None


def _keep(kept: Path, name: str, data: bytes) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    (kept / name).write_bytes(data)


def _joined(reports: Sequence[Report]) -> Report:
    """The batches of one target and driver as one; a place that was found twice counts once."""
    whole = Report(target=reports[0].target, driver=reports[0].driver)
    known: dict[tuple[str, str], dict[str, str]] = {}
    for one in reports:
        whole.inputs += one.inputs
        whole.accepted += one.accepted
        whole.refused += one.refused
        whole.slowest_s = max(whole.slowest_s, one.slowest_s)
        whole.peak_bytes = max(whole.peak_bytes, one.peak_bytes)
        for found in one.findings:
            known.setdefault((found["kind"], found["where"]), found)
    whole.findings = list(known.values())
    return whole


def page(reports: Sequence[Report], command: str, seconds: float) -> str:
    """The results as Markdown."""
    inputs, found = sum(one.inputs for one in reports), sum(len(one.findings) for one in reports)
    packages = ", ".join(f"{name} {version(name)}" for name in _installed(_SHARED))
    lines = [
        "# Fuzzed inputs",
        "",
        f"    {command}",
        "",
        f"{inputs:,} inputs, {found} findings, in {seconds / 60:.0f} minutes. A finding is an "
        "input that ends neither in success nor in one of shardplan's own errors: another "
        f"exception, a warning of numpy, more than {MOST_S:g} s of the processor, more than "
        f"{MOST_BYTES / 2**30:g} GiB of memory, the end of the process. *Accepted* inputs were "
        "read and used, *refused* ones broke a rule that the error names.",
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, {platform.system()}; "
        f"Python {platform.python_version()}, {packages}.",
        "",
        "| target | driver | inputs | accepted | refused | findings | slowest, s | memory, MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one.target} | {one.driver} | {one.inputs:,} | {one.accepted:,} | {one.refused:,} "
        f"| {len(one.findings)} | {one.slowest_s:.1f} | {one.peak_bytes / 2**20:.0f} |"
        for one in reports
    ]
    for one in reports:
        for item in one.findings:
            lines += ["", f"## {one.target}: {item['kind']} at {item['where']}", ""]
            lines += [f"`findings/{item['file']}`", "", "```", item["text"], "```"]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    """Run what was asked for; 1 where anything was found."""
    asked = _asked(words)
    drivers = asked.driver or sorted(DRIVERS, reverse=True)
    if "atheris" in drivers and not _installed(["atheris"]):
        print("atheris is not installed: pip install atheris, or --driver hypothesis")
        return 2
    chosen = [TARGETS[name] for name in asked.target or TARGETS]
    targets = [one for one in chosen if not one.extra or _installed([one.extra])]
    kept, begin = asked.out / "findings", time.monotonic()
    command = f"python -m tests.fuzz {shlex.join(words)}".strip()
    shutil.rmtree(kept, ignore_errors=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    reports: list[Report] = []
    for name, count in shares(targets, asked.inputs // len(drivers)).items():
        for driver in drivers:
            batches = _batches(count, asked.seed)
            reports.append(_joined([run_batch(name, driver, *one, kept) for one in batches]))
            last = reports[-1]
            print(f"{name}, {driver}: {last.inputs} inputs, {len(last.findings)} findings")
            text = page(reports, command, time.monotonic() - begin)  # so far: a run can be ended
            (asked.out / "fuzz.md").write_text(text, encoding="utf-8")
    return 1 if any(one.findings for one in reports) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
