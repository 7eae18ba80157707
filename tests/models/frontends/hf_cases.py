"""Small classes and configurations of transformers that tests capture."""

from __future__ import annotations

from typing import Any

import transformers as hf

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}


def llama(**more: Any) -> tuple[Any, Any]:
    return hf.LlamaForCausalLM, hf.LlamaConfig(**BASE | more)


CASES: dict[str, tuple[Any, Any]] = {
    "llama": llama(),
    "llama, tied": llama(tie_word_embeddings=True),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**BASE)),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**BASE, head_dim=16)),
    "qwen3-moe": (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(
            **BASE | {"head_dim": 16, "num_experts": 8},
            num_experts_per_tok=2,
            moe_intermediate_size=24,
        ),
    ),
    "mixtral": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2),
    ),
    "deepseek-v2-lite": (
        hf.DeepseekV2ForCausalLM,
        hf.DeepseekV2Config(**BASE | LATENT, q_lora_rank=None),
    ),
    "deepseek-v3": (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(**BASE | LATENT, q_lora_rank=24, n_group=2, topk_group=1),
    ),
}
