"""How many parameters a model has, how many a token touches, and its cache bytes a token.

Per layer, in elements (symbols of `shardplan.models.spec`; M = heads = K*G):

    attention  H*M*D + 2*H*K*D + M*D*H  (+ M*D + 2*K*D qkv bias) (+ H output bias)
               (+ 2*D or M*D + K*D norm on queries and keys)
    MLA        H*Q + Q + Q*M*(N+R)  (H*M*(N+R) without a query latent)
               + H*(C+R) + C + C*M*(N+V') + M*V'*H          V' value head width
    dense FFN  3*H*F  (+ 2*F + H bias)
    experts    H*E router  (+ E selection bias) + E*3*H*F_e + 3*H*X  (+ H shared gate)
    norms      2*H  (4*H with sandwich norms)

plus V*H of the embedding (once more for an untied output head) and the final norm H.

Active parameters follow the convention of Mixtral (12.9e9), Qwen3 (22e9) and Pangu Pro MoE
(16.5e9): everything but the experts that a token is not sent to, embedding table and output
head included. DeepSeek and Kimi publish the figure without the embedding table.

Leaves out: multi-token-prediction layers, the scales of quantized checkpoints, rotary tables.
Source: the modelling files that `data/architectures.json` names; checked against the counts
that the checkpoints publish (`presets/sources.toml`).
"""

from __future__ import annotations

from shardplan.models.errors import InputError
from shardplan.models.spec import MlaSpec, ModelSpec, MoeSpec

__all__ = ["active_parameter_count", "kv_bytes_per_token", "parameter_count"]


def parameter_count(spec: ModelSpec) -> int:
    """All parameters of the model, multi-token-prediction layers excluded."""
    total = _outside_layers(spec) + spec.layers * (_attention(spec) + _norms(spec))
    total += spec.dense_layers * _dense_ffn(spec)
    if spec.moe is not None:
        total += spec.moe_layers * _experts(spec, spec.moe, spec.moe.experts)
    return total


def active_parameter_count(spec: ModelSpec) -> int:
    """Parameters that one token touches, embedding table and output head included."""
    if spec.moe is None:
        return parameter_count(spec)
    idle = spec.moe.experts - spec.moe.experts_per_token
    return parameter_count(spec) - spec.moe_layers * idle * _one_expert(spec, spec.moe)


def kv_bytes_per_token(spec: ModelSpec, dtype_bytes: int = 2) -> int:
    """Cache bytes that one token adds over all layers; `dtype_bytes` is one element's size.

    GQA: 2*K*D a layer; MLA: C+R a layer. A sliding layer counts like the others (it keeps at
    most its window of tokens). Raises InputError when `dtype_bytes` is not positive.
    """
    if dtype_bytes < 1:
        raise InputError(
            "dtype_bytes must be at least 1",
            got=f"dtype_bytes={dtype_bytes}",
            hint="2 for bf16, 1 for int8 or fp8",
        )
    if spec.mla is not None:
        elements = spec.mla.kv_lora_rank + spec.mla.qk_rope_head_dim
    else:
        elements = 2 * spec.kv_heads * spec.head_dim
    return elements * spec.layers * dtype_bytes


def _outside_layers(spec: ModelSpec) -> int:
    tables = 1 if spec.tied_embeddings else 2
    return tables * spec.vocab * spec.hidden + spec.hidden


def _attention(spec: ModelSpec) -> int:
    if spec.mla is not None:
        return _latent_attention(spec, spec.mla)
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    total = 2 * spec.hidden * (query + key)
    if spec.qkv_bias:
        total += query + 2 * key
    if spec.o_bias:
        total += spec.hidden
    return total + {"none": 0, "head": 2 * spec.head_dim, "full": query + key}[spec.qk_norm]


def _latent_attention(spec: ModelSpec, mla: MlaSpec) -> int:
    query = spec.heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank is None:
        total = spec.hidden * query
    else:
        total = mla.q_lora_rank * (spec.hidden + 1 + query)
    total += spec.hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank
    total += mla.kv_lora_rank * spec.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return total + spec.heads * mla.v_head_dim * spec.hidden


def _norms(spec: ModelSpec) -> int:
    return (4 if spec.sandwich_norms else 2) * spec.hidden


def _dense_ffn(spec: ModelSpec) -> int:
    bias = 2 * spec.ffn + spec.hidden if spec.mlp_bias else 0
    return 3 * spec.hidden * spec.ffn + bias


def _one_expert(spec: ModelSpec, moe: MoeSpec) -> int:
    return 3 * spec.hidden * moe.ffn


def _experts(spec: ModelSpec, moe: MoeSpec, experts: int) -> int:
    router = spec.hidden * moe.experts + (moe.experts if moe.router_bias else 0)
    shared = 3 * spec.hidden * moe.shared_ffn + (spec.hidden if moe.shared_gate else 0)
    return router + shared + experts * _one_expert(spec, moe)
