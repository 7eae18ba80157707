"""All readers under both drivers: `python -m tests.fuzz --out results/fuzz`, from the root.

Writes `fuzz.md` (counts, machine, command) and, for every finding, the input under `findings/`. A
few thousand inputs at a time run in a process of their own, one process at a time. A run that was
ended goes on into the same folder (`counts.json` says how far it came). Exit code 1 where there
are findings. `--driver atheris` needs the package atheris (`pip install atheris`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tests.fuzz.drive import DRIVERS, Report, drive
from tests.fuzz.judge import MOST_BYTES, MOST_S
from tests.fuzz.targets import TARGETS, Target

_ROOT = Path(__file__).resolve().parents[2]
_BATCH = 2500
"""Most inputs of one process: what hypothesis and shardplan's caches remember stays small."""
_COUNTS = "counts.json"
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
    """(inputs, seed) of each process; `start` inputs were judged before."""
    for begin in range(start, count, _BATCH):
        yield min(_BATCH, count - begin), begin


def run_batch(name: str, driver: str, inputs: int, start: int, kept: Path) -> Report:
    """One process; inputs that make findings are copied to `kept`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start_one = _started if driver == "atheris" else _forked
        code = start_one(name, driver, inputs, start, folder)
        report = _report_of(folder, name, driver)
        if code or report is None:
            report = report or Report(target=name, driver=driver)
            held = next((folder / "run").glob("a/b/c/model*"), None)
            file = f"{name.replace(' ', '-')}-ended-{driver}-{start}"
            _keep(kept, file, b"" if held is None else held.read_bytes())
            text = (folder / "said").read_text(encoding="utf-8", errors="replace")[-2000:]
            found = {"kind": "end", "where": f"the process ended with {code}", "text": text}
            report.findings.append({**found, "file": file, "inputs": "1"})
        for one in (folder / "findings").glob("*"):
            _keep(kept, one.name, one.read_bytes())
        return report


def _started(name: str, driver: str, inputs: int, start: int, folder: Path) -> int:
    """A new interpreter: modules are instrumented as they load. Its exit code."""
    words = [sys.executable, "-m", "tests.fuzz.drive", name, driver, str(inputs), str(start)]
    path = os.pathsep.join([str(_ROOT / "src"), str(_ROOT), os.environ.get("PYTHONPATH", "")])
    with (folder / "said").open("wb") as said:
        return subprocess.run(
            [*words, str(folder)],
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            check=False,
        ).returncode


def _forked(name: str, driver: str, inputs: int, start: int, folder: Path) -> int:
    """A copy of this process, which has loaded everything. Its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), said, said)):
            os.dup2(file, number)
        drive(name, driver, inputs, start, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _report_of(folder: Path, name: str, driver: str) -> Report | None:
    file = folder / "report.json"
    return Report(**json.loads(file.read_bytes())) if file.exists() else None


def _keep(kept: Path, name: str, data: bytes) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    (kept / name).write_bytes(data)


def _joined(reports: Sequence[Report]) -> Report:
    """The batches of one target and driver as one; a place that was found twice counts once."""
    first = reports[0]
    whole = Report(target=first.target, driver=first.driver, command=first.command)
    known: dict[tuple[str, str], dict[str, str]] = {}
    for one in reports:
        whole.inputs += one.inputs
        whole.accepted += one.accepted
        whole.refused += one.refused
        whole.seconds += one.seconds
        whole.slowest_s = max(whole.slowest_s, one.slowest_s)
        whole.peak_bytes = max(whole.peak_bytes, one.peak_bytes)
        for found in one.findings:
            known.setdefault((found["kind"], found["where"]), found)
    whole.findings = list(known.values())
    return whole


def page(reports: Sequence[Report]) -> str:
    """The results as Markdown."""
    inputs, found = sum(one.inputs for one in reports), sum(len(one.findings) for one in reports)
    seconds = sum(one.seconds for one in reports)
    packages = ", ".join(f"{name} {version(name)}" for name in _installed(_SHARED))
    lines = [
        "# Fuzzed inputs",
        "",
        *(f"    {command}" for command in dict.fromkeys(one.command for one in reports)),
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
    asked.out.mkdir(parents=True, exist_ok=True)
    done = _before(asked.out / _COUNTS)
    for driver in drivers:
        for name, count in shares(targets, asked.inputs // len(drivers)).items():
            fresh = Report(target=name, driver=driver, command=command)
            own = done.setdefault((name, driver), fresh)
            for inputs, start in _batches(count, own.inputs):
                ran = run_batch(name, driver, inputs, start + asked.seed * asked.inputs, kept)
                done[(name, driver)] = own = _joined([own, ran])
                own.seconds += time.monotonic() - begin
                begin = time.monotonic()
                _write(asked.out, list(done.values()))
            print(f"{name}, {driver}: {own.inputs} inputs, {len(own.findings)} findings")
    return 1 if any(one.findings for one in done.values()) else 0


def _before(counts: Path) -> dict[tuple[str, str], Report]:
    """What earlier runs into the same folder have counted."""
    if not counts.exists():
        return {}
    found = [Report(**one) for one in json.loads(counts.read_bytes())]
    return {(one.target, one.driver): one for one in found}


def _write(out: Path, reports: Sequence[Report]) -> None:
    """Counts so far: a run can be ended and gone on with."""
    ordered = sorted(reports, key=lambda one: (list(TARGETS).index(one.target), one.driver))
    counts = json.dumps([asdict(one) for one in ordered], indent=1)
    (out / _COUNTS).write_text(counts + "\n", encoding="utf-8")
    (out / "fuzz.md").write_text(page(ordered), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
