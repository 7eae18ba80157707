"""Runs a small Llama under emitted PartitionSpecs on virtual devices; prints error and collectives.

    python jax_run.py FOLDER   ->   `error 1e-6`, `layer_all_reduce 8`

The embedding is looked up whole here, so that what XLA makes of the layers can be counted alone.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, TOKENS, BATCH = 64, 96, 4, 8, 4, 128, 16, 8
HEAD_DIM = HIDDEN // HEADS
SHAPES = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (FFN, HIDDEN),
    "mlp.up_proj.weight": (FFN, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, FFN),
}


def norm(x: Any, weight: Any) -> Any:
    """Root-mean-square norm."""
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def layer(x: Any, w: dict[str, Any], keep: Any) -> Any:
    """A decoder layer; `keep` pins the hidden state."""
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = (h @ w[f"self_attn.{n}_proj.weight"].T for n in "qkv")
    q = q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    k, v = (one.reshape(*one.shape[:2], KV_HEADS, HEAD_DIM) for one in (k, v))
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / HEAD_DIM**0.5
    scores = jnp.where(jnp.tril(jnp.ones((TOKENS, TOKENS), bool)), scores, -1e9)
    out = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v)
    x = keep(x + keep(out.reshape(*out.shape[:2], -1) @ w["self_attn.o_proj.weight"].T))
    h = norm(x, w["post_attention_layernorm.weight"])
    h = jax.nn.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
    return keep(x + keep(h @ w["mlp.down_proj.weight"].T))


def model(weights: dict[str, Any], x: Any, keep: Any) -> Any:
    """Layers and logits."""
    for i in range(LAYERS):
        x = layer(x, {name: weights[f"model.layers.{i}.{name}"] for name in SHAPES}, keep)
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def main() -> None:
    """Compare with one device, and count the sums in the compiled program."""
    sys.path.insert(0, sys.argv[1])
    plan = importlib.import_module("partition_specs")

    rng = np.random.default_rng(1)
    shapes = {f"model.layers.{i}.{name}": s for i in range(LAYERS) for name, s in SHAPES.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    specs = plan.specs()
    assert set(specs) == set(shapes), set(specs) ^ set(shapes)
    whole = {name: rng.standard_normal(s, dtype=np.float32) * 0.1 for name, s in shapes.items()}
    x = rng.standard_normal((BATCH, TOKENS, HIDDEN), dtype=np.float32)
    mesh = plan.mesh()
    cut = {name: jax.device_put(whole[name], NamedSharding(mesh, s)) for name, s in specs.items()}
    lies = NamedSharding(mesh, plan.HIDDEN)
    run = jax.jit(lambda w, h: model(w, h, lambda t: jax.lax.with_sharding_constraint(t, lies)))
    lowered = run.lower(cut, jax.device_put(x, lies)).compile()
    found = np.asarray(lowered(cut, jax.device_put(x, lies)))
    expected = np.asarray(model(whole, x, lambda t: t))
    print("error", np.abs(found - expected).max())
    print("layer_all_reduce", len(re.findall(r"= \S+ all-reduce(?:-start)?\(", lowered.as_text())))


if __name__ == "__main__":
    main()
