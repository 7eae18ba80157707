"""A per-rank graph cut into pipeline stages by layer.

A node belongs to the stage of its layer; what has no layer belongs to the stage of what precedes
it, so that a collective stays with what it serves. Chains that come from inputs alone (positions,
rotary tables, masks) are cloned into each stage that reads them instead of being sent. A stage
hands on what it made, or was handed, and a later one reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardplan.models.fx.collectives import collective_of
from shardplan.models.fx.emit import Held, RankGraph
from shardplan.models.fx.torch_lib import torch_lib

__all__ = ["StageGraph", "cut_stages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGraph:
    """The graph of every rank of one stage: placeholders are wires, inputs, then `rank`."""

    index: int
    graph: Any
    held: Mapping[str, Held]
    wires_in: tuple[str, ...]
    inputs: tuple[str, ...]
    """Captured inputs that the stage reads, in order."""
    wires_out: tuple[str, ...]
    outputs: tuple[int, ...]
    """Numbers of the captured outputs that the stage gives, after its wires."""


def cut_stages(whole: RankGraph, layers: Sequence[int]) -> tuple[StageGraph, ...]:
    """The stages of a graph; `layers` are the layers of each, in order."""
    first = [sum(layers[:stage]) for stage in range(len(layers))]
    at = _stage_of(whole.graph, first)
    cheap = _cheap(whole.graph)
    needs = _needs(whole.graph, at, cheap)
    return tuple(_Stage(whole, index, at, cheap, needs).run() for index in range(len(layers)))


def _stage_of(graph: Any, first: Sequence[int]) -> dict[Any, int]:
    """Node -> stage, never before that of the node in front of it."""
    found, now = {}, 0
    for node in graph.nodes:
        layer = node.meta.get("layer", -1)
        own = sum(start <= layer for start in first) - 1 if layer >= 0 else now
        found[node] = now = max(now, own)
    return found


def _cheap(graph: Any) -> set[Any]:
    """Nodes that come from inputs and constants alone, cross no ranks and look nothing up."""
    found: set[Any] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            found.add(node)
        elif node.op == "call_function" and not collective_of(node):
            products = getattr(node.target, "_opname", "") in ("embedding", "linear", "experts")
            if not products and all(one in found for one in node.all_input_nodes):
                found.add(node)
    return found


def _needs(graph: Any, at: Mapping[Any, int], cheap: set[Any]) -> dict[Any, int]:
    """Node -> last stage that reads it, of nodes that are not cheap."""
    last: dict[Any, int] = {}
    for node in graph.nodes:
        stage = at[node]
        if node in cheap or node.op == "output":
            continue
        for one in node.all_input_nodes:
            if one not in cheap:
                last[one] = max(last.get(one, 0), stage)
    return last


class _Stage:
    def __init__(
        self,
        whole: RankGraph,
        index: int,
        at: Mapping[Any, int],
        cheap: set[Any],
        needs: Mapping[Any, int],
    ) -> None:
        self.whole, self.index, self.at, self.cheap, self.needs = whole, index, at, cheap, needs
        self.graph = torch_lib().fx.Graph()
        self.copied: dict[Any, Any] = {}

    def run(self) -> StageGraph:
        nodes = list(self.whole.graph.nodes)
        results = nodes[-1].args[0]
        own = [n for n in nodes if self.at[n] == self.index and n not in self.cheap]
        own = [n for n in own if n.op != "output"]
        wires_in = [n for n in nodes if self.crosses(n, self.index)]
        wires_out = [n for n in nodes if self.crosses(n, self.index + 1)]
        outputs = tuple(i for i, one in enumerate(results) if self.gives(one))
        wanted = self.cheap_before([*own, *(results[i] for i in outputs)])
        for node in wires_in:
            self.copied[node] = self.graph.placeholder(node.name)
        inputs = [n for n in nodes if n.op == "placeholder" and n in wanted and n.name != "rank"]
        for node in inputs:
            self.copied[node] = self.graph.placeholder(node.name)
        rank = next(n for n in nodes if n.op == "placeholder" and n.target == "rank")
        self.copied[rank] = self.graph.placeholder("rank")
        kept = {*own, *wanted}
        for node in nodes:
            if node in kept and node.op != "placeholder":
                self.copied[node] = self.graph.node_copy(node, self.copied.__getitem__)
        ends = [*wires_out, *(results[i] for i in outputs)]
        self.graph.output(tuple(self.copied[node] for node in ends))
        names = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        return StageGraph(
            index=self.index,
            graph=self.graph,
            held={name: one for name, one in self.whole.held.items() if name in names},
            wires_in=tuple(node.name for node in wires_in),
            inputs=tuple(node.name for node in inputs),
            wires_out=tuple(node.name for node in wires_out),
            outputs=outputs,
        )

    def crosses(self, node: Any, into: int) -> bool:
        """Whether a node's value is handed into a stage: made before it, read in it or later."""
        return self.at[node] < into <= self.needs.get(node, -1)

    def gives(self, node: Any) -> bool:
        """Whether an output of the whole graph is made here; one that is cheap, by the first."""
        return self.index == (0 if node in self.cheap else self.at[node])

    def cheap_before(self, nodes: Sequence[Any]) -> set[Any]:
        """Cheap nodes that these need, directly or through one another."""
        found: set[Any] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            for one in (node, *node.all_input_nodes):
                if one in self.cheap and one not in found:
                    found.add(one)
                    waiting.append(one)
        return found
