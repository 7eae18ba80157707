"""Applying a strategy: one layout rule turns a model graph into the graph that one rank runs.

An operator's strategy is {axis: dim}. Its output is split(dim) on an axis whose dim it keeps and
partial on an axis whose dim it contracts; it needs each input with the same assignment,
restricted to the input's dims. Where a tensor lies otherwise, collectives are inserted:

    partial -> replicated  all_reduce        split  -> split'  all_to_all
    partial -> split       reduce_scatter    replicated -> split  slice
    split   -> replicated  all_gather

Axes with the same transition share one collective over their joint group. A redistribution is
made once per (tensor, layout) and reused. A partial sum passes an operator unreduced where the
operator is linear in the inputs that are partial. Pipeline cuts add send and recv.

When several axes split one dim they nest major to minor, so axes leave a dim from the minor end
and join it there; anything else is refused rather than guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shardplan.models.context import in_parts
from shardplan.models.errors import LayoutError
from shardplan.models.graph import Block, ModelGraph, Op, Phase, digraph
from shardplan.models.parallel import (
    AXES,
    Mesh,
    Parallelism,
    assignment,
    balanced_stages,
    carry,
    check_pipeline,
    make_mesh,
    roles_of,
)
from shardplan.models.redistribute import PARTIAL, redistributions

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "COLLECTIVES",
    "Layout",
    "ShardedBlock",
    "ShardedGraph",
    "ShardedOp",
    "Stage",
    "apply",
]

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
Layout = tuple[tuple[str, str], ...]
"""(axis, dim or PARTIAL) in mesh order; an axis left out holds replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedOp:
    """An operator as one rank runs it, or a collective between two.

    `layout` is the output's. For a collective, `axes` are the sub-axes of its group, `before` the
    layout of its input, and `dims` the tensor's dims.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    dims: tuple[str, ...]
    layout: Layout
    op: Op | None = None
    weight_layout: Layout = ()
    axes: tuple[str, ...] = ()
    before: Layout = ()
    density: float = 1.0
    element_bytes: float = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class ShardedBlock:
    """A template with collectives inserted."""

    name: str
    nodes: Mapping[str, ShardedOp]
    """Operators by name; each comes after what it reads."""
    entry: str
    exit: str
    order: tuple[str, ...]
    known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What others have worked out of it: the same for all layouts that share it."""

    def op(self, name: str) -> ShardedOp:
        """The operator of that name."""
        return self.nodes[name]

    def ops(self) -> Iterator[ShardedOp]:
        """Operators in computing order."""
        return map(self.nodes.__getitem__, self.order)

    def readers(self) -> dict[str, list[str]]:
        """Names of the operators that read each operator, in computing order."""
        found: dict[str, list[str]] = {name: [] for name in self.nodes}
        for name, op in self.nodes.items():
            for source in dict.fromkeys(op.inputs):
                found[source].append(name)
        return found

    @property
    def graph(self) -> nx.DiGraph[str]:
        """The template as a networkx DiGraph: attribute `op` on nodes, `slot` on edges."""
        return digraph(self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pipeline stage: layers [first, last) and what stands at its ends."""

    index: int
    first: int
    last: int
    counts: Mapping[str, int]
    """Times each template stands in this stage, `embed`, `head`, `send` and `recv` included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedGraph:
    """The graph that is priced and proven."""

    model: ModelGraph
    parallel: Parallelism
    mesh: Mesh
    blocks: Mapping[str, ShardedBlock]
    stages: tuple[Stage, ...]

    def sequence(self, stage: Stage) -> Iterator[tuple[str, int]]:
        """(template, layer) in computing order within one stage; layer is -1 outside layers.

        The prediction layer counts as the one after the last and stands there once.
        """
        yield ("embed", -1) if stage.index == 0 else ("recv", -1)
        for layer in range(stage.first, stage.last):
            yield self.model.layers[layer], layer
        yield ("head", -1) if stage.index == len(self.stages) - 1 else ("send", -1)
        if "mtp" in stage.counts:
            yield "mtp", stage.last
            yield "mtp_head", -1

    def runs(self, stage: Stage) -> Mapping[str, int]:
        """Times each template runs in one step.

        `draft` are the passes of a decode step through `mtp` and `mtp_head` after the first: one
        token a sequence, where the first takes all that the step verifies.
        """
        again = self.parallel.mtp - 1
        if again < 1 or "mtp" not in stage.counts or self.model.phase == "prefill":
            return stage.counts
        return {**stage.counts, "draft": again}

    def split(self, dim: str, layout: Layout) -> int:
        """How many ways a dim is cut under a layout."""
        return self.mesh.ways(layout).get(dim, 1)


_Chosen = Callable[[Op], Mapping[str, str]]


def _chosen(mesh: Mesh, par: Parallelism, phase: Phase) -> _Chosen:
    """The assignment of any operator, worked out once for all that are like it."""
    roles = roles_of(par, phase)
    known: dict[tuple[object, ...], Mapping[str, str]] = {}

    def of(op: Op) -> Mapping[str, str]:
        like = (op.role, op.dims, op.contract, op.whole)
        if like not in known:
            known[like] = assignment(op, mesh, roles, phase)
        return known[like]

    return of


class _Sharder:
    """Walks one template, keeping the layout of every tensor."""

    def __init__(
        self, block: Block, mesh: Mesh, par: Parallelism, graph: ModelGraph, chosen: _Chosen
    ) -> None:
        self.block, self.mesh, self.par, self.model = block, mesh, par, graph
        self.chosen = chosen
        self.out: dict[str, ShardedOp] = {}
        self.ready: dict[tuple[str, Layout], str] = {}

    def key(self, layout: Mapping[str, str]) -> Layout:
        """A layout in mesh order."""
        return tuple([(a, layout[a]) for a in self.mesh.axes if a in layout])

    def put(self, op: ShardedOp) -> str:
        """Add a node, in computing order."""
        self.out[op.name] = op
        return op.name

    def op(self, name: str) -> ShardedOp:
        """A node already placed."""
        return self.out[name]

    def run(self) -> ShardedBlock:
        """The sharded template; its exit lies as its successor's entry expects."""
        for op in self.block.ops():
            self.place(op)
        last = self.block.exit
        if self.block.name in ("head", "mtp_head"):
            ends = dict.fromkeys(self.mesh.groups["dp"], "B")
            last = self.whole_vocabulary(last)
        else:
            ends = carry(self.mesh, self.par, self.model.phase)
        exit_name = self.redistribute(last, self.key(ends))
        return ShardedBlock(self.block.name, self.out, "x", exit_name, tuple(self.out))

    def whole_vocabulary(self, last: str) -> str:
        """Logits of a head over several dp groups, gathered over tp before those exchange them."""
        groups = self.mesh.groups
        if not groups["head+"]:
            return last
        lies = dict.fromkeys(groups["dp"], "B") | dict.fromkeys(groups["head+"], "V")
        return self.redistribute(last, self.key(lies))

    def place(self, op: Op) -> None:
        """One operator: its inputs redistributed as it needs them, its output's layout derived."""
        if op.kind == "input":
            lies = carry(self.mesh, self.par, self.model.phase)
            if "H" not in op.dims:
                lies = {a: d for a, d in lies.items() if a not in self.mesh.groups["tp"]}
            key = self.key(lies)
            self.put(
                ShardedOp(name=op.name, kind="input", inputs=(), dims=op.dims, layout=key, op=op)
            )
            return
        chosen = self.chosen(op)
        passing = self.passing(op, chosen)
        alike = dict(op.cut_as)
        inputs = []
        for slot, source in enumerate(op.inputs):
            dims, cut = self.op(source).dims, chosen
            if alike:
                cut = {a: d if d in dims else alike.get(d, d) for a, d in chosen.items()}
            want = {a: d for a, d in cut.items() if d in dims}
            if slot in op.linear:
                want |= dict.fromkeys(passing, PARTIAL)
            inputs.append(self.redistribute(source, self.key(want)))
        layout = {a: d if d in op.dims else PARTIAL for a, d in chosen.items()}
        layout |= dict.fromkeys(passing, PARTIAL)
        weight = {a: d for a, d in chosen.items() if d in op.weight}
        self.put(
            ShardedOp(
                name=op.name,
                kind=op.kind,
                inputs=tuple(inputs),
                dims=op.dims,
                layout=self.key(layout),
                op=op,
                weight_layout=self.key(weight),
                density=op.density,
                element_bytes=op.element_bytes,
            )
        )

    def passing(self, op: Op, chosen: Mapping[str, str]) -> tuple[str, ...]:
        """Axes on which every linear input is partial and the operator splits nothing."""
        if not op.linear:
            return ()
        lies = [dict(self.op(op.inputs[slot]).layout) for slot in op.linear]
        return tuple(
            a
            for a in self.mesh.axes
            if a not in chosen and all(one.get(a) == PARTIAL for one in lies)
        )

    def redistribute(self, source: str, want: Layout) -> str:
        """The name of a tensor equal to `source` that lies as `want`."""
        have = self.op(source).layout
        if have == want:
            return source
        if (source, want) in self.ready:
            return self.ready[source, want]
        name = source
        for kind, axes, layout in redistributions(dict(have), dict(want), self.mesh):
            before = self.op(name)
            after = self.key(layout)
            if (source, after) in self.ready:
                name = self.ready[source, after]
                continue
            name = self.put(
                ShardedOp(
                    name=f"{source}>{kind}.{len(self.out)}",
                    kind=kind,
                    inputs=(name,),
                    dims=before.dims,
                    layout=after,
                    axes=axes,
                    before=before.layout,
                    density=before.density,
                    element_bytes=before.element_bytes,
                )
            )
            self.ready[source, after] = name
        return name


def _wire(name: str, layout: Layout) -> ShardedBlock:
    """A pipeline boundary: the hidden state leaves for, or comes from, the neighbouring stage."""
    entry = ShardedOp(name="x", kind="input", inputs=(), dims=tuple("BTH"), layout=layout)
    wire = ShardedOp(
        name=name, kind=name, inputs=("x",), dims=tuple("BTH"), layout=layout, before=layout
    )
    return ShardedBlock(name, {"x": entry, name: wire}, "x", name, ("x", name))


def _stages(graph: ModelGraph, par: Parallelism) -> tuple[Stage, ...]:
    stages, first = [], 0
    layers = balanced_stages(graph.spec, par)
    for index, count in enumerate(layers):
        names = graph.layers[first : first + count]
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        counts |= {"embed": 1} if index == 0 else {"recv": 1}
        counts |= {"head": 1} if index == par.pp - 1 else {"send": 1}
        counts |= {"mtp": 1, "mtp_head": 1} if index == par.pp - 1 and par.mtp else {}
        stages.append(Stage(index=index, first=first, last=first + count, counts=counts))
        first += count
    return tuple(stages)


@functools.lru_cache(maxsize=1024)
def _blocks(graph: ModelGraph, par: Parallelism) -> tuple[Mesh, Mapping[str, ShardedBlock]]:
    """Every template sharded once; stages differ only in how often each runs."""
    mesh = make_mesh(graph.spec, par)
    chosen = _chosen(mesh, par, graph.phase)
    blocks = {
        name: _Sharder(block, mesh, par, graph, chosen).run()
        for name, block in graph.blocks.items()
    }
    lies = blocks["head"].op("x").layout
    blocks |= {name: _wire(name, lies) for name in ("send", "recv")}
    return mesh, MappingProxyType(blocks)


def apply(graph: ModelGraph, par: Parallelism) -> ShardedGraph:
    """The graph that each rank runs under `par`.

    Raises `LayoutError` where a size does not divide or an axis has no home.
    """
    key = replace(par, pp=1, stage_layers=(), order=AXES, mtp=min(par.mtp, 1))
    check_pipeline(graph.spec, par)
    graph = in_parts(graph, par.cp)
    mesh, blocks = _blocks(graph, key)
    if par.mtp and not graph.predicts:
        raise LayoutError(
            "tokens are predicted ahead on a graph that holds the prediction layer",
            got=f"mtp={par.mtp}, model={graph.spec.name}",
            hint="build the graph with mtp=True",
        )
    return ShardedGraph(
        model=graph, parallel=par, mesh=mesh, blocks=blocks, stages=_stages(graph, par)
    )
