"""What each operator computes, in numpy float64 over named dims.

Arrays are [*mesh, *dims]; mesh axes are lower-case letters and named dims upper-case ones in
einsum, so one expression serves every layout. Nothing here knows about layouts: an operator that
is given the wrong shard gives the wrong answer, which is what the proof is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from shardplan.models.apply import Layout, ShardedOp
from shardplan.models.errors import ProofError
from shardplan.models.graph import ModelGraph, Op
from shardplan.models.kvcache import Places
from shardplan.models.parallel import Mesh
from shardplan.models.weights import Array

__all__ = ["KERNELS", "Call", "own_part"]


def own_part(layout: Layout, dim: str, mesh: Mesh) -> Places:
    """Which part of a dim each rank holds, `[*mesh]` with 1 for axes that do not cut it."""
    own = np.zeros([1] * len(mesh.shape), dtype=np.int64)
    for axis, where in layout:
        if where == dim:
            lead = mesh.axes.index(axis)
            ways = mesh.shape[lead]
            steps = np.arange(ways).reshape([-1 if i == lead else 1 for i in range(own.ndim)])
            own = own * ways + steps
    return own


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operator on all ranks of a stage."""

    node: ShardedOp
    op: Op
    graph: ModelGraph
    mesh: Mesh
    inputs: tuple[Array, ...]
    input_dims: tuple[tuple[str, ...], ...]
    weight: Array | None
    past: int
    """Tokens cached before this call."""
    held: Array | None
    """The operator's own cache, before this call."""
    source: Places | None = None
    """Of a cache: where each slot's entry comes from, `[*mesh, slots]` (`kvcache.Slots`)."""
    keys_at: Places | None = None
    """Of attention: positions of the keys, `[*mesh, keys]`, -1 where there is none."""

    @property
    def lead(self) -> int:
        """Leading mesh axes."""
        return len(self.mesh.shape)

    def ein(self, expression: str, *arrays: Array) -> Array:
        """An einsum over named dims; the mesh axes are put in front of every term."""
        mesh = "abcdefghijklmnop"[: self.lead]
        left, right = expression.split("->")
        terms = ",".join(mesh + term for term in left.split(","))
        result: Array = np.einsum(f"{terms}->{mesh}{right}", *arrays, optimize=True)
        return result

    def tokens_at(self, tokens: int) -> Places:
        """Positions of this operator's new tokens, `[*mesh, tokens]`."""
        first = own_part(self.node.layout, "T", self.mesh)[..., None] * tokens
        return np.asarray(self.past + first + np.arange(tokens))

    def own_weight(self) -> Array:
        """The parameter; `ProofError` where the operator has none."""
        if self.weight is None:
            raise ProofError("an operator has no parameter", got=self.op.name)
        return self.weight


def _embedding(call: Call) -> Array:
    weight = call.own_weight()
    mesh, rows = call.mesh, weight.shape[call.lead]
    own = own_part(call.node.weight_layout, "V", mesh)
    offset = (own * rows)[..., None, None, None]
    hot = call.inputs[0][..., None] == np.arange(rows) + offset
    return call.ein("BTV,VH->BTH", hot.astype(np.float64), weight)


def _matmul(call: Call) -> Array:
    weight = "".join(call.op.weight)
    out = "".join(call.op.dims)
    given = "".join(call.input_dims[0])
    return call.ein(f"{given},{weight}->{out}", call.inputs[0], call.own_weight())


def _over(call: Call, dims: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(call.lead + call.input_dims[0].index(d) for d in dims)


def _spread_weight(call: Call) -> Array:
    weight = call.own_weight()
    sizes = dict(zip(call.op.weight, weight.shape[call.lead :], strict=True))
    return weight.reshape(*call.mesh.shape, *(sizes.get(d, 1) for d in call.op.dims))


def _rmsnorm(call: Call) -> Array:
    x = call.inputs[0]
    mean = np.mean(x * x, axis=_over(call, call.op.whole), keepdims=True)
    normed: Array = x / np.sqrt(mean + call.graph.spec.norm_eps) * _spread_weight(call)
    return normed


def _sumsq(call: Call) -> Array:
    x = call.inputs[0]
    total: Array = np.sum(x * x, axis=_over(call, call.op.contract))
    return total


def _scale(call: Call) -> Array:
    x, stat = call.inputs
    count = call.graph.size(call.op.weight)
    stat = stat.reshape([*stat.shape, *[1] * (x.ndim - stat.ndim)])
    scaled: Array = x / np.sqrt(stat / count + call.graph.spec.norm_eps) * _spread_weight(call)
    return scaled


def _bias(call: Call) -> Array:
    return np.asarray(call.inputs[0] + _spread_weight(call))


def _rope(call: Call) -> Array:
    x = call.inputs[0]
    tokens = x.shape[call.lead + 1]
    half = x.shape[-1] // 2
    at = call.tokens_at(tokens)[..., None]
    angle = at * call.graph.spec.rope_theta ** (-np.arange(half) / half)
    shape = [*at.shape[: call.lead], 1, tokens, *[1] * (x.ndim - call.lead - 3), half]
    cos, sin = np.cos(angle).reshape(shape), np.sin(angle).reshape(shape)
    left, right = x[..., :half], x[..., half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _cache(call: Call) -> Array:
    new, where = call.inputs[0], call.lead + 1
    if call.source is None:
        raise ProofError("a cache has slots", got=call.op.name)
    none = np.zeros_like(np.take(new, [0], where))
    entries = [*([] if call.held is None else [call.held]), new, none]
    source = call.source.reshape(*call.source.shape[:-1], 1, -1, *[1] * (new.ndim - where - 1))
    return np.take_along_axis(np.concatenate(entries, axis=where), source, axis=where)


def _masked_scores(call: Call, scores: Array) -> Array:
    """Scores [..., S] with dims B T first; a token sees the tokens before it and itself."""
    if call.keys_at is None:
        raise ProofError("attention knows where its keys lie", got=call.op.name)
    tokens, keys = scores.shape[call.lead + 1], scores.shape[-1]
    query, key = call.tokens_at(tokens)[..., None], call.keys_at[..., None, :]
    seen = (key >= 0) & (key <= query)
    window = int(call.op.attrs.get("window", 0))
    if window:
        seen &= key > query - window
    shape = [*seen.shape[: call.lead], 1, tokens, *[1] * (scores.ndim - call.lead - 3), keys]
    return np.where(seen.reshape(shape), scores, -np.inf)


def _attend(call: Call, scores: Array, values: str, held: Array) -> Array:
    """Softmax over the keys and their weighted values; of a part, its log-sum-exp beside it.

    `values` is the product's expression; a part that holds no key that is seen gives nought and
    a log-sum-exp of minus infinity.
    """
    scores = _masked_scores(call, scores)
    peak = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    out = call.ein(values, weights / np.where(total > 0.0, total, 1.0), held)
    if "W" not in call.op.dims:
        return out
    with np.errstate(divide="ignore"):
        together = peak + np.log(total)
    return np.concatenate([out, together], axis=-1)[..., None, :]


def _context_merge(call: Call) -> Array:
    parts, together = call.inputs[0][..., :-1], call.inputs[0][..., -1:]
    weights = np.exp(together - together.max(axis=-2, keepdims=True))
    merged: Array = (weights * parts).sum(axis=-2) / weights.sum(axis=-2)
    return merged


def _attention(call: Call) -> Array:
    q, k, v = call.inputs
    scores = call.ein("BTKGD,BSKD->BTKGS", q, k) / np.sqrt(q.shape[-1])
    return _attend(call, scores, "BTKGS,BSKD->BTKGD", v)


def _mla_scale(call: Call) -> float:
    sizes = call.graph.sizes
    return 1.0 / float(np.sqrt(sizes["N"] + sizes["R"]))


def _mla_attention(call: Call) -> Array:
    q, q_pe, k, k_pe, v = call.inputs
    scores = call.ein("BTKN,BSKN->BTKS", q, k) + call.ein("BTKR,BSR->BTKS", q_pe, k_pe)
    return _attend(call, scores * _mla_scale(call), "BTKS,BSKD->BTKD", v)


def _mla_absorbed(call: Call) -> Array:
    q, q_pe, latent, k_pe = call.inputs
    scores = call.ein("BTKC,BSC->BTKS", q, latent) + call.ein("BTKR,BSR->BTKS", q_pe, k_pe)
    return _attend(call, scores * _mla_scale(call), "BTKS,BSC->BTKC", latent)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _swiglu(call: Call) -> Array:
    gate, up = call.inputs
    return np.asarray(gate * _sigmoid(gate) * up)


def _add(call: Call) -> Array:
    return np.asarray(call.inputs[0] + call.inputs[1])


def _concat(call: Call) -> Array:
    return np.concatenate(call.inputs, axis=-1)


def _gate(call: Call) -> Array:
    return np.asarray(call.inputs[0] * _sigmoid(call.inputs[1]))


def _topk(call: Call) -> Array:
    """Gates [B, T, E]: the chosen experts' weights, zero elsewhere."""
    attrs, x = call.op.attrs, call.inputs[0]
    score = np.exp(x - x.max(axis=-1, keepdims=True)) if attrs["softmax"] else _sigmoid(x)
    if attrs["softmax"]:
        score = score / score.sum(axis=-1, keepdims=True)
    rank = score
    if call.weight is not None:
        rank = score + call.weight.reshape(*call.mesh.shape, 1, 1, -1)
    groups, topk = int(attrs["groups"]), int(attrs["topk"])
    folded = rank.reshape(*rank.shape[:-1], groups, -1)
    order = np.argsort(np.argsort(-folded, axis=-1, kind="stable"), axis=-1, kind="stable")
    chosen = (order < topk // groups).reshape(rank.shape)
    gates = np.where(chosen, score, 0.0)
    if attrs["normalise"]:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    return np.asarray(gates)


def _dispatch(call: Call) -> Array:
    x, gates = call.inputs
    return call.ein("BTH,BTE->EBTH", x, (gates != 0).astype(np.float64))


def _combine(call: Call) -> Array:
    return call.ein("EBTH,BTE->BTH", *call.inputs)


def _select(call: Call) -> Array:
    return np.asarray(call.inputs[0][..., -1:, :])


KERNELS: Mapping[str, Callable[[Call], Array]] = {
    "add": _add,
    "attention": _attention,
    "context_merge": _context_merge,
    "bias": _bias,
    "cache": _cache,
    "combine": _combine,
    "concat": _concat,
    "dispatch": _dispatch,
    "embedding": _embedding,
    "gate": _gate,
    "matmul": _matmul,
    "mla_absorbed": _mla_absorbed,
    "mla_attention": _mla_attention,
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "scale": _scale,
    "select": _select,
    "sumsq": _sumsq,
    "swiglu": _swiglu,
    "topk": _topk,
}
