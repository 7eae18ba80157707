"""The `config.json` front end: what it reads, what it refuses, and in which words."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.models import catalog
from shardplan.models.catalog import MAX_CONFIG_BYTES, load_model, model_names
from shardplan.models.config import spec_from_config, supported_architectures
from shardplan.models.counts import active_parameter_count, parameter_count
from shardplan.models.errors import InputError, UnknownNameError
from shardplan.models.spec import ModelSpec

PRESETS = Path(catalog.__file__).parent / "presets"


def preset(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def read(config: object) -> ModelSpec:
    return spec_from_config(config, name="m", source="config.json")  # type: ignore[arg-type]  # wrong types are the point


def changed(name: str = "llama-3.1-8b", **keys: Any) -> dict[str, Any]:
    """A preset's configuration with keys replaced; a value of `...` removes the key."""
    merged = preset(name) | keys
    return {key: value for key, value in merged.items() if value is not ...}


def refused(config: object) -> str:
    with pytest.raises(InputError) as caught:
        read(config)
    assert caught.value.exit_code == 2
    return str(caught.value)


# What is read


def test_absent_keys_take_the_defaults_of_the_architecture() -> None:
    assert read(changed(num_key_value_heads=...)).kv_heads == 32  # Llama: as many as query heads
    assert read(changed("mixtral-8x7b", num_key_value_heads=...)).kv_heads == 8
    assert read(changed("qwen3-8b", head_dim=...)).head_dim == 128
    assert read(changed(rope_theta=...)).rope_theta == 10000.0


def test_null_means_no_value_even_where_a_default_exists() -> None:
    base = changed(architectures=["MistralForCausalLM"], sliding_window=...)
    assert (read(base).sliding_window, read(base).sliding_layers) == (4096, 32)
    assert read(base | {"sliding_window": None}).sliding_window is None
    assert read(changed("deepseek-v3", q_lora_rank=None)).mla.q_lora_rank is None  # type: ignore[union-attr]  # DeepSeek always has it


def test_biases_follow_the_architecture() -> None:
    llama = read(changed(attention_bias=True, mlp_bias=True))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    glm = read(changed(architectures=["Glm4ForCausalLM"]))
    assert (glm.qkv_bias, glm.o_bias, glm.sandwich_norms) == (True, False, True)


def test_sliding_layers_of_qwen_start_after_max_window_layers() -> None:
    spec = read(
        changed("qwen2.5-7b", use_sliding_window=True, sliding_window=512, max_window_layers=20)
    )
    assert (spec.sliding_window, spec.sliding_layers) == (512, 8)
    assert read(changed("qwen2.5-7b", sliding_window=512)).sliding_layers == 0


def test_listed_layer_types_are_counted() -> None:
    kinds = ["full_attention", "sliding_attention"] * 14
    spec = read(
        changed("qwen2.5-7b", use_sliding_window=True, sliding_window=512, layer_types=kinds)
    )
    assert spec.sliding_layers == 14


def test_leading_dense_layers_of_a_mixture_of_experts() -> None:
    assert read(changed("qwen3-30b-a3b", mlp_only_layers=[1, 0])).dense_layers == 2
    assert "first layers" in refused(changed("qwen3-30b-a3b", mlp_only_layers=[0, 5]))


def test_a_multi_modal_configuration_gives_its_language_model() -> None:
    text = changed("qwen3-8b", torch_dtype=..., architectures=...)
    spec = read(
        {
            "architectures": ["SomeVisionForConditionalGeneration"],
            "text_config": text,
            "torch_dtype": "float16",
        }
    )
    assert (spec.architecture, spec.layers, spec.dtype) == ("Qwen3ForCausalLM", 36, "fp16")
    assert "Only the language model (text_config)" in spec.extra[0]
    assert "model_type qwen3" in spec.extra[1]


def test_the_rotary_base_of_new_configurations() -> None:
    new = changed(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert read(new).rope_theta == 5e5


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "torch.float16"}, "fp16"),
        ({"torch_dtype": ..., "dtype": "float32"}, "fp32"),
        ({"quantize": "w8a8_dynamic"}, "w8a8"),
        ({"quantize": "w8a16"}, "w8a16"),
        ({"quantize": "float"}, "bf16"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "w4a16"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 8}}, "w8a16"),
        ({"quantization_config": {}}, "bf16"),
        ({"quantization_config": None}, "bf16"),
    ],
)
def test_the_element_type_of_the_weights(keys: dict[str, Any], dtype: str) -> None:
    assert read(changed(**keys)).dtype == dtype


@pytest.mark.parametrize(
    ("weights", "activations", "dtype"),
    [
        ({"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "int"}, "w8a8"),
        ({"num_bits": 8, "type": "int"}, None, "w8a16"),
        ({"num_bits": 4, "type": "int"}, None, "w4a16"),
        ({"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "float"}, "fp8"),
    ],
)
def test_compressed_tensors_schemes(weights: object, activations: object, dtype: str) -> None:
    group = {"weights": weights, "input_activations": activations, "targets": ["Linear"]}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    assert read(changed(quantization_config=quantization)).dtype == dtype


def test_modules_kept_in_16_bit_are_noted() -> None:
    quantization = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "self_attn"]}
    assert "1 modules" in read(changed(quantization_config=quantization)).extra[0]


def test_what_is_left_out_is_said() -> None:
    assert "activation" in read(changed(hidden_act="gelu")).extra[0]
    assert "bf16 is taken" in read(changed(torch_dtype=...)).extra[0]


# What is refused


def test_an_unknown_architecture_is_named_with_its_neighbours() -> None:
    with pytest.raises(UnknownNameError) as caught:
        read(changed(architectures=["Qwen2MoeForCausalLN"]))
    assert "Qwen2MoeForCausalLN" in str(caught.value)
    assert "Qwen2MoeForCausalLM" in caught.value.close
    assert "config.json" in str(caught.value)


def test_an_unknown_language_model_inside_a_multi_modal_one_is_named() -> None:
    message = refused({"architectures": ["X"], "text_config": {"model_type": "rwkv9"}})
    assert "text_config.model_type" in message
    assert "rwkv9" in message


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"],
)
def test_a_missing_size_is_named(key: str) -> None:
    absent: dict[str, Any] = {key: ...}
    message = refused(changed(**absent))
    assert f"missing key {key}" in message
    assert "file=config.json" in message


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("hidden_size", 0, "must be from 1 to"),
        ("hidden_size", -4096, "must be from 1 to"),
        ("hidden_size", 2**24 + 1, "must be from 1 to"),
        ("num_hidden_layers", 10_001, "must be from 1 to 10000"),
        ("hidden_size", "4096", "must be a whole number"),
        ("hidden_size", 4096.0, "must be a whole number"),
        ("hidden_size", True, "must be a whole number"),
        ("hidden_size", [4096], "must be a whole number"),
        ("vocab_size", None, "must not be null"),
        pytest.param("vocab_size", 10**5000, "16610 bits", id="vocab_size-huge"),
        ("num_key_value_heads", 5, "must divide num_attention_heads, 32"),
        ("num_attention_heads", 24, "must divide hidden_size, 4096"),
        ("rope_theta", float("nan"), "positive finite"),
        pytest.param("rope_theta", 10**5000, "positive finite", id="rope_theta-huge"),
        ("rms_norm_eps", 0, "positive finite"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("architectures", "LlamaForCausalLM", "must be a list"),
        ("architectures", [7], "list of names"),
        ("torch_dtype", "int3", "known element type"),
        ("torch_dtype", 16, "must be a string"),
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("num_local_experts", 8, "no experts"),
        ("layer_types", ["full_attention"], "one entry for each of the 32 layers"),
        ("layer_types", ["linear_attention"] * 32, "'linear_attention' is not supported"),
        ("layer_types", ["sliding_attention"] * 32, "no sliding layers"),
        ("quantize", "w2a2", "known scheme"),
        ("quantization_config", {"bits": 4}, "missing key quant_method"),
        ("quantization_config", {"quant_method": "magic"}, "known method"),
        ("quantization_config", {"quant_method": "gptq", "bits": 3}, "supported weight width"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "at least one group"),
        ("quantization_config", [1], "must be an object"),
    ],
)
def test_a_wrong_value_gives_file_key_value_and_rule(key: str, value: Any, rule: str) -> None:
    keys = {"num_key_value_heads": ...} if key == "num_attention_heads" else {}
    message = refused(changed(**{**keys, key: value}))
    assert rule in message
    assert "file=config.json" in message
    assert f"key={key}" in message


@pytest.mark.parametrize(
    ("name", "keys", "rule"),
    [
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "must not exceed num_local_experts, 8"),
        ("deepseek-v3", {"first_k_dense_replace": 61}, "at least one of the 61 layers"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "every layer after the dense ones"),
        ("deepseek-v3", {"index_topk": 2048}, "indexer"),
        ("deepseek-v3", {"scoring_func": "sqrtsoftplus"}, "known scoring function"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "every layer after the dense ones"),
        ("minimax-m2.5", {"attn_type_list": [1, 0, 1]}, "linear attention"),
        ("pangu-pro-moe", {"num_experts_per_tok": 7}, "must divide num_experts, 64"),
        ("pangu-pro-moe", {"param_sink_number": 128}, "attention sinks"),
    ],
)
def test_what_an_architecture_cannot_express_is_refused(
    name: str, keys: dict[str, Any], rule: str
) -> None:
    assert rule in refused(changed(name, **keys))


def test_mixed_quantization_is_refused() -> None:
    int8 = {"num_bits": 8, "type": "int"}
    groups = {
        "a": {"weights": int8, "input_activations": None},
        "b": {"weights": int8, "input_activations": int8},
    }
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
    assert "w8a16, w8a8" in refused(changed(quantization_config=quantization))


# Files


def test_a_folder_or_a_file_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(preset("qwen3-8b")), encoding="utf-8-sig")
    assert load_model(folder) == load_model(str(folder / "config.json"))
    assert load_model(folder).name == "my-model"


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"[1, 2]", "must be a JSON object"),
        (b'{"a": 1,\n "b": }', "line=2, column=7"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"hidden_size": NaN}', "value=NaN"),
        (b'{"hidden_size": -Infinity}', "value=-Infinity"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "a number that cannot be used"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, rule: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_model(file)
    assert rule in str(caught.value)
    assert f"file={file}" in str(caught.value)


def test_weights_given_as_configuration_are_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors.json"
    with file.open("wb") as stream:
        stream.truncate(200 * 10**6)
    start = time.perf_counter()
    with pytest.raises(InputError, match=f"at most {MAX_CONFIG_BYTES} bytes.*bytes=200000000"):
        load_model(file)
    assert time.perf_counter() - start < 0.1


def test_places_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder holds no config\.json"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_model(f"{tmp_path}/a\0b")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="not a regular file"):
        load_model(tmp_path / "pipe.json")


# Any change of a real configuration ends in a model or in an InputError

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**24, 2**70, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "LlamaForCausalLM", "fp8", "compressed-tensors", "sigmoid"]),
    st.lists(st.one_of(st.integers(-1, 3), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(
        st.sampled_from(["quant_method", "bits", "config_groups", "model_type", "rope_theta"]),
        st.one_of(st.text(max_size=4), st.integers(-1, 9), st.dictionaries(st.text(), st.none())),
        max_size=3,
    ),
)
KEYS = st.sampled_from(
    [
        *sorted({key for name in model_names() for key in preset(name)}),
        *("layer_types", "text_config", "quantize", "dtype", "rope_parameters"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(model_names()),
    changes=st.dictionaries(KEYS, JUNK, max_size=4),
    dropped=st.sets(KEYS, max_size=2),
)
def test_random_changes_never_end_in_a_bug(
    name: str, changes: dict[str, Any], dropped: set[str]
) -> None:
    config = {key: value for key, value in (preset(name) | changes).items() if key not in dropped}
    try:
        spec = read(config)
    except InputError as error:
        str(error).encode("utf-8")
    else:
        assert 0 < active_parameter_count(spec) <= parameter_count(spec)
        assert spec.heads % spec.kv_heads == 0
        assert 0 <= spec.sliding_layers <= spec.layers
        "".join(spec.extra).encode("utf-8")


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(model_names()),
    at=st.floats(0, 1),
    junk=st.binary(max_size=6),
    cut=st.integers(0, 40),
)
def test_random_bytes_never_end_in_a_bug(
    tmp_path_factory: pytest.TempPathFactory, name: str, at: float, junk: bytes, cut: int
) -> None:
    content = (PRESETS / f"{name}.json").read_bytes()
    position = int(at * len(content))
    file = tmp_path_factory.getbasetemp() / "config.json"
    file.write_bytes(content[:position] + junk + content[position + cut :])
    with contextlib.suppress(InputError):
        assert load_model(file).layers > 0


def test_every_supported_architecture_reads_a_plain_configuration() -> None:
    plain = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "vocab_size": 100,
        "num_key_value_heads": 4,
    }
    for architecture in supported_architectures():
        spec = read({**plain, "architectures": [architecture]})
        assert spec.architecture == architecture
        assert parameter_count(spec) > 0
