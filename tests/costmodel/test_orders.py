"""Orders of the axes on the tiers of a cluster: brute force over rank ids is the oracle."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.strategies import tiny, tiny_moe

from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.collectives import collective
from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.optable import spans_of
from shardplan.costmodel.orders import distinct_orders, placement_signature
from shardplan.costmodel.placement import TierSpan, neighbour_tiers, tiers_crossed
from shardplan.costmodel.step import StepModel
from shardplan.models.accounting import transfers
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError, LayoutError
from shardplan.models.parallel import AXES, Axis, Parallelism, make_mesh
from shardplan.models.ranks import Extents

ORDERS = tuple(permutations(AXES))
CLUSTERS = ("atlas-800t-a2", "atlas-800i-a3", "atlas-800-9000", "cloudmatrix-384")
WIDE = tiny_moe(experts=16)


def counted(cluster: Cluster, ids: list[int]) -> list[tuple[str, int]]:
    """Tiers and members by putting every rank in its instances; groups that fill them evenly."""
    held, found = 1, []
    for tier in cluster.tiers:
        shares = set(Counter(one // tier.ranks for one in ids).values())
        if len(shares) == 1 and not (share := shares.pop()) % held:
            if share > held:
                found.append((tier.name, share // held))
            held = share
    return found


def named(spans: tuple[TierSpan, ...]) -> list[tuple[str, int]]:
    return [(span.tier.name, span.members) for span in spans]


def ids_of(lies: Extents) -> list[int]:
    return [sum(one) for one in product(*(range(0, n * s, s) for n, s in lies))]


@given(
    name=st.sampled_from(CLUSTERS),
    sizes=st.tuples(*(st.sampled_from([1, 2, 3, 4, 8]) for _ in range(3))),
    ep=st.sampled_from([1, 2, 4, 8, 16]),
    order=st.sampled_from(ORDERS),
)
def test_every_group_of_an_applied_graph_crosses_the_tiers_that_its_ranks_lie_in(
    name: str, sizes: tuple[int, int, int], ep: int, order: tuple[Axis, ...]
) -> None:
    par = Parallelism(tp=sizes[0], pp=sizes[1], dp=sizes[2], ep=ep, order=order)
    cluster = load_cluster(name, nodes=24)
    try:
        graph = apply(build_graph(replace(WIDE, layers=8), "decode"), par)
    except LayoutError:
        return
    strides = dict(zip(order, (0, 0, 0, 0), strict=True))
    step = 1
    for axis in reversed(order):
        strides[axis], step = step, step * getattr(par, axis)
    for block in graph.blocks.values():
        for one in transfers(graph, block):
            found = named(spans_of(cluster, one))
            if one.kind == "send":
                pairs = [[s * strides["pp"], (s + 1) * strides["pp"]] for s in range(par.pp - 1)]
                meet = Counter(counted(cluster, pair)[0][0] for pair in pairs)
                shares = {one.tier.name: one.share for one in spans_of(cluster, one)}
                assert shares == {tier: count / len(pairs) for tier, count in meet.items()}
            else:
                assert found == counted(cluster, ids_of(one.lies))


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize(
    "par",
    [
        Parallelism(tp=4, pp=2, dp=4),
        Parallelism(tp=2, pp=4, dp=4, ep=8),
        Parallelism(tp=4, pp=3, dp=2, ep=8),
        Parallelism(tp=8, dp=4, ep=16),
    ],
    ids=Parallelism.describe,
)
def test_orders_of_one_class_cross_the_same_tiers_and_every_class_is_priced(
    name: str, par: Parallelism
) -> None:
    spec = tiny_moe(experts=16) if par.ep > 1 else tiny(heads=8, kv_heads=8, ffn=48)
    spec = replace(spec, heads=8, kv_heads=8, layers=6)
    cluster = load_cluster(name, nodes=8)

    def spans(order: tuple[Axis, ...]) -> list[list[tuple[str, int]]]:
        graph = apply(build_graph(spec, "decode"), replace(par, order=order))
        used = {name for stage in graph.stages for name in stage.counts}
        return [
            named(spans_of(cluster, one))
            for name in sorted(used)
            for one in transfers(graph, graph.blocks[name])
        ]

    mesh = make_mesh(spec, par)
    first: dict[object, tuple[Axis, ...]] = {}
    for order in ORDERS:
        key = placement_signature(cluster, mesh, replace(par, order=order))
        assert spans(order) == spans(first.setdefault(key, order))
    chosen = distinct_orders(spec, cluster, par)
    assert chosen[0] == AXES
    assert {str(spans(order)) for order in ORDERS} == {str(spans(order)) for order in chosen}


def test_on_one_mesh_node_and_for_independent_replicas_one_order_is_enough() -> None:
    model = load_model("llama-2-13b")
    node, four = load_cluster("atlas-800t-a2"), load_cluster("atlas-800t-a2", nodes=4)
    assert distinct_orders(model, node, Parallelism(tp=2, pp=2, dp=2)) == (AXES,)
    assert distinct_orders(model, four, Parallelism(tp=8, pp=1, dp=4))[0] == AXES
    near = distinct_orders(model, four, Parallelism(tp=2, pp=4, dp=4))
    assert len(near) > 1


def test_deciding_which_orders_differ_takes_less_than_a_millisecond() -> None:
    model, cluster = load_model("deepseek-v3"), load_cluster("cloudmatrix-384", nodes=24)
    par = Parallelism(tp=4, pp=4, dp=24, ep=32)
    distinct_orders(model, cluster, par)
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        distinct_orders(model, cluster, par)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


def test_a_pipeline_inside_the_node_sends_over_its_mesh_and_memory_stays() -> None:
    """tp4 pp2 dp2 on two nodes: with stages innermost no hidden state leaves the node."""
    spec, engine = load_model("llama-2-13b"), load_engine("vllm-ascend")
    cluster = load_cluster("atlas-800t-a2", nodes=2)
    apart = Parallelism(tp=4, pp=2, dp=2)
    near = replace(apart, order=("dp", "pp", "cp", "tp"))

    def sends(par: Parallelism) -> list[tuple[str, int]]:
        graph = apply(build_graph(spec, "decode"), par)
        model = StepModel.of({"decode": graph}, cluster, engine)
        return named(model.rows["decode"]["send"][0].spans)

    def weights(par: Parallelism) -> list[float]:
        graph = apply(build_graph(spec, "prefill"), par)
        ledger = Ledger.of(graph, cluster.device, engine)
        return [ledger.weights_bytes(stage, "bf16") for stage in graph.stages]

    assert sends(apart) == [("roce", 2)]
    assert sends(near) == [("mesh", 2)]
    assert weights(apart) == weights(near)


def test_a_pipeline_hands_over_inside_nodes_and_between_them_in_turn() -> None:
    """Four stages of 4 ranks on two nodes of 8: one of three hand-overs leaves the node."""
    cluster = load_cluster("atlas-800t-a2", nodes=2)
    assert neighbour_tiers(cluster, ()) == ()
    with pytest.raises(InputError, match="fit in the cluster"):
        neighbour_tiers(cluster, ((8, 4),))
    near, far = neighbour_tiers(cluster, ((2, 4),)), neighbour_tiers(cluster, ((2, 8),))
    mixed = neighbour_tiers(cluster, ((4, 4),))
    assert (named(near), named(far)) == ([("mesh", 2)], [("roce", 2)])
    assert [(one.tier.name, one.share) for one in mixed] == [("mesh", 2 / 3), ("roce", 1 / 3)]
    times = [
        float(collective("send", spans, 1e7, load_calibration("910b2"), launch="graph").total_s)
        for spans in (near, far, mixed)
    ]
    assert times[2] == pytest.approx(2 / 3 * times[0] + 1 / 3 * times[1])


def test_a_group_of_two_pairs_is_counted_whole() -> None:
    """Four dp groups 8 apart, each with two neighbours: pairs in the node, four nodes."""
    cluster = load_cluster("atlas-800t-a2", nodes=4)
    assert named(tiers_crossed(cluster, ((4, 8), (2, 1)))) == [("mesh", 2), ("roce", 4)]
