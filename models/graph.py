"""The model graph: operators with named dims, repeated layers folded to one template each.

A `Block` is a template layer: its operators by name, each naming the operators it reads. Its
`graph` is the same as a networkx DiGraph, whose nodes carry an `Op` (attribute `op`) and whose
edges carry the consumer's input position (attribute `slot`); it is made where asked, because
networkx takes longer to import than most graphs take to price. A `ModelGraph` is the sequence
embed, layer, layer, ..., head, where each layer names its template, so that an 80-layer model
holds four small graphs. Sizes of named dims live once, in `ModelGraph.sizes`; B (batch), T (new
tokens a sequence) and S (context) stay free, so a change of batch or length rebuilds nothing.

Every named dim is one letter, so that an operator's arithmetic is an einsum over its dims:
B T S H K G D F V E I X Q C N R as in `shardplan.models.spec`, and L, of size 1 (the one token whose
logits are wanted), and U, of size 2 H (a hidden state and an embedding side by side).

A graph that predicts tokens ahead holds two more templates, `mtp` (the prediction layer) and
`mtp_head`. They read what the last layer gives, run after the head, and share the embedding table
and the LM head with the model.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

from shardplan.models.errors import InputError
from shardplan.models.spec import ModelSpec

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "FREE_DIMS",
    "Block",
    "ModelGraph",
    "Op",
    "Phase",
    "Role",
    "WeightClass",
    "digraph",
    "topological",
]

Phase = Literal["prefill", "decode"]
Role = Literal[
    "input",
    "embedding",
    "token",
    "heads",
    "kv_heads",
    "latent",
    "o",
    "ffn",
    "router",
    "dispatch",
    "expert",
    "combine",
    "moe_sum",
    "shared",
    "head",
    "select",
    "stat",
]
WeightClass = Literal["none", "linear", "expert", "absorbed", "embedding", "small"]
"""What a parameter is to quantization: linear and expert weights may be quantized; the latent
up-projections of MLA (absorbed into decode), embeddings, routers, norms, biases and the product
that joins the inputs of a prediction layer stay whole."""
FREE_DIMS = ("B", "T", "S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operator with one output.

    `dims` are the output's named dims in order; `contract` the dims it sums over; `whole` the
    dims that no axis may split. `weight` are the dims of its parameter, named `param`.
    """

    name: str
    kind: str
    role: Role
    inputs: tuple[str, ...]
    dims: tuple[str, ...]
    contract: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    weight: tuple[str, ...] = ()
    param: str = ""
    weight_class: WeightClass = "none"
    fuse: str = ""
    """Operators of one block that share this label and their first input run as one kernel."""
    linear: tuple[int, ...] = ()
    """Inputs through which a partial sum may pass unreduced (all of them together)."""
    state: str = ""
    """Name of the cache it appends to and reads."""
    cut_as: tuple[tuple[str, str], ...] = ()
    """(output dim, input dim): an axis that cuts the one cuts the other, where an input has it."""
    element_bytes: float = 2.0
    """Bytes of one element of the output where it crosses ranks."""
    density: float = 1.0
    """Share of the output's elements that carry data (routed tokens: topk / experts)."""
    attrs: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    shared: bool = False
    """Its parameter is one of the whole model, not of its layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A template layer: its operators and the names of its input and output."""

    name: str
    nodes: Mapping[str, Op]
    """Operators by name; each comes after what it reads."""
    entry: str
    exit: str
    order: tuple[str, ...]
    """Operator names in the order the model computes them."""

    def op(self, name: str) -> Op:
        """The operator of that name."""
        return self.nodes[name]

    def ops(self) -> Iterator[Op]:
        """Operators in computing order."""
        return map(self.nodes.__getitem__, self.order)

    @property
    def graph(self) -> nx.DiGraph[str]:
        """The template as a networkx DiGraph."""
        return digraph(self.nodes)


class _Reads(Protocol):
    @property
    def inputs(self) -> tuple[str, ...]: ...


def digraph(nodes: Mapping[str, _Reads]) -> nx.DiGraph[str]:
    """Operators as a networkx DiGraph: attribute `op` on nodes, `slot` on edges."""
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph()
    for name, op in nodes.items():
        graph.add_node(name, op=op)
        for slot, source in enumerate(op.inputs):
            graph.add_edge(source, name, slot=slot)
    return graph


def topological(reads: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Names, what each reads first; the order of the mapping decides between equals."""
    names = list(reads)
    position = {name: index for index, name in enumerate(names)}
    waits = [len(set(sources)) for sources in reads.values()]
    readers: dict[str, list[int]] = {name: [] for name in names}
    for name, sources in reads.items():
        for source in set(sources):
            readers[source].append(position[name])
    ready = [index for index, left in enumerate(waits) if not left]
    order = []
    while ready:
        name = names[heapq.heappop(ready)]
        order.append(name)
        for index in readers[name]:
            waits[index] -= 1
            if not waits[index]:
                heapq.heappush(ready, index)
    return tuple(order)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelGraph:
    """A whole model in one phase, folded."""

    spec: ModelSpec
    phase: Phase
    sizes: Mapping[str, int]
    """Elements of every fixed dim."""
    blocks: Mapping[str, Block]
    """Templates by name; `embed` and `head` are used once."""
    layers: tuple[str, ...]
    """Template of each layer, first to last."""

    def size(self, dims: tuple[str, ...], free: Mapping[str, int] | None = None) -> int:
        """Elements of a tensor with these dims; free dims are looked up in `free`."""
        given = free or {}
        try:
            return math.prod(self.sizes[d] if d in self.sizes else given[d] for d in dims)
        except KeyError as error:
            raise InputError(
                "a named dim has no size", got=f"dim={error.args[0]}, dims={dims}"
            ) from None

    @property
    def predicts(self) -> bool:
        """Whether it holds the layer that predicts tokens ahead."""
        return "mtp" in self.blocks

    def sequence(self) -> Iterator[tuple[str, int]]:
        """(template, layer) in computing order; layer is -1 for embed and heads.

        The prediction layer counts as the one after the last.
        """
        yield "embed", -1
        for layer, name in enumerate(self.layers):
            yield name, layer
        yield "head", -1
        if self.predicts:
            yield "mtp", len(self.layers)
            yield "mtp_head", -1

    def parameters(self) -> int:
        """Parameter elements of the whole graph, shared ones (tied embeddings) counted once."""
        total = 0
        shared: set[str] = set()
        for name, layer in self.sequence():
            for op in self.blocks[name].ops():
                if layer < 0 or op.shared:
                    if op.param in shared:
                        continue
                    shared.add(op.param)
                total += self.size(op.weight) if op.weight else 0
        return total

    def kv_elements_per_token(self) -> int:
        """Cache elements that one token adds over all layers."""
        return sum(
            self.size(tuple(d for d in op.dims if d not in FREE_DIMS))
            for name, _ in self.sequence()
            for op in self.blocks[name].ops()
            if op.state
        )

    def unfolded(self) -> nx.DiGraph[str]:
        """Every operator of every layer in one DiGraph; node names are `template.layer/op`."""
        import networkx as nx

        whole: nx.DiGraph[str] = nx.DiGraph()
        previous = hidden = ""
        for name, layer in self.sequence():
            block = self.blocks[name]
            previous = hidden if name == "mtp" else previous
            prefix = f"{name}.{layer}/" if layer >= 0 else f"{name}/"
            for op in block.ops():
                whole.add_node(prefix + op.name, op=op, layer=layer, block=name)
            for source, target, data in block.graph.edges(data=True):
                whole.add_edge(prefix + source, prefix + target, **data)
            if previous:
                whole.add_edge(previous, prefix + block.entry, slot=0)
            previous = prefix + block.exit
            hidden = hidden if name == "head" else previous
        return whole
