"""`load_graph(...)`: the operators of a model, whoever holds it: PyTorch or an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardplan.models.errors import InputError
from shardplan.models.opgraph import OpGraph

__all__ = ["load_graph"]

_TORCH_FILES = (".pt2",)


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
    `torch.export.ExportedProgram`, a `.pt2` file or an `.onnx` file. `sizes` gives symbolic dims of
    an export or of an ONNX file their elements. `folded`: the first layers of each kind are
    captured and multiplied (`OpGraph.folded`); False captures every layer of a module.
    `InputError` for anything else, and for an operator without a rule, which it names.
    """
    if isinstance(subject, (str, os.PathLike)):
        path = Path(subject)
        if path.suffix == ".onnx":
            from shardplan.models.frontends.onnx_graph import read_onnx

            return read_onnx(path, sizes).graph
        if path.suffix not in _TORCH_FILES:
            raise InputError(
                "an operator graph is read from a .pt2 or .onnx file",
                got=f"{os.fspath(subject)!r}"[:200],
                hint="names and config.json files have no operators: give a PyTorch module",
            )
    from shardplan.models.frontends.torch_model import read_torch

    return read_torch(
        subject, config, inputs=inputs, batch=batch, tokens=tokens, sizes=sizes, folded=folded
    ).graph
