"""What a captured graph holds, in a few numbers, whoever captured it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from shardplan.models.opgraph import Operator, OpGraph
from shardplan.models.opsources import Wiring, columns

__all__ = ["GraphSummary", "describe", "graph_digest"]


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """Counts of one graph: elements, floating point operations of one run, operators by kind."""

    parameters: int
    flop: float
    layers: int
    attentions: int
    kv_elements_per_token: int
    """Elements of keys and values that a token adds over all attentions, 0 without attention."""
    vocabulary: int
    """Rows of the largest embedding table, 0 without one."""
    operators: Mapping[str, int]


def describe(graph: OpGraph) -> GraphSummary:
    """The numbers of a graph; an attention says its own sizes (`kv_heads`, `head_dim`, ...)."""
    attentions = list(graph.of_kind("attention"))
    wiring = Wiring(graph)
    tables = [graph.tensors[one.inputs[0]].shape[0] for one in graph.of_kind("embedding")]
    return GraphSummary(
        parameters=graph.parameters,
        flop=graph.flop,
        layers=graph.layers,
        attentions=sum(graph.times(one.layer) for one in attentions),
        kv_elements_per_token=sum(graph.times(o.layer) * _cached(wiring, o) for o in attentions),
        vocabulary=max(tables, default=0),
        operators=Counter(one.kind for one in graph.operators),
    )


def _cached(wiring: Wiring, one: Operator) -> int:
    """Elements that a token adds to the cache of an attention: its latent where it has one."""
    latent = wiring.latent(one)
    if latent is not None:
        return columns(latent.down)
    return int(one.attrs["kv_heads"]) * (int(one.attrs["head_dim"]) + int(one.attrs["value_dim"]))


def graph_digest(graph: OpGraph) -> str:
    """SHA-256 of what the graph computes: operators, tensors, layers; where it lies counts not."""
    operators = [
        (
            one.name,
            one.kind,
            [(access.tensor, access.loops) for access in one.reads],
            [(access.tensor, access.loops) for access in one.writes],
            [(name, loop.size, loop.whole) for name, loop in one.loops.items()],
            one.linear,
            one.layer,
            sorted((name, str(value)) for name, value in one.attrs.items()),
            one.refused,
        )
        for one in graph.operators
    ]
    tensors = sorted((one.name, one.shape, one.dtype, one.kind) for one in graph.tensors.values())
    whole = (operators, tensors, graph.outputs, sorted(graph.folded.items()))
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()
