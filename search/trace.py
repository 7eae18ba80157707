"""One predicted prefill and decode step of each rank as a trace that Perfetto opens.

Trace Event Format, JSON. A process is a rank; of a pool, a rank of its first instance. Thread 0
holds the step's stage, the layers in it and the kernels in those, thread 1 what crosses ranks,
thread 2 what the stage does for other pieces of the prompt and other microbatches, a slice each.
Arrows join the stages. A prompt comes first, at 0; the decode step follows, with pools after the
transfer of the cache.

Ranks of a stage run the same kernels at the same time. Where all of them would be more than
`MOST_EVENTS` events, the first of each stage stands for the others, and the file says so.

Times are in microseconds with three decimals; `otherData` holds the seconds of both steps. Slices
of a step's stages, and the host's, sum to its seconds; kernels sum, kind by kind, to the rows of
the plan's breakdown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardplan.costmodel.program import Kernel, Pass, StageProgram
from shardplan.models.errors import InputError
from shardplan.models.parallel import Parallelism
from shardplan.models.ranks import coordinates
from shardplan.search.atomic import written_atomically
from shardplan.search.plan import Plan
from shardplan.search.predicted import MOST_PIECES, Predicted

__all__ = ["ALL", "AUTO", "MOST_EVENTS", "ranks_of", "write_trace"]

MOST_EVENTS = 200_000
AUTO, ALL = "auto", "all"
_US = 1e6
_STEP, _EXCHANGE, _OTHERS = 0, 1, 2
_THREADS = {_STEP: "step", _EXCHANGE: "exchange", _OTHERS: "other pieces and microbatches"}
_COUNTS = {"pp": "stage", "dp": "dp", "cp": "cp", "tp": "tp"}
_Event = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """A step, when it begins, and the number of its first rank's process."""

    step: Predicted
    begin_s: float
    first: int
    par: Parallelism

    def stage_of(self, rank: int) -> StageProgram:
        """What a rank runs."""
        return self.step.program.stages[coordinates(self.par, rank)["pp"]]


def write_trace(
    path: Path, plan: Plan, steps: Sequence[Predicted], ranks: str = AUTO
) -> dict[str, Any]:
    """Write the trace, whole or not at all; returns what its `otherData` says.

    `ranks`: auto, all, or numbers as `0,4-7`. `InputError` for others, or a place that cannot be
    written.
    """
    timed = _timed(plan, steps)
    most = max(one.step.way.ranks for one in timed)
    chosen = [_chosen(one, ranks, len(timed), most) for one in timed]
    said = _said(plan, timed, chosen)
    count = 0
    with written_atomically(path) as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        for event in _events(plan, timed, chosen):
            file.write((",\n" if count else "") + json.dumps(event, separators=(",", ":")))
            count += 1
        said["events"] = count
        file.write('\n],"otherData":' + json.dumps(said) + "}\n")
    return said


def ranks_of(text: str, most: int) -> list[int]:
    """Ranks of `0,4-7`, ascending; `InputError` for what is no such list, or beyond the ranks."""
    rule = "`--ranks` is auto, all, or numbers with commas and dashes"
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [first.strip(), last.strip() if dash else first.strip()]
        if not all(end.isascii() and end.isdigit() and len(end) < 10 for end in ends):  # noqa: PLR2004
            raise InputError(rule, got=f"ranks={text[:100]!r}", hint="try 0,4-7")
        low, high = map(int, ends)
        if low > high or high >= most:
            raise InputError(
                f"ranks are from 0 to {most - 1}, the lower of two first",
                got=f"ranks={text[:100]!r}",
                hint=f"try 0-{most - 1}",
            )
        found.update(range(low, high + 1))
    return sorted(found)


def _timed(plan: Plan, steps: Sequence[Predicted]) -> list[_Timed]:
    """Prefill at 0, decode after it; with pools their ranks are numbered one after another."""
    begin_s, first = 0.0, 0
    found = []
    for step in steps:
        par = step.way.parallelism()
        found.append(_Timed(step=step, begin_s=begin_s, first=first, par=par))
        begin_s += step.end_s()
        if plan.pools:
            first += step.instances * step.way.ranks
            begin_s += plan.transfer.request_s if plan.transfer is not None else 0.0
    return found


def _chosen(one: _Timed, ranks: str, steps: int, most: int) -> list[int]:
    """Ranks that are written; of pools the larger has `most`."""
    count = one.step.way.ranks
    if ranks not in (AUTO, ALL):
        return [rank for rank in ranks_of(ranks, most) if rank < count]
    events = sum(_size(one.stage_of(rank)) for rank in range(count))
    if ranks == ALL or events <= MOST_EVENTS // steps:
        return list(range(count))
    firsts: dict[int, int] = {}
    for rank in range(count):
        firsts.setdefault(one.stage_of(rank).stage, rank)
    return sorted(firsts.values())


def _size(stage: StageProgram) -> int:
    """About as many events."""
    return len(stage.passes) + sum(len(one.kernels) for one in stage.passes)


def _said(plan: Plan, timed: list[_Timed], chosen: list[list[int]]) -> dict[str, Any]:
    said: dict[str, Any] = {
        "made_by": f"shardplan {plan.shardplan_version}",
        "model": plan.model.name,
        "cluster": plan.cluster.name,
        "predicted": True,
    }
    for one, ranks in zip(timed, chosen, strict=True):
        phase, count = one.step.phase, one.step.way.ranks
        said[f"{phase}_step_s"] = one.step.program.step_s
        said[f"{phase}_ranks"] = count
        said[f"{phase}_ranks_written"] = len(ranks)
        if one.step.pieces > MOST_PIECES:
            said[f"{phase}_pieces"] = f"the first {MOST_PIECES} of {one.step.pieces}"
        if len(ranks) < count:
            said[f"{phase}_note"] = "ranks of a stage run the same kernels at the same time"
        if one.step.instances > 1:
            said[f"{phase}_instances"] = one.step.instances
    return said


def _events(plan: Plan, timed: list[_Timed], chosen: list[list[int]]) -> Iterator[_Event]:
    named: set[int] = set()
    for one, ranks in zip(timed, chosen, strict=True):
        starts = one.step.starts_s()
        for rank in ranks:
            if one.first + rank not in named:
                named.add(one.first + rank)
                yield from _names(plan, one, rank)
            yield from _rank(one, rank, starts)
        yield from _arrows(one, ranks, starts[0])


def _names(plan: Plan, one: _Timed, rank: int) -> Iterator[_Event]:
    """Of a process and its threads."""
    pid, step = one.first + rank, one.step
    places = [
        f"{_COUNTS[axis]} {at}"
        for axis, at in coordinates(one.par, rank).items()
        if getattr(one.par, axis) > 1
    ]
    pool = f"{step.phase} pool, " if plan.pools else ""
    where = f"{pool}node {rank // step.machine.ranks_per_node}"
    name = f"rank {rank} ({where}{''.join(f', {place}' for place in places)})"
    yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
    yield {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}}
    for thread, word in _THREADS.items():
        args = {"name": word}
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": thread, "args": args}


def _slice(pid: int, tid: int, name: str, begin_s: float, end_s: float, **args: Any) -> _Event:
    """Both ends are rounded, so that neighbours still meet and children stay inside."""
    begin, end = round(begin_s * _US, 3), round(end_s * _US, 3)
    event = {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": begin}
    event["dur"] = round(end - begin, 3)
    return {**event, "args": args} if args else event


def _rank(one: _Timed, rank: int, starts: Sequence[Sequence[float]]) -> Iterator[_Event]:
    """One step of one rank; `starts` of each piece and stage."""
    step, pid, stage = one.step, one.first + rank, one.stage_of(rank)
    at_s = one.begin_s + starts[0][stage.stage]
    if stage.stage == 0 and step.program.host_s:
        host = f"host, before {step.phase}"
        yield _slice(pid, _STEP, host, one.begin_s, one.begin_s + step.program.host_s)
    words = f"{step.phase}, stage {stage.stage}" if one.par.pp > 1 else step.phase
    end_s = at_s + stage.seconds
    yield _slice(pid, _STEP, words, at_s, end_s, layers=sum(p.layer >= 0 for p in stage.passes))
    for part in stage.passes:
        yield from _pass(pid, part, at_s, step.program.gap_s)
        at_s += part.seconds
    if stage.launch_wait_s:
        yield _slice(pid, _STEP, "waiting for launches by the host", at_s, end_s)
    for number, row in enumerate(starts[1:], start=1):
        begin_s = one.begin_s + row[stage.stage]
        name = f"{step.phase}, {step.what} {number}"
        yield _slice(pid, _OTHERS, name, begin_s, begin_s + stage.seconds)


def _pass(pid: int, part: Pass, at_s: float, gap_s: float) -> Iterator[_Event]:
    """A layer and its kernels."""
    name = part.template.replace("_", " ")
    name = f"layer {part.layer} ({name})" if part.layer >= 0 else name
    yield _slice(pid, _STEP, name, at_s, at_s + part.seconds)
    for kernel in part.kernels:
        thread = _EXCHANGE if kernel.collective else _STEP
        words = f"{kernel.kind} after {kernel.name}" if kernel.collective else kernel.name
        end_s = at_s + kernel.total_s
        yield _slice(pid, thread, words, at_s, end_s, kind=kernel.kind, **_parts(kernel))
        at_s = end_s + gap_s


def _parts(kernel: Kernel) -> dict[str, float]:
    """What a kernel's time is made of, without what is none."""
    names = ("compute_s", "memory_s", "collective_s", "overhead_s")
    found = {f"{name[:-2]}_us": round(getattr(kernel, name) * _US, 3) for name in names}
    return {name: value for name, value in found.items() if value}


def _arrows(one: _Timed, ranks: Sequence[int], starts: Sequence[float]) -> Iterator[_Event]:
    """From the end of a stage to the begin of the next, between ranks of like coordinates."""
    program = one.step.program
    begins: dict[tuple[int, ...], dict[int, int]] = {}
    for rank in ranks:
        places = coordinates(one.par, rank)
        stage = places.pop("pp")
        begins.setdefault(tuple(places.values()), {})[stage] = rank
    for line in begins.values():
        for stage, rank in line.items():
            if stage + 1 not in line:
                continue
            end_s = one.begin_s + starts[stage] + program.stages[stage].seconds
            common = {"name": "hidden state", "cat": "pipeline"}
            common["id"] = f"{one.step.phase} {rank}"
            yield {
                **common,
                "ph": "s",
                "pid": one.first + rank,
                "tid": _STEP,
                "ts": round(end_s * _US, 3),
            }
            yield {
                **common,
                "ph": "f",
                "bp": "e",
                "pid": one.first + line[stage + 1],
                "tid": _STEP,
                "ts": round((one.begin_s + starts[stage + 1]) * _US, 3),
            }
