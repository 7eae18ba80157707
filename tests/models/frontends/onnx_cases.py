"""ONNX files for tests: made node by node, or exported from small torch modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
OPSET = 20


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int]],
    outputs: Sequence[str],
    weights: dict[str, Any],
    opset: int = OPSET,
    types: Mapping[str, int] | None = None,
) -> Path:
    """A model of these nodes; weights are kept in the file."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [
            helper.make_tensor_value_info(n, (types or {}).get(n, FLOAT), s)
            for n, s in inputs.items()
        ],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model)
    known = {one.name: one for one in inferred.graph.output}
    for one in model.graph.output:
        if known[one.name].type.HasField("tensor_type"):
            one.CopyFrom(known[one.name])
    path.write_bytes(model.SerializeToString())
    return path


def numbers(*shape: int, seed: int = 0) -> Any:
    """Weights of about unit gain."""
    made = np.random.default_rng([seed, *shape]).standard_normal(shape) / np.sqrt(shape[0])
    return made.astype(np.float32)


def mlp(path: Path) -> Path:
    """y = relu(x w1' + b1) w2 + b2 with Gemm."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], "up", transB=1),
        helper.make_node("Relu", ["h"], ["a"], "act"),
        helper.make_node("Gemm", ["a", "w2", "b2"], ["y"], "down"),
    ]
    weights = {"w1": numbers(32, 16), "b1": numbers(32), "w2": numbers(32, 8), "b2": numbers(8)}
    return save(path, nodes, {"x": (4, 16)}, ["y"], weights)


def matmul2(path: Path, hidden: int = 32) -> Path:
    """y = (x w1) w2."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], "second"),
    ]
    weights = {"w1": numbers(16, hidden), "w2": numbers(hidden, 8)}
    return save(path, nodes, {"x": (8, 16)}, ["y"], weights)


def export(path: Path, module: Any, *inputs: Any, **options: Any) -> Path:
    """What torch.onnx.export writes of a module, its parameters drawn at random.

    Equal ones (norms as they are initialised) would be kept once by the exporter.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    for one in module.parameters():
        torch.nn.init.normal_(one, std=0.3)
    given = {"dynamo": True, "external_data": False, "verbose": False, **options}
    torch.onnx.export(module.eval(), inputs, path, **given)
    return path


def decoder(path: Path, options: dict[str, Any] | None = None, **sizes: Any) -> Path:
    """A Llama-like decoder on 2 sequences of 8 tokens; sizes as `torch_modules.Decoder` has."""
    torch = pytest.importorskip("torch")
    from tests.models.frontends.torch_modules import Decoder

    return export(path, Decoder(**sizes), torch.arange(16).reshape(2, 8), **(options or {}))


def encoder(path: Path) -> Path:
    """A BERT-like encoder of 3 layers."""
    torch = pytest.importorskip("torch")
    from tests.models.frontends.torch_modules import Encoder

    ids = torch.arange(16).reshape(2, 8)
    return export(path, Encoder(), ids, ids % 8)


def vit(path: Path) -> Path:
    """A ViT of one block on 2 images of 16 by 16."""
    torch = pytest.importorskip("torch")
    from tests.models.frontends.torch_modules import VitBlock

    return export(path, VitBlock(), torch.zeros(2, 3, 16, 16))
