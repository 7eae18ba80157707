"""The question that the ILP answers, in numbers: candidates with prices, layouts, steps between.

Everything here is per class (`quotient`): an operator class has its candidates, a tensor class its
layouts, the bytes of each on a rank, and the single steps between them with their seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.opcost import OperatorPrices
from shardplan.models.errors import InputError, UnknownNameError
from shardplan.models.opgraph import OpGraph
from shardplan.models.parallel import Mesh
from shardplan.search.oplevel.candidates import Candidate, candidates_of, partial_axes, priced
from shardplan.search.oplevel.constraints import Constraints
from shardplan.search.oplevel.layouts import (
    Key,
    Step,
    is_partial,
    key_of,
    local_bytes,
    nodes_of,
    step_seconds,
    steps_of,
)
from shardplan.search.oplevel.quotient import Quotient, TensorClass

__all__ = ["Problem", "Strategy", "TensorPart", "make_problem"]

Strategy = Mapping[str, Mapping[str, str]]
"""{operator: {axis: loop}}; operators that it leaves out run whole on every axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """A tensor class in numbers."""

    owner: TensorClass
    nodes: tuple[Key, ...]
    bytes: Array
    """Of each layout on a rank."""
    steps: tuple[Step, ...]
    seconds: Array
    """Of each step."""
    source: int | None
    """How an input comes; None for what is made or held."""
    given: tuple[int, ...] | None
    """Layouts in which an output may be given; None where it is none."""

    def place(self, key: Key) -> int:
        """Place of a layout among its nodes."""
        return self.nodes.index(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Candidates of each operator class and what each tensor class may do."""

    quotient: Quotient
    mesh: Mesh
    candidates: tuple[tuple[Candidate, ...], ...]
    tensors: tuple[TensorPart, ...]

    @property
    def space_size(self) -> int:
        """Strategies: products of candidates over the classes."""
        return math.prod(len(one) for one in self.candidates)

    def pruned(self) -> Problem:
        """Without steps that a path of others replaces at no more cost.

        The steps of such a path cost less each, so what is left replaces all that is dropped. It
        may leave copies in more layouts, so this holds where memory is not limited.
        """
        return replace(self, tensors=tuple(_without_detours(one) for one in self.tensors))


def make_problem(
    quotient: Quotient,
    prices: OperatorPrices,
    constraints: Constraints,
    strategy: Strategy | None = None,
) -> Problem:
    """Candidates, layouts, steps and their prices; only `strategy` where one is given.

    `InputError` where the constraints leave an operator nothing to do.
    """
    mesh = prices.mesh
    fixed = None if strategy is None else _by_class(quotient, strategy, mesh)
    found = _candidates(quotient, prices, constraints, fixed)
    parts = [_part(one, found, quotient.graph, prices, constraints) for one in quotient.tensors]
    return Problem(quotient=quotient, mesh=mesh, candidates=found, tensors=tuple(parts))


def _by_class(quotient: Quotient, strategy: Strategy, mesh: Mesh) -> list[Mapping[str, str]]:
    """What a strategy says of each operator class; it names one operator of each."""
    names = {one.op.name for one in quotient.operators}
    for name, chosen in strategy.items():
        if name not in names:
            raise UnknownNameError("operator (of the first of equal layers)", name, names)
        lost = [axis for axis in chosen if axis not in mesh.axes]
        if lost:
            raise InputError(
                "a strategy names axes of the mesh", got=f"{name}: axis={lost[0]}, {mesh.axes}"
            )
    return [dict(strategy.get(one.op.name, {})) for one in quotient.operators]


def _candidates(
    quotient: Quotient,
    prices: OperatorPrices,
    constraints: Constraints,
    fixed: list[Mapping[str, str]] | None,
) -> tuple[tuple[Candidate, ...], ...]:
    mesh, graph = prices.mesh, quotient.graph
    passing = _passing(quotient, mesh, fixed)
    pinned = _pinned(quotient, constraints, mesh)
    found = []
    for place, one in enumerate(quotient.operators):
        only = None if fixed is None else fixed[place]
        every = candidates_of(one.op, mesh, graph.tensors, passing[place], only)
        mine = [(slot, key) for (at, slot), key in pinned.items() if at == place]
        allowed = [
            c
            for c in every
            if constraints.allows(one.op.kind, c) and all(c.reads[s] == k for s, k in mine)
        ]
        if not allowed:
            raise InputError(
                "the constraints leave every operator something to do",
                got=f"{one.op.name} ({one.op.kind}), forbid={dict(constraints.forbid)}, "
                f"pins={sorted(constraints.pins)}",
            )
        found.append(priced(one.op, allowed, prices))
    return tuple(found)


def _passing(
    quotient: Quotient, mesh: Mesh, fixed: list[Mapping[str, str]] | None
) -> list[tuple[str, ...]]:
    """Axes on which partial sums may pass each operator: all its linear reads may have them."""
    tensors = quotient.graph.tensors
    makes: list[set[str]] = []
    for place, one in enumerate(quotient.operators):
        only = None if fixed is None else fixed[place]
        own = list(candidates_of(one.op, mesh, tensors, (), only)) if one.op.contracted else []
        makes.append(set().union(*(partial_axes(own, slot) for slot in range(len(one.op.writes)))))
    feeds: dict[tuple[int, int], list[TensorClass]] = {}
    for tensor in quotient.tensors:
        for reader in tensor.readers:
            feeds.setdefault(reader, []).append(tensor)
    able = [set(mesh.axes) if one.op.linear else set[str]() for one in quotient.operators]
    changed = True
    while changed:
        changed = False
        for place, one in enumerate(quotient.operators):
            for tensor in (t for slot in one.op.linear for t in feeds[place, slot]):
                maker = tensor.maker
                left = set() if maker is None else makes[maker[0]] | able[maker[0]]
                if not able[place] <= left:
                    able[place] &= left
                    changed = True
    return [tuple(a for a in mesh.axes if a in one) for one in able]


def _pinned(quotient: Quotient, constraints: Constraints, mesh: Mesh) -> dict[tuple[int, int], Key]:
    """{(operator class, read): layout} of parameters that are pinned."""
    found: dict[tuple[int, int], Key] = {}
    for name, layout in constraints.pins.items():
        if quotient.graph.tensors[name].kind == "parameter" and name in quotient.class_of:
            key = key_of(layout, mesh)
            found |= dict.fromkeys(quotient.tensors[quotient.class_of[name]].readers, key)
    return found


def _part(
    owner: TensorClass,
    candidates: Sequence[Sequence[Candidate]],
    graph: OpGraph,
    prices: OperatorPrices,
    constraints: Constraints,
) -> TensorPart:
    mesh, tensor = prices.mesh, owner.tensor
    used: dict[Key, None] = {}
    if owner.maker is not None:
        used |= dict.fromkeys(one.writes[owner.maker[1]] for one in candidates[owner.maker[0]])
    for place, slot in owner.readers:
        used |= dict.fromkeys(one.reads[slot] for one in candidates[place])
    is_input = owner.maker is None and not owner.is_held
    source = constraints.input_key(tensor.name, mesh) if is_input else None
    given = constraints.output_key(graph, tensor.name, mesh) if owner.is_output else None
    used |= {key: None for key in (source, given) if key is not None}
    nodes = tuple(used) if owner.is_held else nodes_of(tensor, used, mesh)
    steps = () if owner.is_held else steps_of(nodes, mesh)
    ends: tuple[int, ...] | None = None
    if owner.is_output and not owner.is_held:
        ends = tuple(
            i for i, k in enumerate(nodes) if (given is None and not is_partial(k)) or k == given
        )
    return TensorPart(
        owner=owner,
        nodes=nodes,
        bytes=np.array([local_bytes(tensor, key, prices) for key in nodes]),
        steps=steps,
        seconds=step_seconds(tensor, nodes, steps, prices),
        source=None if source is None else nodes.index(source),
        given=ends,
    )


def _without_detours(part: TensorPart) -> TensorPart:
    count = len(part.nodes)
    direct = np.full((count, count), np.inf)
    for step, seconds in zip(part.steps, part.seconds, strict=True):
        direct[step.source, step.target] = seconds
    least = direct.copy()
    for middle in range(count):
        np.minimum(least, least[:, middle, None] + least[middle], out=least)
    np.fill_diagonal(least, np.inf)
    around = np.min(least[:, :, None] + least[None, :, :], axis=1) if count else least
    kept = [i for i, s in enumerate(part.steps) if direct[s[0], s[1]] < around[s[0], s[1]]]
    return replace(part, steps=tuple(part.steps[i] for i in kept), seconds=part.seconds[kept])
