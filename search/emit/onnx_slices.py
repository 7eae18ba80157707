"""An ONNX file cut for tensor parallelism: the same graph for every rank, weights sliced.

    y = x w, w [k, n]    n divides   columns: y_r = x w[:, r]      then AllGather along the last dim
                         k divides   rows:    y_r = x[.., r] w[r]  then AllReduce (x is sliced)

Each MatMul with a constant two-dimensional weight of its own is cut, columns first; everything
else stays whole on every rank, so any graph of any operators is cut right. Collectives are nodes
of onnxruntime's domain com.microsoft (ContribOperators.md: AllReduce, AllGather with group_size
and axis). Needs the extra `onnx`. Left out: pairs of products cut columns then rows, which save an
AllGather; weights of Gemm and Conv; files above protobuf's 2 GiB, whose weights lie outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardplan.models.errors import InputError

__all__ = ["OnnxFile", "file_name", "read_onnx", "sliced"]

_DOMAIN = "com.microsoft"
_MATRIX = 2
_MAX_NAME = 64
_FLOATS = ("float32", "float16", "float64", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFile:
    """A checked ONNX model and what is asked of it most."""

    name: str
    data: bytes
    parameters: int
    """Elements of its floating-point weights."""


def read_onnx(path: str | Path) -> OnnxFile:
    """The model of a file. `InputError` for a file that is none, or without the extra `onnx`."""
    onnx = _onnx()
    file = Path(path)
    try:
        data = file.read_bytes()
        model = onnx.load_model_from_string(data)
        onnx.checker.check_model(model)
        weights = [onnx.numpy_helper.to_array(one) for one in model.graph.initializer]
    except OSError as error:
        raise InputError("the model cannot be read", got=f"{file}: {error.strerror}") from None
    except Exception as error:  # protobuf's and the checker's own kinds
        first = str(error).strip().partition("\n")[0][:200]
        raise InputError("a model is a valid ONNX file", got=f"{file}: {first}") from None
    count = sum(int(one.size) for one in weights if str(one.dtype) in _FLOATS)
    return OnnxFile(name=file.stem, data=data, parameters=count)


def file_name(file: OnnxFile) -> str:
    """Its name with nothing in it that a shell, a path or ATC would read otherwise."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", file.name).strip("-.")[:_MAX_NAME] or "model"


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.numpy_helper
        import onnx.shape_inference
    except ImportError:
        raise InputError(
            "cutting an ONNX file needs the package onnx",
            got="option model",
            hint="pip install 'shardplan[onnx]'",
        ) from None
    return onnx


def sliced(file: OnnxFile, ranks: int) -> list[bytes]:
    """The model of every rank. `InputError` where no product can be cut `ranks` ways."""
    onnx = _onnx()
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(file.data))
    cuts = _cuts(onnx, model, ranks)
    if not cuts:
        raise InputError(
            "a model that is cut has a MatMul with a weight of its own that divides",
            got=f"{file.name}: {ranks} ranks",
            hint="try fewer ranks, or the door split",
        )
    return [_slice(onnx, file.data, cuts, ranks, rank) for rank in range(ranks)]


@dataclass(frozen=True, slots=True)
class _Cut:
    """How one product is cut: its weight along `axis`, its output of `rank` dims."""

    weight: str
    axis: int
    dims: int


def _cuts(onnx: Any, model: Any, ranks: int) -> dict[str, _Cut]:
    """Cut by the name of the product's output."""
    graph = model.graph
    shapes = {one.name: tuple(one.dims) for one in graph.initializer}
    uses = [name for node in graph.node for name in node.input]
    values = [*graph.input, *graph.output, *graph.value_info]
    dims = {
        one.name: len(one.type.tensor_type.shape.dim)
        for one in values
        if one.type.tensor_type.HasField("shape")
    }
    found = {}
    for node in graph.node:
        weight = node.input[1] if node.op_type == "MatMul" else ""
        shape = shapes.get(weight, ())
        if len(shape) != _MATRIX or uses.count(weight) > 1 or node.output[0] not in dims:
            continue
        axis = next((axis for axis in (1, 0) if shape[axis] % ranks == 0), None)
        if axis is not None:
            found[node.output[0]] = _Cut(weight, axis, dims[node.output[0]])
    return found


def _slice(onnx: Any, data: bytes, cuts: dict[str, _Cut], ranks: int, rank: int) -> bytes:
    model = onnx.load_model_from_string(data)
    graph = model.graph
    nodes = []
    for node in graph.node:
        cut = cuts.get(node.output[0])
        nodes += [node] if cut is None else _cut_node(onnx, graph, node, cut, ranks, rank)
    weights = {one.name: one for one in graph.initializer}
    for cut in cuts.values():
        whole = onnx.numpy_helper.to_array(weights[cut.weight])
        part = np.ascontiguousarray(np.split(whole, ranks, axis=cut.axis)[rank])
        weights[cut.weight].CopyFrom(onnx.numpy_helper.from_array(part, cut.weight))
    del graph.node[:]
    graph.node.extend(nodes)
    names = {one.name for one in graph.input} & {cut.weight for cut in cuts.values()}
    for one in [one for one in graph.input if one.name in names]:
        graph.input.remove(one)
    if _DOMAIN not in {one.domain for one in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    made: bytes = model.SerializeToString()
    return made


def _cut_node(onnx: Any, graph: Any, node: Any, cut: _Cut, ranks: int, rank: int) -> list[Any]:
    """The product on this rank's slice, and the collective that makes its output whole."""
    helper, output, part = onnx.helper, node.output[0], f"{node.output[0]}_part"
    before, source = [], node.input[0]
    if cut.axis == 0:
        rows = next(one.dims[0] for one in graph.initializer if one.name == cut.weight) // ranks
        bounds = {"starts": rank * rows, "ends": (rank + 1) * rows, "axes": -1}
        for name, value in bounds.items():
            tensor = onnx.numpy_helper.from_array(np.array([value]), f"{output}_{name}")
            graph.initializer.append(tensor)
        source = f"{output}_in"
        read = [node.input[0], *(f"{output}_{name}" for name in bounds)]
        before = [helper.make_node("Slice", read, [source])]
    product = helper.make_node("MatMul", [source, cut.weight], [part], name=node.name)
    more = {"axis": cut.dims - 1} if cut.axis == 1 else {}
    kind = "AllGather" if cut.axis == 1 else "AllReduce"
    join = helper.make_node(kind, [part], [output], domain=_DOMAIN, group_size=ranks, **more)
    return [*before, product, join]
