"""A Llama-like decoder in plain PyTorch, with the module names of the Hugging Face class.

Two steps, as `shardplan.models.fx.decoders` has them: a prompt, [batch, tokens] -> (logits of the
last token [batch, 1, vocab], key and value of each layer), and one token against such caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a configuration says, in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    eps: float
    theta: float

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        """From a Hugging Face `config.json`."""
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim", config["hidden_size"] // heads),
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            eps=config["rms_norm_eps"],
            theta=config["rope_theta"],
        )


class Norm(nn.Module):
    """Root-mean-square norm over the last dim."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(sizes.hidden))
        self.eps = sizes.eps

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, hidden], and the same out."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        size = sizes.head_dim
        self.size = size
        self.q_proj = nn.Linear(sizes.hidden, sizes.heads * size, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, sizes.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, sizes.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(sizes.heads * size, sizes.hidden, bias=False)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], held: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, tokens, hidden] -> (the same, keys, values) with the new tokens behind."""
        batch, tokens, _ = x.shape
        query, key, value = (
            product(x).view(batch, tokens, -1, self.size).transpose(1, 2)
            for product in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _turned(query, *angles), _turned(key, *angles)
        if held:
            key, value = torch.cat([held[0], key], 2), torch.cat([held[1], value], 2)
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=not held, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1)), key, value


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: pairs (i, i + size / 2) of each head turned by their angle."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


class Mlp(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.ffn, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.ffn, bias=False)
        self.down_proj = nn.Linear(sizes.ffn, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Any:
        """x [batch, tokens, hidden], and the same out."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then the feed-forward network, each behind a norm and added."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(sizes), Norm(sizes)
        self.self_attn, self.mlp = Attention(sizes), Mlp(sizes)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], held: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, tokens, hidden] -> (the same, keys, values)."""
        mixed, key, value = self.self_attn(self.input_layernorm(x), angles, held)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class Decoder(nn.Module):
    """The model; `forward` is a prompt without caches, one token with them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = Norm(sizes)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        steps = torch.arange(0, sizes.head_dim, 2).double() / sizes.head_dim
        self.turns = nn.Buffer((sizes.theta**-steps).float(), persistent=False)

    def forward(self, ids: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """ids [batch, tokens]; caches are key and value of each layer in turn."""
        x = self.embed_tokens(ids)
        past = caches[0].shape[2] if caches else 0
        at = torch.arange(past, past + ids.shape[1], device=ids.device).unsqueeze(1)
        angle = (at.float() * self.turns.float()).repeat(1, 2)
        angles = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        grown: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, key, value = layer(x, angles, caches[2 * i : 2 * i + 2])
            grown += [key, value]
        return (self.lm_head(self.norm(x[:, -1:])), *grown)


def random_decoder(sizes: Sizes, device: str, dtype: torch.dtype) -> Decoder:
    """A decoder with random weights of a fixed seed, the same on every process."""
    with torch.device("meta"):
        model = Decoder(sizes)
    steps = torch.arange(0, sizes.head_dim, 2, device=device).double() / sizes.head_dim
    model = model.to(dtype).to_empty(device=device)
    model.turns = (sizes.theta**-steps).float()
    torch.manual_seed(20260101)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)
