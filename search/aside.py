"""Work that runs beside this process, in a forked one, where that is safe and a core is free.

Safe: the process has no other thread (a fork copies one thread and the locks of all), which Linux
tells. Elsewhere, and where the other process dies or fails, the work is done here when its result
is wanted: the answer is the same, and so is the error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TypeVar

__all__ = ["aside"]

_TASKS = "/proc/self/task"
_Result = TypeVar("_Result")


def aside(work: Callable[[], _Result]) -> Callable[[], _Result]:
    """Start `work`; what is returned waits for its result, which can be pickled."""
    if not _may_fork():
        return work
    from multiprocessing import get_context

    context = get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def send() -> None:
        with contextlib.suppress(BaseException):  # the other process meets the same and tells it
            writer.send(work())

    process = context.Process(target=send, daemon=True)
    sys.stdout.flush()
    sys.stderr.flush()
    process.start()
    writer.close()

    def result() -> _Result:
        try:
            value: _Result = reader.recv()
        except EOFError:  # it failed or was killed: the same work says why, or does better here
            value = work()
        process.join()
        return value

    return result


def _may_fork() -> bool:
    try:
        threads = len(os.listdir(_TASKS))
        cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not Linux
        return False
    return threads == 1 and cores > 1
