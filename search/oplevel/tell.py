"""From what the ILP found to the plan: every operator, move and held tensor with its price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

import shardplan
from shardplan.costmodel.opcost import OperatorPrices
from shardplan.models.opdescribe import graph_digest
from shardplan.models.opgraph import OpGraph
from shardplan.models.redistribute import PARTIAL
from shardplan.search.build_plan import cluster_info
from shardplan.search.oplevel.layouts import message_bytes
from shardplan.search.oplevel.memory import alive_bytes, held_bytes, held_keys, stage_rows
from shardplan.search.oplevel.pipeline import Found, cut_segments, layer_count, stage_seconds
from shardplan.search.oplevel.plan import (
    HeldRow,
    KindRow,
    MoveRow,
    OperatorCertificate,
    OperatorPlan,
    OperatorRequest,
    OperatorRow,
    StageRow,
)
from shardplan.search.oplevel.problem import Problem

__all__ = ["Answer", "tell"]

_EXACT = 1e-9
"""Below this, bound and cost differ by rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was found on one mesh."""

    problem: Problem
    prices: OperatorPrices
    found: Found
    capacity_bytes: float

    @property
    def seconds(self) -> float:
        """Of one run."""
        return self.found.chosen.seconds(self.problem, self.found.sends)


def tell(
    graph: OpGraph,
    answer: Answer,
    request: OperatorRequest,
    *,
    space_size: int,
    meshes: int,
    wall_s: float,
) -> OperatorPlan:
    """The plan of an answer to a question about `graph`."""
    found, problem, mesh = answer.found, answer.problem, answer.problem.mesh
    total = answer.seconds
    gap = max(total - found.bound_s, 0.0) / total if total else 0.0
    stages = tuple(_stages(answer))
    moves = tuple(_moves(answer))
    operators = tuple(_operators(answer))
    return OperatorPlan(
        shardplan_version=shardplan.__version__,
        request=request,
        graph=graph.name,
        source=graph.source,
        digest=graph_digest(graph),
        layers=layer_count(problem.quotient),
        parameters=graph.parameters,
        cluster=cluster_info(answer.prices.cluster),
        mesh=dict(zip(mesh.axes, mesh.shape, strict=True)),
        dtype=answer.prices.dtype,
        total_s=total,
        slowest_stage_s=max(one.seconds for one in stages),
        stages=stages,
        operators=operators,
        moves=moves,
        held=tuple(_held(answer)),
        inputs=dict(_inputs(answer)),
        outputs=dict(_outputs(answer)),
        costs=_costs(operators, moves, answer),
        fits=all(one.total_bytes <= one.capacity_bytes for one in stages),
        certificate=OperatorCertificate(
            space_size=space_size,
            meshes=meshes,
            variables=found.solution.variables,
            integers=found.solution.integers,
            rows=found.solution.rows,
            lp_bound_s=found.solution.lp_bound_s,
            bound_s=found.bound_s,
            gap=gap if gap > _EXACT else 0.0,
            wall_s=10.0 ** max(1, int(np.ceil(np.log10(max(wall_s, 1e-9))))),
        ),
    )


def _operators(answer: Answer) -> Iterator[OperatorRow]:
    problem = answer.problem
    classes = zip(
        problem.quotient.operators, problem.candidates, answer.found.chosen.picks, strict=True
    )
    for one, options, pick in classes:
        candidate = options[pick]
        total, compute, memory, overhead = candidate.seconds
        yield OperatorRow(
            name=one.op.name,
            kind=one.op.kind,
            where=one.op.where,
            layer=one.op.layer,
            times=one.times,
            split=candidate.chosen,
            passes=tuple(axis for axis, state in candidate.states if state == PARTIAL),
            reads=tuple(map(dict, candidate.reads)),
            writes=tuple(map(dict, candidate.writes)),
            compute_s=compute,
            memory_s=memory,
            overhead_s=overhead,
            total_s=total,
        )


def _moves(answer: Answer) -> Iterator[MoveRow]:
    problem, chosen = answer.problem, answer.found.chosen
    for part, steps in zip(problem.tensors, chosen.steps, strict=True):
        for i in steps:
            step = part.steps[i]
            yield MoveRow(
                tensor=part.owner.tensor.name,
                times=part.owner.times,
                kind=cast("Any", step.kind),
                axes=step.axes,
                before=dict(part.nodes[step.source]),
                after=dict(part.nodes[step.target]),
                message_bytes=message_bytes(part.owner.tensor, part.nodes, step, answer.prices),
                seconds=float(part.seconds[i]),
            )


def _inputs(answer: Answer) -> Iterator[tuple[str, dict[str, int | str]]]:
    for part in answer.problem.tensors:
        if part.source is not None:
            yield part.owner.tensor.name, dict(part.nodes[part.source])


def _outputs(answer: Answer) -> Iterator[tuple[str, dict[str, int | str]]]:
    problem, chosen = answer.problem, answer.found.chosen
    for place, part in enumerate(problem.tensors):
        if part.given is not None:
            made = chosen.made(problem, part)
            reached = (made, *(part.steps[i].target for i in chosen.steps[place]))
            given = next(node for node in part.given if node in reached)
            yield part.owner.tensor.name, dict(part.nodes[given])


def _held(answer: Answer) -> Iterator[HeldRow]:
    problem, chosen = answer.problem, answer.found.chosen
    for place, part in enumerate(problem.tensors):
        if part.owner.is_held:
            yield HeldRow(
                tensor=part.owner.tensor.name,
                kind=cast("Any", part.owner.tensor.kind),
                times=part.owner.times,
                layouts=tuple(dict(key) for key in held_keys(problem, chosen, part)),
                bytes=held_bytes(problem, chosen, ((place, 1.0),)),
            )


def _costs(
    operators: tuple[OperatorRow, ...], moves: tuple[MoveRow, ...], answer: Answer
) -> tuple[KindRow, ...]:
    rows: dict[str, list[float]] = {}
    for one in operators:
        seconds = (one.compute_s, one.memory_s, 0.0, one.overhead_s, one.total_s)
        _add(rows, one.kind, one.times, seconds)
    for move in moves:
        local = move.kind == "slice"
        seconds = (0.0, move.seconds * local, move.seconds * (not local), 0.0, move.seconds)
        _add(rows, move.kind, move.times, seconds)
    stages, problem = len(answer.found.cut), answer.problem
    for place, each in answer.found.sends.items():
        passed = float(each[answer.found.chosen.made(problem, problem.tensors[place])])
        row = rows.setdefault("send", [0.0] * 6)
        row[0] = stages - 1
        row[3], row[5] = row[3] + passed, row[5] + passed
    return tuple(
        KindRow(
            kind=kind, calls=int(row[0]), compute_s=row[1], memory_s=row[2], collective_s=row[3],
            overhead_s=row[4], total_s=row[5],
        )
        for kind, row in rows.items()
    )  # fmt: skip


def _add(rows: dict[str, list[float]], kind: str, times: int, seconds: tuple[float, ...]) -> None:
    row = rows.setdefault(kind, [0.0] * 6)
    for place, value in enumerate((1.0, *seconds)):
        row[place] += times * value


def _stages(answer: Answer) -> Iterator[StageRow]:
    problem, found = answer.problem, answer.found
    layers = layer_count(problem.quotient)
    each, ends = stage_seconds(problem, found.chosen, len(found.cut), layers, found.sends)
    for stage, segments in enumerate(cut_segments(found.cut, layers)):
        rows = stage_rows(problem.quotient, segments)
        sizes = {
            kind: held_bytes(problem, found.chosen, rows[0].held, kind)
            for kind in ("parameter", "constant", "state")
        }
        alive = max(alive_bytes(problem, found.chosen, row) for row in rows)
        inside = each[max(segments.start, 0) : segments.stop]
        yield StageRow(
            stage=stage,
            layers=found.cut[stage],
            seconds=sum(inside) + ends[stage],
            parameters_bytes=sizes["parameter"],
            constants_bytes=sizes["constant"],
            states_bytes=sizes["state"],
            activations_bytes=alive,
            total_bytes=sum(sizes.values()) + alive,
            capacity_bytes=answer.capacity_bytes,
        )
