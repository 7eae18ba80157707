"""What exporters write in several ways, written in one: done on a walked graph, values unchanged.

- Gemm with a bias becomes Gemm and Add, so that a partial sum gets its bias once.
- Reshape, Transpose, Reshape around a batched transpose becomes Reshape, Transpose: joined batch
  dims would hide heads.
- A transposed copy of an embedding table (exporters fold tied heads so) is read from the table.

New tensors get names of their own; the last tensor of each keeps its name.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from shardplan.models.frontends.onnx_file import DTYPES
from shardplan.models.frontends.onnx_lib import need_onnx
from shardplan.models.frontends.onnx_walk import Walked

__all__ = ["ADDED_BIAS", "normalise"]

ADDED_BIAS = "/bias"
"""What the name of the Add of a Gemm ends in, after the Gemm's own."""


def normalise(walked: Walked) -> None:
    """Rewrite the nodes of a walked graph in place."""
    _split_bias(walked)
    _plain_transposes(walked)
    _tie_copies(walked)


def _note(walked: Walked, name: str, like: str, shape: tuple[int, ...]) -> None:
    """A new tensor of the type of another."""
    kind = need_onnx().helper.make_tensor_type_proto(
        walked.types[like].tensor_type.elem_type, list(shape)
    )
    walked.types[name], walked.shapes[name] = kind, shape
    walked.dtypes[name] = walked.dtypes[like]


def _split_bias(walked: Walked) -> None:
    nodes = []
    for node in walked.nodes:
        nodes.append(node)
        scaled = any(one.name == "beta" and one.f != 1 for one in node.attribute)
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] and not scaled:
            out, bias = node.output[0], node.input[2]
            inner = f"{out}/product"
            _note(walked, inner, out, walked.shapes[out])
            del node.input[2:]
            node.output[0] = inner
            name = node.name + ADDED_BIAS
            nodes.append(need_onnx().helper.make_node("Add", [inner, bias], [out], name))
    walked.nodes[:] = nodes


def _plain_transposes(walked: Walked) -> None:
    """[b, h, t, d] -> [b h, t, d] -> [b h, d, t] -> [b, h, d, t] without the joined dims."""
    made = {name: node for node in walked.nodes for name in node.output}
    uses = Counter(name for node in walked.nodes for name in node.input)
    uses.update(one.name for one in walked.file.proto.graph.output)
    dropped = set()
    for last in walked.nodes:
        turn = made.get(last.input[0]) if last.op_type == "Reshape" else None
        first = made.get(turn.input[0]) if turn and turn.op_type == "Transpose" else None
        if turn is None or first is None or first.op_type != "Reshape":
            continue
        shape, order = walked.shapes[first.output[0]], list(turn.attribute[0].ints)
        after = walked.shapes[last.output[0]]
        swapped = order == [0, 2, 1] and after[-2:] == (shape[2], shape[1])
        if not swapped or uses[turn.output[0]] > 1 or uses[first.output[0]] > 1:
            continue
        whole = f"{first.output[0]}/unjoined"
        _note(walked, whole, first.output[0], (*after[:-2], *shape[1:]))
        target = f"{whole}/shape"
        walked.values[target] = np.array(walked.shapes[whole], np.int64)
        int64 = need_onnx().TensorProto.INT64
        kind = need_onnx().helper.make_tensor_type_proto(int64, [len(after)])
        walked.types[target], walked.shapes[target] = kind, (len(after),)
        walked.dtypes[target] = "int64"
        first.input[1], first.output[0] = target, whole
        turn.input[0], turn.output[0] = whole, last.output[0]
        rank = len(after)
        turn.attribute[0].ints[:] = [*range(rank - 2), rank - 1, rank - 2]
        dropped.add(last.name)
    walked.nodes[:] = [node for node in walked.nodes if node.name not in dropped]


def _tie_copies(walked: Walked) -> None:
    """Both are compared element by element, in pieces; the first that differs ends it."""
    gathers = [node for node in walked.nodes if node.op_type == "Gather"]
    tables = [node.input[0] for node in gathers if node.input[0] in walked.weights]
    for index, node in enumerate(walked.nodes):
        name = node.input[1] if node.op_type == "MatMul" else ""
        for table in tables if name in walked.weights else ():
            if _is_transposed(walked, table, name):
                turn = need_onnx().helper.make_node(
                    "Transpose", [table], [name], f"{name}/transposed", perm=[1, 0]
                )
                walked.nodes.insert(index, turn)
                walked.weights -= {name}
                return


def _is_transposed(walked: Walked, table: str, name: str) -> bool:
    shape, dtype = walked.shapes[table], walked.dtypes[table]
    if walked.shapes[name] != shape[::-1] or walked.dtypes[name] != dtype or len(shape) != 2:
        return False
    if next(bits for known, bits in DTYPES.values() if known == dtype) < 8:
        return False
    rows, columns = walked.file.weight(table), walked.file.weight(name)
    step = max(2**20 // shape[1], 1)
    return all(
        np.array_equal(rows[at : at + step], columns[:, at : at + step].T)
        for at in range(0, shape[0], step)
    )
