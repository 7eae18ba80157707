"""The package of docs/plugins.md, installed beside shardplan: its front end and its target work."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import shardplan
from shardplan.models.errors import InputError
from shardplan.models.frontends.registry import GROUP as FRONTENDS
from shardplan.search.main import run
from shardplan.search.oplevel.ask import OperatorResult
from shardplan.search.targets import GROUP as EMITTERS
from shardplan.search.targets import target_names

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "plugins" / "layers_text"
PAGE = (ROOT.parent / "docs" / "plugins.md").read_text(encoding="utf-8")
CLUSTER = ["--cluster", "atlas-800t-a2"]
NETWORK = "input rows 4096\ndense 16384\nrelu\ndense 4096\n"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the package as an installer leaves it, and a network."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = tmp_path / "site"
    info = site / "layers_text-1.0.dist-info"
    info.mkdir(parents=True)
    name, version = project["name"], project["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    source = (PACKAGE / "layers_text.py").read_text(encoding="utf-8")
    (site / "layers_text.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.layers").write_text(NETWORK, encoding="utf-8")
    return tmp_path


def commands() -> list[list[str]]:
    """Those of the page."""
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("shardplan ")]


@pytest.mark.usefixtures("installed")
def test_the_commands_of_the_page_run(capsys: Capture) -> None:
    """From a file of the package's own to one of its target's, proven between."""
    found = commands()
    assert [one[0] for one in found] == ["search", "verify", "emit"]
    for command in found:
        assert run(command) == 0, command
    assert "all hold" in capsys.readouterr().out
    rows = Path("out/splits.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "operator;times;split"
    assert [row.split(";")[0] for row in rows[1:]] == ["dense0", "relu1", "dense2"]


@pytest.mark.usefixtures("installed")
def test_the_python_of_the_package_is_a_model_like_any_other() -> None:
    """By path, with the sizes of its names."""
    found = shardplan.search(Path("net.layers"), "atlas-800t-a2", sizes={"rows": 512}, mesh=(4,))
    assert isinstance(found, OperatorResult)
    assert found.plan.verify().passed
    assert "splits-csv" in target_names()


@pytest.mark.usefixtures("installed")
def test_what_the_package_refuses_is_one_line(capsys: Capture) -> None:
    """Its own errors, and plans of a kind that its target does not take."""
    assert run(["search", "--model", "net.layers", *CLUSTER]) == 2
    assert "give --sizes rows=..." in capsys.readouterr().err
    Path("bad.layers").write_text("input 4 4\nconv 3\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: conv"):
        shardplan.load_graph("bad.layers")
    asked = ["search", "--model", "llama-3.1-8b", *CLUSTER, "--cards", "1", "--out", "d", "--json"]
    assert run(asked) == 0
    capsys.readouterr()
    assert run(["emit", "d/plan.json", "--target", "splits-csv", "--out", "e"]) == 2
    assert "splits-csv takes plans of: operators" in capsys.readouterr().err
    assert not Path("e").exists()


def test_the_page_shows_the_package() -> None:
    """Every line of it, and both groups."""
    for file in ("pyproject.toml", "layers_text.py"):
        assert (PACKAGE / file).read_text(encoding="utf-8") in PAGE
    assert FRONTENDS in PAGE
    assert EMITTERS in PAGE
