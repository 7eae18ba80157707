"""One target in one process: `python -m tests.fuzz.drive TARGET DRIVER INPUTS SEED FOLDER`.

hypothesis    draws every edit, spreads them, and repeats with changes what it has drawn before
atheris       libFuzzer, led by the coverage of shardplan's own code; half of its changes are our
              edits, half its own (package atheris; CPython on Linux and macOS)

FOLDER receives `report.json` (counts) and `findings/`. The input at hand lies in FOLDER/run: where
it ends the process itself, it is found there. Nothing else is written.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NoReturn

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tests.fuzz.mutators import mutated

if TYPE_CHECKING:
    from tests.fuzz.judge import Judge
    from tests.fuzz.targets import Target

__all__ = ["DRIVERS", "Report", "drive"]

STUCK_S = 120
"""An input that the alarm cannot end (a loop in C) ends the process."""
_ROUND = 500
"""Examples of one run of hypothesis, which remembers all of them."""
_DONE = 0


@dataclass(slots=True, kw_only=True)
class Report:
    """Counts of one target under one driver."""

    target: str
    driver: str
    command: str = ""
    """That asked for it first."""
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    seconds: float = 0.0
    """Of the wall clock."""
    findings: list[dict[str, str]] = field(default_factory=list)
    """One for each place: kind, where, text, file of the first input, number of inputs."""


class _Drive:
    """Judges inputs until there are as many as asked for, and keeps count."""

    def __init__(self, judge: Judge, driver: str, inputs: int, folder: Path) -> None:
        self.judge, self.inputs, self.folder = judge, inputs, folder
        self.report = Report(target=judge.target.name, driver=driver)
        self._seen: dict[tuple[str, str], dict[str, str]] = {}

    @property
    def done(self) -> bool:
        """Whether all inputs were judged."""
        return self.report.inputs >= self.inputs

    def one(self, data: bytes) -> None:
        """Judge one input."""
        report = self.report
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        found = self.judge.judge(data)
        faulthandler.cancel_dump_traceback_later()
        report.inputs += 1
        if found is not None:
            key = (found.kind, found.where)
            if key not in self._seen:
                text = {"kind": found.kind, "where": found.where, "text": found.text}
                self._seen[key] = {**text, "file": found.name, "inputs": "0"}
                (self.folder / "findings").mkdir(exist_ok=True)
                (self.folder / "findings" / found.name).write_bytes(data)
            self._seen[key]["inputs"] = str(int(self._seen[key]["inputs"]) + 1)

    def close(self) -> None:
        """Write the report."""
        report = self.report
        report.accepted, report.refused = (
            self.judge.counts["accepted"],
            self.judge.counts["refused"],
        )
        report.slowest_s, report.peak_bytes = self.judge.slowest_s, self.judge.peak_bytes
        report.findings = list(self._seen.values())
        text = json.dumps(asdict(report), indent=1)
        (self.folder / "report.json").write_text(text, encoding="utf-8")


def _hypothesis(drive: _Drive, examples: Sequence[bytes], start: int) -> None:
    kind = drive.judge.target.kind

    def one(at: int, chance: Random) -> None:
        data = mutated(kind, examples[at], examples, chance)  # drawn alike each time
        if not drive.done:
            drive.one(data)

    for data in examples[: drive.inputs]:
        drive.one(data)
    turn = 0
    while not drive.done:
        chosen = st.integers(0, len(examples) - 1)
        test: Any = given(chosen, st.randoms(use_true_random=False))(one)
        quiet = settings(
            max_examples=min(_ROUND, drive.inputs - drive.report.inputs),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        seed(start + turn)(quiet(test))()
        turn += 1


def _atheris(drive: _Drive, examples: Sequence[bytes], start: int) -> NoReturn:
    atheris: Any = importlib.import_module("atheris")
    kind = drive.judge.target.kind
    corpus = drive.folder / "corpus"
    corpus.mkdir()
    for place, data in enumerate(examples):
        (corpus / str(place)).write_bytes(data)

    def one(data: bytes) -> None:
        drive.one(data)
        if drive.done:
            drive.close()
            os._exit(_DONE)

    def change(data: bytes, most: int, own: int) -> bytes:
        chance = Random(own)
        if chance.random() < 0.5:
            found: bytes = atheris.Mutate(data, most)
            return found
        return mutated(kind, data, examples, chance)[:most]

    quiet = ("-verbosity=0", "-timeout=0", "-rss_limit_mb=0", f"-max_len={1 << 16}")
    atheris.Setup(["fuzz", f"-seed={start + 1}", *quiet, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()
    raise AssertionError("the fuzzer ended before its last input")


DRIVERS: dict[str, Callable[[_Drive, Sequence[bytes], int], None]] = {
    "hypothesis": _hypothesis,
    "atheris": _atheris,
}


def _targets(driver: str) -> dict[str, Target]:
    """The targets; under atheris, with shardplan's own modules instrumented as they load."""
    if driver != "atheris":
        return dict(importlib.import_module("tests.fuzz.targets").TARGETS)
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["shardplan"]):
        return dict(importlib.import_module("tests.fuzz.targets").TARGETS)


def drive(name: str, driver: str, inputs: int, start: int, folder: Path) -> Report:
    """Judge so many inputs of a target; atheris ends the process after the last."""
    target = _targets(driver)[name]
    from tests.fuzz.judge import Judge

    examples = target.seeds()
    ours = _Drive(Judge(target, folder / "run"), driver, inputs, folder)
    DRIVERS[driver](ours, examples, start)
    ours.close()
    return ours.report


if __name__ == "__main__":
    _name, _driver, _inputs, _seed, _folder = sys.argv[1:]
    drive(_name, _driver, int(_inputs), int(_seed), Path(_folder))
