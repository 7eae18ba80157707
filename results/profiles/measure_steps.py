"""Whole-model steps of one rank on an NVIDIA GPU: the check of a calibration, never its input.

    python results/profiles/measure_steps.py --model models/presets/llama-3.1-8b.json \
        --out steps.csv [--tp 1] [--points decode:1x512,prefill:1x2048]

A decoder as a serving engine builds it, with random bf16 weights: query, key and value weights in
one matrix, gate and up in one, cuBLAS matmuls, scaled_dot_product_attention (the kernel that
PyTorch picks; `--attention` names another one), residual add + RMSNorm, RoPE and SwiGLU through
torch.compile, a dense cache [batch, kv_heads, tokens, head_dim] with the new keys and values
written into it, the LM head on the last position alone. Experts: softmax, top-k, sorted rows,
`grouped_mm`, weighted sum. The step is captured once as a CUDA graph; a sample is a replay
between two events, 15 for decode and 7 for prefill after 3 that warm up.

Under `--tp N` the shapes are those of one rank of N; the all-reduces are left out and so is the
time in them (`collectives` = none in the CSV). Columns: model, tp, phase, batch, tokens,
ms_median, ms_min, collectives, warm_s (seconds of replays before the samples). `--trace FILE`
writes the microseconds of each kernel of each point.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

_BF16 = torch.bfloat16
_DECODE_SAMPLES, _PREFILL_SAMPLES, _WARM = 15, 7, 3
_BATCHES = (1, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (512, 1024, 2048, 4096, 8192)
_PROMPTS = (
    (1, 128),
    (1, 512),
    (1, 1024),
    (1, 2048),
    (1, 4096),
    (1, 8192),
    (4, 128),
    (4, 512),
    (4, 1024),
    (4, 2048),
)
_MEMORY_BYTES = 128e9
_ATTENTION = {
    "auto": None,
    "flash": torch.nn.attention.SDPBackend.FLASH_ATTENTION,
    "cudnn": torch.nn.attention.SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What one rank holds of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rows: int
    """Rows of the whole embedding table."""
    experts: int
    topk: int
    qk_norm: bool

    @classmethod
    def read(cls, path: Path, tp: int) -> Sizes:
        """The shard of a config.json under tensor parallelism of `tp`."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        heads = raw["num_attention_heads"]
        experts = raw.get("num_experts", raw.get("num_local_experts", 0))
        ffn = raw.get("moe_intermediate_size", raw["intermediate_size"])
        return cls(
            layers=raw["num_hidden_layers"],
            hidden=raw["hidden_size"],
            heads=heads // tp,
            kv_heads=max(1, raw.get("num_key_value_heads", heads) // tp),
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            ffn=ffn // tp,
            vocab=-(-raw["vocab_size"] // tp),
            rows=raw["vocab_size"],
            experts=experts,
            topk=raw.get("num_experts_per_tok", 0),
            qk_norm=raw["model_type"].startswith("qwen3"),
        )

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ffn = 3 * self.ffn * max(self.experts, 1) + self.experts
        layer = self.hidden * (2 * q + 2 * kv + ffn)
        return 2.0 * (self.layers * layer + self.hidden * (self.vocab + self.rows))


def _compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(work, dynamic=False, fullgraph=True)
    return made


@_compiled
def _norm(x: Any, weight: Any) -> Any:
    return functional.rms_norm(x, (x.shape[-1],), weight, 1e-5)


@_compiled
def _add_norm(x: Any, residual: Any, weight: Any) -> Any:
    total = x + residual
    return functional.rms_norm(total, (x.shape[-1],), weight, 1e-5), total


def _turned(x: Any, cos: Any, sin: Any) -> Any:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


@_compiled
def _rope(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return _turned(q, cos, sin), _turned(k, cos, sin)


@_compiled
def _norm_rope(q: Any, k: Any, cos: Any, sin: Any, wq: Any, wk: Any) -> Any:
    size = (q.shape[-1],)
    q, k = functional.rms_norm(q, size, wq, 1e-6), functional.rms_norm(k, size, wk, 1e-6)
    return _turned(q, cos, sin), _turned(k, cos, sin)


@_compiled
def _swiglu(x: Any) -> Any:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


class Decoder:
    """The weights of one rank and its forward pass."""

    def __init__(self, sizes: Sizes, attention: str) -> None:
        self.sizes, self.kernel = sizes, _ATTENTION[attention]
        s = sizes
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.embedding = self._made(s.rows, s.hidden)
        self.head = self._made(s.vocab, s.hidden)
        self.norm = torch.ones(s.hidden, dtype=_BF16, device="cuda")
        self.head_norm = torch.ones(s.head_dim, dtype=_BF16, device="cuda")
        self.layers = [
            {
                "qkv": self._made(q + 2 * kv, s.hidden),
                "out": self._made(s.hidden, q),
                **self._ffn(),
            }
            for _ in range(s.layers)
        ]

    @staticmethod
    def _made(*shape: int) -> Any:
        return torch.empty(shape, dtype=_BF16, device="cuda").normal_(std=0.02)

    def _ffn(self) -> dict[str, Any]:
        s = self.sizes
        if not s.experts:
            return {"up": self._made(2 * s.ffn, s.hidden), "down": self._made(s.hidden, s.ffn)}
        return {
            "router": self._made(s.experts, s.hidden),
            "up": self._made(s.experts, 2 * s.ffn, s.hidden),
            "down": self._made(s.experts, s.hidden, s.ffn),
        }

    def step(self, ids: Any, turn: tuple[Any, Any], caches: list[Any] | None) -> Any:
        """Logits of the last position of `ids` [batch, tokens], `caches` None in a prefill."""
        batch, tokens = ids.shape
        residual = self.embedding[ids.reshape(-1)]
        x = _norm(residual, self.norm)
        for at, layer in enumerate(self.layers):
            mixed = self._attend(x, layer, turn, None if caches is None else caches[at], batch)
            x, residual = _add_norm(functional.linear(mixed, layer["out"]), residual, self.norm)
            done = self._experts(x, layer) if self.sizes.experts else self._dense(x, layer)
            x, residual = _add_norm(done, residual, self.norm)
        last = x.view(batch, tokens, -1)[:, -1]
        return functional.linear(last, self.head)

    def _attend(self, x: Any, layer: Any, turn: Any, cache: Any, batch: int) -> Any:
        s = self.sizes
        rows = x.shape[0]
        qkv = functional.linear(x, layer["qkv"]).view(rows, -1, s.head_dim)
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), dim=1)
        if s.qk_norm:
            q, k = _norm_rope(q, k, *turn, self.head_norm, self.head_norm)
        else:
            q, k = _rope(q, k, *turn)
        q, k, v = (one.view(batch, rows // batch, -1, s.head_dim).transpose(1, 2)
                   for one in (q, k, v))  # fmt: skip
        causal = rows > batch
        if cache is not None:
            length = k.shape[2]
            cache[0][:, :, -length:].copy_(k)
            cache[1][:, :, -length:].copy_(v)
            if not causal:
                k, v = cache[0], cache[1]
        grouped = s.heads != s.kv_heads
        attend = functional.scaled_dot_product_attention
        if self.kernel is None:
            mixed = attend(q, k, v, is_causal=causal, enable_gqa=grouped)
        else:
            with torch.nn.attention.sdpa_kernel(self.kernel):
                mixed = attend(q, k, v, is_causal=causal, enable_gqa=grouped)
        return mixed.transpose(1, 2).reshape(rows, -1)

    def _dense(self, x: Any, layer: Any) -> Any:
        wide = functional.linear(x, layer["up"])
        return functional.linear(_swiglu(wide), layer["down"])

    def _experts(self, x: Any, layer: Any) -> Any:
        s = self.sizes
        scores, chosen = functional.linear(x, layer["router"]).softmax(-1).topk(s.topk, dim=-1)
        scores = scores / scores.sum(-1, keepdim=True)
        order = chosen.flatten().argsort()
        counts = torch.zeros(s.experts, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, chosen.flatten(), torch.ones_like(order, dtype=torch.int32))
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = x[order // s.topk]
        multiply = getattr(functional, "grouped_mm", None) or torch._grouped_mm
        wide = multiply(rows, layer["up"].transpose(-2, -1), offs=ends)
        done = multiply(_swiglu(wide), layer["down"].transpose(-2, -1), offs=ends)
        back = torch.empty_like(done)
        back[order] = done
        return (back.view(-1, s.topk, s.hidden) * scores[..., None]).sum(1)


def _caches(s: Sizes, batch: int, tokens: int) -> list[Any]:
    shape = (2, batch, s.kv_heads, tokens, s.head_dim)
    return [torch.empty(shape, dtype=_BF16, device="cuda").normal_() for _ in range(s.layers)]


def _captured(work: Callable[[], Any]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _replays_ms(replay: Callable[[], None], samples: int, warm_s: float) -> list[float]:
    begun = time.perf_counter()
    for _ in range(_WARM):
        replay()
    torch.cuda.synchronize()
    while time.perf_counter() - begun < warm_s:
        replay()
        torch.cuda.synchronize()
    spans = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end))
    return spans


def _kernels(replay: Callable[[], None]) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds in all) of one replay."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        replay()
        torch.cuda.synchronize()
    found = [
        (one.key, int(one.count), float(one.device_time_total)) for one in profile.key_averages()
    ]
    return sorted(found, key=lambda one: -one[2])


def _measure(
    decoder: Decoder, point: tuple[str, int, int], warm_s: float, trace: Path | None, label: str
) -> list[float]:
    phase, batch, tokens = point
    s = decoder.sizes
    new = tokens if phase == "prefill" else 1
    ids = torch.randint(0, s.rows, (batch, new), device="cuda")
    turn = tuple(
        torch.randn(batch * new, 1, s.head_dim, dtype=_BF16, device="cuda") for _ in range(2)
    )
    caches = _caches(s, batch, tokens)
    replay = _captured(lambda: decoder.step(ids, (turn[0], turn[1]), caches))
    spans = _replays_ms(replay, _DECODE_SAMPLES if phase == "decode" else _PREFILL_SAMPLES, warm_s)
    if trace is not None:
        with trace.open("a", encoding="utf-8") as file:
            for name, count, total in _kernels(replay):
                file.write(f"{label}\t{phase}\t{batch}\t{tokens}\t{count}\t{total:.1f}\t{name}\n")
    return spans


def _fits(s: Sizes, point: tuple[str, int, int]) -> bool:
    """Whether weights and cache leave some of the memory."""
    cache = 4.0 * s.layers * s.kv_heads * s.head_dim * point[1] * point[2]
    return s.weight_bytes + cache < _MEMORY_BYTES


def _grid() -> Iterator[tuple[str, int, int]]:
    for batch in _BATCHES:
        for tokens in _CONTEXTS:
            yield "decode", batch, tokens
    for batch, tokens in _PROMPTS:
        yield "prefill", batch, tokens


def _points(text: str) -> Iterator[tuple[str, int, int]]:
    for word in text.split(","):
        phase, _, sizes = word.partition(":")
        batch, _, tokens = sizes.partition("x")
        yield phase, int(batch), int(tokens)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="measure whole-model steps of one rank")
    parser.add_argument("--model", type=Path, required=True, help="a config.json")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", default="")
    parser.add_argument("--attention", choices=sorted(_ATTENTION), default="auto")
    parser.add_argument("--warm-s", type=float, default=0.0)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 512
    sizes = Sizes.read(options.model, options.tp)
    name = options.model.stem
    fresh = not options.out.exists()
    with torch.inference_mode(), options.out.open("a", encoding="utf-8", newline="") as file:
        decoder = Decoder(sizes, options.attention)
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(
                [
                    "model",
                    "tp",
                    "phase",
                    "batch",
                    "tokens",
                    "ms_median",
                    "ms_min",
                    "collectives",
                    "warm_s",
                ]
            )
        points = _points(options.points) if options.points else _grid()
        for point in (one for one in points if _fits(sizes, one)):
            spans = _measure(
                decoder, point, options.warm_s, options.trace, f"{name}-tp{options.tp}"
            )
            low, middle = min(spans), statistics.median(spans)
            collectives = "" if options.tp == 1 else "none"
            row = (
                name,
                options.tp,
                *point,
                f"{middle:.4f}",
                f"{low:.4f}",
                collectives,
                options.warm_s,
            )
            writer.writerow(row)
            file.flush()
            print(*row, flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
