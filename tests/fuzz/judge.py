"""One input, judged: it ends in success or in an error of our own, soon and in little memory.

A *finding* is anything else: another exception, a warning of numpy, more than `MOST_S` seconds,
more than `MOST_BYTES` of memory in use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tests.fuzz.targets import Target

from shardplan.models.errors import InfeasibleError, InputError

__all__ = ["MOST_BYTES", "MOST_S", "Finding", "Judge"]

MOST_S = 5.0
"""Of the processor: what else runs on the machine does not count."""
MOST_WAIT_S = 60.0
"""Altogether: a reader may wait for what never comes, and use no processor."""
MOST_BYTES = 2**30
_FRESH_BYTES = 2**29
"""A process of its own holds no more before its first input; what a test's process holds beyond
that, of the tests before, is not the input's."""
_FRAMES = 6
_PEAK = "VmHWM:"


class _TooLong(BaseException):
    """Raised by the alarm; no `except Exception` of a reader holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What an input did that none may do."""

    target: str
    kind: str
    """exception | hang | memory."""
    where: str
    """Innermost place in shardplan; one fault has one place."""
    text: str
    data: bytes

    @property
    def name(self) -> str:
        """A file name for the input."""
        digest = hashlib.sha256(self.data).hexdigest()[:12]
        return f"{self.target.replace(' ', '-').replace('.', '-')}-{self.kind}-{digest}"


class Judge:
    """Runs the inputs of one target in a folder of its own."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        self.folder = folder / "a" / "b" / "c"  # paths that climb stay inside
        self.folder.mkdir(parents=True)
        self._path = self.folder / f"model{target.suffix}"
        self._own = {self._path, self.folder, *self.folder.parents}
        self._depth = 3
        self.counts = {"accepted": 0, "refused": 0}
        self.slowest_s = 0.0
        self.peak_bytes = 0
        _forget_peak()
        self._others_bytes = max(_peak_bytes() - _FRESH_BYTES, 0)

    def judge(self, data: bytes) -> Finding | None:
        """The finding that an input makes, if it makes one."""
        self._clean()
        self._path.write_bytes(data)
        _forget_peak()
        begin = time.process_time()
        kind, where, text = self._outcome()
        seconds, peak = time.process_time() - begin, _peak_bytes() - self._others_bytes
        self.slowest_s, self.peak_bytes = max(self.slowest_s, seconds), max(self.peak_bytes, peak)
        if kind in self.counts and peak > MOST_BYTES:
            kind, text = "memory", f"{peak / 2**20:.0f} MiB in use"
        if kind in self.counts:
            self.counts[kind] += 1
            return None
        return Finding(target=self.target.name, kind=kind, where=where, text=text, data=data)

    def _clean(self) -> None:
        """Only what the input before has left is removed: folders are slow to make."""
        for folder in (self.folder, *list(self.folder.parents)[: self._depth]):
            for entry in folder.iterdir():
                if entry in self._own:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()

    def _outcome(self) -> tuple[str, str, str]:
        """(accepted | refused | kind of finding, place, what was said)."""
        try:
            with warnings.catch_warnings(), _alarm():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", RuntimeWarning)
                self.target.read(self._path)
        except (InputError, InfeasibleError):
            return "refused", "", ""
        except _TooLong as late:
            return "hang", _place(late), _said(late)
        except MemoryError as error:
            return "memory", _place(error), _said(error)
        except Exception as error:
            return "exception", _place(error), _said(error)
        return "accepted", "", ""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise _TooLong(f"more than {MOST_S:g} s, or {MOST_WAIT_S:g} s of waiting")

    clocks = {
        signal.ITIMER_PROF: (signal.SIGPROF, MOST_S),
        signal.ITIMER_REAL: (signal.SIGALRM, MOST_WAIT_S),
    }
    before = {one: signal.signal(one, ring) for one, _ in clocks.values()}
    for clock, (_, seconds) in clocks.items():
        signal.setitimer(clock, seconds)
    try:
        yield
    finally:
        for clock, (one, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(one, before[one])


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if "shardplan" in one.filename or "/tests/" not in one.filename]
    inner = [one for one in own if "site-packages" not in one.filename] or frames
    last = inner[-1]
    return f"{os.path.basename(last.filename)}:{last.lineno} {type(error).__name__}"


def _said(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    lines = [f"{os.path.basename(one.filename)}:{one.lineno} in {one.name}" for one in frames]
    return "\n".join([f"{type(error).__name__}: {str(error)[:600]}", *lines])


def _forget_peak() -> None:
    """The kernel counts this process's peak of memory anew (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes() -> int:
    """Most memory in use since `_forget_peak`; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(one.split()[1]) * 1024 for one in lines if one.startswith(_PEAK)), 0)
