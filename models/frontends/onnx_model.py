"""`load_model("model.onnx")`: an ONNX file as the sizes of a causal decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.models.frontends.decoder import decoder_of
from shardplan.models.frontends.onnx_file import open_onnx
from shardplan.models.frontends.onnx_graph import graph_of

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_lib import ModelProto
    from shardplan.models.spec import ModelSpec

__all__ = ["spec_from_onnx", "usual_sizes"]

USUAL_TOKENS = 16
"""Tokens that a symbolic dim stands for where only the sizes of weights are wanted; any will do."""


def spec_from_onnx(path: Path) -> ModelSpec:
    """The sizes of the decoder in a file. `InputError` as `read_onnx` and `decoder_of` raise it."""
    file = open_onnx(path)
    return decoder_of(graph_of(file, usual_sizes(file.proto)).graph)


def usual_sizes(proto: ModelProto) -> dict[str, int]:
    """A size for each symbolic dim of the inputs: 1 for leading dims, USUAL_TOKENS for others.

    A symbol that is written as a sum of others (`past + tokens`) gets the sum.
    """
    sizes: dict[str, int] = {}
    dims = [
        (dim.dim_param or f"{one.name}.{index}", index)
        for one in proto.graph.input
        for index, dim in enumerate(one.type.tensor_type.shape.dim)
        if not dim.HasField("dim_value")
    ]
    for name, index in dims:
        sizes.setdefault(name, USUAL_TOKENS if index else 1)
    for name in sizes:
        terms = [term.strip() for term in name.split("+")]
        if len(terms) > 1 and all(term.isdigit() or term in sizes for term in terms):
            sizes[name] = sum(int(t) if t.isdigit() else sizes[t] for t in terms)
    return sizes
