"""What a captured graph holds, in a few numbers, whoever captured it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from shardplan.models.opgraph import OpGraph

__all__ = ["GraphSummary", "describe"]


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """Counts of one graph: elements, floating point operations of one run, operators by kind."""

    parameters: int
    flop: float
    layers: int
    attentions: int
    kv_elements_per_token: int
    """Elements of keys and values that a token adds over all attentions, 0 without attention."""
    operators: Mapping[str, int]


def describe(graph: OpGraph) -> GraphSummary:
    """The numbers of a graph; an attention says its own sizes (`kv_heads`, `head_dim`, ...)."""
    attentions = list(graph.of_kind("attention"))
    cached = sum(
        graph.times(one.layer)
        * int(one.attrs["kv_heads"])
        * (int(one.attrs["head_dim"]) + int(one.attrs["value_dim"]))
        for one in attentions
    )
    return GraphSummary(
        parameters=graph.parameters,
        flop=graph.flop,
        layers=graph.layers,
        attentions=sum(graph.times(one.layer) for one in attentions),
        kv_elements_per_token=cached,
        operators=Counter(one.kind for one in graph.operators),
    )
