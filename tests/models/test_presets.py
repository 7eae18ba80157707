"""The catalogue of presets: names, sources, what the `models` command lists."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from shardplan.models import catalog
from shardplan.models.catalog import load_model, model_names, model_summary, preset_sources
from shardplan.models.errors import InputError, UnknownNameError

PRESETS = Path(catalog.__file__).parent / "presets"


def test_the_promised_models_are_there() -> None:
    promised = {
        "llama-65b", "llama-2-13b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b",
        "llama-3.1-405b", "qwen2.5-14b", "qwen2.5-32b", "qwen2.5-72b", "qwen3-8b", "qwen3-14b",
        "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b", "mixtral-8x7b", "deepseek-v2-lite",
        "deepseek-v3", "deepseek-r1", "kimi-k2", "glm-4.5", "minimax-m2.5", "pangu-pro-moe",
    }  # fmt: skip
    assert promised <= set(model_names())


@pytest.mark.parametrize("name", model_names())
def test_a_preset_says_where_it_comes_from(name: str) -> None:
    entry = preset_sources()[name]
    assert entry["kind"] == "datasheet"
    assert entry["source"].startswith("https://")
    assert entry["published"]
    assert load_model(name).source == entry["source"]


def test_no_source_without_a_preset() -> None:
    assert set(preset_sources()) == set(model_names())


@pytest.mark.parametrize("name", model_names())
def test_a_preset_is_the_same_model_by_name_and_by_file(name: str) -> None:
    by_name, by_file = load_model(name), load_model(PRESETS / f"{name}.json")
    assert by_name.name == by_file.name == name
    assert by_file.source.endswith(f"{name}.json")
    assert (
        by_name.architecture
        == json.loads((PRESETS / f"{name}.json").read_text())["architectures"][0]
    )
    for field in ("hidden", "layers", "heads", "kv_heads", "moe", "mla", "dtype", "max_context"):
        assert getattr(by_name, field) == getattr(by_file, field)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama-2-7b", "fp16"),
        ("qwen3-32b", "bf16"),
        ("deepseek-v3", "fp8"),
        ("deepseek-r1", "fp8"),
        ("kimi-k2", "fp8"),
        ("minimax-m2.5", "fp8"),
        ("glm-4.5", "bf16"),
    ],
)
def test_the_checkpoint_element_type(name: str, dtype: str) -> None:
    assert load_model(name).dtype == dtype


def test_deepseek_v3_in_full() -> None:
    spec = load_model("deepseek-v3")
    assert spec.mla is not None
    assert spec.moe is not None
    assert (spec.mla.q_lora_rank, spec.mla.kv_lora_rank, spec.head_dim) == (1536, 512, 192)
    assert (spec.moe.experts, spec.moe.experts_per_token, spec.moe.shared_ffn) == (256, 8, 2048)
    assert (spec.dense_layers, spec.moe_layers, spec.mtp_layers) == (3, 58, 1)
    assert (spec.moe.scoring, spec.moe.router_bias, spec.moe.normalise_topk) == (
        "sigmoid",
        True,
        True,
    )


def test_facts_that_no_key_states() -> None:
    assert load_model("qwen2.5-7b").qkv_bias
    assert not load_model("qwen2.5-7b").o_bias
    assert load_model("qwen3-8b").qk_norm == "head"
    assert load_model("minimax-m2.5").qk_norm == "full"
    assert load_model("qwen3-0.6b").tied_embeddings
    pangu = load_model("pangu-pro-moe")
    assert pangu.moe is not None
    assert pangu.moe.expert_groups == 8
    assert (pangu.qkv_bias, pangu.o_bias) == (True, True)


def test_a_repository_or_another_case_means_the_preset() -> None:
    assert load_model("meta-llama/Llama-3.1-8B") == load_model("llama-3.1-8b")
    assert load_model("Qwen3-32B") == load_model("qwen3-32b")


def test_an_unknown_name_gets_close_matches() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model("qwen3-32")
    assert "qwen3-32b" in caught.value.close
    assert caught.value.exit_code == 2


def test_an_unknown_path_lists_the_names() -> None:
    with pytest.raises(InputError, match=r"no such file or model name \(file=some/where\)"):
        load_model("some/where")


def test_the_listing_of_a_model() -> None:
    assert model_summary("mixtral-8x7b") == {
        "name": "mixtral-8x7b",
        "parameters": 46_702_792_704,
        "active_parameters": 12_879_925_248,
        "kv_bytes_per_token": 131_072,
        "source": "https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json",
        "architecture": "MixtralForCausalLM",
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "kv_heads": 8,
        "experts": 8,
        "dtype": "bf16",
    }
    assert model_summary("llama-2-7b")["experts"] == 0
    json.dumps([model_summary(name) for name in model_names()])


def test_a_model_loads_in_milliseconds() -> None:
    load_model("deepseek-v3")
    best = min(_seconds_to_load("deepseek-v3") for _ in range(5))
    assert best < 5e-3


def _seconds_to_load(name: str) -> float:
    start = time.perf_counter()
    load_model(name)
    return time.perf_counter() - start
