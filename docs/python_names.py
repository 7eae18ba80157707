"""The part of docs/reference.md that tells of the Python names, made from their docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import shardplan
from shardplan.search import api
from shardplan.search.plan import Plan

__all__ = ["python_section"]

_WIDTH = 96
_NEXT = ",\n    "


def python_section() -> str:
    """Public functions with their signatures, and the methods of a plan."""
    lines = [
        "## Python\n",
        "Errors are those of the [exit codes](#exit-codes), as exceptions of "
        "`shardplan.models.errors`. "
        "Arguments of `search` are the options of the command, with `_` for `-`.\n",
    ]
    for name, one in _functions():
        told = inspect.cleandoc(one.__doc__ or "")
        lines += [f"### {name}\n", "```text", f"{_signature(name, one)}\n\n{told}", "```\n"]
    return "\n".join(lines)


def _functions() -> Iterator[tuple[str, Callable[..., object]]]:
    yield "shardplan.search", api.search
    yield "shardplan.estimate", api.estimate
    for name in ("simulate", "load_model", "load_graph", "load_cluster"):
        yield f"shardplan.{name}", getattr(shardplan, name)
    for name in ("load", "save", "dumps", "emit", "verify", "apply"):
        yield f"shardplan.Plan.{name}", getattr(Plan, name)


def _signature(name: str, one: Callable[..., object]) -> str:
    """A call in one line, or with an argument a line where it is long."""
    found = inspect.signature(one)
    plain = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name != "self"]
    inside = str(found.replace(parameters=plain, return_annotation=found.empty))[1:-1]
    if len(name) + len(inside) <= _WIDTH:
        return f"{name}({inside})"
    return f"{name}(\n    {inside.replace(', ', _NEXT)},\n)"
