"""What a model is: sizes and switches of a decoder-only transformer, nothing about hardware.

Symbols used across the project (named dims): B batch, T new tokens, S context, H hidden,
K kv heads, G query heads per kv head, D head dim, F ffn, V vocabulary, E experts,
I expert ffn, X shared-expert ffn, Q query latent, C kv latent, N no-position head part and R
rotary head part (the last four of multi-head latent attention, MLA).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["CHECKPOINT_DTYPES", "CheckpointDtype", "MlaSpec", "ModelSpec", "MoeSpec"]

CheckpointDtype = Literal["bf16", "fp16", "fp32", "fp8", "w8a8", "w8a16", "w4a16"]
CHECKPOINT_DTYPES: tuple[CheckpointDtype, ...] = (
    "bf16",
    "fp16",
    "fp32",
    "fp8",
    "w8a8",
    "w8a16",
    "w4a16",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention: ranks and head parts, in elements."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """Routed experts: how many, how many a token, their width, and what stands beside them."""

    experts: int
    experts_per_token: int
    ffn: int
    """Width of one routed expert, elements."""
    shared_ffn: int = 0
    """Total width of the shared experts (count times width), 0 for none."""
    shared_gate: bool = False
    """A sigmoid gate on the shared expert (Qwen2-MoE)."""
    dense_layers: int = 0
    """Leading layers that keep a dense feed-forward network."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise_topk: bool = True
    router_bias: bool = False
    """A per-expert selection bias (DeepSeek-V3 and relatives), experts elements a layer."""
    expert_groups: int = 1
    """Groups among which tokens spread evenly by construction (Pangu Pro MoE), else 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model. Sizes in elements; counts are whole numbers."""

    name: str
    architecture: str
    """First entry of the Hugging Face `architectures` list."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the dense feed-forward network (of the dense layers where experts exist)."""
    vocab: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm on queries and keys: per head (weight [D]) or over all heads (weight [heads*D])."""
    sandwich_norms: bool = False
    """Extra norms after attention and after the feed-forward network (weights [H] each)."""
    sliding_window: int | None = None
    """Context a sliding layer sees, tokens; None when every layer sees all."""
    sliding_layers: int = 0
    """How many layers use the sliding window."""
    mla: MlaSpec | None = None
    moe: MoeSpec | None = None
    mtp_layers: int = 0
    """Multi-token-prediction layers shipped beside the model; not in its parameter count."""
    dtype: CheckpointDtype = "bf16"
    """What the checkpoint's linear weights are stored in."""
    max_context: int = 0
    """Longest sequence the checkpoint declares, tokens; 0 when it declares none."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    source: str = ""
    extra: tuple[str, ...] = field(default=())
    """Sentences about what the configuration holds that the graph leaves out."""

    @property
    def queries_per_kv(self) -> int:
        """Query heads per kv head (G)."""
        return self.heads // self.kv_heads

    @property
    def dense_layers(self) -> int:
        """Layers with a dense feed-forward network."""
        return self.layers if self.moe is None else self.moe.dense_layers

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.layers - self.dense_layers
