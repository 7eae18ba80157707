"""Repeated layers of a captured graph: written out where they are folded, found where they are not.

A folded layer stands for several in a row. What it hands on to the operators after it is what its
next copy takes in the place of the tensor of that shape which the first took from before:

    h0 -> [layer: h0 -> h1] x 3 -> head(h1)     is     h1 = layer(h0), h1@1 = layer(h1), ..

Copies have parameters and states of their own where only the layer reads them, and share constants
(positions, masks). Layers are alike where their operators, in computing order, do the same to
tensors of the same shapes, wired the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from shardplan.models.errors import InputError
from shardplan.models.opgraph import Access, Operator, OpGraph, Tensor

__all__ = ["alike_layers", "unfolded"]

_GIVEN = ("input", "result")
_OWN = ("parameter", "state")


def unfolded(graph: OpGraph) -> OpGraph:
    """The graph with every layer that it stands for; the graph itself where none is folded.

    Layers are numbered anew, first to last; names of copies end in @1, @2, .. `InputError` where
    it is not clear what a folded layer hands on to its next copy.
    """
    if not any(graph.times(one.layer) > 1 for one in graph.operators):
        return graph
    build = _Unfolding(graph)
    groups = {layer: [o for o in graph.operators if o.layer == layer] for layer in _layers(graph)}
    ends = {group[-1].name: group for group in groups.values()}
    for op in graph.operators:
        if op.layer < 0:
            build.add(op, op.layer, str)
        if op.name in ends:
            build.copies(ends[op.name])
    outputs = tuple(build.passed.get(name, name) for name in graph.outputs)
    return replace(
        graph,
        tensors=MappingProxyType(build.tensors),
        operators=tuple(build.operators),
        outputs=(*outputs, *build.outputs),
        layers=build.layer,
        folded=MappingProxyType({}),
    )


def _layers(graph: OpGraph) -> list[int]:
    return list(dict.fromkeys(one.layer for one in graph.operators if one.layer >= 0))


@dataclass(slots=True, init=False)
class _Unfolding:
    graph: OpGraph
    tensors: dict[str, Tensor]
    operators: list[Operator]
    passed: dict[str, str]
    """What a folded layer hands on -> what its last copy does."""
    outputs: list[str]
    layer: int

    def __init__(self, graph: OpGraph) -> None:
        self.graph, self.tensors = graph, dict(graph.tensors)
        self.operators, self.passed, self.outputs, self.layer = [], {}, [], 0

    def add(self, op: Operator, layer: int, name_of: Callable[[str], str]) -> None:
        """An operator with its tensors under other names."""

        def moved(one: Access) -> Access:
            name = name_of(self.passed.get(one.tensor, one.tensor))
            if name not in self.tensors:
                tensor = self.graph.tensors[one.tensor]
                self.tensors[name] = replace(tensor, name=name)
            return one if name == one.tensor else replace(one, tensor=name)

        reads, writes = tuple(map(moved, op.reads)), tuple(map(moved, op.writes))
        first = name_of is str
        name = op.name if first else name_of(op.name)
        self.operators.append(replace(op, name=name, reads=reads, writes=writes, layer=layer))

    def copies(self, group: Sequence[Operator]) -> None:
        """All copies of a layer, one after another."""
        count = self.graph.times(group[0].layer)
        own = _own(self.graph, group) if count > 1 else set[str]()
        carried = _carried(self.graph, group) if count > 1 else {}
        for copy in range(count):
            names = _Names(own, {self.passed.get(e, e): o for e, o in carried.items()}, copy)
            for op in group:
                self.add(op, self.layer, names if copy else str)
            written = {one.tensor for op in group for one in op.writes}
            given = [n for n in self.graph.outputs if n in written and n not in carried.values()]
            self.outputs += [names(name) for name in given if copy]
            self.layer += 1
        self.passed |= {name: f"{name}@{count - 1}" for name in carried.values() if count > 1}


@dataclass(frozen=True, slots=True)
class _Names:
    """Names in one copy of a layer."""

    own: set[str]
    carried: Mapping[str, str]
    copy: int

    def __call__(self, name: str) -> str:
        if name in self.carried:
            before = self.carried[name]
            return before if self.copy == 1 else f"{before}@{self.copy - 1}"
        return f"{name}@{self.copy}" if name in self.own else name


def _own(graph: OpGraph, group: Sequence[Operator]) -> set[str]:
    """Operators of a layer, what they write, and what is held for them alone."""
    inside = {one.name for one in group}
    others = {name for op in graph.operators if op.name not in inside for name in op.inputs}
    held = {n for op in group for n in op.inputs if graph.tensors[n].kind in _OWN}
    return inside | (held - others) | {one.tensor for op in group for one in op.writes}


def _carried(graph: OpGraph, group: Sequence[Operator]) -> dict[str, str]:
    """{tensor that a layer takes from before: tensor that it hands on}."""
    inside = {one.name for one in group}
    written = {one.tensor for op in group for one in op.writes}
    outside = {name for op in graph.operators if op.name not in inside for name in op.inputs}
    leaving = [name for name in graph.tensors if name in written & outside]
    leaving = leaving or [name for name in graph.outputs if name in written]
    entering = dict.fromkeys(
        name
        for op in group
        for name in op.inputs
        if name not in written and graph.tensors[name].kind in _GIVEN
    )
    found: dict[str, str] = {}
    for name in leaving:
        like = [e for e in entering if _form(graph, e) == _form(graph, name)]
        if len(like) == 1 and like[0] not in found:
            found[like[0]] = name
        elif name in outside:
            raise InputError(
                "a folded layer hands on one tensor for each of that shape which it takes",
                got=f"graph={graph.name}, layer={group[0].layer}, {name} for one of {like}",
                hint="give the graph with all its layers",
            )
    return found


def _form(graph: OpGraph, name: str) -> tuple[tuple[int, ...], str]:
    return graph.tensors[name].shape, graph.tensors[name].dtype


def alike_layers(graph: OpGraph) -> dict[int, int]:
    """Layer -> the first layer that is like it (itself where none is), of an unfolded graph."""
    groups: dict[int, list[Operator]] = {}
    for op in graph.operators:
        groups.setdefault(op.layer, []).append(op)
    first: dict[Hashable, int] = {}
    found = {}
    for layer, group in groups.items():
        if layer >= 0:
            key = tuple(_signature(graph, group))
            found[layer] = first.setdefault(key, layer)
    return found


def _signature(graph: OpGraph, group: Sequence[Operator]) -> Iterator[Hashable]:
    """What each operator of a layer does, names apart."""
    own: dict[str, tuple[int, int]] = {}
    for place, op in enumerate(group):
        reads = []
        for one in op.reads:
            tensor = graph.tensors[one.tensor]
            kind = "result" if tensor.kind in _GIVEN else tensor.kind
            reads.append((one.loops, own.get(one.tensor, kind), tensor.shape, tensor.dtype))
        writes = []
        for slot, one in enumerate(op.writes):
            own[one.tensor] = place, slot
            writes.append((one.loops, *_form(graph, one.tensor)))
        loops = tuple((name, loop.size, loop.whole) for name, loop in op.loops.items())
        yield (
            op.kind,
            tuple(reads),
            tuple(writes),
            loops,
            op.linear,
            op.flop,
            op.refused,
            tuple(op.attrs.items()),
        )
