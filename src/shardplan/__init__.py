"""shardplan: finds and proves the best way to deploy a large language model on Ascend clusters.

    model graph -> strategy -> sharded graph -> cost -> plan

Public names, each loaded on first use so that `import shardplan` stays instant:

    search(...)          the best plan for a model on a cluster; also the package of that name
    estimate(...)        the price of a given strategy
    simulate(...)        what requests see that a plan serves one by one
    load_model(...)      a model's sizes, from a preset's name, a `config.json` or a PyTorch module
    load_graph(...)      a model's operators, from a PyTorch module or export, or an ONNX file
    load_cluster(...)    a cluster, from its name or a TOML file
    Plan                 a chosen strategy with all that is needed to deploy it
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardplan.costmodel.catalog import load_cluster
    from shardplan.models.catalog import load_model
    from shardplan.models.frontends.load import load_graph
    from shardplan.search.api import estimate
    from shardplan.search.ask import search
    from shardplan.search.plan import Plan
    from shardplan.search.simulate_api import simulate

__all__ = [
    "Plan",
    "__version__",
    "estimate",
    "load_cluster",
    "load_graph",
    "load_model",
    "search",
    "simulate",
]

__version__ = "0.1.0"

_HOMES = {
    "Plan": "shardplan.search.plan",
    "estimate": "shardplan.search.api",
    "load_cluster": "shardplan.costmodel.catalog",
    "load_graph": "shardplan.models.frontends.load",
    "load_model": "shardplan.models.catalog",
    "simulate": "shardplan.search.simulate_api",
}


def __getattr__(name: str) -> object:
    """Load a public name on first use; `AttributeError` for any other."""
    if name == "search":  # the package is itself callable: see its docstring
        return importlib.import_module("shardplan.search")
    if name not in _HOMES:
        raise AttributeError(f"module 'shardplan' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
