"""What is captured of PyTorch: a module, a Hugging Face class with its config, an export, a file.

A module is exported at its real sizes without weights in memory: on the meta device, not
decomposed, under no_grad. A model of the transformers package is asked for the logits of token ids
[batch, tokens] alone.

Of a stack of equal layers the first few are captured: until each kind of layer was met twice (or
as often as there are). The graph then is folded: the last of a kind stands for all that were left
out. `folded=False` captures every layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from shardplan.models.errors import InputError
from shardplan.models.frontends.torch_normal import normal_graph
from shardplan.models.frontends.torch_stack import Stack, find_stack
from shardplan.models.fx.torch_lib import said, torch_lib

__all__ = [
    "USUAL_TOKENS",
    "Capture",
    "capture_class",
    "capture_module",
    "capture_program",
    "config_of",
    "module_of",
]

USUAL_TOKENS = 128
"""Tokens of the ids that a model is captured on where none are given; sizes of weights and layers
do not depend on them."""
_PLAIN: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, eq=False, kw_only=True)
class Capture:
    """An export in normal form."""

    name: str
    program: Any
    """The `torch.export.ExportedProgram`, as it was exported."""
    graph: Any
    """Its `torch.fx.Graph` in normal form: node names are those of the operators."""
    states: Mapping[str, str]
    """Input that a run changes -> node of its new value, given after the program's own outputs."""
    config: Mapping[str, Any] | None = None
    """The model's Hugging Face configuration."""
    source: str = ""
    sizes: Mapping[str, int] = field(default_factory=lambda: _PLAIN)
    """Symbol of a dynamic dim -> its elements."""
    stack: Stack | None = None
    """The layers of a folded capture."""

    def kinds(self) -> dict[str, tuple[str, str]]:
        """(kind of tensor, name in the module) of every input of the graph.

        Buffers that a checkpoint stores as floating-point numbers count as parameters.
        """
        signature = self.program.graph_signature
        found = {name: ("parameter", s) for name, s in signature.inputs_to_parameters.items()}
        loose = set(getattr(signature, "non_persistent_buffers", ()))
        for name, source in signature.inputs_to_buffers.items():
            stored = source not in loose and self._tensor(name).is_floating_point()
            found[name] = ("parameter" if stored else "constant", source)
        for name, source in signature.inputs_to_lifted_tensor_constants.items():
            found[name] = ("constant", source)
        for name in self.states:
            found[name] = ("state", found.get(name, ("", ""))[1])
        return found

    @property
    def tied(self) -> Mapping[str, str]:
        """Input of a parameter that is another one under a second name -> the first."""
        first: dict[int, str] = {}
        tied: dict[str, str] = {}
        for name, source in self.program.graph_signature.inputs_to_parameters.items():
            tensor = self.program.state_dict.get(source)
            owner = first.setdefault(id(tensor), name) if tensor is not None else name
            if owner != name:
                tied[name] = owner
        return tied

    def _tensor(self, name: str) -> Any:
        return next(n.meta["val"] for n in self.graph.nodes if n.name == name)


def capture_module(
    module: Any,
    inputs: tuple[Any, ...] | None = None,
    *,
    batch: int = 1,
    tokens: int = USUAL_TOKENS,
    folded: bool = True,
    name: str = "",
) -> Capture:
    """A module on example inputs; a model of transformers needs none: ids [batch, tokens].

    The module is read as it is; parameters on the meta device are enough, and of others no copy is
    made. `InputError` where the module cannot be exported.
    """
    torch = torch_lib()
    config = config_of(module)
    if inputs is None:
        if config is None:
            raise InputError(
                "a module is captured on example inputs",
                got=f"module={type(module).__name__}",
                hint="give inputs=(tensor, ...), on the meta device or not",
            )
        device = next((one.device for one in module.parameters()), torch.device("meta"))
        inputs = (torch.zeros(batch, tokens, dtype=torch.long, device=device),)
        whole: Any = _logits_of(module)
    else:
        whole = module
    said = name or type(module).__name__
    stack = find_stack(module) if folded else None
    if stack is not None:
        with suppress(InputError):  # what follows the layers may count on all of them
            short = _program(module, whole, inputs, stack)
            return _capture(short, said, config=config, stack=stack)
    return _capture(_program(module, whole, inputs, None), said, config=config)


def _program(module: Any, whole: Any, inputs: tuple[Any, ...], stack: Stack | None) -> Any:
    with _shortened(stack), _evaluating(module):
        return _exported(whole, inputs)


def capture_class(
    model_class: Any,
    config: Any,
    *,
    batch: int = 1,
    tokens: int = USUAL_TOKENS,
    folded: bool = True,
    name: str = "",
) -> Capture:
    """A model class of transformers with its config, as `capture_module`."""
    module = module_of(model_class, config)
    return capture_module(module, batch=batch, tokens=tokens, folded=folded, name=name)


def module_of(model_class: Any, config: Any) -> Any:
    """A class built from its config on the meta device: no weights. `InputError` if it does not."""
    try:
        with torch_lib().device("meta"):
            return model_class(config).eval()
    except Exception as error:  # whatever the class raises on a config that does not fit
        raise InputError(
            "the class is built from its config on the meta device",
            got=f"class={getattr(model_class, '__name__', model_class)}, {said(error)}",
            hint="give the config class that belongs to the model class",
        ) from None


def capture_program(
    program: Any,
    *,
    sizes: Mapping[str, int] | None = None,
    name: str = "export",
    source: str = "",
) -> Capture:
    """An `ExportedProgram`. `sizes` gives symbols of dynamic dims their elements."""
    return _capture(program, name, sizes=sizes or _PLAIN, source=source)


def _capture(program: Any, name: str, **more: Any) -> Capture:
    graph, states = normal_graph(program.graph)
    return Capture(name=name, program=program, graph=graph, states=states, **more)


def config_of(module: Any) -> Mapping[str, Any] | None:
    """The configuration of a model of transformers as its config.json would hold it."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    found: dict[str, Any] = config.to_dict()
    found["architectures"] = [type(module).__name__]
    return found


def _logits_of(model: Any) -> Any:
    torch = torch_lib()

    class Logits(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is loaded late
        """Token ids [batch, tokens] to logits [batch, tokens, vocabulary]."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any) -> Any:
            out = self.model(input_ids=ids, use_cache=False)
            return out.logits if hasattr(out, "logits") else out[0]

    return Logits()


def _exported(module: Any, inputs: tuple[Any, ...]) -> Any:
    torch = torch_lib()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, tuple(inputs), strict=False)
    except Exception as error:  # whatever the module or the tracer raises
        raise InputError(
            "the module is exported by torch.export",
            got=f"module={type(module).__name__}, {said(error)}",
            hint="branches and shapes must not depend on data; give inputs of other sizes",
        ) from None


@contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Dropout and batch statistics off, as they were afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def _shortened(stack: Stack | None) -> Iterator[None]:
    """The module with the first layers of its stack alone, whole again afterwards."""
    if stack is None:
        yield
        return
    torch = torch_lib()
    whole = getattr(stack.owner, stack.attribute)
    short = torch.nn.ModuleList(list(whole)[: stack.kept])
    setattr(stack.owner, stack.attribute, short)
    try:
        yield
    finally:
        setattr(stack.owner, stack.attribute, whole)
