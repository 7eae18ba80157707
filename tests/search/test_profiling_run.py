"""`shardplan profile` as it runs: timing, what may be asked for, a CPU, two processes."""

from __future__ import annotations

import contextlib
import csv
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.search.profiling_cases import target

from shardplan.models.errors import InputError, UnknownNameError
from shardplan.search.main import run
from shardplan.search.profiling.backend import open_target
from shardplan.search.profiling.plan import chosen_ops
from shardplan.search.profiling.points import COLLECTIVES, OPERATORS, load_grid
from shardplan.search.profiling.rates import ceiling_of, impossible
from shardplan.search.profiling.table import read_rows
from shardplan.search.profiling.timing import Timing, measure

ROOT = Path(__file__).resolve().parent.parent.parent
PROFILE = ["profile", "--device", "cpu", "--grid", "tiny"]


class FakeRuntime:
    """A runtime whose clock ticks one millisecond a call that runs on it."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.capturing: list[int] | None = None
        runtime = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at_ms = 0.0

            def record(self) -> None:
                self.at_ms = runtime.now_ms

            def synchronize(self) -> None:
                """Nothing runs beside."""

            def elapsed_time(self, other: Event) -> float:
                return other.at_ms - self.at_ms

        class Stream:
            def wait_stream(self, _other: object) -> None:
                """One stream after the other anyway."""

        class CUDAGraph:
            def __init__(self) -> None:
                self.calls: list[int] = []

            def replay(self) -> None:
                runtime.now_ms += 0.5 * len(self.calls)

        self.Event, self.Stream, self.CUDAGraph = Event, Stream, CUDAGraph
        self.current_stream = Stream

    def synchronize(self) -> None:
        """Nothing runs beside."""

    def stream(self, _stream: object) -> Any:
        """What torch.cuda.stream gives."""
        return contextlib.nullcontext()

    def graph(self, graph: Any, **_options: str) -> Any:
        """Records the calls in place of running them."""

        @contextlib.contextmanager
        def capture() -> Iterator[None]:
            self.capturing = graph.calls
            yield
            self.capturing = None

        return capture()

    def call(self) -> None:
        """One operator: a millisecond, or half of one in a graph."""
        if self.capturing is None:
            self.now_ms += 1.0
        else:
            self.capturing.append(1)


def test_a_sample_is_divided_by_the_calls_in_it() -> None:
    """Launched by the host a call takes 1 ms; three in a graph take 1.5 ms, 0.5 ms each."""
    runtime = FakeRuntime()
    device = target(kind="cuda", runtime=runtime)
    calls = [runtime.call] * 3
    assert measure(device, calls, "eager").median_s == pytest.approx(1e-3)
    timing = measure(device, calls, "graph")
    assert timing.median_s == pytest.approx(0.5e-3)
    assert measure(device, calls, "graph", count=7, repeats=4).repeats == 4


def test_on_a_cpu_every_call_is_used_and_the_minimum_is_the_least() -> None:
    """Rotated weights only help if all of them pass."""
    used: list[int] = []
    calls = [lambda at=at: used.append(at) for at in range(4)]
    timing = measure(target(), calls, "eager")
    assert set(used) == {0, 1, 2, 3}
    assert 0 < timing.min_s <= timing.median_s


@pytest.mark.parametrize(
    ("given_ops", "world", "says"),
    [
        ("matmull", 1, "did you mean matmul"),
        (",", 1, "operator"),
        ("all_reduce", 1, "torchrun"),
        ("matmul", 2, "only collectives"),
    ],
)
def test_operators_that_cannot_be_asked_for(given_ops: str, world: int, says: str) -> None:
    """A stranger, a collective alone, an operator of one device on two."""
    with pytest.raises(InputError, match=says):
        chosen_ops(given_ops, world)
    assert chosen_ops(None, 1) == OPERATORS
    assert chosen_ops(None, 4) == COLLECTIVES


def test_without_torch_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, no traceback, no file."""
    monkeypatch.setitem(sys.modules, "torch", None)
    out = tmp_path / "ops.csv"
    assert run([*PROFILE, "--out", str(out)]) == 2
    assert "pip install 'shardplan[torch]'" in capsys.readouterr().err
    assert not out.exists()


def test_an_npu_needs_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is measured; so is a device that does not exist."""
    torch = types.ModuleType("torch")
    torch.__version__ = "2.9"  # type: ignore[attr-defined]  # a stand-in
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(InputError, match="needs torch_npu"):
        open_target("npu")
    with pytest.raises(UnknownNameError, match="npu"):
        open_target("tpu")


def test_a_cpu_profile_is_complete_resumes_and_can_be_priced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny grid in seconds; a second run measures nothing; `estimate` reads the file."""
    pytest.importorskip("torch")
    out, priced = tmp_path / "ops.csv", tmp_path / "priced.csv"
    assert run([*PROFILE, "--out", str(out)]) == 0
    rows, _ = read_rows(out)
    wanted = {p.op for p in load_grid("tiny")} - set(COLLECTIVES)
    assert {r.point.op for r in rows} == wanted
    assert run([*PROFILE, "--out", str(out)]) == 0
    assert f"0 points measured, {len(rows)} already there" in capsys.readouterr().err
    ask = ["estimate", "--points", str(out), "--device", "910b2", "--out", str(priced)]
    assert run(ask) == 0
    with priced.open(encoding="utf-8", newline="") as file:
        answers = [a for a in csv.DictReader(file) if a["op"] == "attention_decode"]
    assert [a["status"] for a in answers] == ["ok", "ok"]


@pytest.mark.slow
def test_collectives_of_two_processes(tmp_path: Path) -> None:
    """torchrun with gloo: one row a collective and size, written by one rank."""
    pytest.importorskip("torch")
    out = tmp_path / "ranks.csv"
    code = "from shardplan.search.main import main; main()"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--no-python", sys.executable, "-c", code, *PROFILE, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    rows, _ = read_rows(out)
    assert {r.point.op for r in rows} == set(COLLECTIVES)
    assert {r.point.ranks for r in rows} == {2}


@pytest.mark.parametrize("name", ["h200_ops.csv", "h200_collectives.csv"])
def test_the_committed_profiles_are_whole_and_possible(name: str) -> None:
    """Rows of this format, each once, of one device, within the rates of its datasheet."""
    rows, size = read_rows(ROOT / "results" / "profiles" / name)
    assert size == (ROOT / "results" / "profiles" / name).stat().st_size
    assert len({r.point for r in rows}) == len(rows) > 100
    assert {r.device_name for r in rows} == {"NVIDIA H200"}
    ceiling = ceiling_of("NVIDIA H200")
    timings = [(r.point, Timing(r.median_s, r.min_s, r.repeats)) for r in rows]
    assert [p for p, spent in timings if impossible(p, spent, ceiling, 0.0)] == []
