"""`estimate` of contexts split over ranks and of modules over data-parallel groups."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from shardplan.models.catalog import load_model
from shardplan.models.counts import kv_bytes_per_token
from shardplan.models.errors import LayoutError
from shardplan.search.estimate import estimate_one, price_points

BASE: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "atlas-800t-a2",
    "tp": 4,
    "phase": "decode",
    "batch": 16,
    "tokens": 2048,
}
SERVE: dict[str, Any] = {**BASE, "phase": "serve", "input_len": 1024, "output_len": 256}
SPLIT: list[dict[str, Any]] = [
    {"tp": 2, "cp": 2},
    {"tp": 2, "cp": 4, "pp": 2},
    {"tp": 2, "dp": 4, "head_tp": 8, "embed_tp": 8, "ffn_tp": 4},
    {"model": "qwen3-30b-a3b", "tp": 2, "cp": 2, "dp": 2, "ep": 8},
    {"model": "deepseek-v2-lite", "tp": 1, "dp": 8, "ep": 8, "o_tp": 8, "shared_tp": 2},
]


@pytest.mark.parametrize("phase", ["prefill", "decode", "serve"])
def test_split_contexts_and_modules_cost_the_same_alone_and_in_a_table(phase: str) -> None:
    """Each row of a mixed table against its own step; the ranks are tp*pp*dp*cp."""
    points = [{**BASE, **SERVE, "phase": phase, **split} for split in [{}, *SPLIT]]
    table = price_points(pd.DataFrame(points).astype(object).where(lambda one: one.notna(), None))
    assert list(table["status"]) == ["ok"] * len(points)
    numbers = ("step_s", "memory_bytes", "output_tokens_per_s", "ttft_mean_s")
    for place, point in enumerate(points):
        alone = estimate_one(**point)
        for name in numbers:
            if name in alone:
                assert table[name][place] == pytest.approx(alone[name], rel=1e-9), (name, point)
    with pytest.raises(LayoutError, match="ranks=64"):
        estimate_one(**{**BASE, "tp": 8, "cp": 8, "nodes": 1})


def test_ranks_that_share_a_context_serve_longer_ones() -> None:
    """A prompt of 100k tokens: a shorter wait, half of the cache on a rank, more slots."""
    long: dict[str, Any] = {"input_len": 100_000, "output_len": 500}
    long |= {"concurrency": 8, "num_prompts": 100_000}
    alone = estimate_one(**{**SERVE, "tp": 2, **long})
    both = estimate_one(**{**SERVE, "tp": 2, "cp": 2, **long})
    assert both["ttft_mean_s"] < 0.7 * alone["ttft_mean_s"]
    assert both["tpot_mean_s"] < alone["tpot_mean_s"]
    pair = {**BASE, "tp": 2, "batch": 8, "tokens": 64_000}
    held = [estimate_one(**pair, cp=cp)["memory_bytes"] for cp in (1, 2)]
    cache = 8 * 64_000 * kv_bytes_per_token(load_model("llama-3.1-8b")) / 2
    assert held[0] - held[1] == pytest.approx(cache / 2, rel=0.05)
