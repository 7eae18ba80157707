"""A Hugging Face model of given sizes with random weights, from a `ModelSpec`."""

from __future__ import annotations

from typing import Any

from shardplan.models.errors import InputError
from shardplan.models.fx.torch_lib import torch_lib, transformers_lib
from shardplan.models.spec import ModelSpec

__all__ = ["ARCHITECTURES", "model_type", "tiny_model"]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV2ForCausalLM": "deepseek_v2",
}
"""Architectures whose graphs are applied, with the library's `model_type`."""
_DEVIATION = 0.2
"""Of random weights: products of a few elements stay of the order of 1."""


def model_type(spec: ModelSpec) -> str:
    """The library's name of an architecture. `InputError` for one not among `ARCHITECTURES`."""
    kind = ARCHITECTURES.get(spec.architecture)
    if kind is None:
        raise InputError(
            "an architecture whose PyTorch graph is applied",
            got=spec.architecture,
            hint="known: " + ", ".join(ARCHITECTURES) + "; use --level 1 for others",
        )
    return kind


def tiny_model(spec: ModelSpec, *, seed: int = 0, dtype: str = "float32") -> Any:
    """A `PreTrainedModel` with the sizes of a spec.

    `InputError` for an architecture that is not among `ARCHITECTURES`.
    """
    torch, library = torch_lib(), transformers_lib()
    config = library.AutoConfig.for_model(model_type(spec), **_settings(spec))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = library.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", experts_implementation="eager"
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=_DEVIATION)
    return model.to(getattr(torch, dtype)).eval()


def _settings(spec: ModelSpec) -> dict[str, Any]:
    found: dict[str, Any] = {
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied_embeddings,
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": spec.qkv_bias and spec.o_bias,
        "mlp_bias": spec.mlp_bias,
    }
    return found | _latent(spec) | _experts(spec)


def _latent(spec: ModelSpec) -> dict[str, Any]:
    mla = spec.mla
    if mla is None:
        return {}
    return {
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "head_dim": mla.qk_rope_head_dim,
        "num_key_value_heads": spec.heads,
    }


def _experts(spec: ModelSpec) -> dict[str, Any]:
    moe = spec.moe
    if moe is None:
        return {}
    return {
        "num_experts": moe.experts,
        "num_local_experts": moe.experts,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.ffn,
        "intermediate_size": moe.ffn if not spec.dense_layers else spec.ffn,
        "norm_topk_prob": moe.normalise_topk,
        "n_shared_experts": moe.shared_ffn // moe.ffn,
        "first_k_dense_replace": moe.dense_layers,
        "mlp_only_layers": list(range(moe.dense_layers)),
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    }
