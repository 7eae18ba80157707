"""ONNX files of a few nodes, sound and not, written without an exporter (needs onnx)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

ROWS, WIDTH, FFN = 64, 256, 1024


def mlp(
    path: Path, *, width: int = WIDTH, ffn: int = FFN, rows: int | str = ROWS, **save: Any
) -> Path:
    """y = x + relu(x up) down, in float16; `rows` may be a symbol."""
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(3)
    weights = {
        "up": rng.standard_normal((width, ffn)) / width**0.5,
        "down": rng.standard_normal((ffn, width)) / ffn**0.5,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MatMul", ["b", "down"], ["c"], name="second"),
        helper.make_node("Add", ["x", "c"], ["y"], name="add"),
    ]
    tensors = [numpy_helper.from_array(v.astype(np.float16), n) for n, v in weights.items()]
    return write(path, nodes, tensors, [rows, width], **save)


def write(
    path: Path,
    nodes: list[Any],
    tensors: list[Any],
    shape: list[int | str],
    *,
    opset: int = 18,
    dtype: int | None = None,
    **save: Any,
) -> Path:
    """A model of one input x and one output y of the same shape and type, float16 unless told."""
    import onnx
    from onnx import TensorProto, helper

    ends = [
        helper.make_tensor_value_info(name, dtype or TensorProto.FLOAT16, shape)
        for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, path.stem, ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path, **save)
    return path


def relu(path: Path, **options: Any) -> Path:
    """One node."""
    from onnx import helper

    return write(path, [helper.make_node("Relu", ["x"], ["y"])], [], [4, 4], **options)


def branch(path: Path) -> Path:
    """Control flow."""
    from onnx import TensorProto, helper

    out = helper.make_tensor_value_info("z", TensorProto.FLOAT16, [4, 4])
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "body", [], [out])
    true = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    return write(path, [node], [true], [4, 4])


def cut_short(path: Path) -> Path:
    """The first half of a file."""
    mlp(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def without_weights(path: Path) -> Path:
    """Its external data is gone."""
    mlp(path, save_as_external_data=True, location="gone.bin", size_threshold=0)
    (path.parent / "gone.bin").unlink()
    return path


def huge(path: Path) -> Path:
    """A sparse file beyond what a message of protobuf holds."""
    with path.open("wb") as file:
        file.truncate(2**31 + 10)
    return path
