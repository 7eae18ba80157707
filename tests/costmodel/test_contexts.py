"""Contexts split over ranks and modules over groups: what they cost and hold, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.costmodel.priced import PHASES, Priced, load, price

from shardplan.costmodel.audit import audit_collectives, audit_memory
from shardplan.costmodel.formulas import _own_queries
from shardplan.costmodel.forward import forward_loads
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.serving import ServingInput, serve
from shardplan.models.catalog import load_model
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism

LLAMA, DEEPSEEK = load_model("llama-3.1-8b"), load_model("deepseek-v3")
SPLIT = [
    "dense tp2 cp4",
    "dense tp2 cp2 pp2 sp",
    "moe tp2 cp4 ep4",
    "mla tp2 cp2 dp4 ep16 a2a",
    "modules over dp16",
    "modules whole and wide",
]


@pytest.mark.parametrize("name", SPLIT)
def test_what_is_charged_passes_the_audit(name: str) -> None:
    """Collectives of both phases, weights and cache, against the applied graph."""
    case = load(name)
    for phase in PHASES:
        assert "different collectives" in audit_collectives(case.model, phase)
    assert "bytes of 16-bit weights" in audit_memory(case.ledger)


def kind_s(case: Priced, phase: Phase, kind: str, batch: int, new: int, prefix: int) -> float:
    """Seconds of one kind of row in a pass."""
    loads = forward_loads(
        phase,
        case.model.engine,
        batch=float(batch),
        new=float(new),
        prefix=float(prefix),
        weight_dtype="bf16",
        kv_dtype="bf16",
        attention="flash",
    )
    parts = [
        one
        for group, each in loads.items()
        for k, one in case.model.by_kind(group, each)
        if k == kind
    ]
    return float(sum(one.total_s for one in parts))


@pytest.mark.parametrize("prefix", [0, 65536])
def test_two_ranks_halve_the_attention_of_a_long_prompt(prefix: int) -> None:
    """Each has half of the queries, and they see what a mean query sees."""
    alone, both = price(LLAMA, Parallelism(tp=2)), price(LLAMA, Parallelism(tp=2, cp=2))
    passes: list[tuple[Phase, int, int, int]] = [
        ("prefill", 1, 65536, prefix),
        ("decode", 32, 1, 131072),
    ]
    for phase, many, new, before in passes:
        whole = kind_s(alone, phase, "attention", many, new, before)
        half = kind_s(both, phase, "attention", many, new, before)
        assert half == pytest.approx(whole / 2, rel=0.08), phase


def test_the_work_of_a_rank_is_an_even_share_of_the_causal_half_by_hand() -> None:
    """T=8 over 2 ranks after 4 cached: the last four see 4 x (8 + 4 / 2) scores, a mean 32."""
    row = next(r for r in load("dense tp2 cp4").rows("prefill", "dense") if r.kind == "attention")
    assert row.parts == 4.0
    asked = Load.of("prefill", load("dense tp1").model.engine, batch=1.0, new=8.0, prefix=4.0)
    new, before, share = map(float, _own_queries(row._replace(parts=2.0), asked))
    assert (new, before) == (4.0, 8.0)
    assert share * new * (before + new / 2) == 8 * (4 + 8 / 2) / 2
    alone = tuple(map(float, _own_queries(row._replace(parts=1.0), asked)))
    assert alone == (8.0, 4.0, 1.0)


def moved(case: Priced, phase: Phase, kind: str) -> list[tuple[str, float, bool, int, float]]:
    """(group, elements, of the context, ways, bytes of one) of a layer's collectives of a kind."""
    name = next(n for n in case.model.rows[phase] if n not in ("embed", "head", "send", "recv"))
    return [
        (row.group, row.n, row.context, row.ways, row.element_bytes)
        for row in case.rows(phase, name)
        if row.kind == kind
    ]


def test_prefill_gathers_keys_and_values_and_decode_partial_results_by_hand() -> None:
    """Llama-3.1-8B, tp 2, cp 4: 4 kv heads of 128 a rank; 16 heads of 128 and a log-sum-exp."""
    case = price(LLAMA, Parallelism(tp=2, cp=4))
    assert moved(case, "prefill", "all_gather") == [("attention", 4 * 128, True, 1, 2.0)] * 2
    assert moved(case, "decode", "all_gather") == [("attention", 16 * 129 * 4, False, 1, 4.0)]


def test_latent_attention_gathers_the_latent_alone() -> None:
    case = price(DEEPSEEK, Parallelism(tp=16, cp=2))
    assert [n for _, n, _, _, _ in moved(case, "prefill", "all_gather")][:2] == [512, 64]
    parts = [n for group, n, *_ in moved(case, "decode", "all_gather") if group == "attention"]
    assert parts == [128 / 16 * 513 * 2]


@settings(max_examples=20)
@given(context=st.integers(1, 300_000), ranks=st.sampled_from([1, 2, 4]))
def test_more_ranks_a_context_never_hold_more_of_it(context: int, ranks: int) -> None:
    """Weights are those of one rank; the cache shrinks by whole blocks."""
    few, more = (price(LLAMA, Parallelism(tp=2, cp=n)).ledger for n in (ranks, 2 * ranks))
    held = [
        one.stages(
            load("dense tp1").model.machine,
            weight_dtype="bf16",
            kv_dtype="bf16",
            attention="flash",
            batch=4.0,
            tokens=8192.0,
            context=float(context),
        )[0]
        for one in (few, more)
    ]
    assert held[1].weights_bytes == held[0].weights_bytes
    assert held[1].kv_cache_bytes <= held[0].kv_cache_bytes
    used = [one.kv_cache_bytes + one.activations_bytes for one in held]
    assert used[1] <= used[0]
    assert held[1].communicators_bytes >= held[0].communicators_bytes
    per_rank = 4 * -(-context // (128 * 2 * ranks)) * 128
    assert held[1].kv_cache_bytes == per_rank * 2 * 32 * 4 * 128 * 2


def test_keys_of_a_context_are_gathered_a_layer_at_a_time_by_hand() -> None:
    """Chunks of 8192, 56k tokens more: keys and values of 4 heads of 128."""
    case = load("dense tp2 cp4")
    held = [
        float(case.ledger.activations_bytes(case.model.machine, 8192.0, context, "flash"))
        for context in (8192.0, 65536.0)
    ]
    assert held[1] - held[0] == (65536 - 8192) * 2 * 4 * 128 * 2


def test_prompt_tokens_are_split_and_decoding_ones_are_not() -> None:
    """Rows of a matrix product: a quarter of a prompt's tokens, all of a decode step's."""
    case = load("dense tp2 cp4")
    ways = {
        phase: {row.ways for row in case.rows(phase, "dense") if row.kind == "matmul"}
        for phase in PHASES
    }
    assert ways == {"prefill": {4}, "decode": {1}}


def test_a_decoding_sequence_beside_a_prompt_is_computed_by_every_rank() -> None:
    """One more sequence in a mixed step costs as much as cp more tokens of the prompt."""
    seen: list[float] = []
    case = load("dense tp2 cp4").model

    class Watched(type(case)):  # type: ignore[misc]  # a step model that tells its loads
        def parts(self, group: str, given: Load) -> list[Parts]:
            if group == "token" and given.phase == "prefill":
                seen.append(float(given.tokens.max()))
            return super().parts(group, given)  # type: ignore[no-any-return]

    model = Watched(graphs=case.graphs, machine=case.machine, engine=case.engine, rows=case.rows)
    asked = ServingInput(
        batch=np.asarray([64.0]), chunk=np.asarray([2048.0]), input_len=512.0, output_len=512.0
    )
    serve(model, asked)
    own = Watched(
        graphs=load("dense tp1").graphs,
        machine=case.machine,
        engine=case.engine,
        rows=load("dense tp1").model.rows,
    )
    serve(own, asked)
    beside = (seen[0] - seen[1]) / 3
    assert beside > 0
    assert beside == int(beside)


def test_experts_of_a_context_s_ranks_are_held_once() -> None:
    """qwen3-30b-a3b, tp 2, cp 4, ep 4: a quarter of the experts on each rank of two pairs."""
    case = load("moe tp2 cp4 ep4")
    (stage,) = case.graphs["prefill"].stages
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    only = {
        ep: price(case.spec, Parallelism(tp=2, cp=4, ep=ep)).ledger.weights_bytes(stage, "bf16")
        for ep in (2, 8)
    }
    assert only[2] - case.ledger.weights_bytes(stage, "bf16") == experts / 4
    assert case.ledger.weights_bytes(stage, "bf16") - only[8] == experts / 8


def weights(spec_name: str, **sizes: Any) -> float:
    """16-bit weight bytes on one rank of the first stage."""
    case = price(load_model(spec_name), Parallelism(**sizes))
    return case.ledger.weights_bytes(case.graphs["prefill"].stages[0], "bf16")


def test_modules_hold_what_their_own_ranks_share_by_hand() -> None:
    """DeepSeek-V3, 16 groups of one rank: o 7168 x 16384 in 61 layers, head and table 129280."""
    base = weights("deepseek-v3", dp=16, ep=16)
    o, table = 61 * 128 * 128 * 7168 * 2, 129280 * 7168 * 2
    dense, shared = 3 * 3 * 7168 * 18432 * 2, 58 * 3 * 7168 * 2048 * 2
    for name, size, ranks in (
        ("o_tp", o, 8),
        ("head_tp", table, 16),
        ("embed_tp", table, 4),
        ("ffn_tp", dense, 8),
        ("shared_tp", shared, 2),
    ):
        saved = base - weights("deepseek-v3", dp=16, ep=16, **{name: ranks})
        assert saved == size * (ranks - 1) / ranks, name
    whole = weights("deepseek-v3", tp=4, dp=4, ep=16, shared_tp=1)
    assert whole - weights("deepseek-v3", tp=4, dp=4, ep=16) == shared * 3 / 4


def test_a_module_s_groups_step_together() -> None:
    """Replicas of a dense model are on their own; those that share a head are not."""
    assert price(LLAMA, Parallelism(tp=2, dp=4)).model.locked == 1
    assert price(LLAMA, Parallelism(tp=2, dp=4, head_tp=4)).model.locked == 2
    assert load("modules over dp16").model.locked == 16


def test_communicators_of_contexts_and_modules() -> None:
    """tp; then one for the ranks of a context, one for each other number of groups."""
    splits = [
        Parallelism(tp=2),
        Parallelism(tp=2, cp=2),
        Parallelism(tp=2, dp=4, head_tp=4),
        Parallelism(tp=2, dp=4, head_tp=4, embed_tp=4),
        Parallelism(tp=2, dp=4, head_tp=4, ffn_tp=8),
    ]
    counts = [price(LLAMA, par).ledger.communicators for par in splits]
    assert counts == [1, 2, 2, 2, 3]
