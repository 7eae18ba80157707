"""The graph of one layer of a plan of operators: how each result lies, and what moves between.

Of layers that are alike one stands for all, the second where there is one: what it reads comes from
a layer like itself. A tensor is told by its shape on the whole mesh with what cuts each dim,
`[2, 2048/8 x, 8192]`; `sum/8 x` is a sum of which each rank has a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from shardplan.models.opfold import first_alike, unfolded
from shardplan.models.opgraph import Operator, OpGraph, Tensor
from shardplan.models.redistribute import PARTIAL
from shardplan.search.oplevel.plan import MoveRow, OperatorPlan, OperatorRow
from shardplan.search.oplevel.program import moves_of
from shardplan.search.oplevel.quotient import HELD, quotient_of
from shardplan.search.report.markup import Html, tag
from shardplan.search.report.rows import (
    CUT,
    PARTIAL_SUM,
    WHOLE,
    Row,
    rows_keys,
    rows_picture,
    size_text,
)

__all__ = ["MOST_ROWS", "layer_section"]

MOST_ROWS = 160
"""Rows of a picture."""
Layout = Mapping[str, int | str]


def layer_section(plan: OperatorPlan, graph: OpGraph) -> Html:
    """A picture of each kind of layer, and of what stands outside of them."""
    whole = unfolded(graph)
    drawing = _Drawing(plan, whole)
    parts = list(_parts(whole))
    figures = [
        tag(
            "details",
            tag("summary", title),
            drawing.figure(title, operators),
            open="" if place == 0 else None,
        )
        for place, (title, operators) in enumerate(parts)
    ]
    return tag(
        "section",
        tag("h2", "The graph, as each rank runs it"),
        tag(
            "p",
            "Shapes are those of the whole mesh: 2048/8 x is a dim cut 8 ways over the axis x,"
            " sum/8 x a sum of which each rank has a part. Between operators stand the collectives,"
            " with the bytes of the full tensor of one group, its ranks, and how the result lies.",
        ),
        rows_keys(),
        *figures,
    )


def _parts(graph: OpGraph) -> Iterator[tuple[str, list[Operator]]]:
    """(title, operators) of each kind of layer, the most frequent first, then of all else."""
    first = first_alike(graph)
    layers: dict[int, list[Operator]] = {}
    for op in graph.operators:
        if op.layer >= 0:
            layers.setdefault(op.layer, []).append(op)
    kinds: dict[tuple[str, ...], list[int]] = {}
    for layer, operators in layers.items():
        kinds.setdefault(tuple(first[op.name] for op in operators), []).append(layer)
    for alike in sorted(kinds.values(), key=lambda one: -len(one)):
        operators = layers[alike[min(1, len(alike) - 1)]]
        count = f"{len(alike):,} equal layers" if len(alike) > 1 else f"layer {alike[0]}"
        yield f"{count}, {len(operators):,} operators each", operators
    outside = [op for op in graph.operators if op.layer < 0]
    if outside:
        words = "outside the layers" if layers else "of the graph"
        yield f"{len(outside):,} operators {words}", outside


class _Drawing:
    """Rows of operators of one graph."""

    def __init__(self, plan: OperatorPlan, graph: OpGraph) -> None:
        self.plan, self.tensors = plan, graph.tensors
        self.moves = moves_of(plan, quotient_of(graph))
        self.first = first_alike(graph)
        self.told = {row.name: row for row in plan.operators}

    def figure(self, title: str, operators: Sequence[Operator]) -> Html:
        """The picture, cut off where it would be too long."""
        rows = list(self.rows(operators))
        moved = ", ".join(row.first for row in rows if row.moves)
        shown = rows[:MOST_ROWS]
        rest = len(rows) - len(shown)
        return tag(
            "div",
            rows_picture(shown, f"{title}: {moved or 'no collectives'}"),
            tag("p", f"{rest:,} more rows are in operators.csv.", class_="soft") if rest else "",
            class_="blocks",
        )

    def rows(self, operators: Sequence[Operator]) -> Iterator[Row]:
        """What comes from outside, operators in order, moves behind what makes a tensor."""
        made = {access.tensor for op in operators for access in op.writes}
        there: dict[str, str] = {}
        for op in operators:
            told = self.told[self.first[op.name]]
            reads = list(zip(op.inputs, told.reads, strict=True))
            for name, layout in reads:
                value = _value(name, layout)
                if not (name in made or value in there or self.tensors[name].kind in HELD):
                    there[value] = value
                    yield self.given(name, layout)
            row = self.operator(op, told, reads, there)
            yield row
            for access, layout in zip(op.writes, told.writes, strict=True):
                there[_value(access.tensor, layout)] = row.name
                for move in self.moves.get(access.tensor, ()):
                    value = _value(access.tensor, move.after)
                    yield self.move(access.tensor, move, there[_value(access.tensor, move.before)])
                    there[value] = value

    def given(self, name: str, layout: Layout) -> Row:
        """A tensor that is made elsewhere."""
        tensor = self.tensors[name]
        words = "input" if tensor.kind == "input" else "from before"
        shape = self.shape(tensor, layout)
        return _row(_value(name, layout), (), f"{name} {words}", shape, layout)

    def operator(
        self,
        op: Operator,
        told: OperatorRow,
        reads: Iterable[tuple[str, Layout]],
        there: Mapping[str, str],
    ) -> Row:
        """An operator with its first result and what it holds; `there`: rows of what it reads."""
        sources, shapes = [], []
        if op.writes:
            shapes.append(self.shape(self.tensors[op.writes[0].tensor], told.writes[0]))
        for name, layout in reads:
            tensor = self.tensors[name]
            if tensor.kind in HELD:
                shapes.append(f"{tensor.kind} {self.shape(tensor, layout)}")
            else:
                sources.append(there[_value(name, layout)])
        place = op.where.rpartition(".")[2]
        told_apart = place and place != op.name and not place.isdigit()
        words = [op.name, op.kind, *([f"in {place}"] if told_apart else [])]
        layout = told.writes[0] if told.writes else {}
        return _row(op.name, tuple(sources), " ".join(words), "; ".join(shapes), layout)

    def move(self, tensor: str, move: MoveRow, source: str) -> Row:
        """A collective or a slice."""
        ranks = math.prod(self.plan.mesh[axis] for axis in move.axes)
        shape = self.shape(self.tensors[tensor], move.after)
        first = f"{move.kind} {size_text(move.message_bytes)}"
        second = f"{ranks:,} of {' '.join(move.axes)} \N{RIGHTWARDS ARROW} {shape}"
        value = _value(tensor, move.after)
        return _row(value, (source,), first, second, move.after, moves=True)

    def shape(self, tensor: Tensor, layout: Layout) -> str:
        """`[2, 2048/8 x, 8192]`, with `sum/8 x` where it is a partial sum."""
        cuts: dict[int | str, list[str]] = {}
        for axis, dim in layout.items():
            cuts.setdefault(dim, []).append(axis)
        dims = [
            f"{size}{self._cut(cuts[place])}" if place in cuts else str(size)
            for place, size in enumerate(tensor.shape)
        ]
        sums = f" sum{self._cut(cuts[PARTIAL])}" if PARTIAL in cuts else ""
        return f"[{', '.join(dims)}]{sums}"

    def _cut(self, axes: Sequence[str]) -> str:
        ways = math.prod(self.plan.mesh[axis] for axis in axes)
        return f"/{ways} {' '.join(axes)}"


def _row(
    name: str,
    inputs: tuple[str, ...],
    first: str,
    second: str,
    layout: Layout,
    *,
    moves: bool = False,
) -> Row:
    stripe = PARTIAL_SUM if PARTIAL in layout.values() else CUT if layout else WHOLE
    return Row(name=name, inputs=inputs, first=first, second=second, stripe=stripe, moves=moves)


def _value(tensor: str, layout: Layout) -> str:
    """A tensor in a layout."""
    return f"{tensor} {sorted((axis, str(dim)) for axis, dim in layout.items())}"
