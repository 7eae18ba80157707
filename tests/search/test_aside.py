"""Work beside the process: the same result and the same error, whoever does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shardplan.search.aside import aside

_ALONE = """
import os
from shardplan.search.aside import aside
done = aside(os.getpid)
print(done() != os.getpid())
"""


def test_the_result_is_that_of_the_work() -> None:
    assert aside(lambda: sum(range(10)))() == sum(range(10))


def test_an_error_is_raised_where_the_result_is_wanted() -> None:
    def fails() -> None:
        raise ValueError("seven")

    wanted = aside(fails)
    with pytest.raises(ValueError, match="seven"):
        wanted()


def test_what_kills_the_other_process_leaves_the_work_to_this_one() -> None:
    here = os.getpid()

    def once() -> str:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    assert aside(once)() == "done"


def test_a_process_with_threads_is_not_forked() -> None:
    leave = threading.Event()
    other = threading.Thread(target=leave.wait)
    other.start()
    try:
        assert aside(os.getpid)() == os.getpid()
    finally:
        leave.set()
        other.join()


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir() or len(os.sched_getaffinity(0)) == 1,
    reason="only Linux tells the threads of a process, and one core has nothing to gain",
)
def test_a_process_of_one_thread_is_forked() -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", _ALONE],
        env={**environment, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True"]
