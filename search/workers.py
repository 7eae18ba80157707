"""Who works on a trial, and which trials were left behind by a process that died.

A study is shared by processes on any number of machines. Each trial names its worker; a worker
that takes long over one shows that it lives by counting a `beat` of the trial up. A trial that
is running is left behind when
  - its worker was a process of this very machine and is no more, or
  - neither its worker nor its beat changed for `GRACE_S`, by the clock of the one who looks.
No two machines' clocks are compared, and a clock that is set changes nothing: what counts is the
monotonic time that passed before one pair of eyes. A trial left behind is failed and drawn again,
at most `RETRIES` times, for it may be what killed its worker.

A worker that was only stopped (a laptop asleep) finds its trial failed and drops its own result.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

__all__ = ["GRACE_S", "Watch", "beating", "queue_again", "worker_name"]

BEAT_S = 10.0
GRACE_S = 60.0
RETRIES = 2


@functools.cache
def _machine() -> str:
    """Names the space of process ids that this process lives in; empty where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot; empty when it is no more."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def worker_name() -> str:
    """This process, as trials name their worker: machine, process, its start."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def _is_gone(worker: str) -> bool:
    """Whether a worker was a process of this machine that is no more."""
    machine, pid, started = [*worker.split(" "), "", ""][:3]
    if not machine or machine != _machine() or not pid.isdecimal():
        return False
    return _started(int(pid)) != started


class Watch:
    """Remembers what running trials looked like, to tell those that were left behind."""

    def __init__(self, study: Study, dimensions: int) -> None:
        self.study, self.dimensions = study, dimensions
        self._seen: dict[int, tuple[object, float]] = {}

    def fail_dead(self, running: Sequence[FrozenTrial]) -> int:
        """Fail the trials that were left behind and queue them again; how many there were."""
        now, count = time.monotonic(), 0
        for trial in running:
            worker = trial.user_attrs.get("worker", "")
            state = worker, trial.user_attrs.get("beat", 0)
            before, since = self._seen.get(trial.number, (None, now))
            if before != state:
                self._seen[trial.number] = state, now
                since = now
            if _is_gone(worker) or now - since > GRACE_S:
                count += queue_again(self.study, trial, self.dimensions)
        return count


def queue_again(study: Study, trial: FrozenTrial, dimensions: int) -> bool:
    """Fail a trial that nobody works on and queue what it drew; False where it had ended.

    A trial that was left before all of its `dimensions` were drawn is not queued: the next one in
    its place draws the same.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):
        return False
    drawn = trial.system_attrs.get("fixed_params", trial.params)
    again = trial.user_attrs.get("again", 0)
    if len(drawn) == dimensions and again < RETRIES:
        kept = {name: trial.user_attrs[name] for name in ("seed",) if name in trial.user_attrs}
        study.enqueue_trial(drawn, user_attrs={**kept, "again": again + 1})
    return True


class _Pulse:
    """The trial in hand."""

    def __init__(self) -> None:
        self.trial: Trial | None = None
        self.done = threading.Event()

    def run(self) -> None:
        count = 0
        while not self.done.wait(BEAT_S):
            trial, count = self.trial, count + 1
            if trial is not None:
                # The trial may come to its end meanwhile; a storage that is down is told by
                # the main thread.
                with suppress(Exception):
                    trial.set_user_attr("beat", count)


@contextmanager
def beating(shared: bool) -> Iterator[Any]:
    """Counts up the beat of the `trial` of what it gives, from another thread, while inside."""
    pulse = _Pulse()
    if not shared:
        yield pulse
        return
    thread = threading.Thread(target=pulse.run, daemon=True)
    thread.start()
    try:
        yield pulse
    finally:
        pulse.done.set()
        thread.join()
