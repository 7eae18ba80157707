"""A plan laid on its graph: what every rank runs, operator by operator, move by move.

    plan + graph -> opshard.Program

The steps are the plan's own, of all layers: an operator with the layouts of its reads and writes,
and behind what makes a tensor the moves that the plan has for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from shardplan.models.errors import InputError, LayoutError, ProofError
from shardplan.models.opdescribe import graph_digest
from shardplan.models.opfold import first_alike, unfolded
from shardplan.models.opgraph import Operator, OpGraph, layouts_of
from shardplan.models.opshard import Key, Move, Placed, Program
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL, redistributions
from shardplan.search.oplevel.layouts import key_of
from shardplan.search.oplevel.plan import MoveRow, OperatorPlan, OperatorRow
from shardplan.search.oplevel.quotient import HELD, Quotient, quotient_of

__all__ = ["check_same", "mesh_of", "moves_of", "program_of"]


def mesh_of(plan: OperatorPlan) -> Mesh:
    """The mesh of one stage."""
    return Mesh(tuple(plan.mesh), tuple(plan.mesh.values()), {})


def check_same(plan: OperatorPlan, graph: OpGraph) -> None:
    """`InputError` unless the plan was made of this graph."""
    found = graph_digest(graph)
    if found != plan.digest:
        raise InputError(
            "a plan is of the graph that it was made of",
            got=f"{graph.name}: {found[:12]}, plan of {plan.graph}: {plan.digest[:12]}",
            hint="name its file with --model, and sizes of symbolic dims as they were",
        )


def moves_of(plan: OperatorPlan, quotient: Quotient) -> dict[str, list[MoveRow]]:
    """Moves of each tensor that is moved, in order, of all layers."""
    rows: dict[int, list[MoveRow]] = {}
    for row in plan.moves:
        if row.tensor not in quotient.class_of:
            raise ProofError("a move is of a tensor of the graph", got=f"tensor={row.tensor}")
        rows.setdefault(quotient.class_of[row.tensor], []).append(row)
    return {name: rows[place] for name, place in quotient.class_of.items() if place in rows}


def program_of(plan: OperatorPlan, graph: OpGraph) -> Program:
    """The program of each rank, all stages together.

    `InputError` for another graph, `ProofError` where the plan does not lead from each layout to
    those that are read.
    """
    check_same(plan, graph)
    whole = unfolded(graph)
    return _Laying(plan, whole, quotient_of(whole)).program()


class _Laying:
    def __init__(self, plan: OperatorPlan, graph: OpGraph, quotient: Quotient) -> None:
        self.plan, self.graph, self.quotient = plan, graph, quotient
        self.mesh = mesh_of(plan)
        self.moves = moves_of(plan, quotient)
        self.ready: dict[str, list[Key]] = {}
        self.held: dict[tuple[str, Key], None] = {}
        self.steps: list[Move | Placed] = []

    def program(self) -> Program:
        """All steps, in computing order."""
        inputs = {
            name: key_of(self.told(self.plan.inputs, name), self.mesh)
            for name, one in self.graph.tensors.items()
            if one.kind == "input" and name in self.quotient.class_of
        }
        for name, key in inputs.items():
            self.arrive(name, key)
        rows = {row.name: row for row in self.plan.operators}
        first = first_alike(self.graph)
        for op in self.graph.operators:
            if first[op.name] not in rows:
                raise ProofError("a plan has every operator of its graph", got=op.name)
            self.place(op, rows[first[op.name]])
        return Program(
            graph=self.graph,
            mesh=self.mesh,
            steps=tuple(self.steps),
            inputs=inputs,
            outputs=tuple(self.outputs()),
            held=tuple(self.held),
        )

    def told(
        self, layouts: Mapping[str, Mapping[str, int | str]], name: str
    ) -> Mapping[str, int | str]:
        """What the plan says of the class of a tensor."""
        owner = self.quotient.tensors[self.quotient.class_of[name]].tensor.name
        if owner not in layouts:
            raise ProofError("a plan says how inputs come and outputs are given", got=name)
        return layouts[owner]

    def place(self, op: Operator, row: OperatorRow) -> None:
        """An operator as its row has it, and the moves of what it makes."""
        reads, writes = layouts_of(op, row.split, self.mesh, self.graph.tensors)
        through = dict.fromkeys(row.passes, PARTIAL)
        if set(through) & set(row.split) or not set(through) <= set(self.mesh.axes):
            raise ProofError("sums pass on axes that split nothing", got=f"{op.name}: {row.passes}")
        wanted = [
            key_of({**one, **through} if slot in op.linear else one, self.mesh)
            for slot, one in enumerate(reads)
        ]
        given = [key_of({**one, **through}, self.mesh) for one in writes]
        if [dict(key) for key in (*wanted, *given)] != [*row.reads, *row.writes]:
            raise ProofError("layouts of an operator follow from its split", got=op.name)
        for tensor, key in zip(op.inputs, wanted, strict=True):
            if self.graph.tensors[tensor].kind in HELD:
                self.held[tensor, key] = None
            elif key not in self.ready.get(tensor, ()):
                raise ProofError(
                    "a tensor comes to lie as it is read",
                    got=f"operator={op.name}, tensor={tensor}, layout={dict(key)}",
                )
        self.steps.append(Placed(op=op, chosen=row.split, reads=tuple(wanted), writes=tuple(given)))
        for access, key in zip(op.writes, given, strict=True):
            self.arrive(access.tensor, key)

    def arrive(self, tensor: str, key: Key) -> None:
        """A tensor that is there in one layout, and all that it is moved to."""
        self.ready[tensor] = [key]
        for row in self.moves.get(tensor, ()):
            before, after = key_of(row.before, self.mesh), key_of(row.after, self.mesh)
            self.check(row, before)
            if before not in self.ready[tensor]:
                raise ProofError(
                    "a move starts where the tensor lies",
                    got=f"tensor={tensor}, {row.kind}, layout={row.before}",
                )
            self.steps.append(
                Move(tensor=tensor, kind=row.kind, axes=row.axes, before=before, after=after)
            )
            self.ready[tensor].append(after)

    def check(self, row: MoveRow, before: Key) -> None:
        """`ProofError` unless a move is the one redistribution between its layouts."""
        have, want = (
            {axis: str(dim) for axis, dim in one.items()} for one in (dict(before), row.after)
        )
        try:
            found = [
                (kind, axes)
                for kind, axes, _ in itertools.islice(redistributions(have, want, self.mesh), 2)
            ]
        except LayoutError as error:
            raise ProofError("a move is possible", got=f"{row.tensor}: {error}") from None
        if found != [(row.kind, row.axes)]:
            raise ProofError(
                "a move is one redistribution between its layouts",
                got=f"tensor={row.tensor}: {row.kind} over {', '.join(row.axes)}, "
                f"{row.before} to {row.after}",
            )

    def outputs(self) -> Iterator[tuple[str, Key]]:
        """Outputs as they are given."""
        for name in self.graph.outputs:
            if self.graph.tensors[name].kind in HELD:
                continue
            key = key_of(self.told(self.plan.outputs, name), self.mesh)
            if key not in self.ready.get(name, ()):
                raise ProofError("an output comes to lie as it is given", got=f"tensor={name}")
            yield name, key
