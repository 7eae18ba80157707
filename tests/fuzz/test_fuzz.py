"""A short slice of the fuzzing, with fixed inputs; `python -m tests.fuzz` is the whole of it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.__main__ import page, shares
from tests.fuzz.drive import Report, drive
from tests.fuzz.judge import MOST_S, Judge
from tests.fuzz.mutators import MUTATORS, mutated
from tests.fuzz.targets import TARGETS, Target

EXAMPLES = 12


def _refused(_path: Path) -> None:
    raise KeyError("a bug")


def _endless(_path: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if one.extra else ()) for n, one in TARGETS.items()],
)
def test_no_input_ends_in_a_traceback(name: str, tmp_path: Path) -> None:
    """The examples as they are, then with edits."""
    target = TARGETS[name]
    if target.extra:
        pytest.importorskip(target.extra)
        pytest.importorskip("torch")
    examples = target.seeds()
    judge = Judge(target, tmp_path)
    for data in examples:
        assert judge.judge(data) is None

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def edited(chance: Random) -> None:
        data = mutated(target.kind, chance.choice(examples), examples, chance)
        assert judge.judge(data) is None

    edited()
    assert judge.counts["refused"]


@pytest.mark.parametrize("kind", sorted(set(MUTATORS) - {"onnx", "zip"}))
def test_edits_are_those_of_the_seed(kind: str) -> None:
    """The same chance gives the same bytes, and most of them are new."""
    data = b'{"a": [1, {"b": "c d"}], "e": 2.5}\n'
    made = [mutated(kind, data, [data], Random(seed)) for seed in range(30)]
    assert made == [mutated(kind, data, [data], Random(seed)) for seed in range(30)]
    assert len(set(made)) > 15


def test_what_may_not_happen_is_a_finding(tmp_path: Path) -> None:
    """An exception of Python's, with its place."""
    found = Judge(Target("x", "bytes", "", list, _refused), tmp_path).judge(b"data")
    assert found is not None
    assert (found.kind, found.data) == ("exception", b"data")
    assert "KeyError: 'a bug'" in found.text
    assert "KeyError" in found.where


@pytest.mark.slow
def test_an_input_that_never_ends_is_a_finding(tmp_path: Path) -> None:
    """Its time of the processor counts."""
    found = Judge(Target("x", "bytes", "", list, _endless), tmp_path).judge(b"")
    assert found is not None
    assert found.kind == "hang"
    assert f"{MOST_S:g} s" in found.text


def test_a_drive_counts_what_it_judged(tmp_path: Path) -> None:
    """As many inputs as asked for, each accepted or refused, and a page that says so."""
    report = drive("trace jsonl", "hypothesis", 60, 1, tmp_path)
    assert report.inputs == 60 == report.accepted + report.refused
    assert report.accepted
    assert report.refused
    assert (tmp_path / "report.json").exists()
    bad = Report(
        target="x",
        driver="y",
        findings=[{"kind": "hang", "where": "a:1", "text": "t", "file": "f"}],
    )
    text = page([report, bad])
    assert "60 inputs, 1 findings" in text
    assert "## x: hang at a:1" in text


def test_every_target_gets_its_share() -> None:
    """And all of them together what was asked for."""
    counts = shares(list(TARGETS.values()), 1000)
    assert sum(counts.values()) == 1000
    assert min(counts.values()) > 0
    assert counts["trace csv"] > counts["command line"]
