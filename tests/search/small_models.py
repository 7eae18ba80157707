"""Small models for the tests of the search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from shardplan.models.spec import MlaSpec, ModelSpec, MoeSpec

__all__ = ["dense", "latent", "sparse", "specs"]


def dense(**changes: Any) -> ModelSpec:
    """A dense model of four layers, eight heads on four kv heads."""
    base = ModelSpec(
        name="small",
        architecture="SmallForCausalLM",
        hidden=256,
        layers=4,
        heads=8,
        kv_heads=4,
        head_dim=32,
        ffn=768,
        vocab=1024,
    )
    return replace(base, **changes)


def sparse(**changes: Any) -> ModelSpec:
    """The same with eight experts, two a token."""
    moe = MoeSpec(experts=8, experts_per_token=2, ffn=128)
    return dense(name="small-moe", moe=replace(moe, **changes))


def latent(**changes: Any) -> ModelSpec:
    """The same with latent attention."""
    mla = MlaSpec(
        q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    )
    return dense(name="small-mla", kv_heads=8, mla=mla, **changes)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Small dense, expert and latent-attention models that some splits fit and some do not."""
    kind = draw(st.sampled_from(["dense", "sparse", "latent", "both"]))
    experts = MoeSpec(
        experts=draw(st.sampled_from([4, 8, 6])),
        experts_per_token=2,
        ffn=draw(st.sampled_from([64, 96, 128])),
        shared_ffn=draw(st.sampled_from([0, 128])),
        dense_layers=draw(st.sampled_from([0, 1])),
    )
    layers, vocab = draw(st.sampled_from([2, 3, 4, 5, 7])), draw(st.sampled_from([1000, 1024]))
    heads = draw(st.sampled_from([4, 8, 12]))
    base = latent if kind in ("latent", "both") else dense
    spec = base(
        layers=layers,
        vocab=vocab,
        heads=heads,
        ffn=draw(st.sampled_from([512, 768, 516])),
        max_context=draw(st.sampled_from([0, 4096])),
    )
    kv_heads = heads if spec.mla else draw(st.sampled_from([1, 2, 4]))
    return replace(spec, kv_heads=kv_heads, moe=experts if kind in ("sparse", "both") else None)
