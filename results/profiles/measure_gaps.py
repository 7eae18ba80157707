"""What a kernel of a captured graph costs beside its own time when others stand around it.

    python results/profiles/measure_gaps.py --out h200_gaps.csv

`shardplan profile` times a call between calls of its own kind, a model runs it between others. For
decode layers of several sizes this times each of the 11 calls of a layer alone, as the profile
does, and all in their order, on weights and caches that no cache holds. Columns: hidden, heads,
kv_heads, ffn (of one rank), batch, tokens, calls, alone_us (the sum), layer_us, gap_us =
(layer_us - alone_us) / calls.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure_steps import _BF16, _add_norm, _captured, _rope, _swiglu
from torch.nn import functional

_LAYERS, _SAMPLES, _HEAD, _TOKENS = 6, 15, 128, 1024
_SIZES = (
    (4096, 32, 8, 14336),
    (4096, 16, 4, 7168),
    (5120, 40, 8, 13824),
    (8192, 16, 2, 7168),
    (3584, 28, 4, 18944),
)
_BATCHES = (1, 8, 32, 64)
Call = Callable[[], Any]


def _made(*shape: int) -> Any:
    return torch.empty(shape, dtype=_BF16, device="cuda").normal_(std=0.02)


def _layer(sizes: tuple[int, int, int, int], batch: int) -> list[Call]:
    """The calls of one layer, on weights and a cache of its own."""
    hidden, heads, kv, ffn = sizes
    x, residual, wide = _made(batch, hidden), _made(batch, hidden), _made(batch, 2 * ffn)
    qkv = _made(batch, heads + 2 * kv, _HEAD)
    q, k, v = qkv.split((heads, kv, kv), dim=1)
    turn = _made(batch, 1, _HEAD), _made(batch, 1, _HEAD)
    weights = [
        _made((heads + 2 * kv) * _HEAD, hidden),
        _made(hidden, heads * _HEAD),
        _made(2 * ffn, hidden),
        _made(hidden, ffn),
    ]
    norm, mixed, narrow = _made(hidden), _made(batch, heads * _HEAD), _made(batch, ffn)
    keys, values = _made(batch, kv, _TOKENS, _HEAD), _made(batch, kv, _TOKENS, _HEAD)
    query, new = _made(batch, heads, 1, _HEAD), k.contiguous()
    attend, linear = functional.scaled_dot_product_attention, functional.linear
    return [
        lambda: linear(x, weights[0]),
        lambda: _rope(q, k, *turn),
        lambda: keys[:, :, -1:].copy_(new.view(batch, 1, kv, _HEAD).transpose(1, 2)),
        lambda: values[:, :, -1:].copy_(v.unsqueeze(1).transpose(1, 2)),
        lambda: attend(query, keys, values, enable_gqa=heads != kv),
        lambda: linear(mixed, weights[1]),
        lambda: _add_norm(x, residual, norm),
        lambda: linear(x, weights[2]),
        lambda: _swiglu(wide),
        lambda: linear(narrow, weights[3]),
        lambda: _add_norm(x, residual, norm),
    ]


def _seconds(calls: Sequence[Call]) -> float:
    """Seconds of one replay of all calls."""

    def run() -> None:
        for call in calls:
            call()

    replay = _captured(run)
    spans = []
    for _ in range(_SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            replay()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end) * 1e-3 / 4)
    return statistics.median(spans)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="time calls alone and among others")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 512
    with torch.inference_mode(), options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ("hidden", "heads", "kv_heads", "ffn", "batch", "tokens", "calls")
        writer.writerow([*names, "alone_us", "layer_us", "gap_us"])
        for sizes in _SIZES:
            for batch in _BATCHES:
                layers = [_layer(sizes, batch) for _ in range(_LAYERS)]
                count = len(layers[0])
                alone = sum(
                    _seconds([layer[at] for layer in layers] * 4) / (4 * _LAYERS)
                    for at in range(count)
                )
                whole = _seconds([call for layer in layers for call in layer]) / _LAYERS
                gap = (whole - alone) / count
                times = [f"{value * 1e6:.3f}" for value in (alone, whole, gap)]
                writer.writerow([*sizes, batch, _TOKENS, count, *times])
                print(*sizes, batch, *times, flush=True)
                file.flush()
                del layers
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
