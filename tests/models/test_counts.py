"""Parameter counts and cache sizes: worked by hand, and against published checkpoints."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.models.catalog import load_model, model_names
from shardplan.models.counts import active_parameter_count, kv_bytes_per_token, parameter_count
from shardplan.models.errors import InputError
from shardplan.models.spec import MlaSpec, ModelSpec, MoeSpec

TINY = ModelSpec(
    name="tiny",
    architecture="LlamaForCausalLM",
    hidden=8,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=3,
    ffn=10,
    vocab=16,
)


def test_a_tiny_dense_model_counted_by_hand() -> None:
    attention = 8 * 12 + 2 * (8 * 6) + 12 * 8  # q, k and v, o
    ffn = 3 * 8 * 10
    assert parameter_count(TINY) == 2 * 16 * 8 + 8 + 2 * (attention + ffn + 2 * 8)
    assert active_parameter_count(TINY) == parameter_count(TINY)


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"tied_embeddings": True}, -16 * 8),
        ({"qkv_bias": True}, 2 * (12 + 6 + 6)),
        ({"o_bias": True}, 2 * 8),
        ({"mlp_bias": True}, 2 * (10 + 10 + 8)),
        ({"qk_norm": "head"}, 2 * (3 + 3)),
        ({"qk_norm": "full"}, 2 * (12 + 6)),
        ({"sandwich_norms": True}, 2 * 2 * 8),
        ({"mtp_layers": 3}, 0),
        ({"sliding_window": 4, "sliding_layers": 1}, 0),
    ],
)
def test_each_switch_adds_its_own_weights(change: dict[str, object], more: int) -> None:
    changed = dataclasses.replace(TINY, **change)  # type: ignore[arg-type]  # a row of the table
    assert parameter_count(changed) - parameter_count(TINY) == more


def test_a_tiny_mixture_of_experts_counted_by_hand() -> None:
    moe = MoeSpec(
        experts=6,
        experts_per_token=2,
        ffn=5,
        shared_ffn=7,
        shared_gate=True,
        dense_layers=1,
        router_bias=True,
    )
    spec = dataclasses.replace(TINY, moe=moe)
    attention_and_norms = 8 * 12 + 2 * (8 * 6) + 12 * 8 + 2 * 8
    dense_layer = attention_and_norms + 3 * 8 * 10
    router, shared, expert = 8 * 6 + 6, 3 * 8 * 7 + 8, 3 * 8 * 5
    outside = 2 * 16 * 8 + 8
    assert parameter_count(spec) == (
        outside + dense_layer + attention_and_norms + router + shared + 6 * expert
    )
    assert parameter_count(spec) - active_parameter_count(spec) == (6 - 2) * expert


@pytest.mark.parametrize(("q_lora_rank", "query"), [(None, 8 * 4 * 5), (6, 8 * 6 + 6 + 6 * 4 * 5)])
def test_tiny_latent_attention_counted_by_hand(q_lora_rank: int | None, query: int) -> None:
    mla = MlaSpec(
        q_lora_rank=q_lora_rank,
        kv_lora_rank=7,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=4,
    )
    spec = dataclasses.replace(TINY, layers=1, mla=mla, kv_heads=4, head_dim=5)
    latent = 8 * (7 + 2) + 7 + 7 * 4 * (3 + 4)
    assert parameter_count(spec) == (
        2 * 16 * 8 + 8 + query + latent + 4 * 4 * 8 + 3 * 8 * 10 + 2 * 8
    )
    assert kv_bytes_per_token(spec) == (7 + 2) * 2


# Elements of the published checkpoints (safetensors headers, GGUF headers), quantization scales,
# rotary tables and multi-token-prediction layers left out.
PUBLISHED = {
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "deepseek-r1": 671_026_419_200,
    "kimi-k2": 1_026_408_232_448,
    "glm-4.5": 352_797_829_024,
    "minimax-m2.5": 228_689_764_864,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_presets_have_exactly_the_published_number_of_parameters(name: str) -> None:
    assert parameter_count(load_model(name)) == PUBLISHED[name]


def test_every_preset_is_checked_against_a_published_count() -> None:
    assert set(model_names()) - set(PUBLISHED) == {"pangu-pro-moe"}  # only a rounded one exists


def test_pangu_pro_moe_has_the_rounded_published_size() -> None:
    spec = load_model("pangu-pro-moe")
    assert parameter_count(spec) == pytest.approx(72e9, rel=5e-3)
    assert round(active_parameter_count(spec) / 1e9, 1) == 16.5


def test_glm_checkpoint_is_the_model_and_one_prediction_layer() -> None:
    spec = load_model("glm-4.5")
    one_more = dataclasses.replace(spec, layers=spec.layers + 1)
    layer = parameter_count(one_more) - parameter_count(spec)
    joint = 2 * 5120 * 5120 + 3 * 5120  # projection of two states, their norms, the head's norm
    tables = 2 * 151_552 * 5120  # the layer ships its own embedding and head
    assert parameter_count(spec) + layer + joint + tables == 358_337_791_296


@pytest.mark.parametrize(
    ("name", "tables", "billions"),
    [
        ("mixtral-8x7b", 2, 12.9),
        ("qwen3-235b-a22b", 2, 22),
        ("qwen3-30b-a3b", 2, 3.3),
        ("deepseek-v3", 1, 37),
        ("deepseek-r1", 1, 37),
        ("deepseek-v2-lite", 1, 2.4),
        ("kimi-k2", 1, 32),
        ("glm-4.5", 0, 32),
        ("minimax-m2.5", 0, 10),
    ],
)
def test_active_parameters_agree_with_the_published_figure(
    name: str, tables: int, billions: float
) -> None:
    """`tables`: how many of embedding and output head the publisher counts."""
    spec = load_model(name)
    counted = active_parameter_count(spec) - (2 - tables) * spec.vocab * spec.hidden
    assert counted == pytest.approx(billions * 1e9, rel=0.025)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llama-65b", 2 * 64 * 128 * 80 * 2),
        ("llama-3.1-70b", 2 * 8 * 128 * 80 * 2),
        ("qwen3-235b-a22b", 2 * 4 * 128 * 94 * 2),
        ("deepseek-v3", (512 + 64) * 61 * 2),
    ],
)
def test_cache_bytes_a_token(name: str, bytes_per_token: int) -> None:
    spec = load_model(name)
    assert kv_bytes_per_token(spec) == bytes_per_token
    assert kv_bytes_per_token(spec, dtype_bytes=1) == bytes_per_token // 2


def test_cache_bytes_need_a_positive_element_size() -> None:
    with pytest.raises(InputError, match=r"dtype_bytes must be at least 1 \(dtype_bytes=0\)"):
        kv_bytes_per_token(TINY, dtype_bytes=0)


@given(name=st.sampled_from(model_names()), extra=st.integers(1, 50))
def test_parameters_grow_linearly_with_layers(name: str, extra: int) -> None:
    spec = load_model(name)
    counts = [
        parameter_count(dataclasses.replace(spec, layers=spec.layers + n * extra)) for n in range(3)
    ]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


@given(name=st.sampled_from(model_names()))
def test_a_token_never_touches_more_than_the_model_holds(name: str) -> None:
    spec = load_model(name)
    active, total = active_parameter_count(spec), parameter_count(spec)
    assert active == total if spec.moe is None else 0 < active < total
