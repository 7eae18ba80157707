"""A `.pt2` file is data: nothing in it is unpickled, evaluated, loaded as code or called."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardplan.models.errors import InputError
from shardplan.models.frontends.load import load_graph

torch = pytest.importorskip("torch")

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small model with a buffer that is no parameter, and dims that are symbols."""

    class Small(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch may be missing
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
            self.register_buffer("scale", torch.ones(8), persistent=False)

        def forward(self, x: Any) -> Any:
            y = self.down(torch.relu(self.up(x))) * self.scale
            return y.reshape(x.shape[0] * x.shape[1], 8)

    dims = ({0: torch.export.Dim("rows", min=2, max=64), 1: torch.export.Dim("tokens", max=99)},)
    path = tmp_path_factory.mktemp("pt2") / "small.pt2"
    torch.export.save(
        torch.export.export(Small(), (torch.ones(3, 4, 8),), dynamic_shapes=dims), path
    )
    return path.read_bytes()


def _changed(data: bytes, path: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> Path:
    """The archive with its members changed by their names inside, and some added."""
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
        top = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
        for name, content in more.items():
            new.writestr(f"{top}/{name}", content)
    return path


def _in_json(member: str, edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if name != member:
            return content
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()

    return change


def _kept(_name: str, content: bytes) -> bytes:
    return content


def test_what_torch_writes_is_read(archive: bytes, tmp_path: Path) -> None:
    """With its symbols (which torch calls otherwise than dims), under a name of any kind."""
    path = tmp_path / "any name.pt2"
    path.write_bytes(archive)
    with pytest.raises(InputError, match="size of 'rows'") as told:
        load_graph(path, sizes={"rows": 4, "tokens": 2})
    symbols = told.value.hint.partition(": ")[2].split(", ")
    graph = load_graph(path, sizes=dict.fromkeys(symbols, 4))
    assert [one.flop for one in graph.operators if one.flop] == [2.0 * 4 * 4 * 8 * 16] * 2
    assert _changed(archive, tmp_path / "same.pt2", _kept).exists()
    load_graph(tmp_path / "same.pt2", sizes=dict.fromkeys(symbols, 4))


@pytest.mark.parametrize("member", ["data/weights/weight_0", "data/sample_inputs/model.pt"])
def test_a_pickle_is_not_loaded(archive: bytes, tmp_path: Path, member: str) -> None:
    """Neither as a weight that says it is one, nor where torch falls back on it."""
    hit = tmp_path / "hit"
    held = io.BytesIO()
    torch.save(Evil(hit), held)

    def change(name: str, content: bytes) -> bytes:
        if name == member:
            return held.getvalue()
        if name == WEIGHTS and "weight" in member:
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return content

    with pytest.raises(InputError):
        load_graph(_changed(archive, tmp_path / "evil.pt2", change))
    assert not hit.exists()


@pytest.mark.parametrize("prefix", ["custom_obj_", "opaque_obj_"])
def test_an_object_is_not_loaded(archive: bytes, tmp_path: Path, prefix: str) -> None:
    """Constants that are no tensors are pickles."""
    hit = tmp_path / "hit"

    def edit(value: Any) -> None:
        next(iter(value["config"].values()))["path_name"] = f"{prefix}0"

    content = {f"data/constants/{prefix}0": pickle.dumps(Evil(hit))}
    for more in (content, {}):
        path = _changed(archive, tmp_path / "evil.pt2", _in_json(CONSTANTS, edit), **more)
        with pytest.raises(InputError, match="plain tensors"):
            load_graph(path)
    assert not hit.exists()


@pytest.mark.parametrize(
    "member", ["data/aotinductor/model/x.so", "data/weights/model.pt", "data/constants/model.pt"]
)
def test_a_member_of_another_kind_is_refused(archive: bytes, tmp_path: Path, member: str) -> None:
    """Compiled libraries, and weights of older versions, which are pickles."""
    path = _changed(archive, tmp_path / "evil.pt2", _kept, **{member: b"x"})
    with pytest.raises(InputError, match="plain tensors"):
        load_graph(path)


def _expression(text: str) -> Callable[[Any], None]:
    def edit(value: Any) -> None:
        sizes = value["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = text

    return edit


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir({hit!r})",
        "sympify(\"__import__('os').mkdir({hit!r})\")",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "Symbol.__class__",
        "Pow(Integer(10), Pow(Integer(10), Integer(10)))",
        "Integer(1) ** Integer(2)",
        "Add(" * 500 + ")" * 500,
        "(",
    ],
)
def test_a_size_is_not_evaluated(archive: bytes, tmp_path: Path, text: str) -> None:
    """Symbols, numbers and arithmetic, as torch writes them; sympy would run anything."""
    hit = tmp_path / "hit"
    edit = _expression(text.replace("{hit!r}", repr(str(hit))))
    with pytest.raises(InputError, match="plain tensors"):
        load_graph(_changed(archive, tmp_path / "evil.pt2", _in_json(MODEL, edit)))
    assert not hit.exists()


@pytest.mark.parametrize(
    "operator", ["torch.ops.load_library", "torch.ops.import_module", "torch.hub.load", "os.mkdir"]
)
def test_an_operator_is_one_of_the_registry(archive: bytes, tmp_path: Path, operator: str) -> None:
    """torch looks names up from its own module."""

    def edit(value: Any) -> None:
        value["graph_module"]["graph"]["nodes"][0]["target"] = operator

    with pytest.raises(InputError, match="plain tensors"):
        load_graph(_changed(archive, tmp_path / "evil.pt2", _in_json(MODEL, edit)))


def test_a_name_is_a_name(archive: bytes, tmp_path: Path) -> None:
    """torch writes names into code that it compiles."""
    hit = tmp_path / "hit"
    name = f"x=__import__('os').mkdir({str(hit)!r})"

    def edit(value: Any) -> None:
        value["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = name

    with pytest.raises(InputError, match="plain tensors"):
        load_graph(_changed(archive, tmp_path / "evil.pt2", _in_json(MODEL, edit)))
    assert not hit.exists()


def test_a_loader_that_fails_says_one_line(
    archive: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own tracebacks are not for the reader."""

    def edit(value: Any) -> None:
        del value["graph_module"]["graph"]["nodes"][0]

    with pytest.raises(InputError, match=r"torch\.export\.load"):
        load_graph(_changed(archive, tmp_path / "evil.pt2", _in_json(MODEL, edit)))
    assert "Traceback" not in capfd.readouterr().err
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
