"""The executor against a decoder written apart from it, and what it records of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.models.faults import edited
from tests.models.reference import Real, forward
from tests.models.strategies import SPECS, tiny, tiny_moe

from shardplan.models.accounting import state_elements_per_token
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.errors import ProofError
from shardplan.models.kvcache import Slots
from shardplan.models.lockstep import Communication, LockStep
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.models.weights import random_weights

BATCH, PROMPT, STEPS = 3, 5, 4
ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def run_of(spec: ModelSpec, par: Parallelism | None = None, seed: int = 7) -> LockStep:
    """A run of a model with random weights; unsharded unless told."""
    graphs = [build_graph(spec, "prefill"), build_graph(spec, "decode")]
    cut = [apply(graph, par or Parallelism()) for graph in graphs]
    return LockStep(cut[0], cut[1], random_weights(graphs[0], seed))


def oracle(run: LockStep, spec: ModelSpec, ids: NDArray[Any]) -> Real:
    """Logits of every token by the reference decoder."""
    return forward(spec, {k: w.values.astype(np.float64) for k, w in run.weights.items()}, ids)


def draw_ids(spec: ModelSpec, batch: int, tokens: int, seed: int = 3) -> NDArray[Any]:
    """Random token ids [batch, tokens]."""
    return np.random.default_rng(seed).integers(0, spec.vocab, size=(batch, tokens))


def assert_equal(got: Real, want: Real) -> None:
    """Equal to 1e-10 of the largest element."""
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-10 * np.abs(want).max()


@ALL
def test_prefill_gives_the_logits_of_the_last_token(spec: ModelSpec) -> None:
    run, ids = run_of(spec), draw_ids(spec, BATCH, PROMPT)
    assert_equal(run.prefill(ids), oracle(run, spec, ids)[:, -1:])


@ALL
def test_decoding_with_a_cache_equals_computing_the_sequence_whole(spec: ModelSpec) -> None:
    """Also after a reset, and for two tokens in one step as in speculation."""
    run, ids = run_of(spec), draw_ids(spec, BATCH, PROMPT + STEPS)
    want = oracle(run, spec, ids)
    for _ in range(2):
        run.reset()
        run.prefill(ids[:, :PROMPT])
        for step in range(PROMPT, PROMPT + STEPS - 2):
            assert_equal(run.decode(ids[:, step : step + 1]), want[:, step : step + 1])
        assert_equal(run.decode(ids[:, -2:]), want[:, -2:])


@ALL
def test_chunks_of_a_prompt_equal_the_prompt(spec: ModelSpec) -> None:
    """Prefill against a prefix that is already cached."""
    run, ids = run_of(spec), draw_ids(spec, BATCH, 7)
    want = oracle(run, spec, ids)
    assert_equal(run.prefill(ids[:, :2]), want[:, 1:2])
    assert_equal(run.prefill(ids[:, 2:]), want[:, -1:])


SPLITS = {
    "mha": Parallelism(tp=2, cp=2, pp=2),
    "mla": Parallelism(tp=2, cp=2, dp=2, sp=True),
    "moe, shared": Parallelism(tp=2, cp=2, ep=4, exchange="alltoall"),
    "moe": Parallelism(cp=2, dp=2, ep=4),
    "tied": Parallelism(tp=2, dp=4, o_tp=4, ffn_tp=4, head_tp=8, embed_tp=8),
    "gqa": Parallelism(tp=2, pp=2, dp=2, sp=True),
    "mqa": Parallelism(tp=4, pp=2),
    "norm over all heads": Parallelism(tp=4, dp=2),
    "everything": Parallelism(tp=2, pp=3, dp=2, ep=4),
    "moe, groups": Parallelism(tp=2, dp=4, ep=8, exchange="alltoall", sp=True),
    "mla, moe": Parallelism(tp=4, pp=2, ep=2),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_sharded_run_equals_the_reference_itself(name: str) -> None:
    """Not only the unsharded run of the same executor."""
    spec, batch = SPECS[name], 8
    run, ids = run_of(spec, SPLITS[name]), draw_ids(spec, 8, 6)
    want = oracle(run, spec, ids)
    assert_equal(run.prefill(ids[:, :4]), want[:, 3:4])
    for step in (4, 5):
        assert_equal(run.decode(ids[:, step : step + 1]), want[:, step : step + 1])
    held = batch * 6 // (SPLITS[name].dp * SPLITS[name].cp)
    assert run.cached_elements(run.decode_graph.stages[0]) % held == 0


@pytest.mark.parametrize("name", ["gqa", "mla", "moe, dense prefix"])
def test_chunks_and_turns_of_split_contexts_equal_the_whole_sequence(name: str) -> None:
    """Chunks of a prompt, single tokens, a second prompt behind them, on four ranks a context.

    11 tokens: three slots on each of four ranks, one of them empty.
    """
    spec = SPECS[name]
    run, ids = run_of(spec, Parallelism(cp=4)), draw_ids(spec, 2, 20)
    want = oracle(run, spec, ids)
    assert_equal(run.prefill(ids[:, :4]), want[:, 3:4])
    assert_equal(run.prefill(ids[:, 4:8]), want[:, 7:8])
    for step in (8, 9, 10):
        assert_equal(run.decode(ids[:, step : step + 1]), want[:, step : step + 1])
    stage = run.decode_graph.stages[0]
    a_token = 4 * state_elements_per_token(run.decode_graph, stage)
    assert run.cached_elements(stage) == a_token * 2 * 3
    assert_equal(run.prefill(ids[:, 11:19]), want[:, 18:19])
    assert_equal(run.decode(ids[:, 19:]), want[:, 19:])


def test_a_split_cache_deals_new_tokens_out_in_turn() -> None:
    """Five tokens of a prompt's halves, then single ones: each goes to the emptier rank."""
    slots, _ = Slots.empty(2).appended(2, dealt=True)
    assert slots.at.tolist() == [[0, 1], [2, 3]]
    for _ in range(3):
        slots, source = slots.appended(1, dealt=False)
    assert slots.at.tolist() == [[0, 1, 4, 6], [2, 3, 5, -1]]
    assert source.tolist() == [[0, 1, 2, 3], [0, 1, 2, 4]]
    assert slots.tokens == 7


def test_the_log_holds_what_moved_between_ranks() -> None:
    """One layer on two ranks, B=3 T=5 H=8: embedding, o and down are summed, logits gathered."""
    spec = tiny(layers=1)
    run = run_of(spec, Parallelism(tp=2))
    run.prefill(draw_ids(spec, 3, 5))
    assert run.log == [
        Communication(0, "embed", "all_reduce", ("tp0",), 2, 3 * 5 * 8),
        Communication(0, "dense", "all_reduce", ("tp0",), 2, 3 * 5 * 8),
        Communication(0, "dense", "all_reduce", ("tp0",), 2, 3 * 5 * 8),
        Communication(0, "head", "all_gather", ("tp0",), 2, 3 * 1 * 16),
    ]


def test_cache_and_weights_are_counted_per_rank_and_stage() -> None:
    """Two stages of one layer on two ranks each; K=2 kv heads of D=6, float64."""
    run = run_of(tiny(), Parallelism(tp=2, pp=2))
    run.prefill(draw_ids(tiny(), 3, 5))
    run.decode(draw_ids(tiny(), 3, 1))
    first, last = run.decode_graph.stages
    assert run.cached_elements(first) == run.cached_elements(last) == 2 * (2 // 2) * 6 * 3 * 6
    layer = (8 * 24 + 2 * 8 * 12 + 24 * 8 + 3 * 8 * 12) // 2 + 2 * 8
    assert run.weight_bytes == {
        0: 8 * (layer + 16 * 8 // 2),
        1: 8 * (layer + 16 * 8 // 2 + 8),
    }
    run.reset()
    assert run.cached_elements(first) == 0


def test_int8_weights_carry_one_scale_per_output_channel() -> None:
    """q [H, K, G, D]: each of K*G*D channels reaches 127 and is off by half a step at most."""
    graph = build_graph(tiny(), "prefill")
    whole, ints = random_weights(graph, 1), random_weights(graph, 1, quantized=True)
    q = ints["0.q"]
    assert q.values.dtype == np.int8
    assert q.scale is not None
    assert q.scale.shape == (2, 2, 6)
    assert (np.abs(q.values).max(axis=0) == 127).all()
    off = np.abs(q.values.astype(np.float64) * q.scale - whole["0.q"].values.astype(np.float64))
    assert (off <= q.scale / 2 + 1e-12).all()
    assert ints["0.norm1"].scale is None
    assert ints["embedding"].scale is None


def test_experts_are_quantized_one_by_one() -> None:
    """e_down [E, I, H] keeps E and H: an expert's scales are its own."""
    ints = random_weights(build_graph(tiny_moe(), "prefill"), 1, quantized=True)
    assert ints["0.e_down"].scale_dims == ("E", "H")
    assert ints["0.router"].scale is None


def test_shards_that_do_not_divide_are_refused() -> None:
    run = run_of(tiny(), Parallelism(dp=2))
    with pytest.raises(ProofError, match="dim=B, size=3, ways=2"):
        run.prefill(draw_ids(tiny(), 3, 5))


def test_replicas_that_disagree_are_noticed() -> None:
    """A sum left out at the end: each rank holds another result."""
    run = run_of(tiny(), Parallelism(tp=2))
    run.prefill_graph, changed = edited(
        run.prefill_graph, lambda node: () if node.name.startswith("lm_head>") else (node,)
    )
    run.prefill_graph, unsplit = edited(
        run.prefill_graph,
        lambda node: (replace(node, layout=()) if node.name == "lm_head" else node,),
    )
    assert changed == unsplit == 1
    with pytest.raises(ProofError, match="replicas of the output disagree"):
        run.prefill(draw_ids(tiny(), 2, 4))
