"""The ablation: every number is that of the cost functions, and the gains come out of them."""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import Load
from shardplan.costmodel.steps import step_seconds
from shardplan.models.catalog import load_model
from shardplan.models.counts import kv_bytes_per_token, parameter_count
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism
from shardplan.search.ablation import run_ablation
from shardplan.search.ablation_rows import Ablation, AblationRow
from shardplan.search.ablation_tables import to_markdown
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.plan import Limits, Workload
from shardplan.search.space import Choice, chunk_grid
from shardplan.search.tables_plan import print_ablation

CLUSTERS = ("atlas-800-9000", "atlas-800t-a2")
STEPS = (
    "baseline",
    "best split",
    "KV cache",
    "FlashAttention",
    "int8 weights",
    "int8 KV cache",
    "auto batching",
)
INPUT_LEN, OUTPUT_LEN = 1024, 256
SPEC = load_model("llama-65b")


@functools.cache
def ablation(cluster: str) -> Ablation:
    """Llama-65B on a node of the cluster."""
    return run_ablation("llama-65b", cluster)


def row(cluster: str, step: str) -> AblationRow:
    """One step of it."""
    return next(one for one in ablation(cluster).rows if one.step == step)


@functools.cache
def scorer(cluster: str, split: str) -> LayoutScorer:
    """The layout that a row names, made anew."""
    machine = load_cluster(cluster)
    words = split.split()
    tp, pp, dp = (int(word[2:]) for word in words[:3])
    question = Question(
        spec=SPEC,
        cluster=machine,
        engine=load_engine("torch-graph"),
        workload=Workload(input_len=INPUT_LEN, output_len=OUTPUT_LEN),
        limits=Limits(),
        objective="throughput",
        cards=8,
    )
    return LayoutScorer(question, Parallelism(tp=tp, pp=pp, dp=dp, sp="sp" in words))


def types(cluster: str, step: str) -> dict[str, Any]:
    """What a step runs with."""
    sixteen = "fp16" if cluster == "atlas-800-9000" else "bf16"
    place = STEPS.index(step)
    return {
        "attention": "flash" if place >= 3 else "naive",
        "weight_dtype": "w8a16" if place >= 4 else sixteen,
        "kv_dtype": "int8" if place >= 5 else sixteen,
    }


def request_s(cluster: str, split: str, step: str, input_len: int, output_len: int) -> float:
    """One request alone, token by token: a prefill, then a step for each further token."""
    model, chosen, one = scorer(cluster, split).model, types(cluster, step), np.ones(1)

    def price(phase: Phase, new: Array, prefix: Array) -> Array:
        return step_seconds(model, phase, batch=one, new=new, prefix=prefix, **chosen)[0]

    first = price("prefill", np.array([float(input_len)]), np.zeros(1))
    seen = input_len + np.arange(1.0, output_len)
    if STEPS.index(step) >= 2:
        later = price("decode", np.ones_like(seen), seen - 1)
    else:
        later = price("prefill", seen, np.zeros_like(seen))
    return float(first[0] + later.sum())


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_steps_stand_in_order(cluster: str) -> None:
    """From the baseline, a pipeline over all cards, to batching."""
    found = ablation(cluster)
    assert tuple(one.step for one in found.rows) == STEPS
    assert found.rows[0].split == "tp1 pp8 dp1"
    assert (found.cards, found.input_len, found.output_len) == (8, INPUT_LEN, OUTPUT_LEN)
    assert all(one.fits for one in found.rows)
    assert all(one.fullest_bytes <= one.capacity_bytes for one in found.rows)


@pytest.mark.parametrize("step", STEPS[:-1])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_row_is_what_the_cost_functions_say(cluster: str, step: str) -> None:
    """Every output token priced by itself; the row takes a mean over 17 of the lengths."""
    one = row(cluster, step)
    alone = request_s(cluster, one.split, step, INPUT_LEN, OUTPUT_LEN)
    assert one.end_to_end_s == pytest.approx(alone, rel=5e-3)
    assert one.end_to_end_s == pytest.approx(one.ttft_s + (OUTPUT_LEN - 1) * one.tpot_s, rel=1e-12)
    assert one.output_tokens_per_s == pytest.approx(OUTPUT_LEN / one.end_to_end_s, rel=1e-12)
    base = row(cluster, "baseline").end_to_end_s
    assert one.speedup == pytest.approx(base / one.end_to_end_s, rel=1e-12)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_best_split_is_the_fastest(cluster: str) -> None:
    """No power of two of tensor and pipeline ranks is faster, with or without a cache."""
    for step in ("best split", "FlashAttention"):
        for tp in (1, 2, 4, 8):
            other = request_s(cluster, f"tp{tp} pp{8 // tp} dp1", step, INPUT_LEN, OUTPUT_LEN)
            assert row(cluster, step).end_to_end_s <= other * (1 + 5e-3)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_int8_halves_the_weights_of_the_layers(cluster: str) -> None:
    """Matrices of the layers: 2 bytes to 1, with one 4-byte scale per output channel.

    Embedding, head and norms keep their 16 bits. At tp 8 each rank has its own copy of the norms,
    and of the scales of the two matrices whose inputs are split (output and down projection).
    """
    before, after = (row(cluster, step) for step in ("FlashAttention", "int8 weights"))
    assert before.split == after.split == "tp8 pp1 dp1"
    norms = (2 * SPEC.layers + 1) * SPEC.hidden
    ends = 2 * SPEC.vocab * SPEC.hidden
    linear = parameter_count(SPEC) - ends - norms
    assert linear == 80 * (4 * 8192 * 8192 + 3 * 8192 * 22016)
    kept = ends + 8 * norms
    channels = 80 * (3 * 8192 + 2 * 22016 + 8 * (8192 + 8192))
    assert before.weights_bytes == pytest.approx(2.0 * (kept + linear), rel=1e-12)
    assert after.weights_bytes == pytest.approx(2.0 * kept + linear + 4.0 * channels, rel=1e-12)
    assert after.kv_cache_bytes == before.kv_cache_bytes


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_an_int8_cache_is_half(cluster: str) -> None:
    """2 * 80 layers * 64 heads * 128 elements a token, 2 bytes or 1."""
    before, after = (row(cluster, step) for step in ("int8 weights", "int8 KV cache"))
    tokens = INPUT_LEN + OUTPUT_LEN
    assert before.kv_cache_bytes == kv_bytes_per_token(SPEC, dtype_bytes=2) * tokens
    assert after.kv_cache_bytes == before.kv_cache_bytes / 2
    assert after.weights_bytes == before.weights_bytes
    assert row(cluster, "best split").kv_cache_bytes == 0.0


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_what_a_request_gains(cluster: str) -> None:
    """All of it more than halves the time; the cache and int8 weights each help."""
    gains = {step: row(cluster, step).speedup for step in STEPS}
    assert gains["int8 KV cache"] > 2
    assert gains["KV cache"] > gains["best split"] > 1
    assert gains["int8 weights"] > gains["FlashAttention"]
    assert gains["auto batching"] > 2 * gains["int8 KV cache"]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_flash_attention_gains_more_the_longer_the_prompt(cluster: str) -> None:
    """From 1,024 to 8,192 tokens; the times are those of the attention operators alone."""
    found = ablation(cluster).attention
    assert [one.tokens for one in found] == [1024, 2048, 4096, 8192]
    gains = [one.gain for one in found]
    assert gains[0] > 1
    assert gains == sorted(gains)
    assert gains[-1] > 2 * gains[0]
    for one in found:
        assert 1 < one.prefill_gain < one.gain
        for kernel, seconds in (("naive", one.naive_s), ("flash", one.flash_s)):
            assert attention_s(cluster, kernel, one.tokens) == pytest.approx(seconds, rel=1e-12)


def attention_s(cluster: str, kernel: str, tokens: int) -> float:
    """Attention of one prompt over all layers."""
    made = scorer(cluster, row(cluster, "int8 KV cache").split)
    load = Load.of(
        "prefill",
        made.question.engine,
        batch=1.0,
        new=float(tokens),
        prefix=0.0,
        kv_dtype=types(cluster, "baseline")["kv_dtype"],
        attention=kernel,  # type: ignore[arg-type]  # one of two
    )
    return sum(float(parts.total_s) for _, parts in made.model.by_kind("attention", load))


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_lengths_take_about_eight_seconds(cluster: str) -> None:
    """Priced token by token, within 3 %; a longer prompt leaves fewer output tokens."""
    split = row(cluster, "int8 KV cache").split
    found = ablation(cluster).lengths
    assert [one.input_len for one in found] == [128, 256, 512, 1024]
    for one in found:
        alone = request_s(cluster, split, "int8 KV cache", one.input_len, one.output_len)
        assert alone == pytest.approx(8.0, rel=0.03)
        assert one.end_to_end_s == pytest.approx(alone, rel=5e-3)
    outputs = [one.output_len for one in found]
    assert outputs == sorted(outputs, reverse=True)


def test_batching_is_the_best_of_the_grid() -> None:
    """The row's split and slots, scored alone, reach its tokens a second."""
    one = row("atlas-800t-a2", "auto batching")
    made = scorer("atlas-800t-a2", one.split)
    choice = types("atlas-800t-a2", "auto batching")
    chunks = np.array(chunk_grid(made.question.engine, INPUT_LEN, OUTPUT_LEN), dtype=float)
    slots = np.array([one.batch / made.parallel.dp])
    scores = made.score(Choice(**choice), slots, chunks)
    rates = np.where(scores.feasible, scores.columns["output_tokens_per_s"], 0.0)
    assert rates.max() == pytest.approx(one.output_tokens_per_s, rel=1e-12)


def test_the_tables_tell_the_numbers() -> None:
    """On a terminal of 100 columns, and as Markdown with the commands that make them again."""
    found = [ablation(cluster) for cluster in CLUSTERS]
    text = io.StringIO()
    print_ablation(found[1], Console(file=text, width=100))
    assert max(len(line) for line in text.getvalue().splitlines()) <= 100
    page = to_markdown(found)
    for one in found:
        assert f"--cluster {one.cluster}" in page
        for each in one.rows:
            shown = f"{each.tpot_s * 1e3:,.1f}"
            assert f"| {each.step} | {each.split} | {each.batch} |" in page
            assert shown in page
            assert each.step in text.getvalue()
        assert all(note in page for note in one.notes)
        assert all(f"| {each.input_len} | {each.output_len} |" in page for each in one.lengths)
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == 2 * (3 * 2 + len(STEPS) + 4 + 4)
    refused = replace(found[0], rows=(replace(found[0].rows[0], fits=False),))
    assert "baseline (does not fit)" in to_markdown([refused])
