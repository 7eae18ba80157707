"""A `.onnx` file, opened and checked: its graph, and where its weights lie.

Weights stay on disk: `OnnxFile.weight` maps one where it is wanted. What is refused, each with one
sentence: files that are no ONNX, too large, of an opset or IR that is not known, with control flow,
sequences, sparse or complex tensors, or whose external data is missing or too short.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shardplan.models.errors import InputError
from shardplan.models.frontends.onnx_lib import OLDEST_OPSET, need_onnx
from shardplan.models.frontends.onnx_skim import Payload, skim

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_lib import ModelProto, TensorProto

__all__ = ["DTYPES", "MAX_FILE_BYTES", "MAX_NODES", "OnnxFile", "open_onnx", "payload_bytes"]

MAX_FILE_BYTES = 2**31 - 1
"""A protobuf message ends there (protobuf.dev, encoding); larger models keep weights outside."""
MAX_GRAPH_BYTES = 256 * 2**20
"""Largest graph without the payloads of its weights, bytes."""
MAX_NODES = 200_000

DTYPES: Mapping[int, tuple[str, int]] = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    16: ("bfloat16", 16),
    17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8),
    19: ("float8e5m2", 8),
    20: ("float8e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4e2m1", 4),
}
"""TensorProto.DataType -> (name, bits of an element); others (text, complex) are refused."""

_CONTROL = ("If", "Loop", "Scan", "SequenceMap")
_DOMAINS = ("", "ai.onnx", "com.microsoft")


@dataclass(frozen=True, slots=True, eq=False)
class OnnxFile:
    """An opened file: `proto` is its ModelProto without large payloads, functions inlined."""

    path: Path
    proto: ModelProto
    payloads: Mapping[str, Payload]

    def whole(self) -> ModelProto:
        """The model as it lies in the file: payloads that are in it included, nodes named."""
        onnx = need_onnx()
        proto: ModelProto = onnx.load(self.path, load_external_data=False)
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        _check_nodes(proto, self.path)
        return proto

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        opsets = self.proto.opset_import
        return int(next(one.version for one in opsets if one.domain in _DOMAINS[:2]))

    def weight(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """Elements of an initializer, mapped where they lie outside the message.

        Types that numpy lacks come as unsigned integers of their width.
        `InputError` for types of fewer than 8 bits.
        """
        tensor = next(one for one in self.proto.graph.initializer if one.name == name)
        dtype, bits = DTYPES[tensor.data_type]
        if bits < 8:
            raise InputError(
                "weights of fewer than 8 bits an element are not cut",
                got=f"file={self.path.name}, initializer={name}, dtype={dtype}",
                hint="give a model with weights of 8 bits or more",
            )
        plain = np.dtype(dtype) if hasattr(np, dtype) or dtype == "bool" else None
        kind = plain if plain is not None else np.dtype(f"uint{bits}")
        shape = tuple(tensor.dims)
        payload = self.payloads.get(name)
        if payload is None or not payload.length:
            return np.asarray(need_onnx().numpy_helper.to_array(tensor)).view(kind).reshape(shape)
        return np.memmap(payload.file, kind, "r", payload.offset, shape)


def open_onnx(path: Path) -> OnnxFile:
    """The file, checked. `InputError` with file, rule and place for anything that is refused."""
    onnx = need_onnx()
    message, payloads = _skimmed(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(message)
    except Exception:  # the parser's own error, whichever of its two implementations runs
        raise _refused("the file is not an ONNX model", path) from None
    if not all(isinstance(one, str) for one in _texts(proto)):
        raise _refused("names in an ONNX file are UTF-8", path)
    _check_versions(proto, path)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    _check_nodes(proto, path)
    external = _external(proto, path)
    file = OnnxFile(path, proto, {**payloads, **external})
    _check_payloads(file)
    return file


def _refused(rule: str, path: Path, got: str = "", hint: str = "") -> InputError:
    shown = str(path).encode("utf-8", "backslashreplace").decode("utf-8")
    return InputError(
        rule,
        got=f"file={shown}" + (f", {got}" if got else ""),
        hint=hint or "give a model as torch.onnx.export writes it",
    )


def _skimmed(path: Path) -> tuple[bytes, dict[str, Payload]]:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _refused("not a regular file", path)
        if not 0 < found.st_size <= MAX_FILE_BYTES:
            raise _refused(
                f"an ONNX file has 1 to {MAX_FILE_BYTES} bytes",
                path,
                f"bytes={found.st_size}",
                "keep large weights as external data",
            )
        message, payloads = skim(path)
    except FileNotFoundError:
        raise _refused("no such file", path, hint="check the path") from None
    except OSError as error:
        raise _refused(f"the file cannot be read: {error.strerror}", path) from None
    except ValueError as error:
        raise _refused(f"the file is not an ONNX model: {error}", path) from None
    if len(message) > MAX_GRAPH_BYTES:
        raise _refused(
            f"a graph without its weights has at most {MAX_GRAPH_BYTES} bytes",
            path,
            f"bytes={len(message)}",
        )
    return message, payloads


def _texts(proto: ModelProto) -> Iterator[object]:
    """Every name of a model; the parser leaves what is not UTF-8 as bytes."""
    graph = proto.graph
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (one.name for one in node.attribute)
        yield from (text for one in node.metadata_props for text in (one.key, one.value))
    for one in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        yield one.name
        yield from (text for prop in one.metadata_props for text in (prop.key, prop.value))
    for tensor in graph.initializer:
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    for value in graph.input:
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    yield from (one.domain for one in proto.opset_import)


def _check_versions(proto: ModelProto, path: Path) -> None:
    onnx = need_onnx()
    opset = max(
        (one.version for one in proto.opset_import if one.domain in _DOMAINS[:2]), default=0
    )
    if not proto.ir_version or not proto.graph.node or not opset:
        raise _refused("the file is not an ONNX model with operators", path)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise _refused(
            f"opsets {OLDEST_OPSET} to {newest} are read",
            path,
            f"opset={opset}",
            "export it with another opset, or convert it with onnx.version_converter",
        )


def _check_nodes(proto: ModelProto, path: Path) -> None:
    """Names for all nodes, and no operator that none could have a rule."""
    if len(proto.graph.node) > MAX_NODES:
        raise _refused(f"a graph has at most {MAX_NODES} nodes", path, f"{len(proto.graph.node)}")
    if proto.graph.sparse_initializer:
        raise _refused("sparse initializers have no rule", path)
    taken: set[str] = set()
    for index, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}#{index}"
        taken.add(node.name)
        if node.op_type in _CONTROL or any(one.type in (5, 10) for one in node.attribute):
            raise _refused(
                "control flow has no fixed graph to split",
                path,
                f"node={node.name}, operator={node.op_type}",
                "export the model without data-dependent branches and loops",
            )
        if node.domain not in _DOMAINS:
            raise _refused(
                "an operator of another domain has no rule",
                path,
                f"node={node.name}, operator={node.domain}.{node.op_type}",
            )


def _external(proto: ModelProto, path: Path) -> dict[str, Payload]:
    """Where the initializers that are kept outside lie."""
    found = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location != 1:
            continue
        given = {one.key: one.value for one in tensor.external_data}
        inside = Path(given.get("location", ""))
        file = path.parent / inside
        if inside.is_absolute() or ".." in inside.parts or not inside.parts:
            raise _refused(
                "external data lies beside the model",
                path,
                f"initializer={tensor.name}, location={inside}",
            )
        try:
            size = file.stat().st_size
            offset = int(given.get("offset", 0))
            length = int(given.get("length", size - offset))
        except (OSError, ValueError):
            raise _refused(
                "the file of the external data is missing",
                path,
                f"initializer={tensor.name}, location={inside}",
                "keep the .onnx file and its data file in one folder",
            ) from None
        if offset < 0 or length < 0 or offset + length > size:
            raise _refused(
                "the external data ends before its weight",
                path,
                f"initializer={tensor.name}, offset={offset}, length={length}, bytes={size}",
            )
        found[tensor.name] = Payload(file, offset, length)
    return found


def payload_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's elements; types of fewer than 8 bits are packed."""
    bits: int = math.prod(tensor.dims) * DTYPES[tensor.data_type][1]
    return -(-bits // 8)


def _check_payloads(file: OnnxFile) -> None:
    for tensor in file.proto.graph.initializer:
        if tensor.data_type not in DTYPES:
            raise _refused(
                "weights are numbers that are not complex",
                file.path,
                f"initializer={tensor.name}, data_type={tensor.data_type}",
            )
        payload = file.payloads.get(tensor.name)
        length = len(tensor.raw_data) if payload is None else payload.length
        given = payload is not None or tensor.HasField("raw_data")
        fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
        typed = sum(len(getattr(tensor, name)) for name in fields)
        whole = DTYPES[tensor.data_type][1] >= 8 and not given
        if whole and typed != math.prod(tensor.dims):
            raise _refused(
                "a weight has as many elements as its shape says",
                file.path,
                f"initializer={tensor.name}, shape={list(tensor.dims)}, elements={typed}",
            )
        if (given and length != payload_bytes(tensor)) or min(tensor.dims, default=0) < 0:
            raise _refused(
                "a weight has as many bytes as its shape says",
                file.path,
                f"initializer={tensor.name}, shape={list(tensor.dims)}, bytes={length}",
            )
