"""Files that are read without their weights, and what is refused of a file."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardplan.models.errors import InputError

pytest.importorskip("onnx")
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.models.frontends import onnx_cases as cases

from shardplan.models.frontends.onnx_file import open_onnx
from shardplan.models.frontends.onnx_graph import read_onnx


def _saved(path: Path, change: Callable[[Any], None] | None = None, **options: Any) -> Path:
    """A product of two matrices, changed and saved again."""
    cases.matmul2(path, hidden=512)
    model = onnx.load(path)
    if change is not None:
        change(model)
    onnx.save(model, path, **options)
    return path


OUTSIDE: dict[str, Any] = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 16}


@pytest.mark.parametrize("options", [{}, OUTSIDE], ids=["inside", "external data"])
def test_weights_stay_on_disk_and_are_mapped_where_wanted(
    options: dict[str, Any], tmp_path: Path
) -> None:
    path = _saved(tmp_path / "m.onnx", **options)
    file = open_onnx(path)
    assert len(file.proto.SerializeToString()) < 2048
    for tensor in onnx.load(path).graph.initializer:
        found = file.weight(tensor.name)
        assert isinstance(found, np.memmap)
        assert np.array_equal(found, numpy_helper.to_array(tensor))


def test_typed_payloads_are_read_too(tmp_path: Path) -> None:
    values = cases.numbers(64, 64)

    def change(model: Any) -> None:
        del model.graph.initializer[:]
        floats = helper.make_tensor("w1", TensorProto.FLOAT, (16, 512), range(16 * 512))
        halves = numpy_helper.from_array(values.astype(np.float16), "half")
        model.graph.initializer.extend([floats, halves])
        model.graph.initializer.append(numpy_helper.from_array(cases.numbers(512, 8), "w2"))

    file = open_onnx(_saved(tmp_path / "m.onnx", change))
    assert np.array_equal(file.weight("w1").reshape(-1), np.arange(16 * 512))
    assert np.array_equal(file.weight("half"), values.astype(np.float16))


def _node(op: str, inputs: list[str], **attributes: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.graph.node[1].CopyFrom(helper.make_node(op, inputs, ["y"], "second", **attributes))

    return change


def _opset(version: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.opset_import[0].version = version

    return change


def _branch(model: Any) -> None:
    inner = helper.make_graph([], "inner", [], [])
    model.graph.node.append(
        helper.make_node("If", ["h"], ["z"], "choice", then_branch=inner, else_branch=inner)
    )


def _complex(model: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.complex64), "phases"))


def _complex_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.COMPLEX64


def _symbol(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"


def _shape_of_weight(model: Any) -> None:
    """A small weight, whose bytes stay in the message."""
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "small"))
    model.graph.initializer[-1].dims[0] = 5


def _typed_too_short(model: Any) -> None:
    weight = next(one for one in model.graph.initializer if one.name == "w2")
    weight.ClearField("raw_data")
    weight.float_data.extend([1.0, 2.0])


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "no rule": (_node("Hardmax", ["h"]), "no rule for the operator Hardmax.*node=second"),
    "unknown operator": (_node("Magic", ["h"]), "no rule for the operator Magic.*node=second"),
    "foreign": (_node("Magic", ["h"], domain="mine"), "another domain.*node=second.*mine.Magic"),
    "shapes": (_node("MatMul", ["h", "w1"]), "onnx refuses the node.*node=second"),
    "made later": (_node("MatMul", ["nothing", "w2"]), "made before it, not nothing.*node=second"),
    "data-dependent": (_node("NonZero", ["h"]), "shape of y does not follow.*node=second"),
    "old": (_opset(11), "opsets 13 to .*opset=11"),
    "new": (_opset(999), "opsets 13 to .*opset=999"),
    "control flow": (_branch, "control flow.*node=choice, operator=If"),
    "complex weight": (_complex, "not complex.*initializer=phases"),
    "complex input": (_complex_input, "not complex.*tensor=x"),
    "bytes of a weight": (_shape_of_weight, r"as many bytes.*initializer=small, shape=\[5, 4\]"),
    "elements of a weight": (_typed_too_short, "as many elements.*initializer=w2"),
    "symbol": (_symbol, "symbolic dim needs a size.*input=x, dim=rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_error_that_names_its_place(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as error:
        read_onnx(_saved(tmp_path / "m.onnx", change))
    assert "m.onnx" in str(error.value)


def test_symbols_take_the_sizes_that_are_given(tmp_path: Path) -> None:
    graph = read_onnx(_saved(tmp_path / "m.onnx", _symbol), {"rows": 5}).graph
    assert graph.tensors["y"].shape == (5, 8)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path / "m.onnx")
    whole = path.read_bytes()
    for cut in (0, 1, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"m\.onnx"):
            read_onnx(path)
    for bad in (b"\x00" * 64, b"\xff" * 64, b"{}", whole[:8] + b"\xff" * 40 + whole[48:]):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"m\.onnx"):
            read_onnx(path)
    for other in (tmp_path, tmp_path / "none.onnx"):
        with pytest.raises(InputError, match=r"file="):
            read_onnx(other)


def test_any_byte_of_a_file_may_be_wrong(tmp_path: Path) -> None:
    """Read, or refused: never another error."""
    path = cases.mlp(tmp_path / "m.onnx")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=3):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(InputError):
            read_onnx(path)


def test_external_data_that_is_missing_short_or_elsewhere_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path / "m.onnx", **OUTSIDE)
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[:-8])
    with pytest.raises(InputError, match=r"ends before its weight.*initializer=w"):
        read_onnx(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InputError, match=r"data is missing.*location=w\.bin"):
        read_onnx(path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../w.bin"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"beside the model.*location=\.\./w\.bin"):
        read_onnx(path)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _saved(tmp_path / "m.onnx")
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "onnx":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"shardplan\[onnx\]"):
        open_onnx(path)


def test_scalars_that_numpy_lacks_are_not_computed_with(tmp_path: Path) -> None:
    """A bfloat16 scale stays what it is; a chain of thousands of nodes is read."""
    scale = helper.make_tensor("scale", TensorProto.BFLOAT16, [], [0.5])
    nodes = [helper.make_node("Cast", ["scale"], ["s"], "cast", to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Mul", ["x", "s"], ["y0"], "mul")]
    for index in range(3000):
        pair = [f"y{index}", f"y{index}"]
        nodes.append(helper.make_node("Add", pair, [f"y{index + 1}"], f"add{index}"))
    nodes.append(helper.make_node("MatMul", ["y3000", "y2999"], ["z"], "product"))
    path = cases.save(tmp_path / "m.onnx", nodes[1:], {"x": (4, 4), "s": ()}, ["z"], {})
    model = onnx.load(path)
    model.graph.node.insert(0, nodes[0])
    del model.graph.input[1]
    model.graph.initializer.append(scale)
    onnx.save(model, path)
    graph = read_onnx(path)
    assert graph.raw.operators[0].name == "cast"
    assert len(graph.raw.operators) == 3003
