"""What CONTRIBUTING.md tells a developer is so: its device, its commands, its versions."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from shardplan import __version__
from shardplan.costmodel.catalog import load_device
from shardplan.search.api import search
from shardplan.search.main import run

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = _BLOCK.findall(TEXT)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """The example, under the name that its commands give it."""
    (text,) = [body for kind, body in BLOCKS if kind == "toml"]
    assert len(text.splitlines()) <= 10
    path = tmp_path / "910b2-1500.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_is_a_device_that_computes_slower(device: Path) -> None:
    """Every rate is that of the 910B2 at its lower clock, all else its own."""
    own, base = load_device(device), load_device("910b2")
    slower = 1500 / 1800
    assert own.clock_hz == pytest.approx(base.clock_hz * slower)
    assert own.vector_flop_per_s == pytest.approx(base.vector_flop_per_s * slower)
    assert own.l2_bytes_per_s == pytest.approx(base.l2_bytes_per_s * slower)
    for dtype in ("fp16", "bf16", "int8", "int4"):
        assert own.flop_per_s[dtype] == pytest.approx(base.flop_per_s[dtype] * slower)
    assert own.hbm_bytes_per_s == base.hbm_bytes_per_s
    question = {"model": "llama-3.1-8b", "cluster": "atlas-800t-a2", "cards": 1}
    slow, fast = (search(**question, device=str(one)) for one in (device, "910b2"))  # type: ignore[arg-type]
    assert slow.plan.cluster.device == own.name
    assert slow.plan.performance.prefill_step_s > fast.plan.performance.prefill_step_s


def test_the_commands_about_it_run(
    device: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand there, beside the file."""
    monkeypatch.chdir(device.parent)
    lines = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("shardplan ")]
    assert len(commands) == 2
    for command in commands:
        assert run(command) == 0, command
        assert "910b2-1500" in capsys.readouterr().out


def test_the_test_command_is_the_one_of_ci() -> None:
    """Told once more, in the same words."""
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert last in TEXT.splitlines()


def test_the_version_and_the_licence_are_told_alike_everywhere() -> None:
    """One place holds the version; the others follow."""
    assert f"\nversion: {__version__}\n" in CITATION
    newest = re.findall(r"^## \[([^\]]+)\]", CHANGELOG, re.MULTILINE)
    assert newest[0] == "Unreleased" or newest[0] == __version__
    assert __version__ in CHANGELOG
    (licence,) = re.findall(r'^license = "(.+)"$', PYPROJECT, re.MULTILINE)
    assert f"\nlicense: {licence}\n" in CITATION
    assert licence == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_interpreters_that_are_told_are_those_that_the_metadata_names() -> None:
    """In CONTRIBUTING.md, in the classifiers, and as the least one."""
    named = re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    assert f"Python {', '.join(named[:-1])} or {named[-1]}" in TEXT
    assert f'requires-python = ">={named[0]}"' in PYPROJECT
