"""Splits of a captured graph that are known beforehand: none, and Megatron's.

Megatron's follows from the graph (`models.onnxout.choose`): products by columns and rows over the
last axis; where there are two, sequences of all inputs over the first; experts by width or apart.
Each names the first of equal layers' operators, as `price_operators` takes it.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardplan.models.errors import LayoutError
from shardplan.models.onnxout.choose import both, follow_strategy, megatron_strategy
from shardplan.models.opfold import first_alike
from shardplan.models.opgraph import OpGraph
from shardplan.models.parallel import Mesh

__all__ = ["Split", "columns_and_rows", "megatron_splits"]

_EXPERT_DIMS = 3
Split = dict[str, dict[str, str]]


def columns_and_rows(graph: OpGraph, mesh: Mesh, axis: str) -> Split:
    """Products by columns and rows over one axis, all else as follows from it.

    `graph`: with all its layers.
    """
    return _firsts(graph, megatron_strategy(graph, mesh, axis))


def megatron_splits(graph: OpGraph, mesh: Mesh) -> Iterator[tuple[str, Split]]:
    """(name, split) of each way that is Megatron's; sequences where all inputs divide.

    `graph`: with all its layers.
    """
    *outer, inner = mesh.axes
    tensors = graph.tensors.values()
    experts = {
        one.name: 0 for one in tensors if one.kind == "parameter" and len(one.shape) == _EXPERT_DIMS
    }
    ids = {one.name: 0 for one in tensors if one.kind == "input"}
    over = f"over {inner}" + "".join(f", sequences over {axis}" for axis in outer)
    dense = megatron_strategy(graph, mesh, inner)
    try:
        rest = [follow_strategy(graph, mesh, axis, ids) for axis in outer]
    except LayoutError:
        rest, over = [], f"over {inner}"
    how = f"products by columns and rows {over}"
    yield how, _firsts(graph, both(dense, *rest))
    if experts:
        try:
            apart = follow_strategy(graph, mesh, inner, experts)
        except LayoutError:
            return
        yield f"{how}, experts apart", _firsts(graph, both(both(dense, apart), *rest))


def _firsts(graph: OpGraph, split: Split) -> Split:
    first = first_alike(graph)
    return {name: chosen for name, chosen in split.items() if first[name] == name}
