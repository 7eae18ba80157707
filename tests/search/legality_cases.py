"""One subject that breaks each rule and one that keeps it, by rule.

`broken` and `kept` are arguments of `subject`; both take the fields that the case shares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tests.search.oracle import dense, latent, sparse

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.optable import NO_OVERLAP, Overlap
from shardplan.models.parallel import Axis, Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.rulebook import Role, Subject

__all__ = ["FORMATS", "LAYOUTS", "PAIRS", "SWITCHES", "Case", "P", "subject"]

P = Parallelism
A2, A3, POD, OLD, DUO = (
    "atlas-800t-a2",
    "atlas-800i-a3",
    "cloudmatrix-384",
    "atlas-800-9000",
    "atlas-300i-duo",
)
OWN: tuple[Axis, ...] = ("dp", "pp", "cp", "tp")
"""How vLLM numbers ranks."""
VLLM, EAGER, MINDIE = "vllm-ascend", "vllm-ascend-eager", "mindie"
FUSED, PREFETCH = Overlap(fused_collectives=True), Overlap(weight_prefetch=True)


def subject(
    spec: ModelSpec | None = None,
    cluster: str = A2,
    nodes: int | None = None,
    device: str | None = None,
    engine: str = "torch-graph",
    parallel: Parallelism = P(),  # noqa: B008  # frozen
    overlap: Overlap = NO_OVERLAP,
    weight_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    role: Role = "mixed",
) -> Subject:
    """A subject from names."""
    return Subject(
        spec=spec or dense(),
        cluster=load_cluster(cluster, nodes=nodes, device=device, cards=parallel.ranks),
        engine=load_engine(engine),
        parallel=parallel,
        overlap=overlap,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        role=role,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Where a rule decides: what breaks it and it alone, and what keeps every rule."""

    broken: Subject
    kept: Subject


def case(broken: dict[str, Any], kept: dict[str, Any], **shared: Any) -> Case:
    """A case from what its two subjects share and what they do not."""
    return Case(broken=subject(**{**shared, **broken}), kept=subject(**{**shared, **kept}))


def layout(broken: Parallelism, kept: Parallelism, **shared: Any) -> Case:
    """A case whose subjects differ in the layout alone."""
    return case({"parallel": broken}, {"parallel": kept}, **shared)


def wide(hidden: int = 2048, experts: int = 64, **moe: Any) -> ModelSpec:
    """Experts of a width that the exchange of every generation takes."""
    return replace(sparse(experts=experts, **moe), hidden=hidden)


def shared() -> ModelSpec:
    """With a shared expert beside the routed ones."""
    spec = wide()
    assert spec.moe is not None
    return replace(spec, moe=replace(spec.moe, shared_ffn=256))


def deep(spec: ModelSpec, mtp_layers: int = 1) -> ModelSpec:
    """The same with layers that predict ahead."""
    return replace(spec, mtp_layers=mtp_layers, architecture="DeepseekV3ForCausalLM")


BOTH = replace(latent(), moe=wide().moe, hidden=2048)
"""Latent attention and experts, as DeepSeek-V3."""
SENT = P(dp=16, ep=16, exchange="alltoall")

LAYOUTS: dict[str, Case] = {
    "tp-heads": layout(P(tp=3), P(tp=8), spec=dense(vocab=1200)),
    "tp-vocabulary": layout(P(tp=4), P(tp=2), spec=dense(vocab=1002)),
    "pp-layers": layout(P(pp=5), P(pp=4)),
    "sp-tp": layout(P(sp=True), P(tp=2, sp=True)),
    "ep-experts": layout(P(dp=4, ep=4), P(dp=4, ep=2), spec=sparse(experts=6)),
    "ep-shape": layout(P(dp=2, ep=4), P(tp=2, dp=2, ep=4), spec=sparse()),
    "tp-width": layout(P(tp=8), P(tp=4), spec=dense(ffn=516)),
    "mesh": layout(P(tp=2, dp=2, head_tp=3), P(tp=2, dp=2, head_tp=4)),
    "mtp-layers": case({"spec": dense()}, {"spec": deep(dense())}, parallel=P(mtp=1), engine=VLLM),
    "mtp-engine": layout(P(mtp=4), P(mtp=3), spec=deep(dense()), engine=VLLM),
    "tp-tier": layout(P(tp=16), P(tp=8, dp=2), spec=dense(heads=16, kv_heads=16), nodes=2),
    "a3-modules": layout(
        P(tp=3, dp=2),
        P(tp=6),
        spec=dense(heads=12, kv_heads=6, vocab=1200),
        cluster=A3,
    ),
    "910a-rings": layout(
        P(tp=3, dp=2), P(tp=4, dp=2), spec=dense(heads=12, vocab=1200), cluster=OLD
    ),
    "kv-heads": layout(P(tp=6), P(tp=2), spec=dense(heads=12, kv_heads=4, vocab=1200), engine=VLLM),
    "ep-engine": layout(P(tp=4, ep=2), P(tp=4, dp=4, ep=8), spec=sparse(), engine=VLLM),
    "whole-nodes": layout(P(pp=3, dp=4, order=OWN), P(pp=4, dp=4, order=OWN), engine=VLLM),
    "order-engine": layout(
        P(tp=2, dp=2, order=("pp", "tp", "cp", "dp")),
        P(tp=2, dp=2, order=("dp", "pp", "cp", "tp")),
        engine=VLLM,
    ),
    "mtp-multiple": layout(P(mtp=3), P(mtp=2), spec=deep(dense(), 2), engine=VLLM),
    "modules-vllm": layout(
        P(dp=4, head_tp=4), P(tp=4, head_tp=4), cluster="hgx-h100", engine="vllm"
    ),
    "cp-dp": layout(P(dp=4, cp=2, ep=4), P(dp=4, cp=2), spec=wide(), engine=VLLM),
    "no-910a": case({"engine": VLLM}, {}, cluster=OLD),
    "ep-310p": layout(P(tp=2, ep=2), P(tp=2), spec=sparse(), cluster=DUO, engine=VLLM),
    "mla-310p": case({"spec": latent()}, {}, cluster=DUO, engine=VLLM),
    "ep-spanning": layout(
        P(tp=8, pp=2, dp=2, ep=16, order=OWN),
        P(tp=8, pp=2, dp=2, ep=8, order=OWN),
        spec=wide(),
        engine=VLLM,
    ),
    "gathered-a3": layout(
        P(dp=4, ep=4),
        P(dp=4, ep=4, exchange="alltoall"),
        spec=wide(),
        cluster=A3,
        engine=VLLM,
    ),
    "sent-a2": layout(P(dp=8, ep=8, exchange="alltoall"), SENT, spec=wide(), engine=VLLM),
    "mc2-ranks-a2": layout(
        P(dp=24, ep=24, exchange="alltoall"),
        P(dp=64, ep=64, exchange="alltoall"),
        spec=wide(experts=192),
        engine=VLLM,
    ),
    "mc2-ranks": layout(
        P(dp=1024, ep=1024, exchange="alltoall"),
        P(dp=768, ep=256, exchange="alltoall"),
        spec=wide(experts=1024),
        cluster=POD,
        nodes=48,
        engine=VLLM,
    ),
    "mc2-hidden-a2": case({"spec": wide(10272)}, {"spec": wide(10240)}, parallel=SENT, engine=VLLM),
    "mc2-hidden": case(
        {"spec": wide(8224)}, {"spec": wide(8192)}, parallel=SENT, cluster=A3, engine=VLLM
    ),
    "mc2-topk": case(
        {"spec": wide(experts_per_token=17)},
        {"spec": wide(experts_per_token=16)},
        parallel=SENT,
        engine=VLLM,
    ),
    "mc2-experts": case(
        {"spec": wide(experts=1280)},
        {"spec": wide(experts=1024)},
        parallel=P(dp=64, ep=64, exchange="alltoall"),
        engine=VLLM,
    ),
    "mc2-roce": layout(
        P(dp=48, ep=48, exchange="alltoall"),
        P(dp=32, ep=32, exchange="alltoall"),
        spec=wide(experts=96),
        cluster=A3,
        engine=VLLM,
    ),
    "mc2-ub": layout(
        SENT, P(dp=16, ep=8, exchange="alltoall"), spec=wide(), device="950pr", engine=VLLM
    ),
    "sp-experts": layout(P(tp=2, sp=True), P(tp=2, ep=2, sp=True), spec=sparse(), engine=VLLM),
    "mtp-pp": layout(P(pp=2, mtp=1), P(mtp=1), spec=deep(dense()), engine=VLLM),
    "fine-experts": case(
        {"spec": dense()}, {"spec": wide()}, parallel=P(tp=2, head_tp=1), engine=VLLM
    ),
    "fine-dp": layout(P(dp=8, ep=4, head_tp=8), P(dp=8, ep=4, head_tp=2), spec=wide(), engine=VLLM),
    "fine-o": layout(
        P(tp=2, dp=4, ep=8, o_tp=4),
        P(dp=4, ep=4, o_tp=4),
        spec=wide(),
        engine=VLLM,
        role="decode",
    ),
    "fine-o-graph": case(
        {"engine": EAGER},
        {"engine": VLLM},
        parallel=P(dp=4, ep=4, o_tp=4),
        spec=wide(),
        role="decode",
    ),
    "fine-decode": case(
        {"role": "mixed"},
        {"role": "decode"},
        parallel=P(dp=4, ep=4, embed_tp=4),
        spec=wide(),
        engine=VLLM,
    ),
    "fine-shared": layout(
        P(tp=4, ep=4, shared_tp=1),
        P(tp=4, ep=4, sp=True, shared_tp=1),
        spec=shared(),
        engine=VLLM,
    ),
    "pp-engine": layout(P(pp=2), P(tp=2), engine=MINDIE),
    "ep-mindie": case({"spec": wide()}, {"spec": BOTH}, parallel=P(dp=4, ep=4), engine=MINDIE),
    "sent-mindie": layout(
        P(tp=4, ep=2, exchange="alltoall"),
        P(tp=4, ep=4, exchange="alltoall"),
        spec=BOTH,
        engine=MINDIE,
    ),
    "dp-mindie": layout(P(dp=4, ep=4), P(dp=4), spec=BOTH, cluster=OLD, engine=MINDIE),
    "cp-mindie": layout(P(cp=4), P(cp=2), spec=BOTH, engine=MINDIE),
    "cp-mindie-model": case({"spec": dense()}, {"spec": latent()}, parallel=P(cp=2), engine=MINDIE),
    "cp-mindie-device": case(
        {"cluster": OLD}, {"cluster": A3}, parallel=P(cp=2), spec=latent(), engine=MINDIE
    ),
    "sp-mindie": layout(P(tp=4, sp=True), P(tp=4), spec=BOTH, engine=MINDIE),
    "mtp-mindie-device": case(
        {"cluster": DUO}, {"cluster": A2}, spec=deep(latent()), parallel=P(mtp=1), engine=MINDIE
    ),
    "mtp-mindie-cp": layout(P(cp=2, mtp=2), P(cp=2, mtp=1), spec=deep(latent()), engine=MINDIE),
    "head-mindie": case(
        {"spec": wide()}, {"spec": BOTH}, parallel=P(dp=4, head_tp=4), engine=MINDIE
    ),
    "o-mindie": layout(P(tp=2, dp=2, o_tp=4), P(dp=4, o_tp=4), spec=BOTH, engine=MINDIE),
    "modules-mindie": layout(P(dp=4, embed_tp=4), P(dp=4), spec=BOTH, engine=MINDIE),
}

FORMATS: dict[str, Case] = {
    "w8a16-experts": case({"spec": sparse()}, {"spec": dense()}, engine=VLLM, weight_dtype="w8a16"),
    "w8a8-static-experts": case(
        {"spec": sparse()}, {"spec": dense()}, engine=VLLM, weight_dtype="w8a8_static"
    ),
    "w8a8sc-experts": case(
        {"spec": sparse()}, {"spec": dense()}, cluster=DUO, engine=VLLM, weight_dtype="w8a8sc"
    ),
    "w4a16-dense": case({"spec": dense()}, {"spec": sparse()}, engine=VLLM, weight_dtype="w4a16"),
    "w8a16-310p": case({"cluster": DUO}, {"cluster": A3}, engine=VLLM, weight_dtype="w8a16"),
    "w8a16-mindie": case({"cluster": A3}, {"cluster": A2}, engine=MINDIE, weight_dtype="w8a16"),
    "int8-cache-device": case({"cluster": DUO}, {"cluster": A3}, engine=VLLM, kv_dtype="int8"),
    "int8-cache-latent": case(
        {"role": "mixed"}, {"role": "decode"}, spec=latent(), engine=VLLM, kv_dtype="int8"
    ),
    "int8-cache-mindie": case(
        {"cluster": A3}, {"cluster": A2}, engine=MINDIE, weight_dtype="w8a8", kv_dtype="int8"
    ),
    "int8-cache-mindie-weights": case(
        {"weight_dtype": "bf16"}, {"weight_dtype": "w8a8"}, engine=MINDIE, kv_dtype="int8"
    ),
}

SWITCHES: dict[str, Case] = {
    "fused-device": case(
        {"cluster": A3}, {"cluster": A2}, engine=VLLM, parallel=P(tp=4), overlap=FUSED
    ),
    "fused-engine": case(
        {"weight_dtype": "w8a8"}, {}, engine=VLLM, parallel=P(tp=4), overlap=FUSED
    ),
    "fused-group": layout(P(dp=4), P(tp=8), engine=VLLM, overlap=FUSED),
    "fused-sp": case(
        {"overlap": FUSED}, {"overlap": PREFETCH}, engine=VLLM, parallel=P(tp=4, sp=True)
    ),
    "prefetch-device": case(
        {"cluster": DUO}, {}, engine=VLLM, parallel=P(tp=4, sp=True), overlap=PREFETCH
    ),
    "prefetch-engine": case(
        {"engine": MINDIE}, {"engine": VLLM}, spec=sparse(), parallel=P(tp=4), overlap=PREFETCH
    ),
    "prefetch-sp": case(
        {"overlap": PREFETCH},
        {"overlap": replace(PREFETCH, fused_collectives=True)},
        engine=VLLM,
        parallel=P(tp=4),
    ),
}

PAIRS: dict[str, tuple[tuple[Subject, Subject], tuple[Subject, Subject]]] = {}
"""(broken, kept), each a prefill and a decode pool."""


def _pair(
    name: str,
    broken: tuple[Parallelism, Parallelism],
    kept: tuple[Parallelism, Parallelism],
    **shared: Any,
) -> None:
    def pools(one: tuple[Parallelism, Parallelism]) -> tuple[Subject, Subject]:
        return (
            subject(parallel=one[0], role="prefill", **shared),
            subject(parallel=one[1], role="decode", **shared),
        )

    PAIRS[name] = pools(broken), pools(kept)


_pair("pd-tp", (P(tp=2), P(tp=4)), (P(tp=4), P(tp=2)), engine=VLLM)
_pair("pd-decode-pp", (P(pp=2), P(pp=2)), (P(pp=2), P()), engine=VLLM)
_pair("pd-pp-cp", (P(pp=2, cp=2), P()), (P(cp=2), P()), engine=VLLM)
_pair("pd-decode-cp", (P(cp=2), P(cp=2)), (P(cp=2), P()), engine=MINDIE, spec=latent())
_pair("pd-mtp", (P(mtp=1), P()), (P(mtp=1), P(mtp=1)), engine=MINDIE, spec=deep(latent()))
PAIRS["pd-310p"] = (
    (subject(engine=VLLM, cluster=DUO), subject(engine=VLLM, cluster=DUO)),
    (subject(engine=VLLM, cluster=A3), subject(engine=VLLM, cluster=A3)),
)
