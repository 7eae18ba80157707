"""Plans of operators are proven on their graphs; plans that were changed are not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.oplevel.graphs import MIXTRAL, Sizes, decoder, mlp
from tests.search.oplevel.test_exact import graphs

from shardplan.costmodel.catalog import load_cluster
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.models.opdescribe import graph_digest
from shardplan.models.opfold import first_alike, unfolded
from shardplan.models.opgraph import OpGraph, check_graph
from shardplan.models.opshard import Move, Placed, Program
from shardplan.models.opwitness import witness
from shardplan.models.verify import TOLERANCE
from shardplan.search.oplevel.api import MeshShape, search_operators
from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.oplevel.program import program_of
from shardplan.search.oplevel.proof import graph_of_plan, prove_operators
from shardplan.search.oplevel.quotient import quotient_of
from shardplan.search.oplevel.shortened import shortened

CLUSTER = "atlas-800t-a2"
SMALL = Sizes(tokens=512, hidden=1024, heads=8, kv_heads=8, ffn=4096, vocab=8192, layers=4)
DECODE = Sizes(batch=64, tokens=1, cached=2048, layers=4)
Data = dict[str, Any]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(
    ("sizes", "mesh", "stages"),
    [(SMALL, (4,), 2), (DECODE, (2, 4), 1), (DECODE, (2, 4), 2), (MIXTRAL, (2, 4), 1)],
)
def test_plans_that_are_found_are_proven(
    sizes: Sizes, mesh: MeshShape, stages: int, folded: bool, tmp_path: Path
) -> None:
    """As they are, and read again from their file."""
    graph = decoder(sizes, folded=folded)
    plan = search_operators(graph, load_cluster(CLUSTER, nodes=2), mesh, stages=stages)
    plan.save(tmp_path / "plan.json")
    for one in (plan, OperatorPlan.load(tmp_path / "plan.json")):
        proof = prove_operators(one, graph)
        assert proof.passed, proof.failures
        assert len(proof.checks) == 6
    program = program_of(plan, graph)
    moved = [one for one in program.steps if isinstance(one, Move)]
    assert len(moved) == sum(row.times for row in plan.moves)
    placed = [one for one in program.steps if isinstance(one, Placed)]
    assert len(placed) == sum(row.times for row in plan.operators)
    assert len(prove_operators(plan, graph, level=0).checks) == 5


def test_numbers_are_run_on_three_layers_of_a_kind() -> None:
    """Whose steps read and write all layouts that there are."""
    graph = unfolded(decoder(replace(DECODE, layers=9)))
    plan = search_operators(graph, load_cluster(CLUSTER, nodes=2), (2, 4), stages=2)
    whole = program_of(plan, graph)
    short = shortened(whole, quotient_of(graph))
    check_graph(short.graph)
    assert {op.layer for op in short.graph.operators} == {-1, 0, 1, 8}

    def layouts(program: Program) -> set[object]:
        first = first_alike(graph)
        placed = (one for one in program.steps if isinstance(one, Placed))
        return {(first[one.op.name], one.reads, one.writes) for one in placed}

    assert layouts(short) == layouts(whole)
    assert witness(short).error <= TOLERANCE
    assert witness(whole).error <= TOLERANCE


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(graphs(8), st.sampled_from([(2,), (3,), (8,), (2, 2), (2, 4)]), st.floats(0.3, 1.0))
def test_whatever_is_found_on_random_graphs_is_proven(
    graph: OpGraph, mesh: tuple[int, ...], share: float
) -> None:
    """With as much memory as the fastest takes, and with less where something fits."""
    plan = search_operators(graph, CLUSTER, mesh)
    limit = share * plan.stages[0].total_bytes
    with contextlib.suppress(InfeasibleError):
        plan = search_operators(graph, CLUSTER, mesh, memory_bytes=limit)
    proof = prove_operators(plan, graph)
    assert proof.passed, proof.failures


def test_a_plan_is_proven_on_its_own_graph_alone() -> None:
    """A graph of other sizes is another graph; where it lies counts not."""
    plan = search_operators(mlp(64, 512, 1024), CLUSTER, (8,))
    assert graph_digest(mlp(64, 512, 1024)) == plan.digest
    with pytest.raises(InputError, match="the graph that it was made of"):
        prove_operators(plan, mlp(64, 512, 2048))
    for level in (2, -1):
        with pytest.raises(InputError, match="level 0 or 1"):
            prove_operators(plan, mlp(64, 512, 1024), level=level)
    with pytest.raises(InputError, match=r"not read from a file .*--model"):
        graph_of_plan(plan)


def _found(graph: OpGraph) -> Data:
    plan = search_operators(graph, CLUSTER, (8,))
    data: Data = json.loads(plan.dumps())
    return data


def _operator(data: Data, name: str) -> Data:
    return next(row for row in data["operators"] if row["name"] == name)


def _other_split(data: Data) -> None:
    _operator(data, "up")["split"] = {"x": "t"}


def _other_layout(data: Data) -> None:
    _operator(data, "up")["writes"] = [{"x": 1}]


def _no_move(data: Data) -> None:
    del data["moves"][0]


def _other_move(data: Data) -> None:
    data["moves"][0]["kind"] = "all_gather"


def _move_of_nothing(data: Data) -> None:
    data["moves"][0]["tensor"] = "nothing"


def _strange_dim(data: Data) -> None:
    data["moves"][0]["before"] = {"x": 7}


def _cheaper_move(data: Data) -> None:
    data["moves"][0]["seconds"] /= 2


def _smaller_message(data: Data) -> None:
    data["moves"][0]["message_bytes"] /= 2


def _cheaper_operator(data: Data) -> None:
    _operator(data, "up")["total_s"] /= 2


def _cheaper_run(data: Data) -> None:
    data["total_s"] /= 2


def _lost_operator(data: Data) -> None:
    data["operators"].remove(_operator(data, "act"))


def _sums_pass_what_is_split(data: Data) -> None:
    _operator(data, "up")["passes"] = ["x"]


def _less_held(data: Data) -> None:
    data["held"][0]["bytes"] /= 2


def _nothing_held(data: Data) -> None:
    data["held"] = []


def _less_of_a_stage(data: Data) -> None:
    data["stages"][0]["parameters_bytes"] /= 2


def _layers_of_nothing(data: Data) -> None:
    data["stages"][0]["layers"] = 3


def _output_that_never_is(data: Data) -> None:
    data["outputs"]["out"] = {"x": 1}


def _no_output(data: Data) -> None:
    data["outputs"] = {}


def _other_mesh(data: Data) -> None:
    data["mesh"] = {"x": 4}


FAULTS = (
    _other_split, _other_layout, _no_move, _other_move, _move_of_nothing, _strange_dim,
    _cheaper_move, _smaller_message, _cheaper_operator, _cheaper_run, _lost_operator,
    _sums_pass_what_is_split, _less_held, _nothing_held, _less_of_a_stage, _layers_of_nothing,
    _output_that_never_is, _no_output, _other_mesh,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_plan_that_was_changed_is_not_proven(
    fault: Callable[[Data], None], tmp_path: Path
) -> None:
    """Each in one place, and each is a failed check, never a traceback."""
    graph = mlp(2048, 8192, 28672)
    data = _found(graph)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    assert prove_operators(OperatorPlan.load(file), graph).passed
    fault(data)
    file.write_text(json.dumps(data), encoding="utf-8")
    proof = prove_operators(OperatorPlan.load(file), graph)
    assert not proof.passed
    assert proof.failures


@pytest.mark.parametrize(
    ("place", "value"), [("mesh", {"x": 0}), ("kind", "deployment"), ("schema_version", 2)]
)
def test_a_file_that_breaks_the_schema_is_refused(place: str, value: Any, tmp_path: Path) -> None:
    """With the place."""
    data = _found(mlp(64, 512, 1024))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**data, place: value}), encoding="utf-8")
    with pytest.raises(InputError, match=place):
        OperatorPlan.load(file)
