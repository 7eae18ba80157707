"""What a user installs: every package, every data file, nothing that the metadata leaves out."""

from __future__ import annotations

import ast
import email
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import shardplan

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("costmodel", "models", "search")
TOP_FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "README.zh-CN.md",
    "SECURITY.md",
)
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
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of what a clone holds, and the wheel made of the sdist."""
    source = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*TOP_FILES, "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "docs", "tests", *LAYERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    out = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel."""
    (found,) = built.glob("*.whl")
    return found


def _package_files() -> set[str]:
    """Every file of the packages, by its path below the root of a clone."""
    folders = [ROOT / layer for layer in LAYERS]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in (ROOT / "src" / "shardplan").iterdir() if path.is_file()]
    here = [path for path in files if "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in here}


@pytest.mark.slow
def test_the_sdist_holds_the_sources_once(built: Path) -> None:
    """Packages, pages and what tells about them; no tests, no links, no data file twice."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        members = [one for one in files.getmembers() if not one.isdir()]
    assert all(one.isreg() for one in members)
    names = [one.name.partition("/")[2] for one in members]
    made = {"PKG-INFO", "setup.cfg"}
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    ours = [name for name in names if name not in made and ".egg-info/" not in name]
    expected = _package_files() | pages | {*TOP_FILES, "pyproject.toml", "MANIFEST.in"}
    assert sorted(ours) == sorted(expected)


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """Modules and data of whatever suffix, and nothing else but the wheel's own metadata."""
    expected = {f"shardplan/{name.removeprefix('src/shardplan/')}" for name in _package_files()}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in held if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in held)


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    """Version, licence, interpreters, extras, and the command that `pipx run` starts."""
    with zipfile.ZipFile(wheel) as files:
        (info,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(files.read(info))
        points = files.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert about["Version"] == shardplan.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(about.get_all("Provides-Extra", [])) == {*extras}
    assert "[console_scripts]\nshardplan = shardplan.search.main:main\n" in points
    assert wheel.name == f"shardplan-{shardplan.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of a fresh environment with the wheel in it; dependencies are those of here."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    program = folder / ("Scripts" if os.name == "nt" else "bin") / "shardplan"
    install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", str(wheel)]
    subprocess.run([str(program.with_name("python")), *install], check=True)
    (site,) = folder.glob("**/site-packages")
    (site / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return program


@pytest.mark.slow
def test_the_installed_command_works_away_from_the_sources(installed: Path, tmp_path: Path) -> None:
    """What it is, that it is whole, and the way from a search to start scripts."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def output(*arguments: str) -> str:
        done = subprocess.run(
            [str(installed), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert output("--version") == f"shardplan {shardplan.__version__}\n"
    health = json.loads(output("doctor", "--json"))
    states = {(one["part"], one["name"]): one["state"] for one in health["checks"]}
    assert health["ok"]
    assert states["package", "shardplan"] == "ok"
    output("search", "--model", "llama-3.1-8b", "--cluster", "atlas-800t-a2", "--out", "plan")
    output("verify", "plan/plan.json")
    output("emit", "plan/plan.json", "--target", "vllm-ascend", "--out", "deploy")
    assert any((tmp_path / "deploy").glob("serve*.sh"))


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
