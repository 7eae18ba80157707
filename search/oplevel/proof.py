"""The proof of an operator plan, on the graph that it was made of.

L0  on the real sizes: every operator is split as its loops allow, every tensor comes by the plan's
    moves to lie as it is read, parameters, constants and caches are held so; bytes of messages, of
    what is held and of stages, and all seconds, are those of the cost model (where the cluster is
    one that ships).
L1  the same program on numbers (`models.opwitness`), of equal layers the first two and the last:
    each tensor of each operator, put together from the ranks, equals the one computed whole to
    1e-10.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from shardplan.costmodel.catalog import cluster_names, device_names, load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.opcost import OperatorPrices
from shardplan.models.errors import InputError, ProofError, ShardplanError
from shardplan.models.frontends.load import load_graph
from shardplan.models.frontends.registry import holds_graph
from shardplan.models.opfold import unfolded
from shardplan.models.opgraph import OpGraph
from shardplan.models.opshard import Move, Placed, Program
from shardplan.models.opwitness import witness
from shardplan.models.verify import TOLERANCE
from shardplan.search.oplevel.api import ENGINE
from shardplan.search.oplevel.layouts import Step, key_of, local_bytes, message_bytes
from shardplan.search.oplevel.memory import stage_rows
from shardplan.search.oplevel.pipeline import cut_segments, layer_count
from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.oplevel.program import check_same, mesh_of, program_of
from shardplan.search.oplevel.quotient import Quotient, quotient_of
from shardplan.search.oplevel.shortened import shortened
from shardplan.search.plan import ProofInfo

__all__ = ["LEVELS", "graph_of_plan", "prove_operators"]

LEVELS = (0, 1)
_SAME = 1e-8
"""A plan keeps ten digits of a float."""
Check = tuple[str, Callable[[], str]]


def graph_of_plan(plan: OperatorPlan, model: str | None = None) -> OpGraph:
    """The graph of a plan's file, or of the file `model`; `InputError` where there is none."""
    path = Path(model or plan.source)
    if not model and not holds_graph(path):
        raise InputError(
            "the plan's graph was not read from a file",
            got=f"graph={plan.graph}, source={plan.source!r}",
            hint="name its .onnx or .pt2 file with --model; in Python give the graph",
        )
    return load_graph(path, sizes=plan.request.sizes)


def prove_operators(plan: OperatorPlan, graph: OpGraph, *, level: int = 1) -> ProofInfo:
    """Prove it. `InputError` for a graph that is not the plan's and for other levels."""
    if level not in LEVELS:
        raise InputError(
            "an operator plan is proven at level 0 or 1", got=f"level={level}", hint="try --level 1"
        )
    check_same(plan, graph)
    passed, failures = [], []
    for name, run in _checks(plan, graph, level):
        try:
            passed.append(f"{name}: {run()}")
        except ShardplanError as error:
            failures.append(f"{name}: {error}")
        except (LookupError, ValueError) as error:  # rows of a file that was written by hand
            failures.append(f"{name}: a plan fits its graph ({type(error).__name__}: {error})")
    return ProofInfo(
        level=level, passed=not failures, checks=tuple(passed), failures=tuple(failures)
    )


def _checks(plan: OperatorPlan, graph: OpGraph, level: int) -> Iterator[Check]:
    whole = unfolded(graph)
    audit = _Audit(plan, quotient_of(whole), whole)
    program = functools.cache(lambda: program_of(plan, graph))
    yield "L0 layouts: every tensor lies as it is read", lambda: _laid(program())
    yield "L0 totals: seconds of the run are those of its parts", audit.totals
    if _is_shipped(plan):
        yield "L0 operators: seconds are the cost model's", audit.operators
        yield "L0 moves: bytes and seconds are the cost model's", audit.moves
        yield "L0 memory: bytes held are those of the layouts", audit.memory
    if level:
        yield (
            "L1 numbers: every tensor equals the one computed whole",
            lambda: _run(shortened(program(), audit.quotient)),
        )


def _laid(program: Program) -> str:
    moves = sum(isinstance(one, Move) for one in program.steps)
    split = sum(isinstance(one, Placed) and bool(one.chosen) for one in program.steps)
    count = len(program.steps) - moves
    return f"{count} operators, {split} of them split, {moves} moves"


def _run(program: Program) -> str:
    found = witness(program)
    if not found.error <= TOLERANCE:
        raise ProofError(
            "the ranks compute what the graph computes",
            got=f"tensor={found.tensor}, relative error {found.error:.3g}",
        )
    return f"{found.compared} tensors, largest relative error {found.error:.1e}"


def _is_shipped(plan: OperatorPlan) -> bool:
    return plan.cluster.name in cluster_names() and plan.cluster.device in device_names()


def _same(what: str, said: float, found: float) -> None:
    if not math.isclose(said, found, rel_tol=_SAME, abs_tol=1e-15):
        raise ProofError("a plan says what its parts say", got=f"{what}: {said!r}, not {found!r}")


class _Audit:
    """What a plan says, against what follows from its layouts."""

    def __init__(self, plan: OperatorPlan, quotient: Quotient, graph: OpGraph) -> None:
        self.plan, self.quotient, self.graph = plan, quotient, graph

    def prices(self) -> OperatorPrices:
        """Of the plan's cluster and mesh."""
        plan, machine = self.plan, self.plan.cluster
        cluster = load_cluster(machine.name, nodes=machine.nodes, device=machine.device)
        return OperatorPrices.of(
            cluster, mesh_of(plan), load_engine(ENGINE), self.graph.tensors, plan.dtype
        )

    def totals(self) -> str:
        """Rows added up; stages against the run."""
        plan = self.plan
        sends = sum(one.total_s for one in plan.costs if one.kind == "send")
        rows = sum(one.times * one.total_s for one in plan.operators)
        rows += sum(one.times * one.seconds for one in plan.moves)
        _same("total_s", plan.total_s, rows + sends)
        _same("costs", plan.total_s, sum(one.total_s for one in plan.costs))
        _same("slowest_stage_s", plan.slowest_stage_s, max(one.seconds for one in plan.stages))
        return f"{plan.total_s * 1e3:.4f} ms"

    def operators(self) -> str:
        """Each operator priced again."""
        rows = {one.name: one for one in self.plan.operators}
        prices = self.prices()
        for one in self.quotient.operators:
            if one.op.name not in rows:
                raise ProofError("a plan has every operator of its graph", got=one.op.name)
            row = rows[one.op.name]
            _same(f"{row.name}.times", row.times, one.times)
            _same(row.name, row.total_s, float(prices.operator(one.op, [row.split]).total_s[0]))
        return f"{sum(one.times for one in rows.values())} operators"

    def moves(self) -> str:
        """Each move's message and seconds counted again."""
        prices, mesh = self.prices(), mesh_of(self.plan)
        for row in self.plan.moves:
            one = self.quotient.tensors[self.quotient.class_of[row.tensor]]
            nodes = (key_of(row.before, mesh), key_of(row.after, mesh))
            moved = message_bytes(one.tensor, nodes, Step(0, 1, row.kind, row.axes), prices)
            _same(f"{row.tensor}.times", row.times, one.times)
            _same(f"{row.tensor}.message_bytes", row.message_bytes, moved)
            seconds = float(prices.move(row.kind, row.axes, np.array([moved]))[0])
            _same(f"{row.tensor}.seconds", row.seconds, seconds)
        return f"{sum(row.times for row in self.plan.moves)} moves"

    def memory(self) -> str:
        """What is held, by its layouts; stages by what they hold."""
        prices, mesh, plan = self.prices(), mesh_of(self.plan), self.plan
        rows = {row.tensor: row for row in plan.held}
        for one in self.quotient.tensors:
            if one.is_held:
                row = rows[one.tensor.name]
                keys = [key_of(layout, mesh) for layout in row.layouts]
                found = sum(local_bytes(one.tensor, key, prices) for key in keys)
                _same(f"{row.tensor}.bytes", row.bytes, found)
        layers = layer_count(self.quotient)
        if sum(one.layers for one in plan.stages) != layers:
            raise ProofError("stages hold all layers", got=f"{layers} layers in the graph")
        segments = cut_segments(tuple(one.layers for one in plan.stages), layers)
        for stage, where in zip(plan.stages, segments, strict=True):
            held = stage_rows(self.quotient, where)[0].held
            total = sum(
                count * rows[self.quotient.tensors[place].tensor.name].bytes
                for place, count in held
            )
            said = stage.parameters_bytes + stage.constants_bytes + stage.states_bytes
            _same(f"stage {stage.stage}", said, total)
            _same(f"stage {stage.stage}.total", stage.total_bytes, said + stage.activations_bytes)
        return f"{len(rows)} tensors, {len(plan.stages)} stages"
