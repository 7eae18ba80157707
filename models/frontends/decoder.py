"""A captured graph recognised as a causal decoder: its `ModelSpec`, or what was not recognised.

What is looked for: one embedding table, equal layers of one causal attention and one gated
feed-forward network each, root-mean-square norms, an output head. Roles follow from the wiring:
what an attention reads comes from the projections of queries, keys and values; the first product
after it is the output projection. At the end the parameters of the recognised model must be those
of the graph, to the element: whatever was overlooked is refused there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from shardplan.models.counts import parameter_count
from shardplan.models.errors import InputError
from shardplan.models.opgraph import Operator, OpGraph
from shardplan.models.spec import CheckpointDtype, ModelSpec

__all__ = ["decoder_of"]

_DTYPES: dict[str, CheckpointDtype] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_HINT = "give the model's config.json, or search the graph at operator level"


@dataclass(slots=True, eq=False)
class _Layer:
    """The products with weights of one layer, by role."""

    attention: Operator
    inputs: list[Operator] = field(default_factory=list)
    output: list[Operator] = field(default_factory=list)
    rest: list[Operator] = field(default_factory=list)


def decoder_of(graph: OpGraph) -> ModelSpec:
    """The sizes of a causal decoder; `InputError` that says what was not recognised."""
    made = graph.producers()
    table, hidden, vocab = _embedding(graph)
    layer = _first_layer(graph, made)
    attrs = {key: int(value) for key, value in layer.attention.attrs.items() if key != "onnx"}
    heads, kv, dim = attrs["heads"], attrs["kv_heads"], attrs["head_dim"]
    if not kv or attrs["value_dim"] != dim:
        raise _lost(graph, "attention with kv heads that divide the heads, values as wide as keys")
    wanted = (heads + 2 * kv) * dim
    if sum(map(_columns, layer.inputs)) != wanted or {_rows(m) for m in layer.inputs} != {hidden}:
        raise _lost(graph, f"projections of {hidden} to {wanted} elements before attention")
    if [(_rows(m), _columns(m)) for m in layer.output] != [(heads * dim, hidden)]:
        raise _lost(graph, f"one projection of {heads * dim} to {hidden} elements after attention")
    ffn = _ffn(graph, layer, hidden)
    biases = [_biased(graph, part) for part in (layer.inputs, layer.output, layer.rest)]
    norms = _norms(graph, layer.attention.layer)
    first = layer.output[0].reads[1].tensor
    dtype = _DTYPES.get(graph.tensors[first].dtype)
    if dtype is None:
        raise _lost(graph, "floating-point weights", f"{first}: {graph.tensors[first].dtype}")
    qk = _qk_norm(norms, heads * dim, kv * dim, dim, hidden)
    spec = ModelSpec(
        name=graph.name,
        architecture=_like(biases[0], qk),
        hidden=hidden,
        layers=graph.layers,
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        ffn=ffn,
        vocab=vocab,
        tied_embeddings=_head_is_tied(graph, made, table, hidden, vocab),
        qkv_bias=biases[0],
        o_bias=biases[1],
        mlp_bias=biases[2],
        qk_norm=qk,
        sandwich_norms=norms.count(hidden) >= 4,
        dtype=dtype,
        source=graph.source,
        extra=("sizes recognised in a graph; architecture names the class of this structure",),
    )
    if parameter_count(spec) != graph.parameters:
        raise _lost(
            graph,
            "every parameter",
            f"recognised={parameter_count(spec)}, in the graph={graph.parameters}",
        )
    return spec


def _lost(graph: OpGraph, what: str, got: str = "") -> InputError:
    found = f"model={graph.name}" + (f", {got}" if got else "")
    return InputError(f"not recognised as a causal decoder: {what}", got=found, hint=_HINT)


def _rows(product: Operator) -> int:
    return product.loops["k"].size


def _columns(product: Operator) -> int:
    return product.loops["n"].size


def _weighted(graph: OpGraph, one: Operator) -> bool:
    """Whether an operator is a product with a weight of two dims."""
    if one.kind != "matmul" or len(one.reads) < 2 or not {"k", "n"} <= one.loops.keys():
        return False
    return graph.tensors[one.inputs[1]].kind == "parameter"


def _embedding(graph: OpGraph) -> tuple[str, int, int]:
    """(table, hidden, vocabulary)"""
    found = [one for one in graph.of_kind("embedding") if one.layer < 0]
    if len(found) != 1:
        raise _lost(graph, "one embedding table", f"tables={len(found)}")
    table = found[0].inputs[0]
    vocab, hidden = graph.tensors[table].shape
    return table, hidden, vocab


def _first_layer(graph: OpGraph, made: dict[str, Operator]) -> _Layer:
    attentions = list(graph.of_kind("attention"))
    if not attentions or graph.layers != len(attentions):
        raise _lost(
            graph,
            "equal layers of one attention each",
            f"equal blocks={graph.layers}, attentions={len(attentions)}",
        )
    if not all(one.attrs["causal"] for one in attentions):
        raise _lost(graph, "attention that is causal", f"attention={attentions[0].name}")
    layer = _Layer(attentions[0])
    before = set(_sources(graph, made, layer.attention))
    behind = {layer.attention.name}
    for one in graph.operators:
        if any(n in made and made[n].name in behind for n in one.inputs):
            behind.add(one.name)
        if one.layer != layer.attention.layer or not _weighted(graph, one):
            continue
        if one.name in before:
            layer.inputs.append(one)
        elif one.name in behind and not layer.output:
            layer.output.append(one)
        else:
            layer.rest.append(one)
    return layer


def _sources(graph: OpGraph, made: dict[str, Operator], one: Operator) -> Iterator[str]:
    """The nearest products with weights from which an operator's inputs come."""
    waiting, seen = [name for name in one.inputs if name in made], set[str]()
    while waiting:
        maker = made[waiting.pop()]
        if maker.name in seen:
            continue
        seen.add(maker.name)
        if _weighted(graph, maker):
            yield maker.name
        else:
            waiting += [name for name in maker.inputs if name in made]


def _ffn(graph: OpGraph, layer: _Layer, hidden: int) -> int:
    """Width of a gated feed-forward network: as much goes in twice as comes out."""
    into = sum(_columns(one) for one in layer.rest if _rows(one) == hidden)
    out = [_rows(one) for one in layer.rest if _columns(one) == hidden and _rows(one) != hidden]
    if len(out) != 1 or into != 2 * out[0]:
        sizes = ", ".join(f"{_rows(one)}x{_columns(one)}" for one in layer.rest)
        raise _lost(graph, "a gated feed-forward network", f"products={sizes or 'none'}")
    return out[0]


def _biased(graph: OpGraph, products: list[Operator]) -> bool:
    """Whether vectors are added to all of the products; some but not all is refused."""
    added = [
        any(
            one.attrs.get("onnx") == "Add"
            and product.writes[0].tensor in one.inputs
            and _vector(graph, one) == _columns(product)
            for one in graph.operators
        )
        for product in products
    ]
    if any(added) != all(added):
        raise _lost(graph, "biases on all projections of a kind or on none")
    return any(added)


def _vector(graph: OpGraph, one: Operator) -> int:
    """Elements of the parameter that an operator reads beside its input, 0 for none."""
    found = [graph.tensors[n] for n in one.inputs if graph.tensors[n].kind == "parameter"]
    return found[0].elements if len(found) == 1 and len(found[0].shape) == 1 else 0


def _norms(graph: OpGraph, layer: int) -> list[int]:
    """Elements of each scale of a norm in a layer."""
    scaled = (
        one
        for one in graph.operators
        if one.layer == layer and (one.kind == "norm" or one.attrs.get("onnx") == "Mul")
    )
    return [size for one in scaled if (size := _vector(graph, one))]


def _qk_norm(
    norms: list[int], query: int, key: int, dim: int, hidden: int
) -> Literal["none", "head", "full"]:
    """Norms of queries and keys beside the two of the layer."""
    extra = list(norms)
    for _ in range(min(2, norms.count(hidden))):
        extra.remove(hidden)
    if sorted(extra) == [dim, dim]:
        return "head"
    return "full" if sorted(extra) == sorted((query, key)) and key != hidden else "none"


def _like(qkv_bias: bool, qk_norm: str) -> str:
    """The Hugging Face class whose layers have this structure."""
    if qk_norm == "head":
        return "Qwen3ForCausalLM"
    return "Qwen2ForCausalLM" if qkv_bias else "LlamaForCausalLM"


def _head_is_tied(
    graph: OpGraph, made: dict[str, Operator], table: str, hidden: int, vocab: int
) -> bool:
    heads = [
        one
        for one in graph.of_kind("matmul")
        if one.layer < 0 and "n" in one.loops and (_rows(one), _columns(one)) == (hidden, vocab)
    ]
    if len(heads) != 1:
        raise _lost(
            graph, f"one output head of {hidden} to {vocab} elements", f"found={len(heads)}"
        )
    weight = heads[0].inputs[1]
    return weight == table or (weight in made and table in made[weight].inputs)
