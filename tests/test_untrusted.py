"""What comes from outside is data: the sources load no pickle, evaluate no text, start no shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("costmodel", "models", "search", "src")
SOURCES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))
STATE = ROOT / "search" / "optimizer_state.py"
"""The one module that unpickles, and only names that it lists."""
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "marshal.loads",
    "pickle.load", "pickle.loads", "shelve.open", "yaml.load", "pd.read_pickle",
    "subprocess.getoutput", "torch.hub.load", "joblib.load", "cloudpickle.loads", "dill.loads",
}  # fmt: skip
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
STARTS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"}


def _faults(text: str, path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            names |= {one.name for one in node.names} if isinstance(node, ast.Import) else set()
            if names & MODULES and path != STATE:
                yield f"{path.name}:{node.lineno}: imports {sorted(names & MODULES)}"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {one.arg: ast.unparse(one.value) for one in node.keywords}
        if name in CALLS:
            yield f"{path.name}:{node.lineno}: {name}"
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            yield f"{path.name}:{node.lineno}: torch.load of more than weights"
        if given.get("allow_pickle", "False") != "False" or given.get("shell") == "True":
            yield f"{path.name}:{node.lineno}: {name} with {given}"
        if name in STARTS and not (node.args and _is_list(node.args[0])):
            yield f"{path.name}:{node.lineno}: {name} of a text"


def _is_list(node: ast.expr) -> bool:
    return isinstance(node, ast.List | ast.Name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_sources_run_nothing_that_they_read(path: Path) -> None:
    """No pickle, no `eval`, no shell."""
    assert list(_faults(path.read_text(encoding="utf-8"), path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(f'ls {path}')",
        "os.system(text)",
    ],
)
def test_each_rule_is_told(text: str) -> None:
    """The scan sees what it looks for."""
    assert list(_faults(text, ROOT / "x.py"))


def test_what_is_allowed_is_not_told() -> None:
    """Weights alone, lists of words, methods with names of their own."""
    fine = "torch.load(p, weights_only=True)\nsubprocess.run(words)\nmodel.eval()\nmodel.compile()"
    assert not list(_faults(fine, ROOT / "x.py"))
