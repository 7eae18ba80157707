"""What `shardplan doctor` finds in a whole installation, and in ones that are not."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from shardplan import __version__
from shardplan.search import doctor, targets
from shardplan.search.doctor import Check, examine, is_whole
from shardplan.search.main import run

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _requires() -> list[str]:
    """The requirements of pyproject.toml as metadata writes them."""
    extras = PROJECT["optional-dependencies"].items()
    beside = [f"{line}; extra == '{name}'" for name, lines in extras for line in lines]
    return [*PROJECT["dependencies"], *beside]


def _install(monkeypatch: pytest.MonkeyPatch, requires: list[str], python: str = ">=3.11") -> None:
    """A distribution of today's code whose metadata asks for these."""
    own = SimpleNamespace(
        version=__version__,
        requires=requires,
        metadata={"Requires-Python": python},
        locate_file=lambda _name: ROOT / "src" / "shardplan" / "__init__.py",
    )
    real = metadata.Distribution.from_name
    monkeypatch.setattr(
        metadata, "distribution", lambda name: own if name == "shardplan" else real(name)
    )


@pytest.fixture(autouse=True)
def _whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation of today's metadata, whose extras are not imported: torch takes seconds."""
    _install(monkeypatch, _requires())
    real = doctor.told_of
    unloaded = {name: {**told, "imports": []} for name, told in real("extras").items()}
    monkeypatch.setattr(
        doctor, "told_of", lambda kind: unloaded if kind == "extras" else real(kind)
    )


def found(name: str, part: str = "") -> Check:
    """The one row of that name."""
    (row,) = [one for one in examine() if one.name == name and part in ("", one.part)]
    return row


def test_a_whole_installation(capsys: pytest.CaptureFixture[str]) -> None:
    """Every dependency, target, catalogue, extra and tool has its row; exit code 0."""
    assert run(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is True
    assert shown["version"] == __version__
    rows = {(one["part"], one["name"]): one for one in shown["checks"]}
    needed = [Requirement(line) for line in PROJECT["dependencies"]]
    for one in needed:
        row = rows["package", one.name]
        assert (row["state"], row["found"]) == ("ok", metadata.version(one.name))
        assert row["needed"] == str(one.specifier)
    for name in targets.OURS:
        assert rows["entry point", f"target {name}"]["state"] == "ok"
    for name in ("models", "devices", "clusters", "engine profiles", "calibrations", "rules"):
        assert int(rows["data", name]["found"]) > 0
    root = ROOT / "costmodel" / "data" / "calibrations"
    sections = [path for path in root.iterdir() if path.is_dir()]
    sections += [path for one in sections for path in one.iterdir() if path.is_dir()]
    assert int(rows["data", "calibrations"]["found"]) == len(sections)
    assert {name for part, name in rows if part == "extra"} == {*PROJECT["optional-dependencies"]}
    tools = {name for part, name in rows if part == "tool"}
    assert tools == {*doctor.told_of("tools")} > {"atc", "npu-smi", "vllm"}
    assert rows["extra", "dev"]["says"]


def test_the_table_has_a_row_for_each_check(capsys: pytest.CaptureFixture[str]) -> None:
    """Grouped by part, and a closing line."""
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"shardplan {__version__} on ")
    assert lines[-1] == "all that is needed is there"
    rows = [line for line in lines if line.split()[:1] and line.split()[0] in ("ok", "absent")]
    assert len(rows) >= len([one for one in examine() if one.state in ("ok", "absent")])


@pytest.mark.parametrize(
    ("requirement", "says"),
    [
        ("numpy>=99", "another version is needed; pip install 'numpy>=99'"),
        ("no-such-thing>=1", "not installed; pip install 'no-such-thing>=1'"),
    ],
)
def test_a_dependency_that_does_not_fit(
    requirement: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 1, and the command that mends it."""
    _install(monkeypatch, [*_requires(), requirement])
    assert run(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "broken" in shown
    assert says in shown
    assert shown.endswith("something needed is broken\n")
    assert run(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def _refuse(name: str, error: Exception) -> Callable[..., Any]:
    real = importlib.import_module

    def load(module: str, *rest: Any) -> Any:
        if module == name:
            raise error
        return real(module, *rest)

    return load


def test_a_dependency_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, but its library lacks a symbol."""
    error = OSError("libblas.so.3: cannot open\nshared object file")
    monkeypatch.setattr(importlib, "import_module", _refuse("scipy", error))
    row = found("scipy")
    assert row.state == "broken"
    assert "OSError: libblas.so.3: cannot open shared object file" in row.says


def test_an_interpreter_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the metadata's own bound."""
    _install(monkeypatch, _requires(), python=">=4")
    assert found("python").state == "broken"


def test_a_source_tree_that_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is looked at all the same."""

    def none(_name: str) -> Any:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "distribution", none)
    checks = examine()
    assert not is_whole(checks)
    assert (checks[0].name, checks[0].state) == ("shardplan", "broken")
    assert "pip install ." in checks[0].says
    assert {"entry point", "data", "place", "tool"} <= {one.part for one in checks}


def test_code_beside_what_is_installed_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source tree on the path hides the package, whose metadata then tells other bounds."""
    own = metadata.distribution("shardplan")
    monkeypatch.setattr(own, "locate_file", lambda _name: Path(__file__))
    row = found("shardplan")
    assert row.state == "warning"
    assert str(ROOT / "src" / "shardplan") in row.says


def test_extras_that_are_absent_or_unwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said with what they give and how to get them; neither breaks the installation."""
    plots = found("plots").says
    lines = [
        "no-such-plots>=1; extra == 'plots'",
        "numpy>=99; extra == 'onnx'",
        "pytest>=1; extra == 'dev'",
        *(f"no-such-{number}; extra == 'dev'" for number in range(4)),
    ]
    _install(monkeypatch, [*PROJECT["dependencies"], *lines])
    error = OSError("libonnx.so: undefined symbol")
    monkeypatch.setattr(importlib, "import_module", _refuse("numpy", error))
    told = doctor.told_of("extras")
    told["onnx"]["imports"] = ["numpy"]
    monkeypatch.setattr(doctor, "told_of", lambda kind: told if kind == "extras" else {})
    rows = {one.name: one for one in examine() if one.part == "extra"}
    assert rows["plots"].state == "absent"
    assert rows["plots"].says == f"{plots}; pip install 'shardplan[plots]'"
    assert rows["onnx"].state == "warning"
    assert "numpy: OSError: libonnx.so" in rows["onnx"].says
    assert rows["dev"].state == "absent"
    assert rows["dev"].found == f"pytest {metadata.version('pytest')}, without 4 packages"
    assert {one.state for one in rows.values()} <= {"ok", "absent", "warning"}


@pytest.mark.slow
def test_what_an_extra_brings_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module that the data file names can be, where the extra is installed."""
    monkeypatch.undo()
    _install(monkeypatch, _requires())
    rows = {one.name: one for one in examine() if one.part == "extra"}
    assert {one.state for one in rows.values()} <= {"ok", "absent"}
    for name, told in doctor.told_of("extras").items():
        lines = PROJECT["optional-dependencies"][name]
        assert {*told["imports"]} <= {Requirement(line).name for line in lines}


def test_without_packaging_the_rest_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds cannot be read; that is what is broken."""
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    row = found("packaging")
    assert row.state == "broken"
    assert "pip install packaging" in row.says
    assert found("models").state == "ok"


def test_a_plug_in_that_does_not_load_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another package's: a target or a front end."""
    point = EntryPoint(name="toy", value="no.such.module:files", group="any")
    for module in (targets, metadata):
        monkeypatch.setattr(module, "entry_points", lambda group: EntryPoints([point]))
    for name in ("target toy", "front end toy"):
        row = found(name, "plug-in")
        assert row.state == "warning"
        assert "ModuleNotFoundError" in row.says
    assert is_whole(examine())


def test_data_that_cannot_be_read_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file's own error."""

    def fail(_name: str) -> None:
        raise ValueError("presets/llama-65b.json ends early")

    monkeypatch.setattr("shardplan.models.catalog.load_model", fail)
    row = found("models")
    assert row.state == "broken"
    assert "presets/llama-65b.json ends early" in row.says


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search then says its answer and writes nothing."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    row = found("working folder")
    assert row.state == "warning"
    assert "--out" in row.says


def test_tools_are_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they lie, or that they do not."""
    tool = tmp_path / "atc"
    tool.write_text("#!/bin/sh\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found("atc").found == str(tool)
    assert found("vllm").state == "absent"
    assert doctor.is_whole(examine())
