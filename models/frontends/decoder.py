"""A captured graph recognised as a causal decoder: its `ModelSpec`, or what was not recognised.

What is looked for: one embedding table, layers of one causal attention each, of equal sizes, and of
a gated feed-forward network or of routed experts behind a dense prefix, root-mean-square norms, an
output head. Roles follow from the wiring: what an attention reads comes from the projections of
queries, keys and values; the first product after it is the output projection; keys and values that
come from one latent are multi-head latent attention. At the end the parameters of the recognised
model must be those of the graph, to the element: whatever was overlooked is refused there.
"""

from __future__ import annotations

from typing import Literal

from shardplan.models.counts import parameter_count
from shardplan.models.frontends.decoder_layer import Layer, layer_of, lost, made_by
from shardplan.models.opgraph import Operator, OpGraph
from shardplan.models.opsources import Wiring, columns, rows
from shardplan.models.spec import CheckpointDtype, MlaSpec, ModelSpec, MoeSpec

__all__ = ["decoder_of"]

_DTYPES: dict[str, CheckpointDtype] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def decoder_of(graph: OpGraph) -> ModelSpec:
    """The sizes of a causal decoder; `InputError` that says what was not recognised."""
    wiring = Wiring(graph)
    table, hidden, vocab = _embedding(graph)
    layers = _layers(wiring, hidden)
    first = layers[0]
    moe = _experts(graph, layers)
    dense = next((one.ffn for one in layers if one.moe is None), None)
    spec = ModelSpec(
        name=graph.name,
        architecture=_like(first, moe),
        hidden=hidden,
        layers=graph.layers,
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        ffn=dense or (moe.ffn if moe is not None else 0),
        vocab=vocab,
        tied_embeddings=_head_is_tied(wiring, table, hidden, vocab),
        qkv_bias=first.biases[0],
        o_bias=first.biases[1],
        mlp_bias=layers[0].biases[2] if moe is None else False,
        qk_norm=_qk_norm(first, hidden),
        sandwich_norms=first.norms.count(hidden) >= 4,
        mla=first.mla,
        moe=moe,
        dtype=_dtype(graph, first),
        source=graph.source,
        extra=("sizes recognised in a graph; architecture names the class of this structure",),
    )
    if parameter_count(spec) != graph.parameters:
        raise lost(
            graph,
            "every parameter",
            f"recognised={parameter_count(spec)}, in the graph={graph.parameters}",
        )
    return spec


def _embedding(graph: OpGraph) -> tuple[str, int, int]:
    """(table, hidden, vocabulary)"""
    found = [one for one in graph.of_kind("embedding") if one.layer < 0]
    if len(found) != 1:
        raise lost(graph, "one embedding table", f"tables={len(found)}")
    table = found[0].inputs[0]
    vocab, hidden = graph.tensors[table].shape
    return table, hidden, vocab


def _layers(wiring: Wiring, hidden: int) -> list[Layer]:
    """The layers that are present, first to last."""
    graph = wiring.graph
    attentions = list(graph.of_kind("attention"))
    total = sum(graph.times(one.layer) for one in attentions if one.layer >= 0)
    present = {one.layer for one in attentions if one.layer >= 0}
    if not attentions or graph.layers != total or len(present) != len(attentions):
        raise lost(
            graph,
            "equal layers of one attention each",
            f"equal blocks={graph.layers}, attentions={total}",
        )
    if not all(one.attrs["causal"] for one in attentions):
        raise lost(graph, "attention that is causal", f"attention={attentions[0].name}")
    layers = [layer_of(wiring, one, hidden) for one in attentions]
    if len({one.mixer for one in layers}) > 1:
        raise lost(graph, "layers whose attentions have equal sizes")
    if len({one.ffn for one in layers if one.moe is None}) > 1:
        raise lost(graph, "feed-forward networks of equal sizes")
    return layers


def _experts(graph: OpGraph, layers: list[Layer]) -> MoeSpec | None:
    """The routed experts: equal in all layers behind a dense prefix."""
    found = [one for one in layers if one.moe is not None]
    if not found:
        return None
    if len({one.moe for one in found}) > 1 or found != layers[-len(found) :]:
        raise lost(graph, "equal experts in all layers behind a dense prefix")
    dense = sum(graph.times(one.number) for one in layers if one.moe is None)
    moe = found[0].moe
    return None if moe is None else moe.spec(dense)


def _dtype(graph: OpGraph, layer: Layer) -> CheckpointDtype:
    dtype = _DTYPES.get(layer.dtype)
    if dtype is None:
        raise lost(graph, "floating-point weights", f"dtype={layer.dtype}")
    return dtype


def _qk_norm(layer: Layer, hidden: int) -> Literal["none", "head", "full"]:
    """Norms of queries and keys beside those of the layer."""
    if layer.mla is not None:
        return "none"
    query, key = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    extra = list(layer.norms)
    for _ in range(min(2, extra.count(hidden))):
        extra.remove(hidden)
    if sorted(extra) == [layer.head_dim] * 2:
        return "head"
    return "full" if sorted(extra) == sorted((query, key)) and key != hidden else "none"


def _like(layer: Layer, moe: MoeSpec | None) -> str:
    """The Hugging Face class whose layers have this structure."""
    if isinstance(layer.mla, MlaSpec):
        biased = moe is not None and moe.router_bias
        return "DeepseekV3ForCausalLM" if biased else "DeepseekV2ForCausalLM"
    heads = layer.norms.count(layer.head_dim) >= 2
    if moe is not None:
        return "Qwen3MoeForCausalLM" if heads else "MixtralForCausalLM"
    if heads:
        return "Qwen3ForCausalLM"
    return "Qwen2ForCausalLM" if layer.biases[0] else "LlamaForCausalLM"


def _head_is_tied(wiring: Wiring, table: str, hidden: int, vocab: int) -> bool:
    graph = wiring.graph
    heads = [
        one
        for one in graph.of_kind("matmul")
        if one.layer < 0
        and {"k", "n"} <= one.loops.keys()
        and (rows(one), columns(one)) == (hidden, vocab)
    ]
    if len(heads) != 1:
        raise lost(graph, f"one output head of {hidden} to {vocab} elements", f"found={len(heads)}")
    weight = heads[0].inputs[1]
    maker: Operator | None = made_by(wiring, weight)
    return weight == table or (maker is not None and table in maker.inputs)
