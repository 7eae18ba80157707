"""Whatever PyTorch holds a model in: as a captured graph (`read_torch`), as sizes (`spec_of`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardplan.models.config import spec_from_config
from shardplan.models.counts import parameter_count
from shardplan.models.errors import InputError, UnknownNameError
from shardplan.models.frontends.decoder import decoder_of
from shardplan.models.frontends.symbols import check_symbols
from shardplan.models.frontends.torch_capture import (
    USUAL_TOKENS,
    Capture,
    capture_class,
    capture_module,
    capture_program,
    config_of,
    module_of,
)
from shardplan.models.frontends.torch_file import open_program
from shardplan.models.frontends.torch_graph import TorchGraph, graph_of
from shardplan.models.fx.torch_lib import torch_lib
from shardplan.models.spec import ModelSpec

__all__ = ["capture", "read_torch", "spec_of", "spec_of_module"]

_WHOLE = ("bf16", "fp16", "fp32")
"""Types of checkpoints that hold weights alone, without the scales of quantized ones."""


def read_torch(
    subject: Any,
    config: Any = None,
    *,
    inputs: tuple[Any, ...] | None = None,
    batch: int = 1,
    tokens: int = USUAL_TOKENS,
    sizes: Mapping[str, int] | None = None,
    folded: bool = True,
    name: str = "",
) -> TorchGraph:
    """The graph of a module, an `ExportedProgram`, a `.pt2` file, or a Hugging Face class and its
    config.

    `inputs`: example inputs of a module, tensors on the meta device or not; a model of transformers
    is captured on ids [`batch`, `tokens`] instead. `sizes` gives symbols of an export's dynamic
    dims their elements. `folded` captures the first layers of each kind and multiplies.
    `InputError` for what cannot be captured or holds an operator without a rule.
    """
    found = capture(
        subject,
        config,
        inputs=inputs,
        batch=batch,
        tokens=tokens,
        sizes=sizes,
        folded=folded,
        name=name,
    )
    symbols = [str(symbol) for symbol in found.program.range_constraints]
    check_symbols(sizes or {}, symbols, found.name)
    return graph_of(found)


def capture(
    subject: Any,
    config: Any = None,
    *,
    inputs: tuple[Any, ...] | None = None,
    batch: int = 1,
    tokens: int = USUAL_TOKENS,
    sizes: Mapping[str, int] | None = None,
    folded: bool = True,
    name: str = "",
) -> Capture:
    """The export behind `read_torch`, with the same arguments."""
    torch = torch_lib()
    ids = {"batch": batch, "tokens": tokens}
    for named in (ids, sizes or {}):
        _check_sizes(named)
    if isinstance(subject, (str, os.PathLike)):
        path = Path(subject)
        return capture_program(
            open_program(path), sizes=sizes, name=name or path.stem, source=str(path)
        )
    if isinstance(subject, torch.export.ExportedProgram):
        return capture_program(subject, sizes=sizes, name=name or "export")
    if isinstance(subject, torch.nn.Module):
        return capture_module(subject, inputs, folded=folded, name=name, **ids)
    if isinstance(subject, type) and issubclass(subject, torch.nn.Module) and config is not None:
        return capture_class(subject, config, folded=folded, name=name, **ids)
    raise InputError(
        "a PyTorch model is a module, an ExportedProgram, a .pt2 file, or a class and its config",
        got=f"type={type(subject).__name__}" + ("" if config is None else ", with a config"),
        hint="for a class of transformers give the config too: (LlamaForCausalLM, config)",
    )


def _check_sizes(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError("sizes are whole numbers from 1 on", got=f"{name}={size!r}")


def spec_of(
    subject: Any, config: Any = None, *, inputs: tuple[Any, ...] | None = None
) -> ModelSpec:
    """The sizes of a causal decoder; `subject`, `config` and `inputs` as of `read_torch`.

    From the configuration of a model of transformers where there is one, else recognised in the
    graph. `InputError` where neither says them.
    """
    if isinstance(subject, type) and config is not None:
        subject = module_of(subject, config)
    if config_of(subject) is not None:
        return spec_of_module(subject)
    return decoder_of(read_torch(subject, config, inputs=inputs).graph)


def spec_of_module(module: Any) -> ModelSpec:
    """The sizes of a model of transformers, from its configuration, checked by its parameters.

    `InputError` for a module without one, of an architecture that is not known, or that has other
    parameters than its configuration says.
    """
    config = config_of(module)
    name = type(module).__name__
    if config is None:
        raise InputError(
            "a module has the configuration of a Hugging Face decoder",
            got=name,
            hint="give a transformers model, the name of a preset or a config.json",
        )
    try:
        spec = spec_from_config(config, name=name, source=f"module {name}")
    except UnknownNameError as error:
        raise InputError(
            error.rule,
            got=error.got,
            hint=f"{error.hint}; shardplan.load_graph takes the module as it is",
        ) from None
    held = _parameters(module)
    if spec.dtype in _WHOLE and parameter_count(spec) != held:
        raise InputError(
            "a model has the parameters that its configuration says",
            got=f"module={name}, parameters={held}, by its configuration={parameter_count(spec)}",
            hint="give inputs to load_graph and search the graph at operator level",
        )
    return spec


def _parameters(module: Any) -> int:
    """Elements that a checkpoint of a module holds as floating-point numbers, shared ones once."""
    stored = module.state_dict(keep_vars=True).values()
    own = {id(one): one for one in stored if one.is_floating_point()}
    return sum(int(one.numel()) for one in own.values())
