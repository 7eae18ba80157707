"""Every rule of the ONNX front end, proven: whatever loop of an operator is split, the ranks agree.

One operator a model. Each of its loops that may be split is split over two ranks; onnxruntime (or
onnx's reference, for operators that it lacks) runs the ranks and the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper
from tests.models.frontends import onnx_cases as cases
from tests.models.onnxout.test_ranks import mesh, proven

from shardplan.models.frontends.onnx_graph import read_onnx
from shardplan.models.frontends.onnx_rules import COMPUTE
from shardplan.models.frontends.onnx_rules_shape import MOVE
from shardplan.models.onnxout.laid import lay

FEED = (4, 6, 8)


@dataclass
class Case:
    """An operator, the shapes of what it is fed, its weights, and its loops that may be split."""

    op: str
    loops: str
    feeds: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"x": FEED})
    weights: dict[str, Any] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    inputs: tuple[str, ...] = ()
    opset: int = 20
    types: Mapping[str, int] = field(default_factory=dict)
    to: int = 0
    """Type that the output is cast to, where a collective does not take its own."""


def ints(*values: int) -> Any:
    """A constant of whole numbers."""
    return np.array(values, np.int64)


IDS: dict[str, int] = {"i": TensorProto.INT64}
TWO = {"a": (4, 6, 8), "b": (6, 8)}
CASES = {
    "matmul, weight": Case("MatMul", "b0 m k n", weights={"w": cases.numbers(8, 10)}),
    "matmul, batches": Case("MatMul", "b0 b1 m k n", {"a": (2, 4, 6, 8), "b": (4, 8, 2)}),
    "matmul, vector": Case("MatMul", "b0 m k", weights={"w": cases.numbers(8)}),
    "gemm": Case("Gemm", "m n k", {"a": (4, 6)}, {"w": cases.numbers(6, 8)}),
    "gemm, turned": Case(
        "Gemm", "m n k", {"a": (6, 4)}, {"w": cases.numbers(8, 6)}, {"transA": 1, "transB": 1}
    ),
    "gemm, scaled bias": Case(
        "Gemm",
        "m n",
        {"a": (4, 6)},
        {"w": cases.numbers(6, 8), "c": cases.numbers(8)},
        {"beta": 2.0},
    ),
    "einsum": Case(
        "Einsum", "a b c d", {"a": (2, 4, 6), "b": (6, 8)}, attrs={"equation": "abc,cd->adb"}
    ),
    "conv": Case(
        "Conv", "b n k", {"x": (2, 4, 8, 8)}, {"w": cases.numbers(6, 4, 4, 4)}, {"strides": [4, 4]}
    ),
    "conv, bias": Case(
        "Conv", "b n", {"x": (2, 3, 8, 8)}, {"w": cases.numbers(6, 3, 4, 4), "c": cases.numbers(6)}
    ),
    "add, broadcast": Case("Add", "d0 d1 d2", TWO),
    "where": Case(
        "Where", "d0 d1 d2", {"c": (6, 1), "a": FEED, "b": (8,)}, types={"c": TensorProto.BOOL}
    ),
    "sigmoid": Case("Sigmoid", "d0 d1 d2"),
    "clip": Case("Clip", "d0 d1 d2", weights={"low": np.float32(-0.5), "high": np.float32(0.5)}),
    "softmax": Case("Softmax", "d0 d2", attrs={"axis": 1}),
    "layer norm": Case(
        "LayerNormalization",
        "d0 d1",
        weights={"s": cases.numbers(8), "c": cases.numbers(8, seed=1)},
    ),
    "layer norm, two dims": Case(
        "LayerNormalization", "d0", weights={"s": cases.numbers(6, 8)}, attrs={"axis": 1}
    ),
    "rms norm": Case("RMSNormalization", "d0 d1", weights={"s": cases.numbers(8)}, opset=23),
    "simplified norm": Case(
        "SimplifiedLayerNormalization", "d0 d1", weights={"s": cases.numbers(8)}, attrs={"axis": -1}
    ),
    "sum": Case("ReduceSum", "d0 d1 d2", weights={"axes": ints(1)}),
    "sum, dropped dims": Case(
        "ReduceSum", "d0 d1 d2", weights={"axes": ints(0, 2)}, attrs={"keepdims": 0}
    ),
    "mean": Case("ReduceMean", "d0 d2", weights={"axes": ints(1)}),
    "max": Case("ReduceMax", "d1 d2", weights={"axes": ints(0)}, attrs={"keepdims": 0}),
    "attention": Case(
        "Attention", "b h t", {"q": (2, 8, 6, 4), "k": (2, 4, 6, 4), "v": (2, 4, 6, 4)}, opset=23
    ),
    "attention, mask": Case(
        "Attention",
        "b h t",
        {"q": (2, 4, 6, 4), "k": (2, 4, 6, 4), "v": (2, 4, 6, 4), "m": (6, 6)},
        opset=23,
    ),
    "attention, causal, three dims": Case(
        "Attention",
        "b h",
        {"q": (2, 6, 32), "k": (2, 6, 16), "v": (2, 6, 16)},
        attrs={"q_num_heads": 8, "kv_num_heads": 4, "is_causal": 1},
        opset=23,
    ),
    "reshape, heads apart": Case("Reshape", "d0 d1 d2", weights={"s": ints(4, 6, 4, 2)}),
    "reshape, heads joined": Case(
        "Reshape", "d0 d1 d2", {"x": (2, 6, 4, 2)}, {"s": ints(0, 0, -1)}
    ),
    "reshape, batch joined": Case("Reshape", "d0 d1", weights={"s": ints(-1, 8)}),
    "reshape, unlike": Case("Reshape", "d0", {"x": (4, 6)}, {"s": ints(6, 4)}),
    "flatten": Case("Flatten", "d0 d1", attrs={"axis": 1}),
    "unsqueeze": Case("Unsqueeze", "d0 d2 d3", weights={"s": ints(1)}),
    "squeeze": Case("Squeeze", "d0 d1", {"x": (4, 1, 6)}, {"s": ints(1)}),
    "transpose": Case("Transpose", "d0 d1 d2", attrs={"perm": [2, 0, 1]}),
    "transpose, reversed": Case("Transpose", "d0 d1 d2"),
    "expand": Case("Expand", "d0 d1 d2", {"x": (4, 1, 8)}, {"s": ints(4, 6, 8)}),
    "concat": Case("Concat", "d0 d2", {"a": (4, 2, 8), "b": (4, 6, 8)}, attrs={"axis": 1}),
    "split": Case("Split", "d0 d1", attrs={"axis": -1, "num_outputs": 2}, outputs=("y", "z")),
    "slice": Case("Slice", "d0 d1", weights={"a": ints(2), "b": ints(7), "c": ints(2)}),
    "slice, backwards": Case(
        "Slice", "d0 d1", weights={"a": ints(-1), "b": ints(-9), "c": ints(2), "d": ints(-1)}
    ),
    "pad": Case("Pad", "d0 d2", weights={"p": ints(0, 1, 0, 0, 2, 0)}),
    "tile": Case("Tile", "d0 d2", weights={"t": ints(1, 2, 1)}),
    "cumsum": Case("CumSum", "d0 d2", weights={"axis": np.array(1, np.int64)}),
    "trilu": Case("Trilu", "d0", attrs={"upper": 0}),
    "embedding": Case(
        "Gather",
        "i0 i1 c0 v",
        {"i": (4, 6)},
        {"w": cases.numbers(8, 10)},
        inputs=("w", "i"),
        types=IDS,
    ),
    "gather": Case("Gather", "a0 i0 c0", weights={"i": ints(3, 1, 1, 0)}, attrs={"axis": 1}),
    "topk": Case("TopK", "d0 d1", weights={"k": ints(2)}, outputs=("y", "z")),
    "argmax": Case("ArgMax", "d0 d1", attrs={"axis": -1, "keepdims": 0}),
    "scatter elements": Case(
        "ScatterElements",
        "d0",
        {"x": (4, 8), "i": (4, 2), "u": (4, 2)},
        attrs={"axis": 1},
        types=IDS,
    ),
    "gather elements": Case(
        "GatherElements", "d0", {"x": (4, 8), "i": (4, 2)}, attrs={"axis": 1}, types=IDS
    ),
    "one-hot": Case(
        "OneHot",
        "d0 d1",
        {"i": (4, 6)},
        {"depth": ints(8), "pair": np.array([0, 1], np.float32)},
        types=IDS,
    ),
    "quantize": Case(
        "QuantizeLinear",
        "d0 d1 d2",
        weights={"s": np.float32(0.02), "z": np.uint8(100)},
        to=TensorProto.FLOAT,
    ),
    "dequantize a weight": Case(
        "DequantizeLinear",
        "d0 d1",
        {},
        {"w": np.arange(48, dtype=np.int8).reshape(8, 6), "s": cases.numbers(6)},
        {"axis": 1},
    ),
    "dequantize blocks": Case(
        "DequantizeLinear",
        "d0 d1",
        {},
        {"w": np.arange(96, dtype=np.int8).reshape(16, 6), "s": cases.numbers(4, 6)},
        {"axis": 0, "block_size": 4},
        opset=21,
    ),
}


def model(case: Case, path: Path) -> Path:
    """The operator alone; an output that no collective takes is cast."""
    names = case.inputs or (*case.feeds, *case.weights)
    written = [f"{name}/own" if case.to else name for name in case.outputs]
    nodes = [helper.make_node(case.op, names, written, "tested", **case.attrs)]
    if case.to:
        nodes += [helper.make_node("Cast", written, ["y"], "cast", to=case.to)]
    return cases.save(path, nodes, case.feeds, case.outputs, case.weights, case.opset, case.types)


@pytest.mark.parametrize("name", CASES)
def test_splitting_any_loop_of_an_operator_keeps_what_it_computes(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    path = model(case, tmp_path / "m.onnx")
    graph = read_onnx(path)
    op = graph.operators["tested"]
    may = [loop for loop, one in op.loops.items() if not one.whole and one.size > 1]
    assert sorted(may) == sorted(case.loops.split())
    for loop in may:
        if op.loops[loop].size % 2 == 0:
            strategy = {node.name: {"x": loop} for node in graph.nodes.values()}
            laid = lay(graph, strategy, mesh(2))
            proven(path, laid, tmp_path / loop)


def test_every_rule_has_a_case() -> None:
    rules = {**COMPUTE, **MOVE}
    tested = {rules[case.op] for case in CASES.values()}
    assert {rule.__name__ for rule in rules.values() if rule not in tested} == set()
