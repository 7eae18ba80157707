"""One walk over an ONNX graph: shapes known, arithmetic on shapes computed, no symbol left.

Node after node in computing order. A node whose inputs are all known (integers, scalars, and what
follows from them, `Shape` of a tensor included) is computed once by onnx's own reference and
becomes a constant; for the others onnx's shape inference gives types and shapes. What is left are
the operators that compute on data, with every shape a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shardplan.models.errors import InputError
from shardplan.models.frontends.onnx_file import DTYPES, OnnxFile
from shardplan.models.frontends.onnx_lib import need_onnx
from shardplan.models.frontends.symbols import check_symbols

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_lib import NodeProto, TypeProto

__all__ = ["Array", "Walked", "node_error", "walk"]

Array = np.ndarray[Any, np.dtype[Any]]
MAX_FOLDED = 2**22
"""Largest constant that is computed, elements (a mask of 2048 by 2048)."""
MAX_FOLDED_TOTAL = 2**26
"""All computed constants together, elements."""
MAX_LOOKED = 2**26
"""Largest constant of the file that is looked at, elements (a mask of 8192 by 8192)."""
_PLAIN = tuple(name for name, bits in DTYPES.values() if bits >= 8 and hasattr(np, name))
"""Types that numpy computes with."""
_PACKED = tuple(name for name, bits in DTYPES.values() if bits < 8)
_INFERRED = 1024
"""Largest constant that shape inference is shown, elements: shapes, axes, counts."""
_LIKE_FIRST = (
    ("", "SimplifiedLayerNormalization"),
    ("com.microsoft", "SimplifiedLayerNormalization"),
    ("com.microsoft", "Gelu"),
)
"""Operators of onnxruntime that onnx has no schema of; the output is like the first input."""
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli")


@dataclass(slots=True, eq=False)
class Walked:
    """A graph without arithmetic on shapes."""

    file: OnnxFile
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    """Constants that are known, small initializers of whole numbers included."""
    nodes: list[NodeProto] = field(default_factory=list)
    """Operators on data, in computing order."""
    types: dict[str, TypeProto] = field(default_factory=dict)
    folded: int = 0
    """Elements of all computed constants."""
    weights: frozenset[str] = frozenset()
    """Initializers of the file."""

    def constant(self, name: str) -> Array | None:
        """The elements of a constant of up to MAX_LOOKED elements, None for other tensors.

        Types that numpy lacks come as their bits, which is enough to tell what is hidden.
        """
        if name in self.values:
            return self.values[name]
        known = name in self.weights and self.dtypes[name] not in _PACKED
        small = known and math.prod(self.shapes[name]) <= MAX_LOOKED
        return self.file.weight(name) if small else None


def node_error(file: OnnxFile, node: NodeProto, rule: str, hint: str = "") -> InputError:
    """What every refusal of a node says: the rule, the file, the node's name and operator."""
    return InputError(
        rule,
        got=f"file={file.path.name}, node={node.name}, operator={node.op_type}",
        hint=hint or "export the model with torch.onnx.export and fixed shapes",
    )


def walk(file: OnnxFile, sizes: Mapping[str, int] | None = None) -> Walked:
    """Types of every tensor, constants computed. `sizes` gives each symbolic dim its elements.

    `InputError` for a symbol without a size, a shape that is not known, a node that onnx refuses.
    """
    found = Walked(file, weights=frozenset(one.name for one in file.proto.graph.initializer))
    for tensor in file.proto.graph.initializer:
        dtype = DTYPES[tensor.data_type][0]
        _note(
            found,
            tensor.name,
            need_onnx().helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims)),
        )
        whole = dtype.startswith(("int", "uint", "bool")) or math.prod(tensor.dims) <= 1
        if whole and dtype in _PLAIN and tensor.name not in file.payloads:
            found.values[tensor.name] = file.weight(tensor.name)
    _inputs(found, sizes or {})
    for node in file.proto.graph.node:
        _visit(found, node)
    return found


def _inputs(found: Walked, sizes: Mapping[str, int]) -> None:
    """Shapes of the graph's inputs, symbols replaced."""
    file, symbols = found.file, set[str]()
    for one in file.proto.graph.input:
        if one.name in found.types:
            continue
        if not one.type.HasField("tensor_type"):
            raise InputError(
                "the inputs of a model are tensors", got=f"file={file.path.name}, input={one.name}"
            )
        for index, dim in enumerate(one.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                continue
            symbol = dim.dim_param or f"{one.name}.{index}"
            symbols.add(symbol)
            if sizes.get(symbol, 0) < 1:
                raise InputError(
                    "every symbolic dim needs a size",
                    got=f"file={file.path.name}, input={one.name}, dim={symbol}",
                    hint=f"give sizes={{{symbol!r}: ...}}, elements, or --sizes {symbol}=...",
                )
            dim.dim_value = sizes[symbol]
        _note(found, one.name, one.type)
    check_symbols(sizes, symbols, file.path.name)


def _note(found: Walked, name: str, kind: TypeProto) -> bool:
    """Record a tensor's type; False where a dim is not known."""
    tensor = kind.tensor_type
    dims = tensor.shape.dim
    if not tensor.HasField("shape") or any(not one.HasField("dim_value") for one in dims):
        return False
    if tensor.elem_type not in DTYPES:
        raise InputError(
            "tensors hold numbers that are not complex",
            got=f"file={found.file.path.name}, tensor={name}, data_type={tensor.elem_type}",
        )
    found.types[name] = kind
    found.shapes[name] = tuple(one.dim_value for one in dims)
    found.dtypes[name] = DTYPES[tensor.elem_type][0]
    return True


def _visit(found: Walked, node: NodeProto) -> None:
    onnx = need_onnx()
    lost = [name for name in node.input if name and name not in found.types]
    if lost:
        raise node_error(found.file, node, f"a node reads what is made before it, not {lost[0]}")
    inferred = _infer(found, node)
    known = node.op_type in ("Shape", "Size") or (
        node.op_type not in _RANDOM and all(name in found.values for name in node.input if name)
    )
    size = sum(_elements(one) for one in inferred.values())
    small = size <= MAX_FOLDED and size + found.folded <= MAX_FOLDED_TOTAL
    if known and small and _fold(found, node):
        return
    for name in node.output:
        if name and (name not in inferred or not _note(found, name, inferred[name])):
            raise node_error(
                found.file,
                node,
                f"the shape of {name} does not follow from the shapes of the inputs",
            )
    kept = onnx.NodeProto()
    kept.CopyFrom(node)
    found.nodes.append(kept)


def _elements(kind: TypeProto) -> int:
    return math.prod(max(one.dim_value, 1) for one in kind.tensor_type.shape.dim)


def _infer(found: Walked, node: NodeProto) -> dict[str, TypeProto]:
    onnx = need_onnx()
    if (node.domain, node.op_type) in _LIKE_FIRST and len(node.output) == 1:
        return {node.output[0]: found.types[node.input[0]]}
    opset, domain = found.file.proto.opset_import, node.domain
    version = next((one.version for one in opset if (one.domain or "") == domain), found.file.opset)
    if not onnx.defs.has(node.op_type, max_inclusive_version=version, domain=domain):
        raise node_error(found.file, node, f"no rule for the operator {node.op_type}")
    schema = onnx.defs.get_schema(node.op_type, version, domain)
    data = {
        name: onnx.numpy_helper.from_array(np.array(value, order="C"), name)
        for name in node.input
        if (value := found.values.get(name)) is not None and value.size <= _INFERRED
    }
    types = {name: found.types[name] for name in node.input if name}
    try:
        inferred: dict[str, TypeProto] = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=list(opset)
        )
    except Exception as error:  # onnx raises several unrelated types
        said = " ".join(str(error).split())[:160]
        raise node_error(found.file, node, f"onnx refuses the node: {said}") from None
    return inferred


def _fold(found: Walked, node: NodeProto) -> bool:
    """Compute a node on constants; False where onnx's reference cannot."""
    onnx = need_onnx()
    values = _shape_value(found, node)
    if values is None:
        try:
            graph = onnx.helper.make_graph(
                [node],
                "one",
                [
                    onnx.helper.make_value_info(n, found.types[n])
                    for n in dict.fromkeys(node.input)
                    if n
                ],
                [onnx.helper.make_empty_tensor_value_info(n) for n in node.output if n],
            )
            model = onnx.helper.make_model(graph, opset_imports=found.file.proto.opset_import)
            given = {name: found.values[name] for name in node.input if name}
            values = onnx.reference.ReferenceEvaluator(model).run(None, given)
        except Exception:  # whatever a kernel of the reference raises: the node stays
            return False
    for name, value in zip([n for n in node.output if n], values, strict=True):
        array = np.asarray(value)
        code = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        found.values[name] = array
        found.folded += array.size
        _note(found, name, onnx.helper.make_tensor_type_proto(code, list(array.shape)))
    return True


def _shape_value(found: Walked, node: NodeProto) -> list[Array] | None:
    """What Shape and Size give of a tensor whose shape is known, None for other operators."""
    if node.op_type == "Size":
        return [np.asarray(math.prod(found.shapes[node.input[0]]), np.int64)]
    if node.op_type != "Shape":
        return None
    given = {one.name: one.i for one in node.attribute}
    shape = found.shapes[node.input[0]]
    return [np.asarray(shape[given.get("start", 0) : given.get("end", len(shape))], np.int64)]
