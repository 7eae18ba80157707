"""A strategy laid on a captured graph: what each rank computes, and what moves between.

    strategy {operator: {axis: loop}}  ->  steps of one rank, in computing order

A step is an operator with the layout of each tensor that it reads and writes, or a move: a tensor
that lies one way comes to lie another (`redistributions`), made once per (tensor, layout).

An operator that the strategy does not name follows what it reads: on each axis it is split over
the loop by which the first of its inputs is split there, if that loop may be split; otherwise the
axis computes it whole, from gathered inputs. Parameters follow their readers: each is held as its
operator reads it. An operator that reads nothing but parameters (a dequantization, a transpose)
is computed on the part that is wanted, once per layout.

A partial sum passes an operator where all its linear inputs are partial and none has been summed
for another reader.

`exchanged` names operators of kind `moe` whose tokens are sent to the ranks that hold their
experts: {operator: {axis: loop of the experts}}. Tokens lie as the strategy says, before and
after; the parameters are also split over the experts on these axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from shardplan.models.errors import LayoutError
from shardplan.models.opgraph import Access, Layout, Operator, OpGraph, layouts_of
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL, redistributions

__all__ = [
    "Key",
    "Move",
    "Placed",
    "Program",
    "Strategy",
    "local_shape",
    "place",
    "route",
    "transfers_of",
]

Strategy = Mapping[str, Mapping[str, str]]
"""{operator: {axis: loop}}."""
Key = tuple[tuple[str, int | str], ...]
"""A layout in mesh order: (axis, tensor dim or PARTIAL); axes left out hold the whole."""
_HELD = ("parameter", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A collective, or a slice: `tensor` as it lies in `before` comes to lie in `after`."""

    tensor: str
    kind: str
    axes: tuple[str, ...]
    before: Key
    after: Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An operator as each rank computes it."""

    op: Operator
    chosen: Mapping[str, str]
    reads: tuple[Key, ...]
    writes: tuple[Key, ...]
    sent: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """{axis: loop of the experts} over which its tokens are exchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What every rank of a mesh runs; a value is named by (tensor, layout)."""

    graph: OpGraph
    mesh: Mesh
    steps: tuple[Move | Placed, ...]
    inputs: Mapping[str, Key]
    outputs: tuple[tuple[str, Key], ...]
    held: tuple[tuple[str, Key], ...]
    """Parameters and constants as each rank holds them."""

    def moves(self) -> Iterator[Move]:
        """Moves that cross ranks, in computing order."""
        return (one for one in self.steps if isinstance(one, Move) and one.kind != "slice")


def local_shape(shape: Sequence[int], lies: Key, mesh: Mesh) -> tuple[int, ...]:
    """Shape of one rank's part. `LayoutError` where a dim does not divide."""
    local = list(shape)
    for axis, dim in lies:
        if isinstance(dim, int):
            ways = mesh.size((axis,))
            if local[dim] % ways:
                raise LayoutError(
                    "the ranks that share a dim divide it",
                    got=f"shape={list(shape)}, dim={dim}, axis={axis} of {ways}",
                )
            local[dim] //= ways
    return tuple(local)


class _Walk:
    """Walks the operators, keeping every layout in which each tensor is at hand."""

    def __init__(self, graph: OpGraph, strategy: Strategy, mesh: Mesh, exchanged: Strategy) -> None:
        self.graph, self.strategy, self.mesh, self.exchanged = graph, strategy, mesh, exchanged
        self.steps: list[Move | Placed] = []
        self.ready: dict[str, list[Key]] = {}
        self.held: dict[tuple[str, Key], None] = {}
        self.lazy: dict[str, Operator] = {}

    def key(self, layout: Layout) -> Key:
        """A layout in mesh order."""
        return tuple((axis, layout[axis]) for axis in self.mesh.axes if axis in layout)

    def free(self, tensor: str) -> bool:
        """Whether a tensor comes from parameters alone, so that it lies as it is wanted."""
        return tensor in self.lazy or self.graph.tensors[tensor].kind in _HELD

    def run(self, op: Operator) -> None:
        """One operator; what only reads parameters waits until it is known how it is wanted."""
        named = op.name in self.strategy
        if op.reads and not named and len(op.writes) == 1 and all(map(self.free, op.inputs)):
            self.lazy[op.writes[0].tensor] = op
            return
        chosen = self.strategy[op.name] if named else self.follow(op)
        self.put(op, {axis: chosen[axis] for axis in self.mesh.axes if axis in chosen})

    def put(self, op: Operator, chosen: Mapping[str, str]) -> None:
        """Place an operator: its inputs made to lie as it reads them."""
        wanted, written = layouts_of(op, chosen, self.mesh, self.graph.tensors)
        passing = dict.fromkeys(self.passing(op, chosen), PARTIAL)
        sent = self.exchanged.get(op.name, {})
        once = {axis: PARTIAL for axis, loop in chosen.items() if loop in op.contracted}
        reads = []
        for slot, (access, layout) in enumerate(zip(op.reads, wanted, strict=True)):
            want = {**layout, **passing} if slot in op.linear else dict(layout)
            if _is_added(op, access):
                want |= once
            if self.free(access.tensor):
                want |= self.expert_dims(access, sent)
            reads.append(self.bring(access.tensor, self.key(want)))
        writes = tuple(self.key({**layout, **passing}) for layout in written)
        self.steps.append(
            Placed(op=op, chosen=chosen, reads=tuple(reads), writes=writes, sent=sent)
        )
        for access, lies in zip(op.writes, writes, strict=True):
            self.ready.setdefault(access.tensor, []).append(lies)

    @staticmethod
    def expert_dims(access: Access, sent: Mapping[str, str]) -> Layout:
        """How an exchange splits a parameter: over the loop of the experts."""
        return {a: access.loops.index(loop) for a, loop in sent.items() if loop in access.loops}

    def present(self, tensor: str) -> Key:
        """How a tensor lies: as it was made, or summed if that was done since."""
        ways = self.ready[tensor]
        whole = [one for one in ways if PARTIAL not in dict(one).values()]
        return whole[0] if whole else ways[0]

    def follow(self, op: Operator) -> dict[str, str]:
        """{axis: loop} by which the first input that is split there is split."""
        if op.refused:
            return {}
        chosen: dict[str, str] = {}
        lies = [{} if self.free(one.tensor) else dict(self.present(one.tensor)) for one in op.reads]
        for axis in self.mesh.axes:
            for access, layout in zip(op.reads, lies, strict=True):
                dim = layout.get(axis)
                loop = access.loops[dim] if isinstance(dim, int) else ""
                if loop and self.splits(op, loop, axis, chosen):
                    chosen[axis] = loop
                    break
        return chosen

    def splits(self, op: Operator, loop: str, axis: str, chosen: Mapping[str, str]) -> bool:
        """Whether a loop may be split over one more axis; never into partial sums unasked."""
        one = op.loops[loop]
        ways = self.mesh.size((axis, *(a for a, name in chosen.items() if name == loop)))
        return not one.whole and one.size % ways == 0 and loop not in op.contracted

    def passing(self, op: Operator, chosen: Mapping[str, str]) -> tuple[str, ...]:
        """Axes on which every linear input is partial and the operator splits nothing."""
        if not op.linear:
            return ()
        reads = [op.reads[slot].tensor for slot in op.linear]
        if any(map(self.free, reads)):
            return ()
        lies = [dict(self.present(one)) for one in reads]
        return tuple(
            a
            for a in self.mesh.axes
            if a not in chosen and all(one.get(a) == PARTIAL for one in lies)
        )

    def bring(self, tensor: str, want: Key) -> Key:
        """Make a tensor lie as wanted; returns the layout."""
        if tensor in self.lazy:
            if want not in self.ready.get(tensor, ()):
                self.compute(tensor, want)
        elif self.graph.tensors[tensor].kind in _HELD:
            self.held[tensor, want] = None
        elif want not in self.ready[tensor]:
            self.move(tensor, self.source(tensor, want), want)
        return want

    def end(self, tensor: str, through: Layout | None, want: Layout) -> tuple[str, Key]:
        """An output as it is wanted, by way of another layout if told."""
        last = self.key(want)
        if through is not None:
            first = self.bring(tensor, self.key(through))
            self.move(tensor, first, last)
        return tensor, self.bring(tensor, last)

    def compute(self, tensor: str, want: Key) -> None:
        """A tensor that comes from parameters alone, on the part that is wanted."""
        op = self.lazy[tensor]
        loops = op.writes[0].loops
        chosen: dict[str, str] = {}
        for axis, dim in want:
            loop = loops[dim] if isinstance(dim, int) else ""
            if loop and not op.refused and self.splits(op, loop, axis, chosen):
                chosen[axis] = loop
        self.put(op, chosen)
        if self.ready[tensor][-1] != want:
            self.move(tensor, self.ready[tensor][-1], want)

    def source(self, tensor: str, want: Key) -> Key:
        """The layout at hand from which a tensor is made to lie as wanted: one to cut if any."""
        wanted = set(want)
        inside = [one for one in self.ready[tensor] if set(one) <= wanted]
        return max(inside, key=len) if inside else self.present(tensor)

    def move(self, tensor: str, have: Key, want: Key) -> None:
        """Redistributions of a tensor, those left out whose outcome is at hand."""
        before = have
        for kind, axes, layout in route(dict(have), dict(want), self.mesh):
            after = self.key(layout)
            if after not in self.ready[tensor]:
                self.steps.append(
                    Move(tensor=tensor, kind=kind, axes=axes, before=before, after=after)
                )
                self.ready[tensor].append(after)
            before = after


def _is_added(op: Operator, access: Access) -> bool:
    """Whether a product adds a tensor to its sum, as a bias: of partial sums only one may."""
    return op.kind == "matmul" and not set(access.loops) & set(op.contracted)


def route(
    have: dict[str, int | str], want: dict[str, int | str], mesh: Mesh
) -> list[tuple[str, tuple[str, ...], dict[str, int | str]]]:
    """Redistributions from one layout to another, also where they cannot lead there directly.

    They cannot where axes do not nest on the way, or where an exchange would have one axis join a
    dim that another leaves (no rank then sends equal parts). The way is then through what both
    layouts have in common, or else through the whole tensor. Raises `LayoutError` for a way into
    a partial sum.
    """
    common = {axis: dim for axis, dim in have.items() if want.get(axis) == dim}
    whole: dict[str, int | str] = {}
    for stops in ((have, want), (have, common, want), (have, whole, want)):
        try:
            steps = [
                step
                for first, last in itertools.pairwise(stops)
                for step in redistributions(first, last, mesh)
            ]
        except LayoutError:
            continue
        if not _tangled(have, steps):
            return steps
    return list(redistributions(have, want, mesh))


def _tangled(
    layout: Mapping[str, int | str], steps: Sequence[tuple[str, tuple[str, ...], Layout]]
) -> bool:
    """Whether an axis of an exchange joins a dim that another leaves."""
    for kind, axes, after in steps:
        if kind == "all_to_all" and {layout[a] for a in axes} & {after[a] for a in axes}:
            return True
        layout = after
    return False


def transfers_of(program: Program) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """(kind, axes, elements of the full tensor of its group) of each move that crosses ranks."""
    mesh = program.mesh
    for one in program.moves():
        lies = one.after if one.kind == "all_gather" else one.before
        held = math.prod(local_shape(program.graph.tensors[one.tensor].shape, lies, mesh))
        yield one.kind, one.axes, held * (mesh.size(one.axes) if one.kind == "all_to_all" else 1)


def place(
    graph: OpGraph,
    strategy: Strategy,
    mesh: Mesh,
    *,
    inputs: Mapping[str, Layout] | None = None,
    outputs: Mapping[str, Layout] | None = None,
    through: Mapping[str, Layout] | None = None,
    exchanged: Strategy | None = None,
) -> Program:
    """The program of each rank.

    `inputs` and `outputs` say how tensors of the graph are given and wanted, whole where not told;
    `through` how an output lies on its way there.
    `LayoutError` where the strategy names an operator that the graph lacks or a split it refuses.
    """
    names = {one.name for one in graph.operators}
    strange = sorted({*strategy, *(exchanged or {})} - names)
    if strange:
        raise LayoutError("a strategy names operators of the graph", got=", ".join(strange[:5]))
    walk = _Walk(graph, strategy, mesh, exchanged or {})
    given = {name: walk.key((inputs or {}).get(name, {})) for name in _given(graph)}
    for name, lies in given.items():
        local_shape(graph.tensors[name].shape, lies, mesh)
        walk.ready[name] = [lies]
    for op in graph.operators:
        walk.run(op)
    ends = tuple(
        walk.end(name, (through or {}).get(name), (outputs or {}).get(name, {}))
        for name in graph.outputs
    )
    return Program(
        graph=graph,
        mesh=mesh,
        steps=tuple(walk.steps),
        inputs=given,
        outputs=ends,
        held=tuple(walk.held),
    )


def _given(graph: OpGraph) -> list[str]:
    return [name for name, one in graph.tensors.items() if one.kind in ("input", "state")]
