"""`shardplan.search(...)`: a deployment of a decoder, or the split of any other graph's operators.

    preset, config.json, decoder of whatever source  ->  search.api            -> SearchResult
    any other graph, or any with `operators=True`    ->  search.oplevel.ask    -> OperatorResult

Each has arguments of its own; one that the other would take is refused by name. To type checkers a
model that is a `str` is a decoder: name other graphs by a `Path`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from shardplan.costmodel.hardware import Cluster
from shardplan.models.errors import InputError
from shardplan.models.frontends.registry import holds_graph
from shardplan.models.spec import ModelSpec
from shardplan.search.api import SearchResult
from shardplan.search.api import search as search_deployment
from shardplan.search.asked import Asked

if TYPE_CHECKING:
    from shardplan.search.oplevel.ask import OperatorResult

__all__ = ["search"]

_BOTH = ("nodes", "cards", "device", "weight_dtype", "time_limit")
_CAPTURE = {"config": None, "inputs": None, "batch": 1, "tokens": 128, "sizes": None}
"""How a graph is read (`load_graph`)."""
_OPERATORS = {"mesh": "auto", "stages": 1, "memory_bytes": None, "pins": None, "forbid": None}
_DEPLOYMENT = {"top": 5, "storage": None, "study": None, "resume": False}
Progress = Callable[[int, int], None]


@overload
def search(
    model: str | ModelSpec,
    cluster: str | Cluster,
    *,
    operators: Literal[False] = False,
    **asked: Any,
) -> SearchResult: ...
@overload
def search(
    model: Any, cluster: str | Cluster, *, operators: Literal[True], **asked: Any
) -> OperatorResult: ...
@overload
def search(
    model: Any, cluster: str | Cluster, *, operators: bool = False, **asked: Any
) -> SearchResult | OperatorResult: ...
def search(
    model: Any,
    cluster: str | Cluster,
    *,
    operators: bool = False,
    progress: Progress | None = None,
    **asked: Any,
) -> SearchResult | OperatorResult:
    """Find, price and prove the best plan.

    `model`: a `ModelSpec`, or whatever `load_model` or `load_graph` takes: the name of a preset, a
    config.json, an ONNX or .pt2 file, a PyTorch module, an export, a class and its config. What is
    no causal decoder is searched operator by operator, and so is any graph with `operators=True`.

    Of both: nodes, cards, device, weight_dtype, time_limit (seconds). Of a graph: config, inputs,
    batch, tokens and sizes, as of `load_graph`. Of a deployment: `search.api.search`; of operators:
    mesh, stages, memory_bytes, pins and forbid, as of `search.oplevel.ask.search_graph`.
    Raises `InputError` for a bad question and `InfeasibleError` when nothing satisfies it.
    """
    if isinstance(model, tuple) and len(model) == 2:  # noqa: PLR2004  # a class and its config
        model, asked["config"] = model
    reading = {name: asked.pop(name, value) for name, value in _CAPTURE.items()}
    if operators:
        from shardplan.models.frontends.load import load_graph

        return _of_operators(load_graph(model, **reading), cluster, asked, reading, "")
    if isinstance(model, ModelSpec) or not holds_graph(model):
        asked = _without(asked, "add operators")
        _refuse(reading, _CAPTURE, "a graph", "give a module, or an ONNX or .pt2 file")
        return search_deployment(model, cluster, progress=progress, **asked)
    from shardplan.models.frontends.load import model_or_graph

    recognised = model_or_graph(model, **reading)
    if isinstance(recognised.found, ModelSpec):
        asked = _without(asked, "add operators: this is a decoder")
        return search_deployment(recognised.found, cluster, progress=progress, **asked)
    return _of_operators(recognised.found, cluster, asked, reading, recognised.why)


def _of_operators(
    graph: Any, cluster: str | Cluster, asked: dict[str, Any], reading: Mapping[str, Any], why: str
) -> OperatorResult:
    from shardplan.search.oplevel.ask import search_graph

    known = {field.name: field.default for field in dataclasses.fields(Asked)} | _DEPLOYMENT
    strange = [name for name in asked if name not in known and name not in _OPERATORS]
    if strange:
        raise TypeError(f"search() got an unexpected keyword argument {strange[0]!r}")
    others = {name: value for name, value in known.items() if name not in _BOTH}
    because = f" ({why})" if why else ""
    _refuse(asked, others, f"the deployment of a decoder{because}", "leave it out")
    given = {name: value for name, value in asked.items() if name not in others}
    notes = [f"searched by operators: {why}"] if why else []
    return search_graph(graph, cluster, sizes=reading["sizes"], notes=notes, **given)


def _without(asked: Mapping[str, Any], hint: str) -> dict[str, Any]:
    """What was asked of a deployment; `InputError` for what belongs to a search of operators."""
    _refuse(asked, _OPERATORS, "a search of operators", hint)
    return {name: value for name, value in asked.items() if name not in _OPERATORS}


def _refuse(asked: Mapping[str, Any], known: Mapping[str, Any], whose: str, hint: str) -> None:
    """`InputError` for an argument that was given and belongs to the other search."""
    given = [n for n, value in known.items() if n in asked and not _is(asked[n], value)]
    if given:
        raise InputError(f"`{given[0]}` belongs to {whose}", got=", ".join(given), hint=hint)


def _is(value: Any, default: Any) -> bool:
    """Whether an argument has its default; those that cannot be compared have not."""
    return value is default or (isinstance(value, str | int | bool) and value == default)
