"""Front ends of other packages: found by the ending of a file, checked in what they give."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from tests.search.oplevel.graphs import Sizes, decoder, mlp

import shardplan
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError
from shardplan.models.frontends.registry import GROUP, has_reader, holds_graph
from shardplan.models.opgraph import OpGraph
from shardplan.models.spec import ModelSpec

HERE = "tests.models.frontends.test_registry"


def read_mlp(path: Path, sizes: Mapping[str, int]) -> OpGraph:
    """Whatever the file holds."""
    return mlp(sizes.get("rows", 64), 256, 512)


def read_spec(path: Path, sizes: Mapping[str, int]) -> ModelSpec:
    """The sizes of a model."""
    return load_model("llama-3.1-8b")


def read_nothing(path: Path, sizes: Mapping[str, int]) -> Any:
    """Neither a graph nor a model."""
    return {"path": path}


def read_broken(path: Path, sizes: Mapping[str, int]) -> OpGraph:
    """A graph that reads what nothing makes."""
    graph = decoder(Sizes(layers=1))
    return OpGraph(
        name="broken", tensors=graph.tensors, operators=graph.operators[1:], outputs=graph.outputs
    )


def read_fails(path: Path, sizes: Mapping[str, int]) -> OpGraph:
    """A fault of the package."""
    raise KeyError("no such thing")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endings of this module, and one of a package that is gone."""
    values = {
        one.removeprefix("read_"): f"{HERE}:{one}" for one in globals() if one.startswith("read_")
    }
    values |= {"gone": "no.such.module:read", "onnx": f"{HERE}:read_mlp"}
    found = EntryPoints(EntryPoint(name=n, value=v, group=GROUP) for n, v in values.items())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found.select(group=group))


@pytest.mark.usefixtures("registered")
def test_a_front_end_is_found_by_the_ending() -> None:
    """Graphs for `load_graph`, models for `load_model`; sizes reach it."""
    assert has_reader(Path("a/net.mlp"))
    assert holds_graph("a/net.MLP")
    assert not has_reader(Path("net.other"))
    graph = shardplan.load_graph("net.mlp", sizes={"rows": 32})
    assert graph.tensors["x"].shape == (1, 32, 256)
    assert shardplan.load_model("net.spec") == load_model("llama-3.1-8b")


@pytest.mark.usefixtures("registered")
def test_built_in_endings_and_names_of_presets_are_not_taken_over(tmp_path: Path) -> None:
    """Nor does a version look like an ending."""
    assert not has_reader(Path("net.onnx"))
    assert not any(has_reader(Path(name)) for name in ("llama-3.1-8b", "glm-4.5", "minimax-m2.5"))
    pytest.importorskip("onnx")
    with pytest.raises(InputError, match="no such file"):
        shardplan.load_graph(tmp_path / "net.onnx")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("ending", "match"),
    [
        ("nothing", "gives dict, not OpGraph or ModelSpec"),
        ("broken", "made before they are read"),
        ("fails", "KeyError: 'no such thing'"),
        ("gone", "ModuleNotFoundError"),
        ("spec", "the sizes of a model"),
        ("strange", "registered front end"),
    ],
)
def test_a_front_end_that_fails_is_told_by_name(ending: str, match: str) -> None:
    """A broken package is no traceback."""
    with pytest.raises(InputError, match=match):
        shardplan.load_graph(f"net.{ending}")


@pytest.mark.usefixtures("registered")
def test_a_graph_that_is_no_decoder_is_no_model() -> None:
    """As that of any other file."""
    with pytest.raises(InputError, match="causal decoder"):
        load_model("net.mlp")


def test_names_of_models_do_not_look_for_packages() -> None:
    """That takes as long as all of a short command."""
    code = "import sys, shardplan; shardplan.load_model('llama-3.1-8b')\n"
    code += "assert 'importlib.metadata' not in sys.modules"
    src = Path(shardplan.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(src)!r}); {code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
