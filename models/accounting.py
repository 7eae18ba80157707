"""What an applied graph holds and moves, read from the graph itself.

Counts are linear in few symbols, so they are kept symbolic: a `Product` is a coefficient and the
free dims (B, T, S) that multiply it, already divided by the ways each dim is cut. The memory
ledger and the price of collectives evaluate these; the proof compares them with what the executor
really held and moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardplan.models.apply import Layout, ShardedBlock, ShardedGraph, ShardedOp, Stage
from shardplan.models.graph import FREE_DIMS, WeightClass
from shardplan.models.lockstep import Communication
from shardplan.models.ranks import Extents, extents
from shardplan.models.weight_groups import WeightGroup, group_of

__all__ = [
    "HeldWeight",
    "Product",
    "Transfer",
    "local_product",
    "predict_communication",
    "stage_weights",
    "state_elements",
    "state_elements_per_token",
    "transfers",
]


@dataclass(frozen=True, slots=True)
class Product:
    """`factor` times the product of ceil(size / ways) over the free dims."""

    factor: float
    free: tuple[tuple[str, int], ...]
    """(dim, ways it is cut)."""

    def at(self, sizes: dict[str, int]) -> float:
        """The value for given free sizes (global B, T, S)."""
        value = self.factor
        for dim, ways in self.free:
            value *= -(-sizes[dim] // ways)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One collective of a template: elements of the full tensor of its group."""

    kind: str
    axes: tuple[str, ...]
    ranks: int
    lies: Extents
    """Where the ranks of its group lie; of a send, all stages of a pipeline."""
    elements: Product
    logits: bool = False
    """It gathers the logits of a vocabulary that is split, for sampling."""
    attention: bool = False
    """It moves what attention reads or gives: keys of a context, results of its parts."""
    element_bytes: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldWeight:
    """One parameter as one rank holds it, `count` times over the layers of its stage."""

    name: str
    weight_class: WeightClass
    weight_group: WeightGroup
    count: int
    elements: int
    channels: int
    """Output channels: one scale each where the weight is quantized per channel."""


def local_product(graph: ShardedGraph, dims: tuple[str, ...], layout: Layout) -> Product:
    """Elements that one rank holds of a tensor with these dims under a layout."""
    factor, free, sizes = 1.0, [], graph.model.sizes
    cut = graph.mesh.ways(layout)
    for dim in dims:
        ways = cut.get(dim, 1)
        if dim in FREE_DIMS:
            free.append((dim, ways))
        else:
            factor *= sizes[dim] / ways
    return Product(factor, tuple(free))


def _transfer(graph: ShardedGraph, node: ShardedOp) -> Transfer:
    if node.kind == "send":
        axes: tuple[str, ...] = ("pp",)
        ranks = 2
        held = local_product(graph, node.dims, node.layout)
        factor = held.factor
    else:
        axes, ranks = node.axes, graph.mesh.size(node.axes)
        lies = node.layout if node.kind == "all_gather" else node.before
        held = local_product(graph, node.dims, lies)
        factor = held.factor * node.density * (ranks if node.kind == "all_to_all" else 1)
    return Transfer(
        kind=node.kind,
        axes=axes,
        ranks=ranks,
        lies=extents(graph.mesh, graph.parallel, axes),
        elements=Product(factor, held.free),
        logits=node.kind in ("all_gather", "all_to_all") and "V" in node.dims,
        attention=bool({"S", "W"}.intersection(node.dims)),
        element_bytes=node.element_bytes,
    )


def transfers(
    graph: ShardedGraph, block: ShardedBlock, *, logits: bool = True
) -> Iterator[Transfer]:
    """Collectives and sends of one template, in computing order; with the gather of logits or not.

    Ranks that sample nothing leave the logits where they are.
    """
    for node in block.ops():
        if node.kind == "send" or (node.axes and node.kind != "slice"):
            one = _transfer(graph, node)
            if logits or not one.logits:
                yield one


def predict_communication(
    graph: ShardedGraph, batch: int, tokens: int, context: int, *, logits: bool = True
) -> list[Communication]:
    """Every collective of one step, in the order that a lock-step run makes them."""
    sizes = {"B": batch, "T": tokens, "S": context}
    found = []
    for stage in graph.stages:
        passes = [(name, sizes) for name, _ in graph.sequence(stage)]
        for _ in range(graph.runs(stage).get("draft", 0)):
            passes += [(name, {**sizes, "T": 1}) for name in ("mtp", "mtp_head")]
        for name, free in passes:
            for one in transfers(graph, graph.blocks[name], logits=logits):
                elements = round(one.elements.at(free))
                found.append(
                    Communication(stage.index, name, one.kind, one.axes, one.ranks, elements)
                )
    return found


def stage_weights(graph: ShardedGraph, stage: Stage) -> Iterator[HeldWeight]:
    """Parameters that one rank of a stage holds.

    A table that several templates of a stage use is held once: a tied LM head on the stage of the
    embedding, and what the prediction layer shares with the model.
    """
    held: set[str] = set()
    for name, count in stage.counts.items():
        whole = name in ("embed", "head", "mtp_head")
        for node in graph.blocks[name].ops():
            op = node.op
            if op is None or not op.weight or ((whole or op.shared) and op.param in held):
                continue
            if whole or op.shared:
                held.add(op.param)
            kept = tuple(d for d in op.weight if d not in op.contract)
            yield HeldWeight(
                name=op.param,
                weight_class=op.weight_class,
                weight_group=group_of(op),
                count=count,
                elements=round(local_product(graph, op.weight, node.weight_layout).factor),
                channels=round(local_product(graph, kept, node.weight_layout).factor),
            )


def _states(graph: ShardedGraph, stage: Stage) -> Iterator[tuple[int, ShardedOp]]:
    """(times it runs in a stage, cache) of every cache."""
    for name, count in stage.counts.items():
        for node in graph.blocks[name].ops():
            if node.op is not None and node.op.state:
                yield count, node


def state_elements_per_token(graph: ShardedGraph, stage: Stage) -> float:
    """KV elements that one cached token of one sequence adds on one rank of a stage.

    The mean over the ranks that share a context.
    """
    total = 0.0
    for count, node in _states(graph, stage):
        dims = tuple(d for d in node.dims if d not in FREE_DIMS)
        held = local_product(graph, dims, node.layout).factor
        total += count * held / graph.split("S", node.layout)
    return total


def state_elements(graph: ShardedGraph, stage: Stage, batch: int, context: int) -> float:
    """KV elements on one rank of a stage, for `batch` sequences of all dp groups."""
    sizes = {"B": batch, "S": context}
    return sum(
        count * local_product(graph, node.dims, node.layout).at(sizes)
        for count, node in _states(graph, stage)
    )
