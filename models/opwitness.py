"""A program of all ranks (`opshard.Program`) run on numbers, against the same graph run whole.

What an operator may be split over is in its loops alone, so each is run as *a* function that has
these loops and nothing else in common with a neighbour (numpy, float64, all ranks in lock step):

    reads     each dim in as many blocks as its loop has turns, a block weighed into one number;
              dims of no loop weighed whole
    z         sum of the linear reads, times all others, summed over contracted loops; what a
              product adds without them (a bias) once; a loop that must stay whole adds the sum
              over it to every turn
    writes    z, tanh(z) where nothing is linear or contracted, spread over the block of each dim

A layout that an operator does not have, a collective too few, too many, over another axis or dim,
a partial sum where the operator is not linear or a bias counted once a rank change its numbers.
That the operators of a front end keep to their loops is proven there, rule by rule.

Loops are shrunk to two turns a rank (one where they have no more), dims to the least that all that
is known of them divides. Every tensor of every operator is compared, not outputs alone, and taken
from the ranks for what comes after, so that rounding does not grow through the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardplan.models.apply import ShardedOp
from shardplan.models.errors import ProofError
from shardplan.models.lockstep import MOVES, unplace
from shardplan.models.opgraph import Access, Operator
from shardplan.models.opshard import Key, Move, Placed, Program
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL
from shardplan.models.weights import Array, place

__all__ = ["Witness", "witness"]

_TURNS = 2
"""Turns of a loop that are left to a rank."""
_PAIR = 2
_MOST_ELEMENTS = 2**27
"""Of one tensor on all ranks together; float64 takes 1 GiB."""


@dataclass(frozen=True, slots=True)
class Witness:
    """What a run found."""

    compared: int
    """Tensors that were compared."""
    error: float
    """Largest difference, relative to the largest number of its tensor."""
    tensor: str
    """Where it is."""
    moves: int
    """Collectives and slices that ran."""


def witness(program: Program, *, seed: int = 0) -> Witness:
    """Run it. `ProofError` where a step reads what is not there or cannot run on what it gets."""
    return _Run(program, _Shrunk.of(program), np.random.default_rng(seed)).run()


@dataclass(frozen=True, slots=True)
class _Shrunk:
    """Sizes of the run."""

    shapes: Mapping[str, tuple[int, ...]]
    turns: Mapping[str, Mapping[str, int]]
    """Operator -> turns of its loops."""

    @classmethod
    def of(cls, program: Program) -> _Shrunk:
        mesh, tensors = program.mesh, program.graph.tensors
        least = {name: [1] * len(one.shape) for name, one in tensors.items()}

        def take(tensor: str, dim: int, ways: int) -> None:
            least[tensor][dim] = math.lcm(least[tensor][dim], ways)

        turns: dict[str, dict[str, int]] = {}
        for step in _placed(program):
            own = turns.setdefault(step.op.name, {})
            for name, loop in step.op.loops.items():
                ways = _ways(mesh, step.chosen, name)
                own[name] = math.lcm(own.get(name, 1), ways * (_TURNS if loop.size > ways else 1))
            for access in (*step.op.reads, *step.op.writes):
                for dim, name in enumerate(access.loops):
                    take(access.tensor, dim, own[name] if name else 1)
        for tensor, key in _lies(program):
            for dim in {dim for _, dim in key if isinstance(dim, int)}:
                take(tensor, dim, _ways(mesh, dict(key), dim))
        shapes = {
            name: tuple(
                _TURNS if n == 1 and size > 1 else n
                for n, size in zip(least[name], one.shape, strict=True)
            )
            for name, one in tensors.items()
        }
        large = max(shapes, key=lambda name: math.prod(shapes[name]), default="")
        if large and math.prod(shapes[large]) * mesh.ranks > _MOST_ELEMENTS:
            raise ProofError(
                "a mesh is small enough for the numeric proof",
                got=f"ranks={mesh.ranks}, tensor={large}, shrunk to {list(shapes[large])}",
                hint="prove it with --level 0",
            )
        return cls(shapes, turns)


def _ways(mesh: Mesh, layout: Mapping[str, int | str], dim: int | str) -> int:
    return mesh.size(tuple(axis for axis, one in layout.items() if one == dim))


def _placed(program: Program) -> Iterator[Placed]:
    return (one for one in program.steps if isinstance(one, Placed))


def _lies(program: Program) -> Iterator[tuple[str, Key]]:
    """Every layout of every tensor."""
    yield from program.inputs.items()
    yield from program.outputs
    yield from program.held
    for step in program.steps:
        if isinstance(step, Move):
            yield from ((step.tensor, step.before), (step.tensor, step.after))
        else:
            yield from zip(step.op.inputs, step.reads, strict=True)
            yield from zip((one.tensor for one in step.op.writes), step.writes, strict=True)


@dataclass(slots=True)
class _Run:
    program: Program
    shrunk: _Shrunk
    random: np.random.Generator
    whole: dict[str, Array] = field(default_factory=dict)
    values: dict[tuple[str, Key], Array] = field(default_factory=dict)
    """[*mesh, *local dims] of each tensor in each layout."""
    found: list[tuple[float, str]] = field(default_factory=list)

    def run(self) -> Witness:
        mesh, moves = self.program.mesh, 0
        for tensor, key in (*self.program.inputs.items(), *self.program.held):
            if tensor not in self.whole:
                self.whole[tensor] = self.random.standard_normal(self.shrunk.shapes[tensor])
            array = self.whole[tensor]
            self.values[tensor, key] = place(array, _dims(array.ndim), _named(key), mesh)
        for step in self.program.steps:
            if isinstance(step, Move):
                self.move(step)
                moves += 1
            else:
                self.operator(step)
        for tensor, key in self.program.outputs:
            self.compare(tensor, key)
        error, tensor = max(self.found, default=(0.0, ""))
        return Witness(len(self.found), error, tensor, moves)

    def at(self, tensor: str, key: Key) -> Array:
        """A tensor in a layout, on all ranks."""
        if (tensor, key) not in self.values:
            raise ProofError(
                "what is read lies there as it is read", got=f"tensor={tensor}, layout={dict(key)}"
            )
        return self.values[tensor, key]

    def move(self, step: Move) -> None:
        x = self.at(step.tensor, step.before)
        node = _node(step.kind, len(self.shrunk.shapes[step.tensor]), step.after, step)
        try:
            self.values[step.tensor, step.after] = MOVES[step.kind](node, x, self.program.mesh)
        except (KeyError, ValueError) as error:
            raise ProofError(
                "a redistribution leads from one layout to the other",
                got=f"{step.tensor}: {step.kind} over {', '.join(step.axes)}: {error}",
            ) from None

    def operator(self, step: Placed) -> None:
        op, mesh = step.op, self.program.mesh
        turns = self.shrunk.turns[op.name]
        local = {name: n // _ways(mesh, step.chosen, name) for name, n in turns.items()}
        given = [self.at(name, key) for name, key in zip(op.inputs, step.reads, strict=True)]
        try:
            known = _computed(op, turns, [self.whole[name] for name in op.inputs], 0)
            own = _computed(op, local, given, len(mesh.shape))
        except ValueError as error:
            raise ProofError(
                "an operator can run on the shards that it is given", got=f"{op.name}: {error}"
            ) from None
        for slot, (access, key) in enumerate(zip(op.writes, step.writes, strict=True)):
            scale = float(np.sqrt(np.mean(known[slot] ** 2))) or 1.0
            shape = self.shrunk.shapes[access.tensor]
            plain = not op.linear and not op.contracted
            made = [
                _spread(np.tanh(z / scale) if plain else z / scale, access, turns, shape, lead)
                for z, lead in ((known[slot], 0), (own[slot], len(mesh.shape)))
            ]
            self.whole[access.tensor] = made[0]
            self.values[access.tensor, key] = np.broadcast_to(
                made[1], (*mesh.shape, *made[1].shape[len(mesh.shape) :])
            )
            self.compare(access.tensor, key)

    def compare(self, tensor: str, key: Key) -> None:
        """The tensor put together again, against the one that was never apart."""
        mesh, x = self.program.mesh, self.at(tensor, key)
        over = tuple(mesh.axes.index(axis) for axis, dim in key if dim == PARTIAL)
        x = np.broadcast_to(x.sum(axis=over, keepdims=True), x.shape) if over else x
        lies = tuple((axis, dim) for axis, dim in key if dim != PARTIAL)
        known = self.whole[tensor]
        try:
            got = unplace(x, _node("", known.ndim, lies), mesh)
        except ProofError:
            got = np.full(known.shape, np.nan)  # ranks that should agree do not
        same = got.shape == known.shape and bool(np.isfinite(got).all())
        large = float(np.abs(known).max(initial=0.0)) or 1.0
        apart = float(np.abs(got - known).max(initial=0.0)) / large if same else math.inf
        self.found.append((apart, tensor))
        self.whole[tensor] = got if same else known


def _dims(rank: int) -> tuple[str, ...]:
    return tuple(map(str, range(rank)))


def _named(key: Key) -> tuple[tuple[str, str], ...]:
    return tuple((axis, str(dim)) for axis, dim in key)


def _node(kind: str, rank: int, after: Key, step: Move | None = None) -> ShardedOp:
    """A move as the executor of applied graphs takes it."""
    return ShardedOp(
        name=step.tensor if step else "",
        kind=kind,
        inputs=(),
        dims=_dims(rank),
        layout=_named(after),
        axes=step.axes if step else (),
        before=_named(step.before) if step else (),
    )


def _weights(size: int) -> Array:
    """Different for each place, none of them 0."""
    found: Array = 1.0 + np.cos(np.arange(1.0, size + 1.0)) / 2.0
    return found


def _computed(
    op: Operator, turns: Mapping[str, int], reads: Sequence[Array], lead: int
) -> list[Array]:
    """z of each write over the loops that it runs over, [*lead, *loops]; 1 for loops of no read."""
    parts = [_weighed(op, a, turns, x, lead) for a, x in zip(op.reads, reads, strict=True)]
    found = []
    for access in op.writes:
        own = [name for name in dict.fromkeys(access.loops) if name]
        may = {*own, *op.contracted}
        used = [s for s, one in enumerate(op.reads) if {n for n in one.loops if n} <= may]
        total = np.zeros([1] * lead + [turns[name] for name in own])
        for slots in _terms(op, used):
            total = total + _product(op, slots, parts, own, lead)
        found.append(total)
    return found


def _terms(op: Operator, used: Sequence[int]) -> list[list[int]]:
    """Reads that are multiplied, of each term of the sum: a product's bias is one of its own."""
    summed = {s for s in used if set(op.reads[s].loops) & set(op.contracted)}
    linear = [s for s in used if s in op.linear]
    apart = [s for s in used if op.contracted and s not in summed]
    if op.kind == "matmul":
        linear = [s for s in linear if s in summed]
    elif summed.isdisjoint(linear):
        apart = []
    else:
        apart = [s for s in apart if s in linear]
    others = [s for s in used if s not in op.linear and s not in apart]
    terms = [[s, *others] for s in linear if s not in apart] if op.linear else [others]
    return [*terms, *([s] for s in apart)]


def _product(
    op: Operator, slots: Sequence[int], parts: Sequence[Array], own: Sequence[str], lead: int
) -> Array:
    """Product of reads, summed over loops that are not its own: [*lead, *own], 1 for loops of no
    read."""
    letters = {name: chr(ord("A") + i) for i, name in enumerate(op.loops)}
    front = "".join(chr(ord("a") + i) for i in range(lead))
    runs = [[name for name in op.reads[s].loops if name] for s in slots]
    kept = [name for name in own if any(name in run for run in runs)]
    terms = [front + "".join(letters[name] for name in run) for run in runs] or [front]
    arrays = [parts[s] for s in slots] or [np.ones([1] * lead)]
    out = front + "".join(letters[name] for name in kept)
    made = np.einsum(f"{','.join(terms)}->{out}", *arrays, optimize=len(arrays) > _PAIR)
    index = tuple(slice(None) if name in kept else None for name in own)
    return np.asarray(made[(slice(None),) * lead + index])


def _weighed(op: Operator, access: Access, turns: Mapping[str, int], x: Array, lead: int) -> Array:
    """A read over its loops: [*lead, *loops]."""
    weighed: Array = x
    for dim in reversed(range(len(access.loops))):
        name, at = access.loops[dim], lead + dim
        count = turns[name] if name else 1
        shape = weighed.shape
        if shape[at] % count:
            raise ValueError(f"{access.tensor}, dim {dim} of {shape[at]} over {name} of {count}")
        block = shape[at] // count
        cut = weighed.reshape([*shape[:at], count, block, *shape[at + 1 :]])
        weighed = np.asarray(np.moveaxis(cut, at + 1, -1) @ _weights(block))
        if not name:
            weighed = weighed.squeeze(at)
        elif op.loops[name].whole:
            weighed = weighed + np.sum(weighed, axis=at, keepdims=True) / 2.0
    return weighed


def _spread(
    z: Array, access: Access, turns: Mapping[str, int], shape: Sequence[int], lead: int
) -> Array:
    """z over the dims of a write: [*lead, *local dims]. `turns`, `shape`: those of the whole."""
    for dim, name in enumerate(access.loops):
        at = lead + dim
        if not name:
            z = np.expand_dims(z, at)
        block = shape[dim] // (turns[name] if name else 1)
        wide = np.moveaxis(z[..., None] * _weights(block), -1, at + 1)
        z = np.reshape(wide, [*z.shape[:at], z.shape[at] * block, *z.shape[at + 1 :]])
    return z
