"""What a user installs: every package, every data file, nothing that the metadata leaves out."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import shardplan

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("costmodel", "models", "search")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _requirements(lines: list[str]) -> set[str]:
    """Import names of requirement lines (`numpy>=1.26` -> `numpy`)."""
    return {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in lines}


def _imported() -> set[str]:
    """Top-level names that the three packages import, at the top or inside functions."""
    names: set[str] = set()
    for folder in LAYERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.partition(".")[0])
    return names - {"shardplan"} - sys.stdlib_module_names


def test_every_package_folder_is_listed() -> None:
    """A folder that `packages` leaves out works here and is missing where it is installed."""
    folders = {
        ".".join(("shardplan", *path.parent.relative_to(ROOT).parts))
        for layer in LAYERS
        for path in (ROOT / layer).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {"shardplan", *folders}


def test_every_module_lies_in_a_package_folder() -> None:
    """A folder of modules without `__init__.py` would be left out of the wheel."""
    modules = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    assert modules
    assert [path for path in modules if not (path.parent / "__init__.py").is_file()] == []


@pytest.mark.parametrize("layer", LAYERS)
def test_the_links_are_relative_and_lead_to_the_folders(layer: str) -> None:
    """An absolute link would point at the machine that made it."""
    link = ROOT / "src" / "shardplan" / layer
    assert os.readlink(link) == f"../../{layer}"
    assert link.resolve() == ROOT / layer


def test_what_is_imported_is_what_is_declared() -> None:
    """No import that an install does not bring, no dependency that nothing uses."""
    project = PYPROJECT["project"]
    core = _requirements(project["dependencies"])
    extras = project["optional-dependencies"]
    names = ("torch", "onnx", "plots", "parquet")
    optional = _requirements([line for name in names for line in extras[name]])
    brought_along = {"torch_npu", "transformers", "onnxruntime"}  # by the user's own environment
    imported = _imported()
    assert imported - core - optional - brought_along == set()
    assert core - imported == set()


def test_every_public_name_loads() -> None:
    """`shardplan.<name>` for each name that the package promises."""
    for name in shardplan.__all__:
        assert getattr(shardplan, name) is not None


def test_search_is_a_function_and_a_package() -> None:
    """`shardplan.search(...)` and `import shardplan.search.main` in one program."""
    main = importlib.import_module("shardplan.search.main")
    assert sys.modules["shardplan.search"].main is main
    assert callable(shardplan.search)
    with pytest.raises(TypeError, match="no_such_argument"):
        shardplan.search("llama-65b", "atlas-800t-a2", no_such_argument=1)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    """As for any module, so that `hasattr` and `from shardplan import` behave."""
    assert not hasattr(shardplan, "no_such_name")


def test_entry_points_lead_to_something() -> None:
    """Each script and plug-in that the metadata names can be loaded."""
    project = PYPROJECT["project"]
    groups = [project["scripts"], *project.get("entry-points", {}).values()]
    for target in (value for group in groups for value in group.values()):
        assert metadata.EntryPoint(name="x", value=target, group="x").load() is not None


def test_the_readme_and_ci_run_the_same_test_command() -> None:
    """One command for people and for CI, so that neither rots."""
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert last.endswith("-m tests")
    assert last in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy of what a clone holds."""
    source = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("src", *LAYERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """Modules and data of whatever suffix, and nothing else but the wheel's own metadata."""
    expected = {
        f"shardplan/{path.relative_to(ROOT).as_posix()}"
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {"shardplan/__init__.py", "shardplan/py.typed"}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in held if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in held)


@pytest.mark.slow
def test_the_wheel_works_beside_a_users_own_models_folder(wheel: Path, tmp_path: Path) -> None:
    """Most machine-learning repositories have a `models/`; ours must not take its place."""
    site, cwd = tmp_path / "site", tmp_path / "project"
    zipfile.ZipFile(wheel).extractall(site)
    for name in LAYERS:
        (cwd / name).mkdir(parents=True)
        (cwd / name / "__init__.py").write_text(f"NAME = 'my own {name}'\n", encoding="utf-8")
    program = (
        "import models, search, costmodel, shardplan\n"
        "print(models.NAME, search.NAME, costmodel.NAME, sep=', ')\n"
        "print(shardplan.load_cluster('atlas-800t-a2').ranks)\n"
        "print(shardplan.load_model('llama-65b').layers)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["my own models, my own search, my own costmodel", "8", "80"]
