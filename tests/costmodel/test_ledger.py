"""The memory ledger: bytes worked by hand, liveness by brute force, and what never needs more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.costmodel.priced import CASES, Priced, case_names, load, price

from shardplan.costmodel.ledger import StageMemory, weight_element_bytes
from shardplan.models.apply import ShardedBlock, ShardedGraph
from shardplan.models.catalog import load_model
from shardplan.models.errors import LayoutError
from shardplan.models.graph import FREE_DIMS
from shardplan.models.parallel import Parallelism

DTYPES = ("w8a16", "w8a8", "fp8", "w4a16", "w4a8")
_batches, _tokens, _contexts = st.integers(1, 256), st.integers(1, 16384), st.integers(1, 65536)


def stages(case: Priced, **asked: Any) -> list[StageMemory]:
    """The ledger of a case, 16-bit and flash, 16 sequences of 4096 tokens unless said otherwise."""
    usual: dict[str, Any] = {
        "weight_dtype": "bf16",
        "kv_dtype": "bf16",
        "attention": "flash",
        "batch": 16,
        "tokens": 2048,
        "context": 4096,
    }
    return case.ledger.stages(case.model.machine, **(usual | asked))


def activations(case: Priced, tokens: int, context: int = 4096, attention: Any = "flash") -> float:
    """Bytes of one step's tensors and attention scratch."""
    machine = case.model.machine
    return float(case.ledger.activations_bytes(machine, tokens, context, attention))


def test_llama_8b_on_one_rank_by_hand() -> None:
    """Linear weights and their scales by dtype; both tables and the norms stay 16-bit."""
    (stage,) = load("llama-3.1-8b").graphs["prefill"].stages
    held = load("llama-3.1-8b").ledger.weights_bytes
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    whole = 2 * (2 * 128256 * 4096 + 65 * 4096)
    channels = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert held(stage, "bf16") == 2 * linear + whole == 2 * 8_030_261_248
    assert held(stage, "w8a8") == linear + 4 * channels + whole
    assert held(stage, "w4a16") == linear / 2 + 2 * linear / 128 + whole


def test_the_cache_of_sixteen_sequences_by_hand() -> None:
    """32 layers, keys and values, 8 heads of 128: 131,072 bytes a token; blocks of 128 tokens."""
    for context, kept in ((1, 128), (128, 128), (129, 256), (4000, 4096)):
        (stage,) = stages(load("llama-3.1-8b"), context=context)
        assert stage.kv_cache_bytes == 16 * kept * 131072


def test_logits_of_many_sequences_can_outweigh_the_layers_of_the_last_stage() -> None:
    first, _, last = stages(load("dense tp2 pp3"), batch=1000, tokens=1000)
    assert last.activations_bytes == 1000 * 128256 * 4
    assert last.activations_bytes > first.activations_bytes


def test_a_stage_sums_to_its_total() -> None:
    for name in CASES:
        for stage in stages(load(name)):
            assert stage.total_bytes == (
                stage.weights_bytes
                + stage.kv_cache_bytes
                + stage.activations_bytes
                + stage.communicators_bytes
                + stage.reserve_bytes
            )


def test_each_group_that_a_rank_belongs_to_takes_a_buffer() -> None:
    known = {"dense tp1": 0, "dense tp8": 1, "dense tp2 pp3": 2, "mla dp16 ep16 a2a": 2}
    for name, count in known.items():
        case = load(name)
        assert case.ledger.communicators == count
        buffers = stages(case)[0].communicators_bytes
        assert buffers == count * case.model.engine.communicator_bytes


def local_elements(graph: ShardedGraph, block: ShardedBlock, name: str, tokens: int) -> float:
    """Elements of one tensor on one rank; caches are counted elsewhere."""
    node = block.op(name)
    if node.op is not None and node.op.state:
        return 0.0
    ways, size = 1, node.density
    for dim in node.dims:
        cut = graph.split(dim, node.layout)
        if dim in FREE_DIMS:
            ways *= cut
        else:
            size *= graph.model.sizes[dim] / cut
    return float(np.ceil(tokens * graph.parallel.dp / ways)) * size


def brute_force_peak(graph: ShardedGraph, tokens: int) -> float:
    """Elements alive at the worst moment of any layer, moment by moment."""
    worst = 0.0
    for name in {name for stage in graph.stages for name, _ in graph.sequence(stage)}:
        if name in ("head", "send", "recv"):
            continue
        block = graph.blocks[name]
        order = list(block.order)
        for now, _ in enumerate(order):
            alive = 0.0
            for made, tensor in enumerate(order[: now + 1]):
                used = [at for at, other in enumerate(order) if tensor in block.op(other).inputs]
                if made == now or tensor == block.exit or any(at >= now for at in used):
                    alive += local_elements(graph, block, tensor, tokens)
            worst = max(worst, alive)
    return worst


@pytest.mark.parametrize("tokens", [16, 1024, 8192])
@pytest.mark.parametrize("name", CASES)
def test_activations_are_the_most_that_is_ever_alive(name: str, tokens: int) -> None:
    case = load(name)
    peaks = case.ledger.peaks.values()
    step = tokens * case.model.groups
    held = max(sum(np.ceil(step / ways) * each for each, ways in alive) for alive in peaks)
    assert held == pytest.approx(brute_force_peak(case.graphs["prefill"], tokens), rel=1e-12)


def test_a_llama_layer_holds_the_residual_and_three_ffn_tensors_by_hand() -> None:
    """While the activation is computed: 4096 + 3 * 14336 elements a token, 2 bytes each."""
    more = activations(load("llama-3.1-8b"), 8192) - activations(load("llama-3.1-8b"), 4096)
    assert more == 4096 * 2 * (4096 + 3 * 14336)


def test_tensor_parallel_cuts_the_ffn_tensors_but_not_the_residual() -> None:
    """On eight ranks queries, keys and sums are smaller than 4 * 4096: norm, sum, residual."""
    more = activations(load("dense tp8"), 8192) - activations(load("dense tp8"), 4096)
    assert more == 4096 * 2 * (3 * 4096)


@given(name=case_names(), dtype=st.sampled_from(DTYPES))
def test_quantized_weights_never_need_more(name: str, dtype: str) -> None:
    case = load(name)
    for stage in case.graphs["prefill"].stages:
        small = case.ledger.weights_bytes(stage, dtype)
        assert small < case.ledger.weights_bytes(stage, "bf16")
        assert weight_element_bytes(dtype) < weight_element_bytes("bf16")


@given(name=case_names(), batch=_batches, context=_contexts)
def test_an_int8_cache_takes_exactly_half(name: str, batch: int, context: int) -> None:
    asked = {"batch": batch, "context": context}
    whole, half = stages(load(name), **asked), stages(load(name), kv_dtype="int8", **asked)
    for one, other in zip(whole, half, strict=True):
        assert other.kv_cache_bytes * 2 == one.kv_cache_bytes


@given(name=case_names(), one=_tokens, more=st.integers(1, 16384), context=_contexts)
def test_more_tokens_never_need_less(name: str, one: int, more: int, context: int) -> None:
    for kernel in ("flash", "naive"):
        less = activations(load(name), one, context, kernel)
        assert activations(load(name), one + more, context, kernel) >= less
    fewer, many = (stages(load(name), batch=n, context=context) for n in (one, one + more))
    for small, big in zip(fewer, many, strict=True):
        assert big.total_bytes > small.total_bytes


@given(name=case_names(), tokens=st.integers(128, 16384), context=st.integers(512, 65536))
def test_naive_attention_never_needs_less(name: str, tokens: int, context: int) -> None:
    """Of a tile of queries over 512 tokens on; below, flash keeps whole tiles (some megabytes)."""
    flash, naive = (activations(load(name), tokens, context, k) for k in ("flash", "naive"))
    assert naive >= flash


@pytest.mark.parametrize("preset", ["llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v3", "glm-4.5"])
def test_twice_the_cards_never_need_more_each(preset: str) -> None:
    """Communicators aside: the first split brings the first buffers."""
    spec, before = load_model(preset), np.inf
    for tp in (1, 2, 4, 8, 16):
        try:
            found = stages(price(spec, Parallelism(tp=tp)))[0]
        except LayoutError:
            continue
        needed = float(found.total_bytes) - found.communicators_bytes
        assert needed < before
        before = needed


def test_pipeline_stages_share_the_layers_and_the_ends_hold_the_tables() -> None:
    one, two, three, four = stages(load("dense pp4 uneven"))
    assert [s.layers for s in (one, two, three, four)] == [9, 11, 11, 9]
    assert two.weights_bytes == three.weights_bytes
    layer = (two.weights_bytes) / 11
    assert one.weights_bytes == 9 * layer + 2 * 32000 * 5120
    assert four.weights_bytes == 9 * layer + 2 * (32000 + 1) * 5120
