"""The weights of a plan by checkpoint name: all of them, and cut where the graph cuts them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe
from tests.search.small_models import dense

from shardplan.models.accounting import stage_weights
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError
from shardplan.models.parallel import Parallelism
from shardplan.search.emit.weights import applied, rank_grid, weights

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-3.1-70b", {"tp": 8}),
    ("llama-3.1-8b", {"tp": 16}),
    ("qwen2.5-72b", {"tp": 4, "dp": 2}),
    ("qwen3-0.6b", {"tp": 4}),
    ("mixtral-8x7b", {"tp": 4, "dp": 2, "ep": 8}),
    ("qwen3-30b-a3b", {"tp": 4, "ep": 2}),
    ("deepseek-v3", {"tp": 4, "dp": 8, "ep": 32}),
    ("deepseek-v2-lite", {"tp": 2}),
    ("glm-4.5", {"tp": 8}),
]


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_a_rank_holds_what_the_ledger_counts(name: str, sizes: dict[str, Any]) -> None:
    """All parameters of the model are named, and a rank's slices have the graph's elements."""
    graph = apply(build_graph(load_model(name), "prefill"), Parallelism(**sizes))
    found = list(weights(graph, "test"))
    assert sum(math.prod(one.shape) for one in found) == graph.model.parameters()
    assert len({one.name for one in found}) == len(found)
    held = 0
    for one in found:
        ways = [graph.mesh.size(cut) for cut in one.cut]
        assert all(size % way == 0 for size, way in zip(one.shape, ways, strict=True)), one.name
        held += math.prod(one.shape) // math.prod(ways)
    counted = sum(one.count * one.elements for one in stage_weights(graph, graph.stages[0]))
    assert held == counted


def test_query_heads_follow_their_kv_heads() -> None:
    """16 ranks on 8 kv heads: queries cut 16 ways, keys 8 ways and held twice."""
    graph = apply(build_graph(load_model("llama-3.1-8b"), "prefill"), Parallelism(tp=16))
    cut = {
        one.name.removeprefix("model.layers.0.self_attn."): one.cut for one in weights(graph, "")
    }
    assert cut["q_proj.weight"] == (("tp0", "tp1"), ())
    assert cut["k_proj.weight"] == (("tp0",), ())
    assert cut["o_proj.weight"] == ((), ("tp0", "tp1"))
    assert rank_grid(graph) == (("tp0", "tp1"), (8, 2))


def test_ranks_are_numbered_in_the_plans_order() -> None:
    """tp>dp: ranks of one dp group are dp apart."""
    par = Parallelism(tp=4, dp=2, order=("pp", "tp", "cp", "dp"))
    graph = apply(build_graph(load_model("llama-3.1-8b"), "prefill"), par)
    assert rank_grid(graph) == (("tp0", "dp0"), (4, 2))


def test_what_is_no_slice_is_refused() -> None:
    """6 kv heads over 4 ranks: a rank has half of the queries of three kv heads."""
    spec = dense(architecture="LlamaForCausalLM", heads=24, kv_heads=6)
    graph = apply(build_graph(spec, "prefill"), Parallelism(tp=4))
    with pytest.raises(InputError, match=r"q_proj.weight: tp1 cuts G inside pieces"):
        list(weights(graph, "test"))


def test_a_plan_for_another_model_is_refused() -> None:
    """The digest binds a plan to its model's sizes."""
    plan = emit_plan()
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"digest": "0" * 64})})
    with pytest.raises(InputError, match="model of other sizes"):
        applied(other, "test")


def test_unknown_names_are_refused() -> None:
    """An architecture whose checkpoint is not described."""
    fields = moe(name="minimax-m2.5", architecture="MiniMaxM2ForCausalLM")
    graph = applied(emit_plan(model=fields), "test")
    with pytest.raises(InputError, match=r"names of this architecture.*LlamaForCausalLM"):
        list(weights(graph, "test"))
