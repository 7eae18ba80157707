"""Small torch modules that tests export: a Llama-like decoder, a BERT-like encoder, a ViT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that torch's own pages use
from torch import Tensor, nn


class Norm(nn.Module):
    """Root-mean-square norm, written out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Grouped queries with rotary positions."""

    def __init__(self, hidden: int, heads: int, kv: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv, self.dim = heads, kv, dim
        self.q_proj = nn.Linear(hidden, heads * dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv * dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv * dim, bias=bias)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Any = None) -> Any:
        """What attention adds; with the keys and values of earlier tokens, those of all tokens
        too."""
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        q, k = (one * cos + self.turned(one) * sin for one in (q, k))
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        mixed = F.scaled_dot_product_attention(
            q, self.repeated(k), self.repeated(v), is_causal=past is None
        )
        given = self.o_proj(mixed.transpose(1, 2).reshape(b, t, self.heads * self.dim))
        return given if past is None else (given, (k, v))

    def turned(self, x: Tensor) -> Any:
        half = self.dim // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def repeated(self, x: Tensor) -> Any:
        b, k, t, d = x.shape
        group = self.heads // self.kv
        return x[:, :, None].expand(b, k, group, t, d).reshape(b, k * group, t, d)


class Layer(nn.Module):
    """Attention and a gated feed-forward network, each behind a norm."""

    def __init__(
        self, hidden: int, heads: int, kv: int, dim: int, ffn: int, bias: bool, gated: bool
    ) -> None:
        super().__init__()
        self.self_attn = Attention(hidden, heads, kv, dim, bias)
        self.gate_proj = nn.Linear(hidden, ffn, bias=False) if gated else None
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        x = x + self.self_attn(self.norm1(x), cos, sin)
        return x + self.fed(self.norm2(x))

    def fed(self, y: Tensor) -> Any:
        up = self.up_proj(y)
        wide = F.silu(up) if self.gate_proj is None else F.silu(self.gate_proj(y)) * up
        return self.down_proj(wide)


class Decoder(nn.Module):
    """Token ids [b, t] to logits [b, t, vocab]."""

    def __init__(
        self,
        vocab: int = 64,
        hidden: int = 32,
        heads: int = 8,
        kv: int = 4,
        dim: int = 4,
        ffn: int = 48,
        layers: int = 2,
        bias: bool = False,
        tied: bool = False,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(
            Layer(hidden, heads, kv, dim, ffn, bias, gated) for _ in range(layers)
        )
        self.norm = Norm(hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Any:
        places = torch.arange(ids.shape[1], dtype=torch.float32)
        steps = 1.0 / (10000 ** (torch.arange(0, self.dim, 2).float() / self.dim))
        angles = places[:, None] * steps[None]
        angles = torch.cat((angles, angles), -1)
        x = self.embed_tokens(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


class EncoderLayer(nn.Module):
    """Attention that sees everything and a feed-forward network, each followed by a LayerNorm."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 64), nn.Linear(64, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Any:
        b, t, h = x.shape
        q, k, v = (
            one(x).view(b, t, self.heads, -1).transpose(1, 2) for one in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, h)
        x = self.norm1(x + self.o(mixed))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class DecodeStep(nn.Module):
    """One token after others: ids [b, 1] and the cache of each layer to logits and the caches."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        x, grown = self.decoder.embed_tokens(ids), []
        cos, sin = (torch.full((1, self.decoder.dim), value) for value in (0.8, 0.6))
        layers: Any = self.decoder.layers
        for layer, cache in zip(layers, past, strict=True):
            mixed, new = layer.self_attn(layer.norm1(x), cos, sin, cache)
            grown.append(new)
            x = x + mixed
            x = x + layer.fed(layer.norm2(x))
        return self.decoder.lm_head(self.decoder.norm(x)), grown


class VitBlock(nn.Module):
    """Patches by a convolution, one encoder layer, the logits of their mean."""

    def __init__(self, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, hidden, kernel_size=4, stride=4)
        self.places = nn.Parameter(torch.zeros(1, 16, hidden))
        self.layer = EncoderLayer(hidden, heads)
        self.head = nn.Linear(hidden, 10)

    def forward(self, image: Tensor) -> Any:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.places
        return self.head(self.layer(x).mean(1))


class Encoder(nn.Module):
    """BERT-like: words and places looked up, LayerNorm after each part."""

    def __init__(self, hidden: int = 32, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(64, hidden), nn.Embedding(8, hidden)
        self.layers = nn.Sequential(*(EncoderLayer(hidden, heads) for _ in range(layers)))

    def forward(self, ids: Tensor, places: Tensor) -> Any:
        return self.layers(self.words(ids) + self.places(places))


class Logits(nn.Module):
    """A causal model of transformers: token ids to logits, no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(input_ids=ids, use_cache=False).logits
