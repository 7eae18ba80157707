"""What the operator-level search finds on real sizes, and what a user may say of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.search.oplevel.graphs import (
    DECODE_70B,
    LLAMA_70B,
    MIXTRAL,
    Sizes,
    both,
    data_parallel,
    decoder,
    megatron,
    mlp,
)

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.opcost import OperatorPrices
from shardplan.models.errors import InfeasibleError, InputError, LayoutError, UnknownNameError
from shardplan.models.parallel import Mesh
from shardplan.search.oplevel.api import MeshShape, price_operators, search_operators
from shardplan.search.oplevel.plan import OperatorPlan, operator_plan_schema

CLUSTER = "atlas-800t-a2"
SMALL = Sizes(tokens=64, hidden=512, heads=8, kv_heads=4, dim=64, ffn=1024, vocab=2048, layers=4)


def test_an_mlp_is_split_by_columns_then_by_rows() -> None:
    """Worked by hand: 64 rows of wide weights; one all-reduce, nothing else crosses ranks."""
    graph = mlp(64, 8192, 28672)
    plan = search_operators(graph, CLUSTER, (8,))
    assert plan.strategy["up"] == {"x": "n"}
    assert plan.strategy["act"] == {"x": "n"}
    assert plan.strategy["down"] == {"x": "k"}
    (move,) = [one for one in plan.moves if one.kind != "slice"]
    assert (move.tensor, move.kind, move.before) == ("down", "all_reduce", {"x": "+"})
    assert move.message_bytes == 64 * 8192 * 2
    weights = {one.tensor: (one.layouts, one.bytes) for one in plan.held}
    assert weights["up.w"] == (({"x": 0},), 8192 * 28672 * 2 / 8)
    assert weights["down.w"] == (({"x": 1},), 8192 * 28672 * 2 / 8)


@pytest.mark.parametrize(
    ("sizes", "experts"),
    [(LLAMA_70B, False), (DECODE_70B, False), (MIXTRAL, True), (MIXTRAL, False)],
)
def test_what_is_found_is_no_slower_than_megatron(sizes: Sizes, experts: bool) -> None:
    """Column and row parallel products, experts by E or by width, priced by the same code."""
    graph = decoder(sizes)
    plan = search_operators(graph, CLUSTER, (8,))
    known = price_operators(graph, CLUSTER, (8,), megatron(graph, "x", experts=experts))
    assert plan.total_s <= known.total_s
    assert plan.certificate.gap == 0.0
    assert plan.certificate.bound_s == pytest.approx(plan.total_s)
    assert known.certificate.space_size <= plan.certificate.space_size


def test_megatron_has_the_collectives_that_it_is_known_for() -> None:
    """Two all-reduces a layer, one for the embedding table, one gather of the logits."""
    graph = decoder(DECODE_70B)
    known = price_operators(graph, CLUSTER, {"tp": 8}, megatron(graph, "tp"))
    calls = {row.kind: row.calls for row in known.costs}
    assert calls["all_reduce"] == 2 * 80 + 1
    assert calls["all_gather"] == 1
    assert "reduce_scatter" not in calls
    assert "all_to_all" not in calls
    split = sum(row.times * row.bytes for row in known.held if row.kind == "parameter")
    norms = 161 * 8192 * 2
    assert split == pytest.approx((graph.parameters * 2 - norms) / 8 + norms)
    assert sum(row.total_s for row in known.costs) == pytest.approx(known.total_s)


def test_a_folded_graph_and_its_twin_have_the_same_answer() -> None:
    folded, twin = decoder(SMALL), decoder(SMALL, folded=False)
    one, other = (search_operators(graph, CLUSTER, (2, 4)) for graph in (folded, twin))
    assert one.total_s == pytest.approx(other.total_s, rel=1e-12)
    assert one.stages[0].total_bytes == other.stages[0].total_bytes
    assert one.certificate.space_size == other.certificate.space_size
    assert [row.times for row in one.operators] == [row.times for row in other.operators]
    split = [row.split for row in one.operators]
    assert split == [row.split for row in other.operators]


def test_more_ranks_and_more_axes_are_never_slower() -> None:
    graph = decoder(LLAMA_70B)
    times = [search_operators(graph, CLUSTER, shape).total_s for shape in [(8,), (2, 4), (4, 2)]]
    assert times[1] <= times[0] * (1 + 1e-9)
    assert times[2] <= times[0] * (1 + 1e-9)
    best = search_operators(graph, CLUSTER, "auto")
    assert best.total_s == pytest.approx(min(times))
    assert best.certificate.meshes == 3


def test_experts_may_lie_where_memory_wants_them() -> None:
    """A limit under the weights of all experts makes every split hold a part of them."""
    graph = decoder(MIXTRAL)
    plan = search_operators(graph, CLUSTER, (8,), memory_bytes=16 * 2.0**30)
    assert plan.fits
    assert plan.stages[0].parameters_bytes < 16 * 2.0**30 < graph.parameters * 2
    with pytest.raises(InfeasibleError, match="GiB more than"):
        search_operators(graph, CLUSTER, (8,), memory_bytes=8 * 2.0**30)


def test_a_strategy_that_does_not_fit_is_priced_and_said_not_to() -> None:
    plan = price_operators(decoder(LLAMA_70B), CLUSTER, (8,), {})
    assert not plan.fits
    assert plan.stages[0].total_bytes > plan.stages[0].capacity_bytes
    assert all(not row.split for row in plan.operators)
    assert plan.moves == ()


def test_layouts_are_pinned_and_axes_forbidden() -> None:
    graph = mlp(64, 8192, 28672)
    mesh = {"x": 8}
    pins = {"x": {"x": 1}, "out": {"x": 1}, "up.w": {}}
    plan = search_operators(graph, CLUSTER, mesh, pins=pins)
    held = {row.tensor: row.layouts for row in plan.held}
    assert held["up.w"] == ({},)
    first = [row for row in plan.moves if row.tensor == "x"]
    assert all(row.before == {"x": 1} or row.kind != "slice" for row in first)
    ends = [row.after for row in plan.moves if row.tensor == "out"]
    made = next(row for row in plan.operators if row.name == "out")
    assert ends[-1:] == [{"x": 1}] or made.split == {"x": "t"}
    assert plan.total_s > search_operators(graph, CLUSTER, mesh).total_s
    bare = search_operators(graph, CLUSTER, mesh, forbid={"matmul": ["x"]})
    assert not [row for row in bare.operators if row.kind == "matmul" and row.split]


def test_pipeline_stages_share_the_layers_within_the_memory() -> None:
    """70B on four stages of two: the weights of 80 layers in a quarter each."""
    graph = decoder(LLAMA_70B)
    plan = search_operators(graph, CLUSTER, (2,), stages=4)
    assert sum(row.layers for row in plan.stages) == 80
    assert plan.fits
    assert plan.certificate.gap == 0.0
    sends = [row for row in plan.costs if row.kind == "send"]
    assert [row.calls for row in sends] == [3]
    assert sum(row.seconds for row in plan.stages) == pytest.approx(plan.total_s)
    assert plan.slowest_stage_s == max(row.seconds for row in plan.stages)
    parameters = sum(row.parameters_bytes for row in plan.stages)
    held = sum(row.times * row.bytes for row in plan.held if row.kind == "parameter")
    assert parameters == pytest.approx(held)


def test_a_stage_that_memory_keeps_small_gets_fewer_layers() -> None:
    """The embedding table and the head weigh on the first and the last stage."""
    graph = decoder(LLAMA_70B)
    wide = search_operators(graph, CLUSTER, (2,), stages=4)
    most = max(row.total_bytes for row in wide.stages)
    tight = search_operators(graph, CLUSTER, (2,), stages=4, memory_bytes=most * 0.97)
    assert tight.fits
    assert tight.total_s >= wide.total_s
    assert max(row.total_bytes for row in tight.stages) <= most * 0.97
    with pytest.raises(InfeasibleError, match="GiB more than"):
        search_operators(graph, CLUSTER, (2,), stages=4, memory_bytes=10 * 2.0**30)


def test_the_same_question_has_the_same_bytes_and_reads_back(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    one, other = (search_operators(decoder(SMALL), CLUSTER, (8,)) for _ in range(2))
    assert one.dumps() == other.dumps()
    one.save(tmp_path / "plan.json")
    again = OperatorPlan.load(tmp_path / "plan.json")
    assert again.dumps() == one.dumps()
    assert again.strategy == one.strategy
    jsonschema.validate(json.loads(one.dumps()), operator_plan_schema())


@pytest.mark.parametrize("text", ["", "{}", "[", '{"schema_version": 2}', "[" * 100000])
def test_a_file_that_is_no_plan_is_one_clear_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="plan"):
        OperatorPlan.load(file)
    with pytest.raises(InputError, match="cannot be read"):
        OperatorPlan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((), "one or two axes"),
        ((2, 2, 2), "one or two axes"),
        ((0,), "one or two axes"),
        ({"x": True}, "one or two axes"),
        ((16,), "fit in the cluster"),
        ("best", "`auto`"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(shape: MeshShape, match: str) -> None:
    with pytest.raises(InputError, match=match):
        search_operators(mlp(8, 64, 64), CLUSTER, shape)


def test_constraints_that_name_nothing_are_refused() -> None:
    graph = mlp(8, 64, 64)
    with pytest.raises(UnknownNameError, match=r"up\.w"):
        search_operators(graph, CLUSTER, (8,), pins={"up.v": {}})
    with pytest.raises(InputError, match="can be pinned"):
        search_operators(graph, CLUSTER, (8,), pins={"act": {}})
    with pytest.raises(InputError, match="axes of the mesh"):
        search_operators(graph, CLUSTER, (8,), pins={"x": {"z": 1}})
    with pytest.raises(LayoutError, match="divide"):
        search_operators(graph, CLUSTER, (8,), pins={"x": {"x": 0}})
    with pytest.raises(LayoutError, match="names dims"):
        search_operators(graph, CLUSTER, (8,), pins={"x": {"x": 7}})
    with pytest.raises(UnknownNameError, match="kind of operator"):
        search_operators(graph, CLUSTER, (8,), forbid={"conv": ["x"]})
    with pytest.raises(InputError, match="leave every operator"):
        search_operators(graph, CLUSTER, (8,), pins={"up.w": {"x": 0}}, forbid={"matmul": ["x"]})
    with pytest.raises(InputError, match="mesh that is given"):
        search_operators(graph, CLUSTER, pins={"x": {"x": 1}})
    for stages in (0, 2):
        with pytest.raises(InputError, match="stage"):
            search_operators(graph, CLUSTER, (2,), stages=stages)


def test_a_strategy_that_names_nothing_is_refused() -> None:
    graph = mlp(8, 64, 64)
    with pytest.raises(UnknownNameError, match="upp"):
        price_operators(graph, CLUSTER, (8,), {"upp": {"x": "n"}})
    with pytest.raises(InputError, match="axes of the mesh"):
        price_operators(graph, CLUSTER, (8,), {"up": {"y": "n"}})
    with pytest.raises(LayoutError, match="loop=q"):
        price_operators(graph, CLUSTER, (8,), {"up": {"x": "q"}})
    with pytest.raises(InputError, match="mesh that is given"):
        price_operators(graph, CLUSTER, "auto", {})


def test_two_servers_split_sequences_between_them_where_that_is_given() -> None:
    """Data parallel over x, tensor parallel over y: a step's caches are split both ways."""
    graph = decoder(DECODE_70B)
    cluster = load_cluster(CLUSTER, nodes=2)
    mesh = {"x": 2, "y": 8}
    plan = search_operators(graph, cluster, mesh)
    known = price_operators(
        graph, cluster, mesh, both(data_parallel(graph, "x"), megatron(graph, "y"))
    )
    assert plan.total_s <= known.total_s
    caches = [row for row in plan.held if row.kind == "state"]
    assert [row.layouts for row in caches] == [({"x": 0, "y": 2},)] * 2
    prices = OperatorPrices.of(
        cluster, Mesh(("x", "y"), (2, 8), {}), load_engine("torch-graph"), graph.tensors
    )
    for row in plan.moves:
        seconds = prices.move(row.kind, row.axes, np.array([row.message_bytes]))[0]
        assert row.seconds == pytest.approx(float(seconds))
