"""Small models, and hypothesis strategies that draw models and the ways to split them.

Sizes are small and differ from one another where they can, so that a mixed-up dim shows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from shardplan.models.parallel import Exchange, Parallelism
from shardplan.models.spec import MlaSpec, ModelSpec, MoeSpec

__all__ = ["SPECS", "models", "parallelisms", "tiny", "tiny_mla", "tiny_moe"]


def tiny(**changes: Any) -> ModelSpec:
    """A dense model of two layers with two query heads to each of two kv heads."""
    base = ModelSpec(
        name="tiny",
        architecture="TinyForCausalLM",
        hidden=8,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=6,
        ffn=12,
        vocab=16,
        rope_theta=100.0,
        norm_eps=1e-5,
    )
    return replace(base, **changes)


def tiny_moe(**changes: Any) -> ModelSpec:
    """The same with four experts of width 4, two a token; `changes` are those of the experts."""
    moe = MoeSpec(experts=4, experts_per_token=2, ffn=4)
    return tiny(name="tiny-moe", moe=replace(moe, **changes))


def tiny_mla(q_lora_rank: int | None = 5, **changes: Any) -> ModelSpec:
    """The same with latent attention: every head reads one latent of 6 and a rotary part of 4."""
    mla = MlaSpec(
        q_lora_rank=q_lora_rank,
        kv_lora_rank=6,
        qk_nope_head_dim=3,
        qk_rope_head_dim=4,
        v_head_dim=5,
    )
    return tiny(name="tiny-mla", kv_heads=4, mla=mla, **changes)


_FULL_MOE = tiny_moe(
    shared_ffn=8, shared_gate=True, dense_layers=1, scoring="sigmoid", router_bias=True
).moe

SPECS: dict[str, ModelSpec] = {
    "mha": tiny(kv_heads=4),
    "gqa": tiny(),
    "mqa": tiny(kv_heads=1),
    "one layer": tiny(layers=1),
    "tied": tiny(tied_embeddings=True),
    "qkv bias": tiny(qkv_bias=True),
    "o bias, mlp bias": tiny(o_bias=True, mlp_bias=True),
    "norm per head": tiny(qk_norm="head"),
    "norm over all heads": tiny(qk_norm="full"),
    "sandwich norms": tiny(sandwich_norms=True),
    "all layers slide": tiny(sliding_window=3, sliding_layers=2),
    "some layers slide": tiny(layers=5, sliding_window=2, sliding_layers=2),
    "moe": tiny_moe(),
    "moe, gates not normalised": tiny_moe(normalise_topk=False),
    "moe, sigmoid with bias": tiny_moe(scoring="sigmoid", router_bias=True),
    "moe, softmax with bias": tiny_moe(router_bias=True, normalise_topk=False),
    "moe, groups": tiny_moe(experts=8, experts_per_token=4, expert_groups=2),
    "moe, shared": tiny_moe(shared_ffn=8),
    "moe, shared and gated": tiny_moe(shared_ffn=8, shared_gate=True),
    "moe, dense prefix": replace(tiny_moe(dense_layers=1), layers=3),
    "moe, sliding, dense prefix": replace(
        tiny_moe(dense_layers=1), layers=4, sliding_window=2, sliding_layers=2
    ),
    "mla": tiny_mla(),
    "mla, no query latent": tiny_mla(q_lora_rank=None),
    "mla, moe": tiny_mla(layers=3, moe=_FULL_MOE),
    "everything": replace(
        tiny_moe(shared_ffn=8, shared_gate=True, dense_layers=1, router_bias=True),
        layers=3,
        tied_embeddings=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm="full",
        sandwich_norms=True,
        sliding_window=3,
        sliding_layers=2,
    ),
}
"""Every switch of a model at least once, alone where it can be."""

_FEW = st.sampled_from([1, 2, 4])


@st.composite
def _moes(draw: st.DrawFn, layers: int) -> MoeSpec:
    groups = draw(st.sampled_from([1, 1, 2]))
    return MoeSpec(
        experts=draw(st.sampled_from([4, 6, 8, 16])),
        experts_per_token=2 if groups == 2 else draw(st.integers(1, 3)),
        ffn=draw(st.sampled_from([4, 8, 12])),
        shared_ffn=draw(st.sampled_from([0, 8, 16])),
        shared_gate=draw(st.booleans()),
        dense_layers=draw(st.integers(0, layers - 1)),
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        normalise_topk=draw(st.booleans()),
        router_bias=draw(st.booleans()),
        expert_groups=groups,
    )


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """A dense, expert, or latent-attention model with any switches."""
    layers = draw(st.integers(1, 4))
    kv_heads, queries = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(_FEW)
    latent = draw(st.sampled_from([False, False, True]))
    spec = (
        tiny_mla(draw(st.sampled_from([None, 5])), heads=kv_heads * queries)
        if latent
        else tiny(
            heads=kv_heads * queries,
            kv_heads=kv_heads,
            qkv_bias=draw(st.booleans()),
            qk_norm=draw(st.sampled_from(["none", "head", "full"])),
            sliding_window=3,
            sliding_layers=draw(st.integers(0, layers)),
        )
    )
    return replace(
        spec,
        layers=layers,
        kv_heads=spec.heads if latent else kv_heads,
        ffn=draw(st.sampled_from([8, 12, 16])),
        vocab=draw(st.sampled_from([16, 24, 48])),
        tied_embeddings=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        sandwich_norms=draw(st.booleans()),
        moe=draw(st.none() | _moes(layers)),
    )


@st.composite
def parallelisms(draw: st.DrawFn, spec: ModelSpec) -> Parallelism:
    """Axis sizes that often, not always, fit the model; stages of any lengths."""
    tp, dp = draw(st.sampled_from([1, 2, 2, 3, 4, 4, 6, 8])), draw(st.sampled_from([1, 2, 4]))
    cp = draw(st.sampled_from([1, 1, 2, 4] if tp * dp <= 8 else [1]))
    shares = [1, 2, 4, tp, tp * cp, tp * cp * dp] if spec.moe else [1]
    pp = draw(st.integers(1, spec.layers))
    cuts = sorted(draw(st.permutations(range(1, spec.layers)))[: pp - 1])
    stages = tuple(b - a for a, b in zip([0, *cuts], [*cuts, spec.layers], strict=True))
    exchange: Exchange = draw(st.sampled_from(["allgather", "alltoall"]))
    par = Parallelism(
        tp=tp,
        pp=pp,
        dp=dp,
        ep=draw(st.sampled_from(shares)),
        cp=cp,
        sp=draw(st.booleans()),
        exchange=exchange,
        stage_layers=draw(st.sampled_from([(), stages])),
    )
    return replace(par, **draw(_module_widths(spec, par))) if draw(st.booleans()) else par


@st.composite
def _module_widths(draw: st.DrawFn, spec: ModelSpec, par: Parallelism) -> dict[str, Any]:
    """Ranks of single modules: as tp, whole, or over some dp groups where contexts are whole."""
    groups = {par.dp, draw(st.sampled_from([1, 2]))} if par.cp == 1 else {1}
    widths = st.sampled_from([0, 1, *(par.tp * m for m in sorted(groups))])
    had = {"o": True, "embed": True, "head": True, "ffn": spec.dense_layers > 0}
    had["shared"] = spec.moe is not None and spec.moe.shared_ffn > 0
    found = {f"{one}_tp": draw(widths) for one, there in had.items() if there}
    if spec.tied_embeddings:
        found["head_tp"] = found["embed_tp"]
    return found
