"""From a `ModelSpec` to a `ModelGraph`: the decoder's templates in named dims.

Formulas, one line an operator (weights in brackets):
    q = x[H,K,G,D]   k = x[H,K,D]   v = x[H,K,D]          grouped-query attention
    o = softmax(q k^T / sqrt(D)) v   y = o[K,G,D,H]
    c = x[H,C]  r = x[H,R]  q_n = x'[Q,K,N]  q_r = x'[Q,K,R]     multi-head latent attention
    prefill: k = c[C,K,N], v = c[C,K,D]; decode: q_c = q_n[C,K,N], o = o_c[C,K,D] (absorbed)
    y = (silu(x[H,F]) * x[H,F]) [F,H]                     feed-forward network
    g = topk(score(x[H,E]));  y = sum_E g_E ffn_E(x)      experts, dispatched and combined
    h' = layer([norm(h); norm(embed(t))] [U,H])           multi-token prediction (MTP), U = 2 H
The KV cache is state: an operator of kind `cache` appends T new tokens and yields all S.

The prediction layer is the module of DeepSeek-V3 (arXiv 2412.19437, section 2.2): h is what the
last layer gives for a token, t the token after it, the layer one like the model's last with a KV
cache of its own; a norm of its own and the shared LM head give the logits of the token after t.
It is in the graph only where asked. Of several shipped layers the first is taken, again for each
further token, as engines do.
Left out: vision towers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from shardplan.models.errors import LayoutError
from shardplan.models.graph import Block, ModelGraph, Op, Phase, topological
from shardplan.models.spec import ModelSpec

__all__ = ["build_graph"]


class _Template:
    """Collects the operators of one block in computing order."""

    def __init__(self, name: str, entry_dims: tuple[str, ...]) -> None:
        self.name = name
        self.nodes: dict[str, Op] = {}
        self.last = self.add("x", "input", "input", (), entry_dims)

    def add(
        self,
        name: str,
        kind: str,
        role: str,
        inputs: tuple[str, ...],
        dims: tuple[str, ...] | str,
        **more: Any,
    ) -> str:
        """Add one operator; returns its name. Dims may be given as one word."""
        for key in ("contract", "whole", "weight"):
            if isinstance(more.get(key), str):
                more[key] = tuple(more[key])
        if more.get("weight") and "param" not in more:
            more["param"] = name
        op = Op(name=name, kind=kind, role=role, inputs=inputs, dims=tuple(dims), **more)  # type: ignore[arg-type]  # roles are literals at every call
        self.nodes[name] = op
        return name

    def linear(self, name: str, role: str, source: str, dims: str, weight: str, **more: Any) -> str:
        """A matrix product of `source` with a weight; contracts what the output drops."""
        before = self.nodes[source].dims
        contract = "".join(d for d in weight if d in before and d not in dims)
        more.setdefault("weight_class", "linear")
        return self.add(
            name, "matmul", role, (source,), dims, weight=weight, contract=contract, **more
        )

    def norm(self, name: str, role: str, source: str, over: str, **more: Any) -> str:
        """A root-mean-square norm over the dims `over`."""
        dims = self.nodes[source].dims
        return self.add(
            name,
            "rmsnorm",
            role,
            (source,),
            dims,
            whole=over,
            weight=over,
            weight_class="small",
            **more,
        )

    def bias(self, role: str, source: str) -> str:
        """A bias added to the output of `source`, one element per output feature."""
        dims = self.nodes[source].dims
        features = "".join(d for d in dims if d not in "BTS")
        return self.add(
            f"{source}_bias", "bias", role, (source,), dims, weight=features, weight_class="small"
        )

    def block(self, exit_name: str) -> Block:
        """The finished template."""
        order = topological({name: op.inputs for name, op in self.nodes.items()})
        nodes = {name: self.nodes[name] for name in order}
        return Block(self.name, nodes, "x", exit_name, order)


def _normed_heads(block: _Template, spec: ModelSpec, name: str, source: str, role: str) -> str:
    """Query or key norm: per head, over all heads, or none."""
    if spec.qk_norm == "none":
        return source
    if spec.qk_norm == "head":
        return block.norm(name, role, source, "D")
    dims = "".join(block.nodes[source].dims)
    heads = "".join(d for d in dims if d not in "BT")
    stat = block.add(f"{name}_stat", "sumsq", "stat", (source,), "BT", contract=heads)
    return block.add(name, "scale", role, (source, stat), dims, weight=heads, weight_class="small")


def _cache(block: _Template, name: str, role: str, source: str, dims: str, phase: Phase) -> str:
    """A cache that takes the new tokens of `source`; those of a prompt stay where they lie."""
    cut_as = (("S", "T"),) if phase == "prefill" else ()
    state = name.removesuffix("_cache")
    return block.add(name, "cache", role, (source,), dims, whole="T", state=state, cut_as=cut_as)


def _gqa(block: _Template, spec: ModelSpec, source: str, window: bool, phase: Phase) -> str:
    q = block.linear("q", "heads", source, "BTKGD", "HKGD", fuse="qkv")
    k = block.linear("k", "kv_heads", source, "BTKD", "HKD", fuse="qkv")
    v = block.linear("v", "kv_heads", source, "BTKD", "HKD", fuse="qkv")
    if spec.qkv_bias:
        q, k, v = block.bias("heads", q), block.bias("kv_heads", k), block.bias("kv_heads", v)
    q = _normed_heads(block, spec, "q_norm", q, "heads")
    k = _normed_heads(block, spec, "k_norm", k, "kv_heads")
    q = block.add("q_rope", "rope", "heads", (q,), "BTKGD", whole="D")
    k = block.add("k_rope", "rope", "kv_heads", (k,), "BTKD", whole="D")
    keys = _cache(block, "k_cache", "kv_heads", k, "BSKD", phase)
    values = _cache(block, "v_cache", "kv_heads", v, "BSKD", phase)
    attrs = MappingProxyType({"window": float(spec.sliding_window or 0) if window else 0.0})
    out = block.add(
        "attention", "attention", "heads", (q, keys, values), "BTKGD", whole="SD", attrs=attrs
    )
    return block.linear("o", "o", out, "BTH", "KGDH")


def _mla(block: _Template, spec: ModelSpec, source: str, phase: Phase) -> str:
    mla = spec.mla
    query, reads = source, "H"
    if mla is not None and mla.q_lora_rank is not None:
        down = block.linear("q_a", "latent", source, "BTQ", "HQ", fuse="qkv_a")
        query, reads = block.norm("q_a_norm", "latent", down, "Q"), "Q"
    qn = block.linear("q_nope", "heads", query, "BTKN", reads + "KN", fuse="q_b")
    qr = block.linear("q_pe", "heads", query, "BTKR", reads + "KR", fuse="q_b")
    c = block.linear("kv_a", "latent", source, "BTC", "HC", fuse="qkv_a")
    c = block.norm("kv_a_norm", "latent", c, "C")
    r = block.linear("k_pe", "latent", source, "BTR", "HR", fuse="qkv_a")
    qr = block.add("q_pe_rope", "rope", "heads", (qr,), "BTKR", whole="R")
    r = block.add("k_pe_rope", "rope", "latent", (r,), "BTR", whole="R")
    latent = _cache(block, "latent_cache", "latent", c, "BSC", phase)
    rotary = _cache(block, "rotary_cache", "latent", r, "BSR", phase)
    absorbed = {"weight_class": "absorbed"}
    if phase == "prefill":
        keys = block.linear("k_up", "heads", latent, "BSKN", "CKN", fuse="kv_b", **absorbed)
        values = block.linear("v_up", "heads", latent, "BSKD", "CKD", fuse="kv_b", **absorbed)
        read = (qn, qr, keys, rotary, values)
        out = block.add("attention", "mla_attention", "heads", read, "BTKD", whole="SNRD")
    else:
        ql = block.linear("q_absorb", "heads", qn, "BTKC", "CKN", param="k_up", **absorbed)
        seen = (ql, qr, latent, rotary)
        ol = block.add("attention", "mla_absorbed", "heads", seen, "BTKC", whole="SCR")
        out = block.linear("o_absorb", "heads", ol, "BTKD", "CKD", param="v_up", **absorbed)
    return block.linear("o", "o", out, "BTH", "KDH")


def _ffn(block: _Template, source: str, *, role: str, prefix: str, width: str, bias: bool) -> str:
    """A gated feed-forward network of width dim `width`."""
    fuse = f"{prefix}gate_up"
    gate = block.linear(f"{prefix}gate", role, source, f"BT{width}", f"H{width}", fuse=fuse)
    up = block.linear(f"{prefix}up", role, source, f"BT{width}", f"H{width}", fuse=fuse)
    if bias:
        gate, up = block.bias(role, gate), block.bias(role, up)
    act = block.add(f"{prefix}act", "swiglu", role, (gate, up), f"BT{width}")
    return block.linear(f"{prefix}down", role, act, "BTH", f"{width}H")


def _experts(block: _Template, spec: ModelSpec, source: str) -> str:
    moe = spec.moe
    if moe is None:
        return source
    density = moe.experts_per_token / moe.experts
    attrs = MappingProxyType(
        {
            "topk": float(moe.experts_per_token),
            "softmax": float(moe.scoring == "softmax"),
            "normalise": float(moe.normalise_topk),
            "groups": float(moe.expert_groups),
        }
    )
    scores = block.linear("router", "router", source, "BTE", "HE", weight_class="small")
    bias = {"weight": "E", "weight_class": "small"} if moe.router_bias else {}
    gates = block.add("topk", "topk", "router", (scores,), "BTE", whole="E", attrs=attrs, **bias)
    sent = block.add("dispatch", "dispatch", "dispatch", (source, gates), "EBTH", density=density)
    more = {"weight_class": "expert", "density": density, "attrs": attrs}
    gate = block.linear("e_gate", "expert", sent, "EBTI", "EHI", fuse="e_gate_up", **more)
    up = block.linear("e_up", "expert", sent, "EBTI", "EHI", fuse="e_gate_up", **more)
    act = block.add("e_act", "swiglu", "expert", (gate, up), "EBTI", density=density)
    down = block.linear("e_down", "expert", act, "EBTH", "EIH", **more)
    routed = block.add(
        "combine", "combine", "combine", (down, gates), "BTH", contract="E", linear=(0,)
    )
    if not moe.shared_ffn:
        return routed
    shared = _ffn(block, source, role="shared", prefix="s_", width="X", bias=False)
    if moe.shared_gate:
        gate = block.linear("s_switch", "router", source, "BTL", "HL", weight_class="small")
        shared = block.add("s_gated", "gate", "token", (shared, gate), "BTH", linear=(0,))
    return block.add("moe_sum", "add", "moe_sum", (routed, shared), "BTH", linear=(0, 1))


def _decoder(block: _Template, spec: ModelSpec, name: str, phase: Phase, source: str) -> str:
    """One decoder layer of kind `name` on `source`."""
    normed = block.norm("norm1", "token", source, "H")
    window = name.startswith("sliding_")
    if spec.mla:
        mixed = _mla(block, spec, normed, phase)
    else:
        mixed = _gqa(block, spec, normed, window, phase)
    if spec.o_bias:
        mixed = block.bias("token", mixed)
    if spec.sandwich_norms:
        mixed = block.norm("norm1_post", "token", mixed, "H")
    first = block.add("add1", "add", "token", (source, mixed), "BTH", linear=(0, 1))
    normed = block.norm("norm2", "token", first, "H")
    if name.endswith("moe"):
        fed = _experts(block, spec, normed)
    else:
        fed = _ffn(block, normed, role="ffn", prefix="", width="F", bias=spec.mlp_bias)
    if spec.mlp_bias and not name.endswith("moe"):
        fed = block.bias("token", fed)
    if spec.sandwich_norms:
        fed = block.norm("norm2_post", "token", fed, "H")
    return block.add("add2", "add", "token", (first, fed), "BTH", linear=(0, 1))


def _layer(spec: ModelSpec, name: str, phase: Phase) -> Block:
    block = _Template(name, tuple("BTH"))
    return block.block(_decoder(block, spec, name, phase, "x"))


def _prediction(spec: ModelSpec, name: str, phase: Phase) -> Block:
    """The prediction layer: hidden states `x` and the tokens after them, `ids`."""
    block = _Template("mtp", tuple("BTH"))
    ids = block.add("ids", "input", "input", (), "BT")
    hidden = block.norm("hnorm", "token", "x", "H")
    token = block.add(
        "embedding",
        "embedding",
        "embedding",
        (ids,),
        "BTH",
        contract="V",
        weight="VH",
        weight_class="embedding",
        shared=True,
    )
    token = block.norm("enorm", "token", token, "H")
    both = block.add("concat", "concat", "token", (hidden, token), "BTU")
    # engines keep this product in 16 bits and whole on each rank (vLLM deepseek_mtp.py: nn.Linear)
    joined = block.linear("eh_proj", "token", both, "BTH", "UH", weight_class="small")
    return block.block(_decoder(block, spec, name, phase, joined))


def _prediction_head(tied: bool) -> Block:
    """Logits of the token that follows the last one, in both phases."""
    block = _Template("mtp_head", tuple("BTH"))
    source = block.add("select", "select", "token", ("x",), "BLH", whole="T")
    source = block.norm("mtp_norm", "token", source, "H")
    more = {"param": "embedding"} if tied else {}
    head = block.linear(
        "lm_head", "head", source, "BLV", "VH" if tied else "HV", weight_class="embedding", **more
    )
    return block.block(head)


def _embed() -> Block:
    block = _Template("embed", tuple("BT"))
    return block.block(
        block.add(
            "embedding",
            "embedding",
            "embedding",
            ("x",),
            "BTH",
            contract="V",
            weight="VH",
            weight_class="embedding",
        )
    )


def _head(phase: Phase, tied: bool) -> Block:
    block = _Template("head", tuple("BTH"))
    source = block.norm("final_norm", "token", "x", "H")
    if phase == "prefill":
        source = block.add("select", "select", "select", (source,), "BLH", whole="T")
    dims = "BLV" if phase == "prefill" else "BTV"
    more = {"param": "embedding"} if tied else {}
    head = block.linear(
        "lm_head", "head", source, dims, "VH" if tied else "HV", weight_class="embedding", **more
    )
    return block.block(head)


def _sizes(spec: ModelSpec) -> dict[str, int]:
    """Elements of the fixed dims."""
    sizes = {"H": spec.hidden, "V": spec.vocab, "K": spec.kv_heads, "D": spec.head_dim}
    sizes |= {"G": spec.queries_per_kv, "F": spec.ffn, "L": 1}
    if spec.mla is not None:
        mla = spec.mla
        sizes |= {"K": spec.heads, "C": mla.kv_lora_rank, "N": mla.qk_nope_head_dim}
        sizes |= {"R": mla.qk_rope_head_dim, "D": mla.v_head_dim}
        if mla.q_lora_rank is not None:
            sizes["Q"] = mla.q_lora_rank
        del sizes["G"]
    if spec.moe is not None:
        sizes |= {"E": spec.moe.experts, "I": spec.moe.ffn}
        if spec.moe.shared_ffn:
            sizes["X"] = spec.moe.shared_ffn
    return sizes


def _layer_names(spec: ModelSpec) -> tuple[str, ...]:
    """Template of each layer: dense prefix first; sliding layers spread evenly among full ones."""
    names = []
    for layer in range(spec.layers):
        kind = "dense" if layer < spec.dense_layers else "moe"
        before = layer * spec.sliding_layers // spec.layers
        after = (layer + 1) * spec.sliding_layers // spec.layers
        names.append(f"sliding_{kind}" if after > before else kind)
    return tuple(names)


def build_graph(spec: ModelSpec, phase: Phase, *, mtp: bool = False) -> ModelGraph:
    """The folded graph of `spec` in `phase`, with its prediction layer where `mtp` asks for it.

    Prefill takes T new tokens a sequence and yields the logits of the last one; decode takes T
    tokens (one, or more with speculation) against a cache of S and yields the logits of each.
    `LayoutError` where a model without a prediction layer is asked for one.
    """
    if mtp and not spec.mtp_layers:
        raise LayoutError(
            "only a model that ships a prediction layer predicts tokens ahead",
            got=f"model={spec.name}, mtp_layers=0",
            hint="use mtp=0",
        )
    return _build(spec, phase, mtp)


@functools.lru_cache(maxsize=64)
def _build(spec: ModelSpec, phase: Phase, mtp: bool) -> ModelGraph:
    layers = _layer_names(spec)
    blocks: Mapping[str, Block] = {
        "embed": _embed(),
        **{name: _layer(spec, name, phase) for name in dict.fromkeys(layers)},
        "head": _head(phase, spec.tied_embeddings),
    }
    sizes = _sizes(spec)
    if mtp:
        sizes["U"] = 2 * spec.hidden
        ahead = {"mtp": _prediction(spec, layers[-1], phase)}
        blocks = {**blocks, **ahead, "mtp_head": _prediction_head(spec.tied_embeddings)}
    return ModelGraph(
        spec=spec,
        phase=phase,
        sizes=MappingProxyType(sizes),
        blocks=MappingProxyType(dict(blocks)),
        layers=layers,
    )
