"""Every command and example that the pages show is run as it stands there.

In the order of the pages, in one folder, so that a command may read what one before it wrote. What
a page takes from its reader (a table of points, a profile) lies there first; commands for hardware
that a test does not have are named below and left out.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from docs.outputs import FILLED, lay_out

from shardplan.search.main import run
from tests.search.onnx_files import mlp

ROOT = Path(__file__).resolve().parent.parent
APART = ("capture.md", "emitters.md", "onnx.md", "plugins.md", "reference.md", "torch.md")
"""Pages with tests of their own: examples that need a package or a model of the reader's, and the
reference, which is no place for examples."""
PAGES = (
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in APART),
)
NEEDS_A_DEVICE = ("shardplan profile --device npu",)
_COMMAND = re.compile(r"`(shardplan [a-z][^`]*)`")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Commands of a page, in its tables, its sentences and its shell blocks.

    Not in the blocks of pages that show outputs: tests/test_pages.py runs those.
    """
    text = page.read_text(encoding="utf-8")
    shell = [body for kind, body in _BLOCK.findall(text) if kind == "sh" and page not in FILLED]
    lines = [line.strip() for body in shell for line in body.replace("\\\n", " ").splitlines()]
    found = [line for line in lines if line.startswith("shardplan ")]
    found += [one.replace("\\|", "|") for one in _COMMAND.findall(_BLOCK.sub("", text))]
    names = [one for one in found if len(one.split()) > len(("shardplan", "search"))]
    return [one for one in dict.fromkeys(names) if not one.startswith(NEEDS_A_DEVICE)]


def _block(page: str, kind: str) -> str:
    """The first block of a kind on a page of docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return next(str(body) for found, body in _BLOCK.findall(text) if found == kind)


def test_the_pages_have_commands() -> None:
    """So that a page written otherwise does not pass unseen."""
    assert len(commands(PAGES[0])) > 20


@pytest.mark.slow
def test_every_command_of_the_pages_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    pytest.importorskip("onnx")
    mlp(tmp_path / "mlp.onnx")
    (tmp_path / "workload.toml").write_text(_block("simulate.md", "toml"), encoding="utf-8")
    once = {command: page for page in reversed(PAGES) for command in commands(page)}
    for page in PAGES:
        for command in (one for one in commands(page) if once[one] == page):
            code = run(shlex.split(command)[1:])
            told = capsys.readouterr().err
            assert code == 0, f"{page.name}: {command}: {told}"
    assert {"plan.json", "report.html"} <= {one.name for one in (tmp_path / "plan").iterdir()}


def python_of(page: Path) -> str:
    """The Python examples of a page, one after another."""
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return "\n".join(body for kind, body in blocks if kind == "python")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_of(page)], ids=lambda page: page.name
)
def test_every_python_example_of_the_pages_runs(page: Path, tmp_path: Path) -> None:
    code = python_of(page)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
