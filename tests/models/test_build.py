"""From a specification to the graph: counts of real models, and what each switch adds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.models.strategies import tiny, tiny_mla, tiny_moe

from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model, model_names
from shardplan.models.counts import kv_bytes_per_token, parameter_count
from shardplan.models.graph import Op, Phase
from shardplan.models.spec import ModelSpec


def ops_of(spec: ModelSpec, phase: Phase, block: str) -> dict[str, Op]:
    """Operators of one template by name."""
    return {op.name: op for op in build_graph(spec, phase).blocks[block].ops()}


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_preset_has_the_parameters_and_the_cache_that_its_formula_gives(
    name: str, phase: Phase
) -> None:
    spec = load_model(name)
    graph = build_graph(spec, phase)
    assert graph.parameters() == parameter_count(spec)
    assert graph.kv_elements_per_token() * 2 == kv_bytes_per_token(spec)


@pytest.mark.parametrize(
    ("spec", "plain", "more"),
    [
        (tiny(qkv_bias=True), tiny(), 24 + 12 + 12),
        (tiny(o_bias=True), tiny(), 8),
        (tiny(mlp_bias=True), tiny(), 12 + 12 + 8),
        (tiny(qk_norm="head"), tiny(), 6 + 6),
        (tiny(qk_norm="full"), tiny(), 24 + 12),
        (tiny(sandwich_norms=True), tiny(), 8 + 8),
        (tiny_moe(), tiny(), 8 * 4 + 4 * 3 * 8 * 4 - 3 * 8 * 12),
        (tiny_moe(router_bias=True), tiny_moe(), 4),
        (tiny_moe(shared_ffn=8), tiny_moe(), 3 * 8 * 8),
        (tiny_moe(shared_ffn=8, shared_gate=True), tiny_moe(shared_ffn=8), 8),
        (tiny_mla(), tiny_mla(None), 8 * 5 + 5 + (5 - 8) * 4 * (3 + 4)),
    ],
    ids=str,
)
def test_each_switch_adds_its_parameters(spec: ModelSpec, plain: ModelSpec, more: int) -> None:
    """`more` a layer, worked by hand; two layers."""
    counts = [build_graph(one, "prefill").parameters() for one in (spec, plain)]
    assert counts[0] - counts[1] == 2 * more


def test_repeated_layers_are_one_template() -> None:
    graph = build_graph(load_model("llama-2-70b"), "decode")
    assert set(graph.blocks) == {"embed", "dense", "head"}
    assert graph.layers == ("dense",) * 80


def test_dense_layers_come_before_those_with_experts() -> None:
    graph = build_graph(load_model("deepseek-v3"), "prefill")
    assert graph.layers == ("dense",) * 3 + ("moe",) * 58


def test_sliding_layers_are_spread_evenly() -> None:
    graph = build_graph(tiny(layers=6, sliding_window=2, sliding_layers=3), "prefill")
    assert graph.layers == ("dense", "sliding_dense") * 3
    assert graph.blocks["sliding_dense"].op("attention").attrs["window"] == 2
    assert graph.blocks["dense"].op("attention").attrs["window"] == 0


def test_projections_of_one_input_share_a_kernel() -> None:
    ops = ops_of(tiny(), "decode", "dense")
    for names in (("q", "k", "v"), ("gate", "up")):
        assert len({ops[name].fuse for name in names}) == 1
        assert len({ops[name].inputs for name in names}) == 1
    assert ops["q"].fuse != ops["gate"].fuse
    assert ops["o"].fuse == ops["down"].fuse == ""


def test_decode_of_latent_attention_absorbs_the_up_projections() -> None:
    """The same parameters in both phases; in decode no operator grows keys from the context."""
    prefill, decode = (ops_of(tiny_mla(), phase, "dense") for phase in ("prefill", "decode"))
    params = [
        {op.param: op.weight for op in ops.values() if op.weight} for ops in (prefill, decode)
    ]
    assert params[0] == params[1]
    assert prefill["k_up"].dims == ("B", "S", "K", "N")
    assert decode["q_absorb"].param == "k_up"
    assert not any("S" in op.dims for op in decode.values() if op.weight)


def test_what_may_be_quantized() -> None:
    spec = replace(tiny_mla(), moe=tiny_moe(router_bias=True, shared_ffn=8).moe)
    classes = {name: op.weight_class for name, op in ops_of(spec, "prefill", "moe").items()}
    linear = {"q_a", "q_nope", "q_pe", "kv_a", "k_pe", "o", "s_gate", "s_up", "s_down"}
    assert {name for name, kind in classes.items() if kind == "linear"} == linear
    assert {n for n, kind in classes.items() if kind == "expert"} == {"e_gate", "e_up", "e_down"}
    assert classes["k_up"] == classes["v_up"] == "absorbed"
    assert classes["router"] == classes["topk"] == classes["norm1"] == "small"
    assert ops_of(spec, "prefill", "head")["lm_head"].weight_class == "embedding"


def test_routed_tensors_carry_the_chosen_share() -> None:
    """Two of four experts: half of the elements."""
    ops = ops_of(tiny_moe(), "prefill", "moe")
    dense = {name for name, op in ops.items() if op.density == 1.0}
    assert {op.density for name, op in ops.items() if name not in dense} == {0.5}
    assert set(ops) - dense == {"dispatch", "e_gate", "e_up", "e_act", "e_down"}


def test_prefill_yields_logits_of_one_token_and_decode_of_each() -> None:
    assert ops_of(tiny(), "prefill", "head")["lm_head"].dims == ("B", "L", "V")
    assert ops_of(tiny(), "decode", "head")["lm_head"].dims == ("B", "T", "V")


def test_a_graph_is_built_once() -> None:
    assert build_graph(tiny(), "decode") is build_graph(tiny(), "decode")
