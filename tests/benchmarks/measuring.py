"""How the benchmarks measure: best of several runs, cold processes timed from outside, the machine.

A cold process is timed from outside, start of the interpreter included, with files already in the
page cache and bytecode compiled, as `pip install` leaves a package. The best of several runs is the
one that other load on the machine disturbed the least.
"""

from __future__ import annotations

import atexit
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ENTRY = "import sys; from shardplan.search.main import main; sys.exit(main())"
_LAUNCHER = """
import os, sys, time
start = time.perf_counter()
both = [(os.POSIX_SPAWN_DUP2, 1, 2)]
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=both)
_, status, usage = os.wait4(child, 0)
wall_s = time.perf_counter() - start
code = os.waitstatus_to_exitcode(status)
print(wall_s, usage.ru_utime, usage.ru_stime, usage.ru_maxrss, code, file=sys.stderr)
"""
"""Times one command, its output on stdout; wall, user and system seconds, peak, exit code on
stderr."""
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
MIB = 2.0**20
_KIB = 1024
"""`ru_maxrss` is in KiB on Linux and in bytes on macOS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One finished process."""

    wall_s: float
    user_s: float
    system_s: float
    peak_bytes: float

    @property
    def cpu_s(self) -> float:
        """Seconds of all cores together."""
        return self.user_s + self.system_s


def best_seconds(action: Callable[[], object], runs: int) -> float:
    """Least wall time of several runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def cold(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Process:
    """Run the command line in a process of its own; `SystemExit` with its output if it fails.

    A small process starts it: Linux counts the memory of the process that forks as the child's.
    """
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
    done = subprocess.run(
        [*launch, sys.executable, "-c", _ENTRY, *arguments],
        capture_output=True,
        check=True,
        env={**_installed(), **(environment or {})},
    )
    wall_s, user_s, system_s, peak, code = (float(number) for number in done.stderr.split())
    if code:
        raise SystemExit(f"{' '.join(arguments)}: {done.stdout.decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else _KIB
    return Process(wall_s=wall_s, user_s=user_s, system_s=system_s, peak_bytes=peak * unit)


def _installed() -> dict[str, str]:
    """This environment, with a folder that keeps bytecode from one process to the next."""
    kept = {name: value for name, value in os.environ.items() if name != _NO_BYTECODE}
    return {**kept, "PYTHONPYCACHEPREFIX": _bytecode()}


@functools.cache
def _bytecode() -> str:
    folder = tempfile.mkdtemp(prefix="bytecode-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def best_process(arguments: Sequence[str], runs: int) -> Process:
    """The fastest of several cold runs."""
    return min((cold(arguments) for _ in range(runs)), key=lambda one: one.wall_s)


def against(value: float, target: float, shown: str, *, least: bool = False) -> str:
    """A target beside whether it is met; `least`: the value shall not be below it."""
    met = value >= target if least else value <= target
    return f"{'>=' if least else '<='} {shown}: {'met' if met else 'missed'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def machine() -> str:
    """Processor, cores, memory, versions, and the load that was there before."""
    load = f"; load average {os.getloadavg()[0]:.1f} before the first run"
    return (
        f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}, numpy {np.__version__}{load}"
    )


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2.0**30


def _processor() -> str:
    """The processor's name where Linux tells it, else the architecture."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} ({names[0]})" if names else platform.machine()
