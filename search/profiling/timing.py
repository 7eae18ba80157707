"""Seconds of one call.

graph: `count` calls are captured once; a sample is one replay between two device events, over
`count`. eager: the host launches `count` calls between two events (on a CPU: between two readings
of the clock). `count` covers every call given, so that rotated tensors all pass through the cache,
and fills `_SAMPLE_S` where calls are short. Samples follow warm-up runs for as long as the first
calls took, from `_WARM_S` to `_LONG_WARM_S`: while the host compiles, the device idles and its
clocks fall. Arithmetic in dense rows is warmed up longer (`hot`): an H200 holds its highest clock
for some 70 ms before its power limit takes a fifth to a quarter of it, and steps follow one another
for longer. The median and the minimum of 5 to 25 samples are kept.

Left out: the time to capture, the host's work before the first launch, the copy of inputs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from shardplan.search.profiling.backend import Target

__all__ = ["Timing", "measure"]

_SAMPLE_S = 1e-3
_BUDGET_S, _HOT_BUDGET_S = 0.05, 0.08
_WARM_S, _LONG_WARM_S, _HOT_WARM_S = 0.01, 0.3, 0.12
_WARM_RUNS = 10
_TICK_S = 1e-7
_MAX_CALLS = 512
_FEWEST, _MOST = 5, 25

Call = Callable[[], object]


class Timing(NamedTuple):
    """Seconds of one call over `repeats` samples."""

    median_s: float
    min_s: float
    repeats: int


def _elapsed_s(target: Target, work: Call) -> float:
    """Seconds that the device (or the CPU) takes for `work`."""
    if target.runtime is None:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin = target.runtime.Event(enable_timing=True)
    end = target.runtime.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def _all_of(calls: Sequence[Call], count: int) -> Call:
    def run() -> None:
        for at in range(count):
            calls[at % len(calls)]()

    return run


def _captured(target: Target, run: Call) -> Call:
    """`run` as a graph; the function replays it. Other threads may use the device meanwhile."""
    runtime = target.runtime
    graph: Any = runtime.CUDAGraph() if hasattr(runtime, "CUDAGraph") else runtime.NPUGraph()
    options = {"capture_error_mode": "thread_local"} if target.kind == "cuda" else {}
    with runtime.graph(graph, **options):
        run()
    replay: Call = graph.replay
    return replay


def _warm(target: Target, calls: Sequence[Call], mode: str) -> None:
    """Every call once, on a side stream where a capture follows, as capturing asks for."""
    if mode != "graph":
        _all_of(calls, len(calls))()
        target.synchronize()
        return
    stream = target.runtime.Stream()
    stream.wait_stream(target.runtime.current_stream())
    with target.runtime.stream(stream):
        _all_of(calls, len(calls))()
    target.runtime.current_stream().wait_stream(stream)
    target.synchronize()


def _warmed(target: Target, run: Call, warm_s: float) -> float:
    """Repeat `run` for `warm_s` seconds; the seconds of the last one."""
    begun = time.perf_counter()
    span = _elapsed_s(target, run)
    while time.perf_counter() - begun < warm_s:
        span = _elapsed_s(target, run)
    return span


def _fixed_warm_up(target: Target, run: Call) -> float:
    """Repeat `run` as often on every rank of a collective; the seconds of the last one."""
    return [_elapsed_s(target, run) for _ in range(_WARM_RUNS)][-1]


def measure(
    target: Target,
    calls: Sequence[Call],
    mode: str,
    *,
    count: int | None = None,
    repeats: int | None = None,
    hot: bool = False,
) -> Timing:
    """Time `calls`, which do the same work on different tensors, one after another.

    mode: graph or eager. count: calls a sample; repeats: samples (both the same on all ranks of a
    collective; by default chosen from the time of a call). hot: in the state that the device keeps
    under load. Raises what the calls raise.
    """
    begun = time.perf_counter()
    _warm(target, calls, mode)
    least_s, budget_s = (_HOT_WARM_S, _HOT_BUDGET_S) if hot else (_WARM_S, _BUDGET_S)
    warm_s = min(max(time.perf_counter() - begun, least_s), _LONG_WARM_S)
    if count is None:
        once = _elapsed_s(target, _all_of(calls, len(calls))) / len(calls)
        wanted = math.ceil(_SAMPLE_S / max(once, _TICK_S))
        count = min(max(len(calls), wanted), _MAX_CALLS)
    run = _all_of(calls, count)
    if mode == "graph":
        run = _captured(target, run)
    span = _warmed(target, run, warm_s) if repeats is None else _fixed_warm_up(target, run)
    samples = repeats or min(max(_FEWEST, int(budget_s / max(span, _TICK_S))), _MOST)
    spans = [_elapsed_s(target, run) / count for _ in range(samples)]
    return Timing(statistics.median(spans), min(spans), samples)
