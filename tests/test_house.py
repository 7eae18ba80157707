"""The house rules that no linter checks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardplan.costmodel.calibration import calibration_names, load_calibration

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".ci", "costmodel", "docs", "models", "results", "search", "src", "tests")
TEXT = {"", ".css", ".csv", ".html", ".js", ".json", ".md", ".toml", ".py"}
MAX_LINES = 400
HEAVY = {"matplotlib", "optuna", "pandas", "rich", "scipy"}


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, links and caches left out, and what runs wrote (`results/runs`)."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or entry.name == "__pycache__" or entry == ROOT / "results" / "runs":
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _files() -> list[Path]:
    top = [entry for entry in sorted(ROOT.iterdir()) if entry.is_file()]
    folders = [ROOT / name for name in FOLDERS if (ROOT / name).is_dir()]
    return top + [file for folder in folders for file in _walk(folder)]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON = [file for file in _files() if file.suffix == ".py"]
PRODUCT = [file for file in PYTHON if not _name(file).startswith("tests/")]


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_a_python_file_says_what_it_is_for_and_stays_short(path: Path) -> None:
    """A module docstring first, at most 400 lines, and no relative import."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert ast.get_docstring(tree), "starts without a docstring"
    assert len(text.splitlines()) <= MAX_LINES
    assert [node.lineno for node in imports if node.level] == []


def _loaded_on_import(tree: ast.Module) -> set[str]:
    """Top-level names of what a module imports when it is itself imported."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return names


def test_imports_are_told_apart_by_when_they_run() -> None:
    """Only what runs at import counts: not a function's own imports, not those for types."""
    text = """
import os.path
if TYPE_CHECKING:
    import torch
else:
    import json
try:
    from scipy.optimize import milp
except ImportError:
    pass
def late():
    import pandas
"""
    assert _loaded_on_import(ast.parse(text)) == {"os", "json", "scipy"}


@pytest.mark.parametrize("path", PRODUCT, ids=_name)
def test_heavy_packages_load_only_where_they_are_used(path: Path) -> None:
    """`shardplan --help` must not wait for pandas or scipy."""
    assert _loaded_on_import(ast.parse(path.read_text(encoding="utf-8"))) & HEAVY == set()


def test_no_file_holds_a_leftover_or_a_path_of_one_machine() -> None:
    """No note to come back later, and nothing that exists on one computer only."""
    words = (
        "TO" + "DO",
        "FIX" + "ME",
        "X" * 3,
        "/wor" + "k",
        "/ho" + "me",
        "/ro" + "ot",
        "/Us" + "ers",
    )
    pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(words)})\b")
    found = [
        f"{_name(path)}:{number}: {match.group()}"
        for path in _files()
        if path.suffix in TEXT
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1)
        for match in pattern.finditer(line)
    ]
    assert found == []


def test_every_calibration_says_where_its_coefficients_come_from() -> None:
    """Each section has a source, and an error on unseen rows wherever rows were kept out.

    A section without coefficients of its own names the one that it takes them from.
    """
    sections = [
        (name, section)
        for name in calibration_names()
        for section in load_calibration(name).sections.values()
    ]
    assert sections
    for name, section in sections:
        where = f"{name}: {section.name}"
        assert section.source.strip(), where
        borrowed = section.kind in ("derived", "assumed") and section.source.startswith("like ")
        assert section.coefficients or borrowed, where
        if section.rows_held_out:
            assert 0 <= section.median_error <= section.p90_error, where
