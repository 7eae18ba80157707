"""The folded graph: sizes, order, counts, and its unfolded twin."""

from __future__ import annotations

import networkx as nx
import pytest
from tests.models.strategies import SPECS, tiny, tiny_mla

from shardplan.models.build import build_graph
from shardplan.models.errors import InputError
from shardplan.models.graph import Phase, topological
from shardplan.models.spec import ModelSpec

ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
PHASES = pytest.mark.parametrize("phase", ["prefill", "decode"])


def test_parameters_by_hand() -> None:
    """q and o 8*24 each, k and v 8*12 each, three matrices 8*12, two norms of 8; two layers."""
    layer = 2 * 8 * 24 + 2 * 8 * 12 + 3 * 8 * 12 + 2 * 8
    want = 2 * layer + 16 * 8 + 8 + 8 * 16
    assert build_graph(tiny(), "prefill").parameters() == want


def test_tied_embeddings_are_counted_once() -> None:
    apart = build_graph(tiny(), "decode").parameters()
    tied = build_graph(tiny(tied_embeddings=True), "decode").parameters()
    assert apart - tied == 16 * 8


def test_cache_elements_by_hand() -> None:
    """Keys and values of 2 heads of 6 in two layers; a latent of 6 and a rotary part of 4."""
    assert build_graph(tiny(), "decode").kv_elements_per_token() == 2 * 2 * 2 * 6
    assert build_graph(tiny_mla(), "prefill").kv_elements_per_token() == 2 * (6 + 4)


@ALL
@PHASES
def test_the_unfolded_twin_holds_the_same_operators(spec: ModelSpec, phase: Phase) -> None:
    graph = build_graph(spec, phase)
    whole = graph.unfolded()
    ops = [data["op"] for _, data in whole.nodes(data=True)]
    assert len(ops) == sum(len(graph.blocks[name].order) for name, _ in graph.sequence())
    assert nx.is_directed_acyclic_graph(whole)
    assert nx.is_weakly_connected(whole)
    elements = sum(graph.size(op.weight) for op in ops if op.weight)
    tied = graph.size(("V", "H")) if spec.tied_embeddings else 0
    assert elements - tied == graph.parameters()


@ALL
@PHASES
def test_edges_say_which_input_they_are(spec: ModelSpec, phase: Phase) -> None:
    for block in build_graph(spec, phase).blocks.values():
        for op in block.ops():
            slots = {d["slot"]: s for s, _, d in block.graph.in_edges(op.name, data=True)}
            assert [slots[index] for index in range(len(slots))] == list(op.inputs)


@ALL
@PHASES
def test_operators_come_after_what_they_read(spec: ModelSpec, phase: Phase) -> None:
    for block in build_graph(spec, phase).blocks.values():
        place = {name: index for index, name in enumerate(block.order)}
        assert len(place) == len(block.graph)
        assert all(place[i] < place[op.name] for op in block.ops() for i in op.inputs)
        assert block.exit == block.order[-1]


@ALL
@PHASES
def test_dims_follow_from_inputs_and_weight(spec: ModelSpec, phase: Phase) -> None:
    """A matrix product keeps or contracts each dim that it reads, and makes none up."""
    for block in build_graph(spec, phase).blocks.values():
        for op in (op for op in block.ops() if op.kind == "matmul"):
            read = set(block.op(op.inputs[0]).dims) | set(op.weight)
            assert set(op.dims) | set(op.contract) == read
            assert not set(op.dims) & set(op.contract)
            assert set(op.contract) <= set(op.weight)


def test_order_of_insertion_decides_between_equals() -> None:
    assert topological({"c": (), "b": ("z",), "a": (), "z": ()}) == ("c", "a", "z", "b")


def test_a_free_dim_needs_a_size() -> None:
    graph = build_graph(tiny(), "prefill")
    assert graph.size(("B", "T", "H"), {"B": 2, "T": 3}) == 2 * 3 * 8
    with pytest.raises(InputError, match=r"a named dim has no size \(dim=T"):
        graph.size(("B", "T", "H"), {"B": 2})
