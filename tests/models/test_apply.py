"""What a strategy makes of a model: collectives, messages, weights and cache, by hand.

Messages are elements of the full tensor of the group, on one rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tests.models.strategies import tiny, tiny_moe

from shardplan.models.accounting import (
    predict_communication,
    stage_weights,
    state_elements_per_token,
    transfers,
)
from shardplan.models.apply import ShardedGraph, apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.errors import LayoutError
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec

B, T, H = 4, 128, 8192
LLAMA, DEEPSEEK = load_model("llama-2-70b"), load_model("deepseek-v3")
"""70b: H=8192, 80 layers, 64 heads, 8 kv heads of 128, V=32000, F=28672."""


def cut(spec: ModelSpec, phase: Phase = "prefill", **sizes: Any) -> ShardedGraph:
    """The model under a strategy given by its axis sizes."""
    return apply(build_graph(spec, phase), replace(Parallelism(), **sizes))


def moved(graph: ShardedGraph, batch: int = B, tokens: int = T) -> Counter[tuple[str, int]]:
    """(kind, elements) of a step -> how often."""
    steps = predict_communication(graph, batch, tokens, tokens)
    return Counter((one.kind, one.elements) for one in steps)


def held(graph: ShardedGraph, stage: int = 0) -> dict[str, int]:
    """Elements of each parameter that one rank of a stage holds."""
    return {one.name: one.elements * one.count for one in stage_weights(graph, graph.stages[stage])}


def test_tensor_parallelism_sums_twice_a_layer() -> None:
    """And once for the embedding; the logits of one token a sequence are gathered."""
    hidden = B * T * H
    assert moved(cut(LLAMA, tp=8)) == {
        ("all_reduce", hidden): 1 + 2 * 80,
        ("all_gather", B * 32000): 1,
    }


def test_decode_moves_one_token_a_sequence() -> None:
    assert moved(cut(LLAMA, "decode", tp=8), batch=32, tokens=1) == {
        ("all_reduce", 32 * H): 1 + 2 * 80,
        ("all_gather", 32 * 32000): 1,
    }


def test_sequence_parallelism_halves_each_sum_in_two() -> None:
    """A reduce_scatter after each pair of products and an all_gather before the next."""
    hidden = B * T * H
    assert moved(cut(LLAMA, tp=8, sp=True)) == {
        ("reduce_scatter", hidden): 1 + 2 * 80,
        ("all_gather", hidden): 2 * 80 + 1,
        ("all_gather", B * 32000): 1,
    }


def test_a_pipeline_sends_between_stages_and_nothing_else() -> None:
    assert moved(cut(LLAMA, pp=4)) == {("send", B * T * H): 3}


def test_a_send_carries_what_one_rank_holds() -> None:
    """Half of the batch for two groups; with tokens split over tp, an eighth of them."""
    sent = moved(cut(LLAMA, tp=8, dp=2, pp=4, sp=True))
    assert {key: n for key, n in sent.items() if key[0] == "send"} == {
        ("send", B // 2 * T // 8 * H): 3
    }


def test_replicas_of_a_dense_model_do_not_talk() -> None:
    assert moved(cut(LLAMA, dp=4)) == {}


def test_data_parallel_groups_sum_among_themselves() -> None:
    graph = cut(LLAMA, tp=4, dp=2)
    assert moved(graph)["all_reduce", B // 2 * T * H] == 161
    moves = [one for block in graph.blocks.values() for one in transfers(graph, block)]
    assert {one.lies[-1][1] for one in moves if one.kind != "send"} == {1}


def test_experts_over_ranks_exchange_twice_a_layer() -> None:
    """Each of 58 layers sends every token to 8 of 256 experts and back, and nothing else."""
    graph = cut(DEEPSEEK, dp=8, ep=8, exchange="alltoall")
    assert moved(graph, batch=8) == {("all_to_all", 8 * 8 * T * 7168): 2 * 58}


def test_experts_fed_by_gathering_tokens() -> None:
    """Tokens are gathered over the groups with their gates, the experts' sums scattered back."""
    assert moved(cut(DEEPSEEK, dp=8, ep=8), batch=8) == {
        ("all_gather", 8 * T * 7168): 58,
        ("all_to_all", 8 * T * 256): 58,
        ("reduce_scatter", 8 * T * 7168): 58,
    }


def test_experts_within_tp_are_summed_with_the_rest() -> None:
    """Tokens are on every rank already: no exchange, one sum for experts and shared together."""
    spec = load_model("deepseek-v2-lite")
    found = moved(cut(spec, tp=8, ep=8))
    assert found == {
        ("all_reduce", B * T * spec.hidden): 1 + 2 * spec.layers,
        ("all_gather", B * spec.vocab): 1,
    }


def test_tp_beyond_the_kv_heads_replicates_keys_and_values() -> None:
    """16 ranks on 8 kv heads: queries halve again, keys, values and cache do not."""
    eight, sixteen = cut(LLAMA, "decode", tp=8), cut(LLAMA, "decode", tp=16)
    before, after = held(eight), held(sixteen)
    assert before["q"] == 2 * after["q"] == 80 * 8192 * 64 * 128 // 8
    assert before["k"] == after["k"] == before["v"] == after["v"] == 80 * 8192 * 128
    per_token = [state_elements_per_token(g, g.stages[0]) for g in (eight, sixteen)]
    assert per_token == [80 * 2 * 128] * 2


def test_cache_is_split_over_kv_heads_and_stages() -> None:
    graph = cut(LLAMA, "decode", tp=4, pp=2)
    per_token = [state_elements_per_token(graph, stage) for stage in graph.stages]
    assert per_token == [40 * 2 * (8 // 4) * 128] * 2


@pytest.mark.parametrize("tp", [1, 8, 32])
def test_the_latent_is_replicated(tp: int) -> None:
    """61 layers of 512 + 64 elements on every rank, and the projections that make them whole."""
    graph = cut(DEEPSEEK, "decode", tp=tp)
    assert state_elements_per_token(graph, graph.stages[0]) == 61 * (512 + 64)
    found = Counter[str]()
    for one in stage_weights(graph, graph.stages[0]):
        found[one.name] += one.elements * one.count
    assert found["kv_a"] == 61 * 7168 * 512
    assert found["k_up"] == 61 * 512 * 128 * 128 // tp


def test_the_vocabulary_is_split() -> None:
    found = held(cut(LLAMA, tp=8))
    assert found["embedding"] == found["lm_head"] == 32000 * 8192 // 8


def test_weights_of_a_rank_fall_with_tp_and_norms_stay() -> None:
    """70b on 8: all but the norms by eight."""
    whole, eighth = (sum(held(cut(LLAMA, tp=tp)).values()) for tp in (1, 8))
    norms = (2 * 80 + 1) * 8192
    assert whole == build_graph(LLAMA, "prefill").parameters()
    assert (whole - norms) == 8 * (eighth - norms)


def test_stages_hold_the_model_once() -> None:
    graph = cut(LLAMA, pp=4)
    found = [held(graph, stage) for stage in range(4)]
    assert sum(sum(one.values()) for one in found) == build_graph(LLAMA, "prefill").parameters()
    assert ["embedding" in one for one in found] == [True, False, False, False]
    assert ["lm_head" in one for one in found] == [False, False, False, True]


def test_a_tied_table_is_held_once_a_stage_that_uses_it() -> None:
    spec = tiny(tied_embeddings=True)
    assert held(cut(spec))["embedding"] == 16 * 8
    apart = cut(spec, pp=2)
    assert held(apart, 0)["embedding"] == held(apart, 1)["embedding"] == 16 * 8
    alone = cut(spec)
    names = [one.name for one in stage_weights(alone, alone.stages[0])]
    assert names.count("embedding") == 1


def test_experts_of_a_rank() -> None:
    """256 experts on 64 ranks: 4 each, whole; split by tp only: all 256, an eighth each."""
    expert = 7168 * 2048
    assert held(cut(DEEPSEEK, tp=8, dp=8, ep=64))["e_up"] == 58 * 4 * expert
    assert held(cut(DEEPSEEK, tp=8))["e_up"] == 58 * 256 * expert // 8
    assert held(cut(DEEPSEEK, tp=8, ep=2))["e_up"] == 58 * 128 * expert // 4


def test_stages_count_their_templates() -> None:
    graph = cut(DEEPSEEK, pp=4)
    assert [dict(stage.counts) for stage in graph.stages] == [
        {"dense": 3, "moe": 12, "embed": 1, "send": 1},
        {"moe": 16, "recv": 1, "send": 1},
        {"moe": 15, "recv": 1, "send": 1},
        {"moe": 15, "recv": 1, "head": 1},
    ]
    assert [name for name, _ in graph.sequence(graph.stages[3])][::15] == ["recv", "moe"]


def test_a_tensor_is_gathered_once_for_all_that_read_it() -> None:
    """q, k and v read one gathered tensor."""
    block = cut(tiny(), tp=2, sp=True).blocks["dense"]
    assert len({block.op(name).inputs for name in ("q", "k", "v")}) == 1


def test_stages_share_their_templates() -> None:
    """A pipeline of another shape shards nothing anew."""
    one, two = cut(LLAMA, tp=8), cut(LLAMA, tp=8, pp=4)
    assert one.blocks["dense"] is two.blocks["dense"]


def test_experts_on_a_part_of_tp_with_tokens_split_over_all_of_it() -> None:
    """The gates leave the major part of their tokens' split: gathered whole, then sliced."""
    block = cut(tiny_moe(), tp=4, ep=2, sp=True).blocks["moe"]
    kinds = [op.kind for op in block.ops() if op.name.startswith("topk>")]
    assert kinds == ["all_gather", "slice"]


def test_a_size_that_does_not_divide_is_refused_before_anything_is_cut() -> None:
    with pytest.raises(LayoutError, match=r"tp=3, heads=64\); try 1, 2, 4, 8"):
        cut(LLAMA, tp=3)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_layers_over_ranks_that_share_a_context_may_be_cut_again(phase: Phase) -> None:
    """An applied graph's model takes the same contexts with another cut: its parts stay parts."""
    even = cut(LLAMA, phase, cp=2, pp=2)
    other = apply(even.model, replace(even.parallel, stage_layers=(41, 39)))
    assert [stage.last - stage.first for stage in other.stages] == [41, 39]
    assert other.blocks == even.blocks
