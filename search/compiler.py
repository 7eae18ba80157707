"""The backend `shardplan` of torch.compile: plan, report, and hand the graph on (extra `torch`).

    torch.compile(model, backend="shardplan", options={"model": model, "cluster": "atlas-800t-a2"})

Options:
    model      what is planned: a module (one that is no decoder with its `inputs`), the name of a
               preset, a config.json, an ONNX or .pt2 file
    cluster    the machine; with the other arguments of `shardplan.search` (cards, input_len, ...)
    plan       a plan, or the path of a plan.json, in place of a search
    report     a file that the plan is written to
    on_plan    a function that is called with the plan
    inner      who compiles: "eager" (default), another backend's name, "npu" (torchair), a callable

The graph that a backend is given has whole weights as inputs, so it is not cut here: every rank
would have to hold the model. `Plan.apply` cuts a module before it is compiled; this backend says
what the plan would be, and compiles what it is given.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import InputError
from shardplan.models.fx.torch_lib import torch_lib

if TYPE_CHECKING:
    from shardplan.search.oplevel.plan import OperatorPlan
    from shardplan.search.plan import Plan

__all__ = ["backend", "inner_backend"]

_OWN = ("model", "cluster", "plan", "report", "on_plan", "inner")


def backend(
    graph: Any, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **more: Any
) -> Callable[..., Any]:
    """The compiled graph, as `torch.compile` calls a backend. `InputError` for a bad option."""
    asked = {**(options or {})}
    inner = inner_backend(asked.pop("inner", "eager"))
    plan = _plan(asked)
    if plan is not None:
        if report := asked.get("report"):
            plan.save(report)
        if on_plan := asked.get("on_plan"):
            on_plan(plan)
    compiled: Callable[..., Any] = inner(graph, inputs, **more)
    return compiled


def _plan(asked: Mapping[str, Any]) -> Plan | OperatorPlan | None:
    """The plan that is named or searched for; None where nothing is asked."""
    from shardplan.search.ask import search
    from shardplan.search.oplevel.plan import OperatorPlan
    from shardplan.search.plan import Plan
    from shardplan.search.plan_file import load_plan

    given = asked.get("plan")
    if given is not None:
        return given if isinstance(given, Plan | OperatorPlan) else load_plan(Path(given))
    others = {name: value for name, value in asked.items() if name not in _OWN}
    if "model" not in asked and "cluster" not in asked and not others:
        return None
    missing = [name for name in ("model", "cluster") if asked.get(name) is None]
    if missing:
        raise InputError(
            "the backend plans a model for a cluster",
            got="options without " + ", ".join(missing),
            hint='give options={"model": ..., "cluster": ...}, or "plan"',
        )
    try:
        found: Plan | OperatorPlan = search(asked["model"], asked["cluster"], **others).plan
    except TypeError as error:
        raise InputError(
            "the options of the backend are its own and those of shardplan.search",
            got=str(error),
            hint="its own: " + ", ".join(_OWN),
        ) from None
    return found


def inner_backend(inner: str | Callable[..., Any]) -> Callable[..., Any]:
    """The backend that compiles: by name, "npu" for torchair, or as it is given."""
    if callable(inner):
        return inner
    if inner == "npu":
        return _torchair()
    torch_lib()
    dynamo = importlib.import_module("torch._dynamo")
    known = dynamo.list_backends(exclude_tags=())
    if inner not in known or inner == "shardplan":
        names = ", ".join(sorted({*known, "npu"} - {"shardplan"}))
        raise InputError(
            "`inner` is the name of a backend of torch.compile, or a callable",
            got=f"inner={inner!r}",
            hint=f"known: {names}",
        )
    found: Callable[..., Any] = dynamo.lookup_backend(inner)
    return found


def _torchair() -> Callable[..., Any]:
    """Huawei's compiler; torch_npu must be imported before torchair."""
    try:
        importlib.import_module("torch_npu")
        torchair = importlib.import_module("torchair")
    except ImportError as error:
        raise InputError(
            "the inner backend npu needs torch_npu and torchair",
            got=str(error),
            hint="install torch_npu for this torch and CANN, or use another inner backend",
        ) from None
    made: Callable[..., Any] = torchair.get_npu_backend()
    return made
