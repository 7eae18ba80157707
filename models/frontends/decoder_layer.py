"""One layer of a decoder in a captured graph: products with weights by role, and their sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardplan.models.errors import InputError
from shardplan.models.opgraph import Operator, OpGraph
from shardplan.models.opsources import Wiring, columns, rows
from shardplan.models.spec import MlaSpec, MoeSpec

__all__ = ["Experts", "Layer", "layer_of", "lost", "made_by"]

_HINT = "give the model's config.json, or search the graph at operator level"


def lost(graph: OpGraph, what: str, got: str = "") -> InputError:
    """A refusal that says what was not recognised."""
    found = f"model={graph.name}" + (f", {got}" if got else "")
    return InputError(f"not recognised as a causal decoder: {what}", got=found, hint=_HINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Routed experts of a layer."""

    experts: int
    experts_per_token: int
    ffn: int
    shared_ffn: int
    shared_gate: bool
    sigmoid: bool
    normalised: bool
    router_bias: bool

    def spec(self, dense_layers: int) -> MoeSpec:
        """The same in a model with so many dense layers before."""
        return MoeSpec(
            experts=self.experts,
            experts_per_token=self.experts_per_token,
            ffn=self.ffn,
            shared_ffn=self.shared_ffn,
            shared_gate=self.shared_gate,
            dense_layers=dense_layers,
            scoring="sigmoid" if self.sigmoid else "softmax",
            normalise_topk=self.normalised,
            router_bias=self.router_bias,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Sizes of one layer, elements."""

    number: int
    heads: int
    kv_heads: int
    head_dim: int
    mla: MlaSpec | None
    ffn: int
    """Width of the dense feed-forward network, 0 where there are experts."""
    moe: Experts | None
    biases: tuple[bool, bool, bool]
    """Of the projections before attention, of the one after, of the feed-forward network."""
    norms: tuple[int, ...]
    """Elements of every scale of a norm."""
    dtype: str

    @property
    def mixer(self) -> tuple[object, ...]:
        """What the attentions of all layers have in common."""
        return (self.heads, self.kv_heads, self.head_dim, self.mla, self.biases[:2], self.norms)


def made_by(wiring: Wiring, tensor: str) -> Operator | None:
    """The operator that gives a tensor, None for inputs and parameters."""
    return wiring.made.get(tensor)


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """The products with weights of one layer."""

    inputs: list[Operator]
    output: list[Operator]
    rest: list[Operator]


def layer_of(wiring: Wiring, attention: Operator, hidden: int) -> Layer:
    """The layer that an attention stands in; `InputError` where its parts are not recognised."""
    graph = wiring.graph
    attrs = {name: value for name, value in attention.attrs.items() if not isinstance(value, str)}
    heads, kv, dim, value = (
        int(attrs[name]) for name in ("heads", "kv_heads", "head_dim", "value_dim")
    )
    parts = _parts(wiring, attention)
    mla = _latent(wiring, attention, parts, hidden)
    if mla is None:
        if not kv or value != dim:
            raise lost(graph, "kv heads that divide the heads, values as wide as keys")
        wanted = (heads + 2 * kv) * dim
        if sum(map(columns, parts.inputs)) != wanted or {*map(rows, parts.inputs)} != {hidden}:
            raise lost(graph, f"projections of {hidden} to {wanted} elements before attention")
    if [(rows(one), columns(one)) for one in parts.output] != [(heads * value, hidden)]:
        raise lost(graph, f"one projection of {heads * value} to {hidden} elements after attention")
    moe = _experts(wiring, attention.layer, parts, hidden)
    vectors = _vectors(wiring, attention.layer)
    fed = parts.rest if moe is None else []
    first = wiring.weight(parts.output[0])
    return Layer(
        number=attention.layer,
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        mla=mla,
        ffn=_ffn(graph, fed, hidden) if moe is None else 0,
        moe=moe,
        biases=(
            _biased(wiring, parts.inputs),
            _biased(wiring, parts.output),
            _biased(wiring, fed),
        ),
        norms=tuple(sorted(vectors)),
        dtype="" if first is None else first.dtype,
    )


def _parts(wiring: Wiring, attention: Operator) -> _Parts:
    before = wiring.before(attention)
    behind = {write.tensor for write in attention.writes}
    parts = _Parts([], [], [])
    for one in wiring.layers[attention.layer]:
        reached = any(name in behind for name in one.inputs)
        behind |= {write.tensor for write in one.writes} if reached else set()
        if wiring.weight(one) is None:
            continue
        if one.name in before:
            parts.inputs.append(one)
        elif reached and not parts.output:
            parts.output.append(one)
        else:
            parts.rest.append(one)
    return parts


def _latent(wiring: Wiring, attention: Operator, parts: _Parts, hidden: int) -> MlaSpec | None:
    """Multi-head latent attention, None for projections from the hidden state alone."""
    latent = wiring.latent(attention)
    if latent is None:
        return None
    graph, attrs = wiring.graph, attention.attrs
    heads, dim, value = (int(attrs[name]) for name in ("heads", "head_dim", "value_dim"))
    nope = dim - latent.rotary
    (query,) = wiring.sources([attention.inputs[0]])[:1] or (None,)
    if query is None or columns(query) != heads * dim or rows(latent.down) != hidden:
        raise lost(graph, f"one projection to {heads * dim} elements of queries")
    known = {query.name, latent.up.name, latent.down.name}
    others = [one for one in parts.inputs if one.name not in known]
    rank = None if rows(query) == hidden and not others else rows(query)
    down = [(rows(one), columns(one)) for one in others]
    if down != ([] if rank is None else [(hidden, rank)]) or columns(latent.up) != heads * (
        nope + value
    ):
        raise lost(graph, "the projections of latent attention", f"others={down}")
    return MlaSpec(
        q_lora_rank=rank,
        kv_lora_rank=rows(latent.up),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=latent.rotary,
        v_head_dim=value,
    )


def _ffn(graph: OpGraph, products: list[Operator], hidden: int) -> int:
    """Width of a gated feed-forward network: as much goes in twice as comes out."""
    into = sum(columns(one) for one in products if rows(one) == hidden)
    out = [rows(one) for one in products if columns(one) == hidden and rows(one) != hidden]
    if len(out) != 1 or into != 2 * out[0]:
        sizes = ", ".join(f"{rows(one)}x{columns(one)}" for one in products)
        raise lost(graph, "a gated feed-forward network", f"products={sizes or 'none'}")
    return out[0]


def _experts(wiring: Wiring, layer: int, parts: _Parts, hidden: int) -> Experts | None:
    """The routed experts of a layer: grouped products, a router, and what stands beside them."""
    graph = wiring.graph
    routed = [one for one in parts.rest if one.kind == "grouped_matmul"]
    if not routed:
        return None
    inside = wiring.layers[layer]
    experts = int(routed[0].attrs["experts"])
    routers = [
        one
        for one in parts.rest
        if one.kind == "matmul" and (rows(one), columns(one)) == (hidden, experts)
    ]
    gates = [one for one in parts.rest if one.kind == "matmul" and columns(one) == 1]
    shared = [one for one in parts.rest if one.kind == "matmul" and one not in routers + gates]
    picks = [one for one in inside if one.kind == "topk"]
    if len(routers) != 1 or len(gates) > 1 or not picks:
        raise lost(graph, f"one router of {hidden} to {experts} elements", f"found={len(routers)}")
    tokens = math.prod(graph.tensors[routers[0].writes[0].tensor].shape[:-1])
    score = {str(one.attrs.get("torch")) for one in inside if one.name in wiring.before(picks[0])}
    return Experts(
        experts=experts,
        experts_per_token=routed[0].loops["m"].size // tokens,
        ffn=_ffn(graph, routed, hidden),
        shared_ffn=_ffn(graph, shared, hidden) if shared else 0,
        shared_gate=bool(gates),
        sigmoid="sigmoid" in score and "softmax" not in score,
        normalised=any(one.attrs.get("torch") == "div" and len(one.inputs) > 1 for one in inside),
        router_bias=any(_adds(wiring, one) == experts for one in inside),
    )


def _biased(wiring: Wiring, products: list[Operator]) -> bool:
    """Whether vectors are added to all of the products; some but not all is refused."""
    named = {one.writes[0].tensor: columns(one) for one in products}
    added = {
        name
        for product in products
        for one in wiring.layers[product.layer]
        for name in one.inputs
        if name in named and _adds(wiring, one) == named[name]
    }
    if added and len(added) != len(named):
        raise lost(wiring.graph, "biases on all projections of a kind or on none")
    return bool(added)


def _adds(wiring: Wiring, one: Operator) -> int:
    """Elements of the vector that an operator adds, 0 where it adds none."""
    return _vector(wiring, one) if _named(one) == "add" else 0


def _named(one: Operator) -> str:
    """What its source calls an operator."""
    return str(one.attrs.get("torch") or one.attrs.get("onnx") or "").lower()


def _vector(wiring: Wiring, one: Operator) -> int:
    """Elements of the parameter that an operator reads beside its input, 0 for none."""
    read = [wiring.graph.tensors[name] for name in one.inputs]
    found = [tensor for tensor in read if tensor.kind == "parameter"]
    return found[0].elements if len(found) == 1 and len(found[0].shape) == 1 else 0


def _vectors(wiring: Wiring, layer: int) -> list[int]:
    """Elements of each scale of a norm in a layer."""
    scaled = (one for one in wiring.layers[layer] if one.kind == "norm" or _named(one) == "mul")
    return [size for one in scaled if (size := _vector(wiring, one))]
