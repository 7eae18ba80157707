"""A strategy laid on the nodes of an ONNX graph: where each tensor lies, and what moves it.

The rules are those of `shardplan.models.apply`: an operator needs its reads as its loops say, gives
its writes so, and where a tensor lies otherwise redistributions are put between, once for each
(tensor, layout). A partial sum passes where the operator is linear in all that is partial, unless
another reader needs the whole sum, which is then taken once. Weights and caches are held as their
readers need them, inputs whole, outputs are given whole.

Stages are runs of layers. What follows from inputs and constants alone (positions, masks) or from
weights alone (a tied head, scales applied) is computed in every stage that reads it; everything
else crosses from the stage that makes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardplan.models import opshard
from shardplan.models.errors import LayoutError
from shardplan.models.frontends.onnx_graph import OnnxGraph, Strategy
from shardplan.models.opgraph import Layout, Operator, layouts_of
from shardplan.models.opshard import Program
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL, redistributions

__all__ = ["Laid", "Move", "Placed", "lay", "local_shape", "shard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An operator of one rank: the local tensors that it reads, and how its writes lie."""

    op: Operator
    chosen: Mapping[str, str]
    reads: tuple[str, ...]
    writes: tuple[Layout, ...]
    stage: int
    light: bool
    """It follows from inputs alone or from weights alone: every stage computes its own."""

    @property
    def made(self) -> tuple[str, ...]:
        """Names of what it makes."""
        return tuple(one.tensor for one in self.op.writes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A redistribution: all_reduce, reduce_scatter, all_gather, all_to_all or slice."""

    kind: str
    axes: tuple[str, ...]
    tensor: str
    """The tensor of the graph that it moves."""
    source: str
    result: str
    before: Layout
    after: Layout
    stage: int
    light: bool

    @property
    def reads(self) -> tuple[str, ...]:
        """The one local tensor that it reads."""
        return (self.source,)

    @property
    def made(self) -> tuple[str, ...]:
        """The one local tensor that it makes."""
        return (self.result,)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Laid:
    """What every rank runs, in computing order."""

    source: OnnxGraph
    mesh: Mesh
    stages: int
    steps: tuple[Placed | Move, ...]
    held: Mapping[str, Layout]
    """How inputs, weights, constants and caches lie."""
    outputs: Mapping[str, str]
    """Output of the graph -> local tensor that is given."""
    layouts: Mapping[str, Layout]
    """How each local tensor lies."""

    @property
    def ranks(self) -> int:
        """Ranks of all stages."""
        return self.stages * self.mesh.ranks

    def moves(self, *kinds: str) -> list[Move]:
        """Redistributions of these kinds (all of them unless told)."""
        found = [one for one in self.steps if isinstance(one, Move)]
        return [one for one in found if not kinds or one.kind in kinds]


def local_shape(shape: Sequence[int], layout: Layout, mesh: Mesh) -> tuple[int, ...]:
    """Elements of each dim on one rank. `LayoutError` where a dim does not divide."""
    found = list(shape)
    for axis, dim in layout.items():
        if isinstance(dim, int):
            ways = mesh.size((axis,))
            if found[dim] % ways:
                raise LayoutError(
                    "the ranks that share a dim divide it",
                    got=f"shape={list(shape)}, dim={dim}, axis={axis} of {ways}",
                )
            found[dim] //= ways
    return tuple(found)


def shard(layout: Layout, dim: int, rank: int, mesh: Mesh) -> tuple[int, int]:
    """(which piece of a dim a rank holds, how many there are); axes nest major to minor."""
    piece, pieces = 0, 1
    for axis, size, place in zip(mesh.axes, mesh.shape, _coordinates(rank, mesh), strict=True):
        if layout.get(axis) == dim:
            piece, pieces = piece * size + place, pieces * size
    return piece, pieces


def _coordinates(rank: int, mesh: Mesh) -> tuple[int, ...]:
    """Place of a rank of a stage on each axis, major to minor."""
    return next(itertools.islice(itertools.product(*map(range, mesh.shape)), rank, None))


_Step = tuple[str, tuple[str, ...], dict[str, int | str]]
"""(kind, axes, layout after) of a redistribution."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What a program says of the operators and tensors that it has."""

    passes: Mapping[str, tuple[str, ...]]
    moves: Mapping[str, list[opshard.Move]]

    @classmethod
    def of(cls, program: Program | None) -> _Told:
        passes: dict[str, tuple[str, ...]] = {}
        moves: dict[str, list[opshard.Move]] = {}
        for step in program.steps if program else ():
            if isinstance(step, opshard.Move):
                moves.setdefault(step.tensor, []).append(step)
            else:
                sums = (a for s in step.op.linear for a, d in step.reads[s] if d == PARTIAL)
                passes[step.op.name] = tuple(dict.fromkeys(sums))
        return cls(passes, moves)

    def way(self, tensor: str, have: Layout, want: Layout) -> list[_Step] | None:
        """The steps of the program that lead there; None where it has none."""
        for last in self.moves.get(tensor, ()):
            if dict(last.after) == dict(want):
                before = dict(last.before)
                way = [] if before == dict(have) else self.way(tensor, have, before)
                return None if way is None else [*way, (last.kind, last.axes, dict(last.after))]
        return None


@dataclass(slots=True, eq=False)
class _Builder:
    source: OnnxGraph
    mesh: Mesh
    chosen: Mapping[str, Mapping[str, str]]
    readers: Mapping[str, list[tuple[Operator, int]]]
    told: _Told
    steps: list[Placed | Move] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    stage: dict[str, int] = field(default_factory=dict)
    light: dict[str, str] = field(default_factory=dict)
    """Local tensor -> input or parameter, whichever it follows from alone; constant for neither."""
    moved: dict[tuple[str, frozenset[tuple[str, int | str]], int], str] = field(
        default_factory=dict
    )

    def need(self, tensor: str, want: Layout, stage: int) -> str:
        """The local tensor that holds a tensor in the wanted layout; moves are added."""
        name, have = tensor, self.layouts[tensor]
        known = self.told.way(tensor, have, want)
        for kind, axes, after in _steps(have, want, self.mesh) if known is None else known:
            place = self.stage.get(name, stage) if PARTIAL in have.values() else stage
            key = (tensor, frozenset(after.items()), place)
            if key not in self.moved:
                result = f"{tensor}/{kind}.{len(self.moved)}"
                light = name in self.light
                self.steps.append(
                    Move(kind=kind, axes=axes, tensor=tensor, source=name, result=result,
                         before=have, after=after, stage=place, light=light)
                )  # fmt: skip
                self.moved[key], self.layouts[result] = result, after
                self.stage[result] = place
                self.light |= {result: self.light[name]} if light else {}
            name, have = self.moved[key], after
        return name

    def passes(self, tensor: str, axis: str) -> bool:
        """Whether all readers of a tensor can take it as a partial sum."""
        return tensor not in self.source.raw.outputs and all(
            slot in op.linear and axis not in self.chosen.get(op.name, {})
            for op, slot in self.readers[tensor]
        )

    def through(self, op: Operator) -> Sequence[str]:
        """Axes on which partial sums pass an operator: as told, else wherever they may."""
        if op.name in self.told.passes:
            return self.told.passes[op.name]
        reads, chosen = [op.inputs[slot] for slot in op.linear], self.chosen.get(op.name, {})
        free = [axis for axis in self.mesh.axes if reads and axis not in chosen]
        return [
            axis
            for axis in free
            if all(self.layouts[n].get(axis) == PARTIAL and self.passes(n, axis) for n in reads)
        ]

    def place(self, op: Operator, stage: int) -> None:
        """Add an operator with what has to be moved for it."""
        chosen = self.chosen.get(op.name, {})
        reads, writes = layouts_of(op, chosen, self.mesh, self.source.raw.tensors)
        wanted, given = [dict(one) for one in reads], [dict(one) for one in writes]
        for axis in self.through(op):
            for slot in op.linear:
                wanted[slot][axis] = PARTIAL
            for one in given:
                one[axis] = PARTIAL
        kinds = {self._origin(name) for name in op.inputs} - {"constant"}
        light = len(kinds) <= 1 and kinds <= {"input", "parameter"}
        names = [self.need(n, w, stage) for n, w in zip(op.inputs, wanted, strict=True)]
        self.steps.append(
            Placed(op=op, chosen=dict(chosen), reads=tuple(names), writes=tuple(given),
                   stage=stage, light=light)
        )  # fmt: skip
        for write, layout in zip(op.writes, given, strict=True):
            self.layouts[write.tensor], self.stage[write.tensor] = layout, stage
            self.light |= {write.tensor: next(iter(kinds), "constant")} if light else {}

    def _origin(self, name: str) -> str:
        return self.light.get(name, self.source.raw.tensors[name].kind)


def lay(
    source: OnnxGraph,
    strategy: Strategy,
    mesh: Mesh,
    stage_layers: Sequence[int] = (),
    program: Program | None = None,
) -> Laid:
    """The graph as the ranks run it.

    `strategy` names operators of `source.graph` or of `source.raw`; `stage_layers` the layers of
    each pipeline stage, none for one stage. `program`: of `source.graph` and this strategy, whose
    moves and partial sums are then taken as they are. `LayoutError` where it cannot be laid.
    """
    chosen = source.of_nodes(strategy)
    for name, axes in chosen.items():
        lost = [axis for axis in axes if axis not in mesh.axes]
        if lost:
            raise LayoutError(
                "a strategy names axes of the mesh",
                got=f"operator={name}, axis={lost[0]}, axes={', '.join(mesh.axes)}",
            )
    readers: dict[str, list[tuple[Operator, int]]] = {}
    for op in source.raw.operators:
        for slot, name in enumerate(op.inputs):
            readers.setdefault(name, []).append((op, slot))
    build = _Builder(source, mesh, chosen, readers, _Told.of(program))
    build.layouts |= _held(source, chosen, mesh)
    held = dict(build.layouts)
    starts = _starts(source, stage_layers)
    for op in source.raw.operators:
        build.place(op, _stage(build, op, starts))
    outputs = {}
    for name in source.raw.outputs:
        kept = build.layouts[name] if name in _grown(source) else {}
        whole = {a: d for a, d in kept.items() if d != PARTIAL}
        outputs[name] = build.need(name, whole, build.stage.get(name, 0))
    return Laid(
        source=source,
        mesh=mesh,
        stages=len(starts),
        steps=tuple(build.steps),
        held=held,
        outputs=outputs,
        layouts=build.layouts,
    )


def _steps(have: Layout, want: Layout, mesh: Mesh) -> Iterator[_Step]:
    """As `redistributions`, whose dims are names."""
    named = [{axis: str(dim) for axis, dim in one.items()} for one in (have, want)]
    for kind, axes, after in redistributions(named[0], named[1], mesh):
        yield kind, axes, {a: d if d == PARTIAL else int(d) for a, d in after.items()}


def _held(
    source: OnnxGraph, chosen: Mapping[str, Mapping[str, str]], mesh: Mesh
) -> dict[str, Layout]:
    """Weights, constants and caches as all their readers need them; inputs whole."""
    found: dict[str, dict[str, int | str]] = {}
    for op in source.raw.operators:
        reads, _ = layouts_of(op, chosen.get(op.name, {}), mesh, source.raw.tensors)
        for name, layout in zip(op.inputs, reads, strict=True):
            known = found.setdefault(name, dict(layout))
            found[name] = {a: d for a, d in known.items() if layout.get(a) == d}
    tensors = source.raw.tensors
    for name, tensor in tensors.items():
        if tensor.kind == "input":
            found[name] = {}
    return {name: found.get(name, {}) for name, one in tensors.items() if one.kind != "result"}


def _grown(source: OnnxGraph) -> set[str]:
    """Outputs that give a cache back."""
    tensors = source.raw.tensors
    return {
        write.tensor
        for op in source.raw.operators
        if any(tensors[name].kind == "state" for name in op.inputs)
        for write in op.writes[op.kind == "attention" :]
    }


def _starts(source: OnnxGraph, stage_layers: Sequence[int]) -> list[int]:
    """First layer of each stage."""
    if stage_layers and (sum(stage_layers) != source.raw.layers or min(stage_layers) < 1):
        raise LayoutError(
            "pipeline stages hold all layers, at least one each",
            got=f"stages={list(stage_layers)}, layers={source.raw.layers}",
        )
    return [0, *itertools.accumulate(stage_layers)][:-1] if stage_layers else [0]


def _stage(build: _Builder, op: Operator, starts: Sequence[int]) -> int:
    """That of its layer; outside the layers, the last of what it reads."""
    before = [build.stage.get(n, 0) for n in op.inputs if n not in build.light]
    if op.layer < 0:
        return max(before, default=0)
    stage = sum(first <= op.layer for first in starts) - 1
    if max(before, default=0) > stage:
        raise LayoutError(
            "a pipeline stage reads what earlier ones make",
            got=f"operator={op.name}, layer={op.layer}, stage={stage}",
        )
    return stage
