"""Prices of operators: the kernel formulas at the sizes that are left on a rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.search.oplevel.graphs import DECODE_70B, LLAMA_70B, MIXTRAL, Builder, decoder

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.kernels.attention import attention_decode, attention_prefill
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.collectives import collective
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.moe import grouped_matmul, moe_block
from shardplan.costmodel.kernels.pointwise import pointwise
from shardplan.costmodel.opcost import OperatorPrices
from shardplan.costmodel.placement import group_tiers
from shardplan.models.errors import InputError, UnknownNameError
from shardplan.models.opgraph import Operator, OpGraph, Tensor
from shardplan.models.parallel import Mesh

CLUSTER = load_cluster("atlas-800t-a2", nodes=2)
ENGINE = load_engine("torch-graph")
MACHINE = Machine.of(CLUSTER.device, ENGINE.name)
MESH = Mesh(("x", "y"), (2, 8), {})
GAP = ENGINE.launch_gap_s


def _prices(graph: OpGraph, dtype: str = "auto") -> OperatorPrices:
    return OperatorPrices.of(CLUSTER, MESH, ENGINE, graph.tensors, dtype)


def _op(graph: OpGraph, name: str) -> Operator:
    return next(one for one in graph.operators if one.name == name)


def test_a_product_is_priced_at_its_local_sizes() -> None:
    """up: 2048 x 8192 x 28672; n over y, t over x, k over both."""
    graph = decoder(LLAMA_70B)
    chosen = [{}, {"y": "n"}, {"x": "t", "y": "n"}, {"x": "k", "y": "k"}]
    found = _prices(graph).operator(_op(graph, "up"), chosen)
    m, n, k = [2048, 2048, 1024, 2048], [28672, 3584, 3584, 28672], [8192, 8192, 8192, 512]
    sizes = np.array([m, n, k])
    expected = matmul(MACHINE, sizes[0], sizes[1], sizes[2], "bf16", weights="cold")
    assert found.total_s == pytest.approx(expected.total_s + GAP)
    parts = found.compute_s + found.memory_s + found.overhead_s
    assert parts == pytest.approx(found.total_s)


def test_the_type_of_products_is_the_tensors_own_unless_told() -> None:
    graph = decoder(LLAMA_70B)
    found = _prices(graph, "w8a8").operator(_op(graph, "up"), [{}])
    assert found.total_s[0] == pytest.approx(
        float(matmul(MACHINE, 2048, 28672, 8192, "w8a8", weights="cold").total_s) + GAP
    )
    prices = _prices(graph, "w8a8")
    assert prices.width_bytes(graph.tensors["up.w"]) == 1.0
    assert prices.width_bytes(graph.tensors["up"]) == 2.0
    assert prices.width_bytes(graph.tensors["ids"]) == 8.0
    with pytest.raises(UnknownNameError, match="w9a9"):
        _prices(graph, "w9a9")
    wide = {**graph.tensors, "up.w": replace(graph.tensors["up.w"], dtype="float32")}
    with pytest.raises(InputError, match="give dtype"):
        _prices(replace(graph, tensors=wide)).operator(_op(graph, "up"), [{}])


def test_grouped_products_run_over_the_loops_that_both_operands_have() -> None:
    """8 experts of 512 rows; 1 expert a rank where y splits them."""
    graph = decoder(MIXTRAL)
    found = _prices(graph).operator(_op(graph, "up"), [{}, {"y": "e"}, {"x": "c", "y": "n"}])
    expected = grouped_matmul(
        MACHINE, np.array([4096.0, 512.0, 2048.0]), np.array([8.0, 1.0, 8.0]),
        np.array([14336, 14336, 1792]), 4096, "bf16",
        active=np.array([8.0, 1.0, 8.0]), ep=np.array([1.0, 8.0, 1.0]),
    )  # fmt: skip
    assert found.total_s == pytest.approx(expected.total_s + GAP)


def test_attention_takes_its_heads_and_context_from_its_attributes() -> None:
    prompt, step = decoder(LLAMA_70B), decoder(DECODE_70B)
    found = _prices(prompt).operator(_op(prompt, "attention"), [{}, {"y": "h"}])
    expected = attention_prefill(
        MACHINE, 1, 2048, 0, np.array([64, 8]), np.array([8, 1]), 128,
        kernel="flash", kv_dtype="bf16",
    )  # fmt: skip
    assert found.total_s == pytest.approx(expected.total_s + GAP)
    found = _prices(step).operator(_op(step, "attention"), [{"x": "b"}, {"x": "b", "y": "h"}])
    expected = attention_decode(
        MACHINE, 32, 4097, np.array([64, 8]), np.array([8, 1]), 128,
        kernel="flash", kv_dtype="bf16",
    )  # fmt: skip
    assert found.total_s == pytest.approx(expected.total_s + GAP)
    silent = replace(_op(prompt, "attention"), attrs={"heads": 64, "kv_heads": 8})
    with pytest.raises(InputError, match="head_dim"):
        _prices(prompt).operator(silent, [{}])


def test_rows_sorted_by_expert_are_shared_by_the_ranks_of_the_experts() -> None:
    b = Builder()
    x = b.tensor("x", (512, 4096), "input", "bfloat16")
    ends = b.tensor("ends", (8,), "input", "int32")
    reads = [(x, ("m", "k")), (b.param("w", 8, 4096, 1024), ("e", "k", "n")), (ends, ("",))]
    b.op("routed", "grouped_matmul", reads, (512, 1024), ("m", "n"))
    graph = b.graph("routed", ("routed",))
    found = _prices(graph).operator(graph.operators[0], [{}, {"y": "e"}, {"x": "k", "y": "n"}])
    expected = grouped_matmul(
        MACHINE, np.array([512, 64, 512]), np.array([8, 1, 8]), np.array([1024, 1024, 128]),
        np.array([4096, 4096, 2048]), "bf16", ep=np.array([1, 8, 1]),
    )  # fmt: skip
    assert found.total_s == pytest.approx(expected.total_s + GAP)


def test_a_block_of_experts_in_one_operator() -> None:
    """Tokens, gates and three weights, as a front end captures a fused block."""
    b = Builder()
    x = b.tensor("x", (1, 256, 4096), "input", "bfloat16")
    gates = b.tensor("gates", (1, 256, 8), "input", "bfloat16")
    weights = [b.param("g", 8, 14336, 4096), b.param("u", 8, 14336, 4096)]
    weights.append(b.param("d", 8, 4096, 14336))
    runs = (("e", "f", ""), ("e", "f", ""), ("e", "", "f"))
    reads = [(x, ("b", "t", "")), (gates, ("b", "t", "e")), *zip(weights, runs, strict=True)]
    b.op("moe", "moe", reads, (1, 256, 4096), ("b", "t", ""), attrs={"topk": 2})
    graph = b.graph("experts", ("moe",))
    found = _prices(graph).operator(graph.operators[0], [{}, {"y": "e"}, {"x": "t", "y": "f"}])
    expected = moe_block(
        MACHINE, np.array([256, 256, 128]), 4096, np.array([14336, 14336, 1792]), 8, 2,
        np.array([1, 8, 1]), "bf16",
    )  # fmt: skip
    assert found.total_s == pytest.approx(expected.total_s + GAP)
    short = replace(graph.operators[0], reads=graph.operators[0].reads[:4])
    with pytest.raises(InputError, match="experts read"):
        _prices(graph).operator(short, [{}])


def test_streams_move_their_bytes_and_views_take_no_time() -> None:
    graph = decoder(LLAMA_70B)
    prices = _prices(graph)
    elements = np.array([2048 * 8192, 128 * 8192])
    chosen = [{}, {"x": "t", "y": "t"}]
    found = prices.operator(_op(graph, "norm1"), chosen)
    moved = 4.0 * elements + 2.0 * 8192
    assert found.total_s == pytest.approx(
        pointwise(MACHINE, "rmsnorm", elements, moved).total_s + GAP
    )
    found = prices.operator(_op(graph, "embed"), chosen)
    ids = np.array([2048.0, 128.0]) * 8
    expected = pointwise(MACHINE, "embedding", elements, 4.0 * elements + ids)
    assert found.total_s == pytest.approx(expected.total_s + GAP)
    assert prices.operator(_op(graph, "q.heads"), chosen).total_s.tolist() == [0.0, 0.0]
    turned = replace(_op(graph, "q.heads"), writes=_op(graph, "attention").writes)
    assert prices.operator(turned, [{}]).total_s[0] == 0.0
    heads = replace(graph.tensors["attention"], shape=(1, 64, 2048, 128))
    write = replace(turned.writes[0], loops=("b", "h", "t", ""))
    moving = replace(turned, writes=(write,))
    with_turn = {**graph.tensors, "attention": heads}
    assert _prices(replace(graph, tensors=with_turn)).operator(moving, [{}]).total_s[0] > 0.0


def test_wide_elements_count_as_such() -> None:
    """The same norm in 32 bits computes twice the lanes and moves twice the bytes."""
    graph = decoder(LLAMA_70B)
    wide: dict[str, Tensor] = {
        name: replace(one, dtype="float32") for name, one in graph.tensors.items()
    }
    found = _prices(replace(graph, tensors=wide)).operator(_op(graph, "norm1"), [{}])
    elements = 2048 * 8192
    expected = pointwise(MACHINE, "rmsnorm", elements, 8.0 * elements + 4.0 * 8192, "fp32")
    assert found.total_s[0] == pytest.approx(float(expected.total_s) + GAP)


def test_moves_cross_the_tiers_of_their_axes() -> None:
    """y inside a server, x between two, both over all 16 ranks; a slice stays on its rank."""
    prices = _prices(decoder(LLAMA_70B))
    message = np.array([1e5, 1e7])
    for axes, (group, stride) in ((("y",), (8, 1)), (("x",), (2, 8)), (("x", "y"), (16, 1))):
        spans = group_tiers(CLUSTER, group=group, stride=stride)
        expected = collective(
            "all_reduce", spans, message, MACHINE.calibration, launch="graph", in_service=True
        )
        found = prices.move("all_reduce", axes, message)
        assert found == pytest.approx(expected.total_s + GAP)
    expected_s = pointwise(MACHINE, "slice", message / 2.0, message * 2.0).total_s
    assert prices.move("slice", ("x",), message) == pytest.approx(expected_s + GAP)
