"""`shardplan worker`: one more process, here or on another machine, for a study in a storage.

It needs the address and the name alone: the study carries its question. It ends when the study
holds what its search asked for, after `--trials` of its own, after `--timeout` seconds, or at
SIGINT or SIGTERM, always with the trial in hand finished; a second signal ends it at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from shardplan.models.errors import InputError
from shardplan.search.cli_common import Json, note, number, print_json, whole

__all__ = ["worker"]

_EVERY_S = 5.0
"""Between two lines of progress."""
_MOST_S = 1e8


def worker(
    storage: Annotated[str, typer.Option("--storage", help="Optuna storage URL of the study.")],
    study: Annotated[str, typer.Option("--study", help="Its name.")],
    trials: Annotated[int | None, whole("--trials", "Trials of this worker at most.")] = None,
    timeout: Annotated[float | None, number("--timeout", "Seconds after which it ends.")] = None,
    json: Json = False,
) -> None:
    """Join the study of a sampled search, and try strategies for it.

    The study is one that `shardplan search --storage URL --study NAME` made.
    """
    if trials is not None and trials < 1:
        raise InputError("a worker makes at least one trial", got=f"trials={trials}")
    if timeout is not None and not 0 < timeout <= _MOST_S:
        raise InputError(f"`--timeout` is above 0 and at most {_MOST_S:.0f}", got=f"{timeout}")
    start = time.monotonic()
    with _stopped_by_signals() as stop:
        summary = _work(storage, study, trials, timeout, stop)
    summary["wall_s"] = round(time.monotonic() - start, 3)
    note(
        f"{summary['made']} trials made, {summary['finished']} of {summary['wanted']} in the "
        f"study: {summary['ended']}"
    )
    if json:
        print_json(summary)


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the next does what it always does."""
    stop = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def ask(_number: int, _frame: object) -> None:
        for one, handler in before.items():
            signal.signal(one, handler)
        stop.set()

    for one in (signal.SIGINT, signal.SIGTERM):
        before[one] = signal.signal(one, ask)
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _work(
    storage: str, name: str, most: int | None, timeout_s: float | None, stop: threading.Event
) -> dict[str, Any]:
    """Join, draw, and say what was done."""
    from shardplan.search.joined import draw_for

    late = threading.Event()

    def end() -> None:
        late.set()
        stop.set()

    timer = threading.Timer(timeout_s or _MOST_S, end)
    timer.daemon = True
    timer.start()
    try:
        found = draw_for(storage, name, most=most, stop=stop, progress=_progress())
    finally:
        timer.cancel()
    if found["finished"] >= found["wanted"]:
        why = "the study is full"
    elif late.is_set():
        why = "time is up"
    else:
        why = "a signal asked it to end" if stop.is_set() else "its own trials are made"
    return {**found, "ended": why}


def _progress() -> Callable[[int, int], None]:
    """Lines on stderr, not more than one in `_EVERY_S`."""
    last = [-_EVERY_S]

    def show(done: int, wanted: int) -> None:
        now = time.monotonic()
        if now - last[0] >= _EVERY_S:
            last[0] = now
            note(f"{done} of {wanted} trials")

    return show
