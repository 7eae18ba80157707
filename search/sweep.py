"""A sweep: one search for every combination of values of some options, over processes.

Combinations come in the order of a nested loop, the first option outermost; rows keep that order
and every row depends on its own question alone, so any number of processes gives the same bytes.
One that has no answer keeps its error: `status` is `ok` or the error's code, `limit` what binds,
`message` the whole sentence. After an interrupt, what has been started is finished and kept and
the rest is `interrupted`.
"""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from shardplan.models.errors import ShardplanError
from shardplan.search.plan import Performance, Plan, StrategyInfo
from shardplan.search.sweep_values import Axis

__all__ = ["Sweep", "Task", "columns", "run_sweep", "tasks_of"]

Progress = Callable[[int, int], None]
_BINDS = re.compile(r"(\w+) binds")
_TOTALS = ("memory_bytes", "capacity_bytes", "objective", "bound", "gap", "plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One combination, complete in itself so that any process can run it."""

    values: Mapping[str, Any]
    """Of the swept options."""
    asked: Mapping[str, Any]
    """Arguments of `shardplan.search`, with the swept values in them."""
    name: str
    """Of its folder."""
    folder: Path | None
    """Where plan.json goes; None: nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All rows, in the order of the combinations."""

    axes: tuple[Axis, ...]
    rows: tuple[Mapping[str, Any], ...]
    """By column; None where there is nothing."""
    interrupted: bool

    def counts(self) -> dict[str, int]:
        """Rows by status, `ok` first."""
        found = [str(row["status"]) for row in self.rows]
        return {name: found.count(name) for name in sorted({*found}, key=lambda n: (n != "ok", n))}


def _column(name: str, axes: Sequence[Axis]) -> str:
    """The column of a strategy's field: what was chosen, where the same was swept."""
    return f"chosen_{name}" if name in {axis.name for axis in axes} else name


def columns(axes: Sequence[Axis]) -> list[str]:
    """Columns of a sweep's table, in order."""
    fields = [*StrategyInfo.model_fields, *Performance.model_fields]
    return [
        *(axis.name for axis in axes),
        *("status", "limit", "message", "ranks"),
        *(_column(name, axes) for name in fields),
        *_TOTALS,
    ]


def tasks_of(base: Mapping[str, Any], axes: Sequence[Axis], plans: Path | None) -> list[Task]:
    """Every combination; swept values take the place of those in `base`."""
    found, names = [], set[str]()
    for place, values in enumerate(itertools.product(*(axis.values for axis in axes))):
        named = dict(zip((axis.name for axis in axes), values, strict=True))
        name = _name(named)
        if name in names:
            name = f"{name}_{place + 1}"
        names.add(name)
        folder = None if plans is None else plans / name
        found.append(Task(values=named, asked={**base, **named}, name=name, folder=folder))
    return found


def _name(values: Mapping[str, Any]) -> str:
    """A folder name: `input-len-1024_nodes-2`; of a path, its last part."""
    words = []
    for name, value in values.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        text = Path(text).stem if "/" in text else text
        words.append(f"{name.replace('_', '-')}-{re.sub(r'[^A-Za-z0-9.]+', '-', text).strip('-.')}")
    return "_".join(words)[:200]


def _row(task: Task, axes: Sequence[Axis], status: str, message: str, limit: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(columns(axes))
    return {**row, **task.values, "status": status, "limit": limit, "message": message}


def _plan_row(task: Task, axes: Sequence[Axis], plan: Plan) -> dict[str, Any]:
    does = plan.performance
    rate, latency = does.output_tokens_per_s, 1.0 / does.end_to_end_s
    fullest = max(plan.memory, key=lambda row: row.total_bytes)
    return {
        **_row(task, axes, "ok", "", ""),
        "ranks": plan.cards,
        **{_column(name, axes): value for name, value in plan.strategy.model_dump().items()},
        **{_column(name, axes): value for name, value in does.model_dump().items()},
        "memory_bytes": fullest.total_bytes,
        "capacity_bytes": fullest.capacity_bytes,
        "objective": latency if plan.request.objective == "latency" else rate,
        "bound": plan.certificate.bound,
        "gap": plan.certificate.gap,
        "plan": None if task.folder is None else f"plans/{task.name}/plan.json",
    }


def run_task(task: Task, axes: tuple[Axis, ...]) -> dict[str, Any]:
    """One combination's row; nothing but an interrupt gets out of it."""
    from shardplan.search.api import search

    try:
        plan = search(**task.asked).plan
        if task.folder is not None:
            plan.save(task.folder / "plan.json")
        return _plan_row(task, axes, plan)
    except ShardplanError as error:
        message = " ".join(str(error).split())
        binds = _BINDS.search(error.got)
        limit = binds[1] if binds else "rules" if error.got.startswith("rules") else ""
        return _row(task, axes, error.code, message, limit)
    except Exception as error:
        return _row(task, axes, "bug", f"{type(error).__name__}: {error}", "")


def run_sweep(
    base: Mapping[str, Any],
    axes: tuple[Axis, ...],
    *,
    jobs: int = 1,
    plans: Path | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Search every combination with `jobs` processes (1: in this one).

    `base` are arguments of `shardplan.search`; plan.json files go into folders of `plans`.
    """
    tasks = tasks_of(base, axes, plans)
    rows: dict[int, dict[str, Any]] = {}
    run = _alone if min(jobs, len(tasks)) <= 1 else _pooled
    interrupted = False
    try:
        run(tasks, axes, min(jobs, len(tasks)), rows, progress)
    except KeyboardInterrupt:
        interrupted = True
    message = "the sweep was interrupted before this combination"
    done = [
        rows[at] if at in rows else _row(task, axes, "interrupted", message, "")
        for at, task in enumerate(tasks)
    ]
    return Sweep(axes=axes, rows=tuple(done), interrupted=interrupted)


def _alone(
    tasks: Sequence[Task],
    axes: tuple[Axis, ...],
    _jobs: int,
    rows: dict[int, dict[str, Any]],
    progress: Progress | None,
) -> None:
    for at, task in enumerate(tasks):
        rows[at] = run_task(task, axes)
        if progress is not None:
            progress(len(rows), len(tasks))


def _pooled(
    tasks: Sequence[Task],
    axes: tuple[Axis, ...],
    jobs: int,
    rows: dict[int, dict[str, Any]],
    progress: Progress | None,
) -> None:
    """Fresh interpreters: nothing that this process holds (threads, locks) is copied."""
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_leave_interrupts)
    places: dict[Future[dict[str, Any]], int] = {}
    try:
        places = {pool.submit(run_task, task, axes): at for at, task in enumerate(tasks)}
        for future in as_completed(places):
            at = places[future]
            rows[at] = _result(future, tasks[at], axes)
            if progress is not None:
                progress(len(rows), len(tasks))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for future, at in places.items():
            done = future.done() and not future.cancelled()
            if at not in rows and done and future.exception() is None:
                rows[at] = future.result()


def _leave_interrupts() -> None:
    """An interrupt is the parent's to handle: a worker finishes what it has begun."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _result(future: Future[dict[str, Any]], task: Task, axes: tuple[Axis, ...]) -> dict[str, Any]:
    error = future.exception()
    if error is None:
        return future.result()
    return _row(task, axes, "bug", f"{type(error).__name__}: {error}", "")
