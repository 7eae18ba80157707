"""The ILP against the oracle that tries everything, on random small graphs."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.oplevel.brute import Oracle
from tests.search.oplevel.graphs import Builder, mlp

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.opcost import OperatorPrices
from shardplan.models.errors import InfeasibleError
from shardplan.models.opgraph import Loop, OpGraph
from shardplan.models.parallel import Mesh
from shardplan.search.oplevel.api import search_operators
from shardplan.search.oplevel.memory import capacity_bytes

CLUSTER = load_cluster("atlas-800t-a2")
WIDTHS = (8192, 28672, 8190)
ROWS = (8192, 16380, 2048)


@st.composite
def graphs(draw: st.DrawFn, most: int) -> OpGraph:
    """Chains, diamonds and residuals: each operator reads any tensors that are there."""
    b = Builder()
    rows, narrow, wide = (draw(st.sampled_from(sizes)) for sizes in (ROWS, WIDTHS, WIDTHS))
    here = [b.tensor("x", (rows, narrow), "input", "bfloat16")]
    shape = {"x": narrow}
    for number in range(draw(st.integers(2, most))):
        name, x = f"o{number}", draw(st.sampled_from(here[-3:]))
        kind = draw(st.sampled_from(["linear", "add", "linear", "norm", "linear", "mul", "fold"]))
        alike = [one for one in here if shape[one] == shape[x]]
        if kind == "linear":
            b.linear(name, x, draw(st.sampled_from((narrow, wide))))
        elif kind == "norm":
            b.norm(name, x)
        elif kind == "fold":
            run = ("b", "n")
            b.op(name, "reshape", [(x, run)], (rows, shape[x]), run, linear=(0,))
            loops = {**b.operators[-1].loops, "n": Loop(size=math.gcd(shape[x], 4))}
            b.operators[-1] = dataclasses.replace(b.operators[-1], loops=loops)
        else:
            other = draw(st.sampled_from(alike))
            b.like(name, "pointwise", [x, other], linear=(0, 1) if kind == "add" else ())
        here.append(name)
        shape[name] = b.tensors[name].shape[-1]
    read = {name for op in b.operators for name in op.inputs}
    return b.graph("random", tuple(name for name in here if name not in read))


def oracle(graph: OpGraph, mesh: dict[str, int]) -> Oracle:
    """The oracle of a graph on a mesh."""
    axes = Mesh(tuple(mesh), tuple(mesh.values()), {})
    engine = load_engine("torch-graph")
    return Oracle(graph, OperatorPrices.of(CLUSTER, axes, engine, graph.tensors))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(graphs(5), st.sampled_from([2, 3, 8]))
def test_the_optimum_is_that_of_trying_everything(graph: OpGraph, ranks: int) -> None:
    plan = search_operators(graph, CLUSTER, {"x": ranks})
    assert plan.total_s == pytest.approx(oracle(graph, {"x": ranks}).best(), rel=1e-9)
    assert plan.certificate.gap == 0.0


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(graphs(3), st.sampled_from([(2, 2), (2, 4), (3, 2)]))
def test_so_it_is_on_a_mesh_of_two_axes(graph: OpGraph, shape: tuple[int, int]) -> None:
    mesh = dict(zip("xy", shape, strict=True))
    plan = search_operators(graph, CLUSTER, mesh)
    assert plan.total_s == pytest.approx(oracle(graph, mesh).best(), rel=1e-9)
    assert plan.certificate.gap == 0.0


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(graphs(4), st.sampled_from([2, 4]), st.floats(0.0, 1.0))
def test_so_it_is_where_memory_binds(graph: OpGraph, ranks: int, share: float) -> None:
    """Limits from the least that any split needs up to what the fastest takes; then below it."""
    mesh, tried = {"x": ranks}, oracle(graph, {"x": ranks})
    free = search_operators(graph, CLUSTER, mesh)
    least = tried.least_bytes()
    most = free.stages[0].total_bytes
    assert least <= most
    limit = math.floor(least + share * (most - least)) + 1.0
    plan = search_operators(graph, CLUSTER, mesh, memory_bytes=limit)
    assert plan.total_s == pytest.approx(tried.best(limit), rel=1e-9)
    assert plan.stages[0].total_bytes <= limit
    assert plan.fits
    with pytest.raises(InfeasibleError, match=r"[GM]iB more than"):
        search_operators(graph, CLUSTER, mesh, memory_bytes=least * 0.9)


def test_what_does_not_fit_is_said_with_how_much_it_would_take() -> None:
    """64 rows of 8192 x 28672 weights: 2 x 448 MiB over 2 ranks, and activations."""
    graph = mlp(64, 8192, 28672)
    with pytest.raises(InfeasibleError) as caught:
        search_operators(graph, CLUSTER, {"x": 2}, memory_bytes=400 * 2.0**20)
    needed = oracle(graph, {"x": 2}).least_bytes()
    assert needed > 448 * 2.0**20
    assert f"needs is {needed / 2.0**30:.2f} GiB" in str(caught.value)


def test_a_limit_that_everything_keeps_changes_nothing() -> None:
    graph = mlp(64, 4096, 8192)
    free = search_operators(graph, CLUSTER, {"x": 8})
    axes = Mesh(("x",), (8,), {})
    assert free.stages[0].capacity_bytes == capacity_bytes(
        CLUSTER.device, load_engine("torch-graph"), axes
    )
    held = search_operators(graph, CLUSTER, {"x": 8}, memory_bytes=free.stages[0].total_bytes)
    assert held.total_s == free.total_s


def two_branches(rows: int, hidden: int, ffn: int) -> OpGraph:
    """Two networks beside each other on one input; their results are added."""
    b = Builder()
    x = b.tensor("x", (1, rows, hidden), "input", "bfloat16")
    ends = []
    for name in ("a", "b"):
        act = b.like(f"{name}.act", "pointwise", [b.linear(f"{name}.up", x, ffn)])
        ends.append(b.linear(f"{name}.down", act, hidden))
    return b.graph("branches", (b.add("sum", ends[0], ends[1]),))


@pytest.mark.parametrize("mesh", [{"x": 8}, {"x": 2, "y": 2}])
def test_sums_that_meet_are_taken_once(mesh: dict[str, int]) -> None:
    """Partial sums pass the addition unreduced: one all-reduce for both."""
    graph = two_branches(2048, 8192, 28672)
    plan = search_operators(graph, CLUSTER, mesh)
    (total,) = [row for row in plan.operators if row.name == "sum"]
    assert total.passes == tuple(mesh)
    crossing = [(row.tensor, row.kind) for row in plan.moves if row.kind != "slice"]
    assert crossing == [("sum", "all_reduce")]
    if len(mesh) == 1:
        assert plan.total_s == pytest.approx(oracle(graph, mesh).best(), rel=1e-9)
