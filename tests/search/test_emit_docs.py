"""docs/emitters.md: the example is a package that works, and the table names every target."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.search.emit_cases import emit_plan

from shardplan.search.emit.atc import files
from shardplan.search.targets import BUILT_IN, GROUP, OF_GRAPHS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "emitters.md").read_text(encoding="utf-8")


def _block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return str(found)


def _install(folder: Path) -> None:
    """The package of the page, as an installer leaves it."""
    (folder / "weights_csv.py").write_text(_block("python"), encoding="utf-8")
    points = tomllib.loads(_block("toml"))["project"]["entry-points"][GROUP]
    info = folder / "weights_csv-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weights-csv\nVersion: 1.0\n")
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize(("pp", "code"), [(1, 0), (2, 2)])
def test_the_pages_package_is_a_target(tmp_path: Path, pp: int, code: int) -> None:
    """Installed beside shardplan and called from the command line."""
    _install(tmp_path)
    emit_plan(tp=8, pp=pp, stage_layers=(40, 40) if pp > 1 else ()).save(tmp_path / "plan.json")
    start = "import sys; from shardplan.search.main import main; main()"
    words = ["emit", "plan.json", "--target", "weights-csv", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", start, *words, "--option", "separator=;"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    if code:
        assert "weights-csv describes one stage (pp=2); search with pp=1" in done.stderr
        assert not (tmp_path / "out").exists()
        return
    lines = (tmp_path / "out" / "weights.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "name;shape;cut"
    assert "model.layers.0.self_attn.o_proj.weight;8192x8192;-xtp0" in lines


def test_the_page_and_readme_name_every_target() -> None:
    """And the help of the command."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    help_text = (ROOT / "search" / "cli_plan.py").read_text(encoding="utf-8")
    for name in {**BUILT_IN, **OF_GRAPHS}:
        assert f"| `{name}`" in TEXT
        assert name in readme
        assert name in help_text


def test_the_options_of_atc_are_named() -> None:
    """All that its function takes."""

    for name in list(inspect.signature(files).parameters)[1:]:
        assert f"`{name}`" in TEXT
