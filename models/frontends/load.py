"""`load_graph(...)`: the operators of a model, whoever holds it: PyTorch or an ONNX file.

`model_or_graph` tells a causal decoder, which is searched by its sizes, from any other graph.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shardplan.models.errors import InputError
from shardplan.models.frontends.decoder import decoder_of
from shardplan.models.frontends.registry import GRAPH_FILES, has_reader, read_registered
from shardplan.models.opgraph import OpGraph
from shardplan.models.spec import ModelSpec

__all__ = ["Recognised", "load_graph", "model_or_graph"]


class Recognised(NamedTuple):
    """A model as it is to be searched: by its sizes, or by its operators."""

    found: ModelSpec | OpGraph
    why: str
    """Why it is no causal decoder; "" where it is one."""


def load_graph(
    subject: Any,
    config: Any = None,
    *,
    inputs: tuple[Any, ...] | None = None,
    batch: int = 1,
    tokens: int = 128,
    sizes: Mapping[str, int] | None = None,
    folded: bool = True,
) -> OpGraph:
    """The operator graph of a model.

    `subject`: a PyTorch module (with example `inputs`; a model of transformers needs none and is
    captured on token ids [`batch`, `tokens`]), a transformers class with its `config`, a
    `torch.export.ExportedProgram`, a `.pt2` or `.onnx` file, or a file of a registered front end
    (docs/plugins.md). `sizes` gives symbolic dims of an export or of a file their elements.
    `folded`: the first layers of each kind are captured and multiplied (`OpGraph.folded`); False
    captures every layer of a module.
    `InputError` for anything else, and for an operator without a rule, which it names.
    """
    if isinstance(subject, (str, os.PathLike)):
        path = Path(subject)
        if path.suffix == ".onnx":
            from shardplan.models.frontends.onnx_graph import read_onnx

            return read_onnx(path, sizes).graph
        if path.suffix not in GRAPH_FILES:
            return _foreign(path, sizes)
    from shardplan.models.frontends.torch_model import read_torch

    return read_torch(
        subject, config, inputs=inputs, batch=batch, tokens=tokens, sizes=sizes, folded=folded
    ).graph


def _foreign(path: Path, sizes: Mapping[str, int] | None) -> OpGraph:
    """The graph of a file of a registered front end."""
    if not has_reader(path):
        raise InputError(
            "an operator graph is read from a .pt2 or .onnx file, or by a registered front end",
            got=f"{os.fspath(path)!r}"[:200],
            hint="names and config.json files have no operators: give a PyTorch module",
        )
    found = read_registered(path, sizes)
    if not isinstance(found, OpGraph):
        raise InputError(
            "a front end gives a graph of operators where one is wanted",
            got=f"file={path}: the sizes of a model",
            hint="search it without operators",
        )
    return found


def model_or_graph(
    subject: Any,
    config: Any = None,
    *,
    inputs: tuple[Any, ...] | None = None,
    batch: int = 1,
    tokens: int = 128,
    sizes: Mapping[str, int] | None = None,
) -> Recognised:
    """The sizes of the causal decoder that a subject of `load_graph` is, or else its graph.

    A decoder needs no `sizes` of an ONNX file's symbols. `InputError` for what cannot be read.
    """
    if isinstance(subject, (str, os.PathLike)):
        path = Path(subject)
        if path.suffix == ".onnx":
            return _of_onnx(path, sizes or {})
        if path.suffix != ".pt2":
            found = read_registered(path, sizes)
            return _recognised(found) if isinstance(found, OpGraph) else Recognised(found, "")
    else:
        spec = _configured(subject, config)
        if spec is not None:
            return Recognised(spec, "")
    graph = load_graph(subject, config, inputs=inputs, batch=batch, tokens=tokens, sizes=sizes)
    return _recognised(graph)


def _recognised(graph: OpGraph) -> Recognised:
    try:
        return Recognised(decoder_of(graph), "")
    except InputError as error:
        return Recognised(graph, f"{error.rule} ({error.got})")


def _configured(subject: Any, config: Any) -> ModelSpec | None:
    """The sizes that a configuration of a model of transformers says; None without a known one."""
    from shardplan.models.frontends.torch_capture import config_of
    from shardplan.models.frontends.torch_model import spec_of

    if config is None and config_of(subject) is None:
        return None
    try:
        return spec_of(subject, config)
    except InputError:
        return None


def _of_onnx(path: Path, sizes: Mapping[str, int]) -> Recognised:
    from shardplan.models.frontends.onnx_file import open_onnx
    from shardplan.models.frontends.onnx_graph import graph_of, read_onnx
    from shardplan.models.frontends.onnx_model import usual_sizes

    file = open_onnx(path)
    known = {**usual_sizes(file.proto), **sizes}
    recognised = _recognised(graph_of(file, known).graph)
    if not recognised.why or known == dict(sizes):
        return recognised
    return recognised._replace(found=read_onnx(path, sizes).graph)  # a walk keeps its sizes
