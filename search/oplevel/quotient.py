"""Equal operators and tensors of an unfolded graph as one each: what the variables stand for.

Operators at the same place of layers that are alike are one class, so that they are split alike.
Tensors are one class where the same class makes them and the same classes read them: what a layer
hands to the next has the same layouts at each border, while the first layer's input and the last
one's output are classes of their own.

A segment is where an operator stands in a pipeline: a layer's number, -1 for what comes before the
layers, the number of layers for what reads (by whatever way) the last of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardplan.models.opfold import alike_layers
from shardplan.models.opgraph import Operator, OpGraph, Tensor

__all__ = ["HELD", "Live", "OperatorClass", "Quotient", "TensorClass", "largest", "quotient_of"]

HELD = ("parameter", "constant", "state")
"""Kinds that lie as their readers read them, in as many layouts as these need."""


@dataclass(slots=True, eq=False)
class OperatorClass:
    """Operators that are split alike; `op` is the first of them."""

    op: Operator
    segments: list[int] = field(default_factory=list)
    """Of each of them."""

    @property
    def times(self) -> int:
        """How many there are."""
        return len(self.segments)


@dataclass(slots=True, eq=False)
class TensorClass:
    """Tensors that are made and read alike; `tensor` is the first of them."""

    tensor: Tensor
    maker: tuple[int, int] | None
    """(operator class, write), None for what the graph is given or holds."""
    readers: tuple[tuple[int, int], ...]
    """(operator class, read) of every reader."""
    is_output: bool
    segments: list[tuple[int, ...]] = field(default_factory=list)
    """Of each of them, the segments in which it is made or read."""

    @property
    def times(self) -> int:
        """How many there are."""
        return len(self.segments)

    @property
    def is_held(self) -> bool:
        """A parameter, constant or state."""
        return self.tensor.kind in HELD


Live = tuple[tuple[int, int], ...]
"""(tensor class, how many of it) alive at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotient:
    """Classes of a graph, in computing order."""

    graph: OpGraph
    operators: tuple[OperatorClass, ...]
    tensors: tuple[TensorClass, ...]
    lives: Mapping[Live, tuple[int, ...]]
    """What is alive while an operator runs -> segments in which it is."""
    class_of: Mapping[str, int]
    """Tensor -> its class."""


def quotient_of(graph: OpGraph) -> Quotient:
    """Classes of an unfolded graph."""
    places, classes = _operator_classes(graph)
    readers: dict[str, dict[tuple[int, int], None]] = {}
    where: dict[str, dict[int, None]] = {}
    makers: dict[str, tuple[int, int]] = {}
    segments = _segments(graph)
    for op in graph.operators:
        place, segment = places[op.name], segments[op.name]
        classes[place].segments.append(segment)
        for slot, one in enumerate(op.reads):
            readers.setdefault(one.tensor, {})[place, slot] = None
            where.setdefault(one.tensor, {})[segment] = None
        for slot, one in enumerate(op.writes):
            makers[one.tensor] = place, slot
            where.setdefault(one.tensor, {})[segment] = None
    outputs = set(graph.outputs)
    tensors: dict[object, int] = {}
    found: list[TensorClass] = []
    class_of: dict[str, int] = {}
    for name, segments_of in where.items():
        tensor, output = graph.tensors[name], name in outputs
        own = name if tensor.kind == "input" else ""
        read_by = tuple(sorted(readers.get(name, ())))
        key = (own, tensor.kind, tensor.shape, tensor.dtype, makers.get(name), read_by, output)
        if key not in tensors:
            tensors[key] = len(found)
            found.append(TensorClass(tensor, makers.get(name), read_by, output))
        class_of[name] = tensors[key]
        found[tensors[key]].segments.append(tuple(segments_of))
    return Quotient(
        graph=graph,
        operators=tuple(classes),
        tensors=tuple(found),
        lives=_lives(graph, class_of, segments),
        class_of=class_of,
    )


def _operator_classes(graph: OpGraph) -> tuple[dict[str, int], list[OperatorClass]]:
    """(operator -> its class, the classes)."""
    alike = alike_layers(graph)
    seen: Counter[int] = Counter()
    keys: dict[tuple[object, int], int] = {}
    places: dict[str, int] = {}
    classes: list[OperatorClass] = []
    for op in graph.operators:
        key: tuple[object, int] = (op.name, 0)
        if op.layer >= 0:
            key = (alike[op.layer], seen[op.layer])
            seen[op.layer] += 1
        if key not in keys:
            keys[key] = len(classes)
            classes.append(OperatorClass(op))
        places[op.name] = keys[key]
    return places, classes


def _segments(graph: OpGraph) -> dict[str, int]:
    """Segment of each operator."""
    order = {
        layer: at for at, layer in enumerate(sorted({o.layer for o in graph.operators} - {-1}))
    }
    made: dict[str, int] = {}
    found = {}
    for op in graph.operators:
        after = any(made.get(name, -1) >= 0 for name in op.inputs)
        segment = order[op.layer] if op.layer >= 0 else len(order) if after else -1
        found[op.name] = segment
        made |= {one.tensor: segment for one in op.writes}
    return found


def _lives(
    graph: OpGraph, class_of: Mapping[str, int], segments: Mapping[str, int]
) -> dict[Live, tuple[int, ...]]:
    """Inputs and results that are alive while each operator runs, those held within more left out.

    A tensor is alive from its making (an input from the start) to its last read; outputs stay.
    """
    last = {name: at for at, op in enumerate(graph.operators) for name in op.inputs}
    ends: dict[int, list[str]] = {}
    for name, at in last.items():
        if name not in graph.outputs:
            ends.setdefault(at, []).append(name)
    inputs = (name for name in last if graph.tensors[name].kind == "input")
    alive = Counter(class_of[name] for name in inputs)
    found: dict[Live, dict[int, None]] = {}
    for at, op in enumerate(graph.operators):
        written = [one.tensor for one in op.writes]
        alive.update(class_of[name] for name in written)
        live = tuple(sorted((one, count) for one, count in alive.items() if count))
        found.setdefault(live, {})[segments[op.name]] = None
        gone = [n for n in ends.get(at, ()) if graph.tensors[n].kind not in HELD]
        gone += [n for n in written if n not in last and n not in graph.outputs]
        alive.subtract(class_of[name] for name in gone)
    return {live: tuple(where) for live, where in found.items()}


def largest(lives: Iterable[Live]) -> list[Live]:
    """Those that are not held within another."""
    counted = sorted(
        (dict(one) for one in set(lives)), key=lambda one: (-sum(one.values()), sorted(one))
    )
    kept: list[dict[int, int]] = []
    for one in counted:
        if not any(all(more.get(t, 0) >= n for t, n in one.items()) for more in kept):
            kept.append(one)
    return [tuple(sorted(one.items())) for one in kept]
