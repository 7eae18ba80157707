"""What is priced is what is proven: the op table moves, holds and caches what the graph says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tests.costmodel.priced import CASES, PHASES, Priced, load, price

from shardplan.costmodel.kernels.collectives import group_size
from shardplan.models.accounting import predict_communication, stage_weights
from shardplan.models.catalog import load_model
from shardplan.models.counts import kv_bytes_per_token, parameter_count
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism

Moved = Counter[tuple[int, str, int, int]]
"""(stage, kind, ranks, bytes) -> times a step."""


def priced_moves(case: Priced, phase: Phase, batch: int, tokens: int) -> Moved:
    """Collectives of the op table, for `batch` sequences of one dp group."""
    groups, found = case.model.groups, Counter[tuple[int, str, int, int]]()
    for stage in case.graphs[phase].stages:
        for name, count in stage.counts.items():
            for row in case.rows(phase, name):
                if not row.is_collective:
                    continue
                rows = batch if row.group == "logits" and phase == "prefill" else batch * tokens
                local = np.ceil(rows * groups / row.ways)
                what = (stage.index, row.kind, group_size(row.spans), round(2 * row.n * local))
                found[what] += count
    return found


def proven_moves(case: Priced, phase: Phase, batch: int, tokens: int) -> Moved:
    """Collectives that the lock-step proof checks, 16-bit."""
    everyone = batch * case.model.groups
    steps = predict_communication(case.graphs[phase], everyone, tokens, tokens)
    return Counter((one.stage, one.kind, one.ranks, 2 * one.elements) for one in steps)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_collectives_are_those_of_the_proof(name: str, phase: Phase) -> None:
    case = load(name)
    tokens = 256 if phase == "prefill" else 1
    for batch in (16, 64):
        moved = priced_moves(case, phase, batch, tokens)
        assert moved == proven_moves(case, phase, batch, tokens)
    assert bool(moved) == (case.graphs[phase].parallel.ranks > 1)


def test_llama_on_eight_ranks_by_hand() -> None:
    """Two sums a layer and one for the embedding, tokens * 4096 * 2 bytes; logits gathered once."""
    prompt, many = 4 * 512 * 4096 * 2, 4 * 128256 * 2
    assert priced_moves(load("dense tp8"), "prefill", 4, 512) == {
        (0, "all_reduce", 8, prompt): 2 * 32 + 1,
        (0, "all_gather", 8, many): 1,
    }
    assert priced_moves(load("dense tp8"), "decode", 4, 1) == {
        (0, "all_reduce", 8, 4 * 4096 * 2): 2 * 32 + 1,
        (0, "all_gather", 8, many): 1,
    }


def test_a_pipeline_sends_each_ranks_hidden_state_by_hand() -> None:
    moved = priced_moves(load("dense tp2 pp3"), "prefill", 2, 100)
    sends = {what: count for what, count in moved.items() if what[1] == "send"}
    assert sends == {(stage, "send", 2, 2 * 100 * 4096 * 2): 1 for stage in (0, 1)}


def test_sequence_parallel_gathers_every_token_before_the_head() -> None:
    """The last gather is of the hidden state of all tokens, not of the last one's logits."""
    case = load("dense tp8 sp")
    gathers = [row for row in case.rows("prefill", "head") if row.kind == "all_gather"]
    assert sorted((row.group, row.n) for row in gathers) == [("logits", 128256), ("token", 8192)]


def test_experts_receive_each_token_once_for_each_of_theirs_by_hand() -> None:
    """dp 4 x tp 2, ep 8: tokens of the stage times 8 experts each, cut by the eight ranks."""
    hidden, topk, everyone = 2048, 8, 4 * 16 * 256
    moved = priced_moves(load("moe dp4 tp2 ep8 a2a"), "prefill", 16, 256)
    sent = {what[3]: count for what, count in moved.items() if what[1] == "all_to_all"}
    assert sent == {everyone * topk * hidden * 2: 2 * 48}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_that_the_graph_holds(name: str) -> None:
    case = load(name)
    for stage in case.graphs["prefill"].stages:
        held = stage_weights(case.graphs["prefill"], stage)
        elements = sum(one.count * one.elements for one in held)
        assert case.ledger.weights_bytes(stage, "bf16") == 2 * elements


REPLICAS = {
    "dense tp1": 0,
    # norms of 4096, two a layer and the last
    "dense tp8": 7 * 65 * 4096,
    # the same over three stages of two ranks
    "dense tp2 pp3": 65 * 4096,
    # a second group holds everything again; norms of 8192 on the other three ranks of both
    "dense dp2 tp4": 70_553_706_496 + 2 * 3 * 161 * 8192,
    "dense pp4 uneven": 0,
    # norms, query and key norms, router on 15 more ranks; keys and values, cut 4 ways, on 3 more
    "tp beyond kv heads": 15 * (97 * 2048 + 48 * (256 + 2048 * 128)) + 3 * 48 * 2 * 2048 * 4 * 128,
    # the last stage keeps its own copy of the table; norms of 1024 and of query and key
    "tied": 151936 * 1024 + 57 * 1024 + 28 * 256,
    # latent projections and their norms, norms, routers with their biases, on 7 more ranks
    "mla tp8": 7
    * (61 * (7168 * (1536 + 576) + 1536 + 512 + 2 * 7168) + 7168 + 58 * (7168 * 256 + 256)),
}


@pytest.mark.parametrize("name", REPLICAS)
def test_all_ranks_together_hold_every_parameter_and_the_replicas_by_hand(name: str) -> None:
    case = load(name)
    graph = case.graphs["prefill"]
    total = sum(case.ledger.weights_bytes(s, "bf16") for s in graph.stages) * graph.mesh.ranks
    assert total == 2 * (parameter_count(case.spec) + REPLICAS[name])


def test_experts_are_held_once_whatever_the_exchange() -> None:
    """qwen3-30b-a3b on dp 4 x tp 2, ep 8: the experts once, all else four times, norms eight."""
    for name in ("moe dp4 tp2 ep8", "moe dp4 tp2 ep8 a2a"):
        case = load(name)
        stage = case.graphs["prefill"].stages[0]
        experts = 48 * 128 * 3 * 2048 * 768
        whole = 97 * 2048 + 48 * (256 + 2048 * 128)
        rest = parameter_count(case.spec) - experts - whole
        assert 8 * case.ledger.weights_bytes(stage, "bf16") == 2 * (experts + 4 * rest + 8 * whole)


KV_WAYS = {
    "dense tp1": 1,
    "dense tp8": 8,
    "dense tp2 pp3": 2,
    "dense dp2 tp4": 4,
    "tp beyond kv heads": 4,  # only four kv heads to share out
    "moe dp4 tp2 ep8": 2,
    "mla tp8": 1,  # the latent is whole on every rank
    "mla dp16 ep16 a2a": 1,
    "mla lite tp4 sp": 1,
}


@pytest.mark.parametrize(("name", "ways"), KV_WAYS.items())
def test_cache_bytes_of_a_token(name: str, ways: int) -> None:
    case = load(name)
    stages = case.graphs["prefill"].stages
    for dtype, size in (("bf16", 2), ("int8", 1)):
        whole = kv_bytes_per_token(case.spec, size)
        assert sum(case.ledger.kv_bytes_per_token(s, dtype) for s in stages) == whole / ways


def linear_flop(case: Priced, tokens: int) -> float:
    """FLOP of the matrix products of all ranks' token rows in a prefill of one dp group."""
    graph, total = case.graphs["prefill"], 0.0
    for stage in graph.stages:
        for name, count in stage.counts.items():
            for row in case.rows("prefill", name):
                if row.kind in ("matmul", "grouped_matmul") and row.group != "logits":
                    m = np.ceil(tokens * case.model.groups / row.ways) * row.share
                    total += count * 2 * m * row.n * row.k
    return total * graph.mesh.ranks


LINEAR = {
    # 32 layers: q and o, k and v, three FFN matrices
    "llama-3.1-8b": (32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 0),
    # 48 layers: q and o, k and v, 8 experts of width 768; the router on every rank, keys and
    # values (4 heads) on two ranks each
    "qwen3-30b-a3b": (
        48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 8 * 3 * 2048 * 768 + 2048 * 128),
        48 * (7 * 2048 * 128 + 2 * 2048 * 512),
    ),
    # 61 layers of latent attention (the up-projections once a token of context), 3 dense, 58 with
    # 8 experts and a shared one; the latent projections and the router on every rank
    "deepseek-v3": (
        61 * (7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168)
        + 3 * 3 * 7168 * 18432
        + 58 * (9 * 3 * 7168 * 2048 + 7168 * 256),
        7 * (61 * 7168 * (1536 + 576) + 58 * 7168 * 256),
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_matrix_products_cost_two_flop_a_parameter_and_token_by_hand(name: str) -> None:
    parameters, repeated = LINEAR[name]
    alone = price(load_model(name), Parallelism())
    assert linear_flop(alone, 1000) == 2 * 1000 * parameters
    split = price(load_model(name), Parallelism(tp=8))
    assert linear_flop(split, 1000) == 2 * 1000 * (parameters + repeated)
