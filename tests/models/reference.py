"""A plain decoder in numpy, written from the specification alone: the oracle of the executor.

Arrays are [batch, tokens, ...]; every sequence is computed whole, from its first token, with no
cache, no shards and no graph. From the project it takes the specification and the names and
shapes of the weights, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from shardplan.models.spec import MlaSpec, ModelSpec, MoeSpec

__all__ = ["forward"]

Real = NDArray[np.float64]


def forward(spec: ModelSpec, weights: Mapping[str, Real], ids: NDArray[np.integer]) -> Real:
    """Logits [batch, tokens, vocab] of whole sequences `ids` [batch, tokens]."""
    x = weights["embedding"][ids]
    for layer in range(spec.layers):
        prefix = f"{layer}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        x = _layer(spec, own, x, layer)
    x = _norm(spec, x, weights["final_norm"])
    return x @ (weights["embedding"].T if spec.tied_embeddings else weights["lm_head"])


def _layer(spec: ModelSpec, w: Mapping[str, Real], x: Real, layer: int) -> Real:
    normed = _norm(spec, x, w["norm1"])
    if spec.mla is not None:
        mixed = _latent_attention(spec, spec.mla, w, normed)
    else:
        mixed = _grouped_attention(spec, w, normed, _window(spec, layer))
    if spec.o_bias:
        mixed = mixed + w["o_bias"]
    if spec.sandwich_norms:
        mixed = _norm(spec, mixed, w["norm1_post"])
    x = x + mixed
    normed = _norm(spec, x, w["norm2"])
    if spec.moe is not None and layer >= spec.moe.dense_layers:
        fed = _experts(spec.moe, w, normed)
    else:
        fed = _dense(spec, w, normed)
    if spec.sandwich_norms:
        fed = _norm(spec, fed, w["norm2_post"])
    return x + fed


def _window(spec: ModelSpec, layer: int) -> int:
    """Tokens that a layer sees, 0 for all; the i-th of s sliding layers is layer ceil(i*L/s)-1."""
    if spec.sliding_window is None:
        return 0
    sliding = {-(-i * spec.layers // spec.sliding_layers) - 1 for i in _counted(spec)}
    return spec.sliding_window if layer in sliding else 0


def _counted(spec: ModelSpec) -> range:
    return range(1, spec.sliding_layers + 1)


def _norm(spec: ModelSpec, x: Real, weight: Real) -> Real:
    """Root-mean-square norm over the last dimension."""
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * weight)


def _rotate(spec: ModelSpec, x: Real) -> Real:
    """Rotary positions on [batch, tokens, heads, width]: complex numbers from both halves."""
    tokens, width = x.shape[1], x.shape[-1]
    pair = x[..., : width // 2] + 1j * x[..., width // 2 :]
    frequency = 1.0 / spec.rope_theta ** (np.arange(0, width, 2) / width)
    turn = np.exp(1j * np.arange(tokens)[:, None] * frequency)
    turned = pair * turn[None, :, None, :]
    return np.concatenate([turned.real, turned.imag], -1)


def _softmax(x: Real) -> Real:
    grown = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(grown / grown.sum(-1, keepdims=True))


def _sigmoid(x: Real) -> Real:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def _attend(scores: Real, values: Real, window: int) -> Real:
    """Scores [batch, heads, tokens, tokens], values [batch, tokens, heads, width]."""
    tokens = scores.shape[-1]
    ago = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    hidden = (ago < 0) | (ago >= (window or tokens))
    seen = _softmax(np.where(hidden, -1e300, scores))
    return np.asarray(np.einsum("bhqk,bkhd->bqhd", seen, values))


def _grouped_attention(spec: ModelSpec, w: Mapping[str, Real], x: Real, window: int) -> Real:
    batch, tokens, _ = x.shape
    q = x @ w["q"].reshape(spec.hidden, -1)
    k = x @ w["k"].reshape(spec.hidden, -1)
    v = x @ w["v"].reshape(spec.hidden, -1)
    if spec.qkv_bias:
        q = q + w["q_bias"].ravel()
        k = k + w["k_bias"].ravel()
        v = v + w["v_bias"].ravel()
    if spec.qk_norm == "full":
        q, k = _norm(spec, q, w["q_norm"].ravel()), _norm(spec, k, w["k_norm"].ravel())
    q = q.reshape(batch, tokens, spec.heads, spec.head_dim)
    k = k.reshape(batch, tokens, spec.kv_heads, spec.head_dim)
    v = v.reshape(batch, tokens, spec.kv_heads, spec.head_dim)
    if spec.qk_norm == "head":
        q, k = _norm(spec, q, w["q_norm"]), _norm(spec, k, w["k_norm"])
    q, k = _rotate(spec, q), _rotate(spec, k)
    each = spec.heads // spec.kv_heads
    k, v = np.repeat(k, each, axis=2), np.repeat(v, each, axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(spec.head_dim)
    out = _attend(scores, v, window).reshape(batch, tokens, -1)
    return np.asarray(out @ w["o"].reshape(-1, spec.hidden))


def _latent_attention(spec: ModelSpec, mla: MlaSpec, w: Mapping[str, Real], x: Real) -> Real:
    """Keys and values grown from the latent for every token, nothing absorbed."""
    batch, tokens, _ = x.shape
    source = x if mla.q_lora_rank is None else _norm(spec, x @ w["q_a"], w["q_a_norm"])
    q_plain = np.einsum("btq,qhn->bthn", source, w["q_nope"])
    q_turned = _rotate(spec, np.einsum("btq,qhr->bthr", source, w["q_pe"]))
    latent = _norm(spec, x @ w["kv_a"], w["kv_a_norm"])
    k_turned = _rotate(spec, (x @ w["k_pe"])[:, :, None, :])
    k_plain = np.einsum("btc,chn->bthn", latent, w["k_up"])
    values = np.einsum("btc,chd->bthd", latent, w["v_up"])
    q = np.concatenate([q_plain, q_turned], -1)
    k = np.concatenate([k_plain, np.repeat(k_turned, spec.heads, axis=2)], -1)
    width = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width)
    out = _attend(scores, values, 0).reshape(batch, tokens, -1)
    return np.asarray(out @ w["o"].reshape(-1, spec.hidden))


def _gated(x: Real, gate: Real, up: Real, down: Real) -> Real:
    opened = x @ gate
    return np.asarray((opened * _sigmoid(opened) * (x @ up)) @ down)


def _dense(spec: ModelSpec, w: Mapping[str, Real], x: Real) -> Real:
    if not spec.mlp_bias:
        return _gated(x, w["gate"], w["up"], w["down"])
    gate, up = x @ w["gate"] + w["gate_bias"], x @ w["up"] + w["up_bias"]
    return np.asarray((gate * _sigmoid(gate) * up) @ w["down"] + w["down_bias"])


def _experts(moe: MoeSpec, w: Mapping[str, Real], x: Real) -> Real:
    """Token by token: choose, run the chosen experts only, weigh, add the shared expert."""
    out = np.zeros_like(x)
    for place in np.ndindex(*x.shape[:2]):
        token = x[place]
        gates = _gates(moe, w, token)
        for expert, gate in gates.items():
            grown = _gated(token, w["e_gate"][expert], w["e_up"][expert], w["e_down"][expert])
            out[place] += gate * grown
        if moe.shared_ffn:
            shared = _gated(token, w["s_gate"], w["s_up"], w["s_down"])
            out[place] += shared * (_sigmoid(token @ w["s_switch"]) if moe.shared_gate else 1.0)
    return out


def _gates(moe: MoeSpec, w: Mapping[str, Real], token: Real) -> dict[int, float]:
    """Chosen expert -> its weight; each group of experts gives the same number of them."""
    logits = token @ w["router"]
    scores = _softmax(logits) if moe.scoring == "softmax" else _sigmoid(logits)
    ranked = scores + w["topk"] if moe.router_bias else scores
    wide, each = moe.experts // moe.expert_groups, moe.experts_per_token // moe.expert_groups
    chosen = [
        expert
        for first in range(0, moe.experts, wide)
        for expert in sorted(range(first, first + wide), key=lambda e: -float(ranked[e]))[:each]
    ]
    total = sum(float(scores[e]) for e in chosen) if moe.normalise_topk else 1.0
    return {e: float(scores[e]) / total for e in chosen}
