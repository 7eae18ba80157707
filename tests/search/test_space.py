"""The strategy space: what is in it, counted by hand, and how large it says it is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.oracle import Case, cases, dense, sparse

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.search.layouts import divisors, raw_layouts
from shardplan.search.space import (
    Choice,
    batch_grid,
    build_space,
    chunk_grid,
)

CHOICES = (
    Choice(attention="flash", weight_dtype="bf16", kv_dtype="bf16"),
    Choice(attention="naive", weight_dtype="bf16", kv_dtype="bf16"),
)


@given(st.integers(1, 5000))
def test_divisors_are_all_that_divide(n: int) -> None:
    assert divisors(n) == tuple(d for d in range(1, n + 1) if n % d == 0)


def test_layouts_of_a_dense_model_are_the_ways_to_split_the_cards() -> None:
    """Four cards are tp * pp * dp in 6 ways (4 = 1*1*4, 1*2*2, ...), each with and without sp."""
    found = list(raw_layouts(dense(), load_engine("vllm-ascend"), 4))
    assert len(found) == len(set(found)) == 12
    assert {par.ranks for par in found} == {4}
    assert {par.ep for par in found} == {1}


def test_layouts_of_an_expert_model_add_ep_and_the_exchange() -> None:
    """Two cards: ep shares the tp * dp ranks. ep 1 has no exchange, ep 2 has two kinds.

    tp 1 pp 1 dp 2 and tp 2 pp 1 dp 1: (1 + 2) * 2 each; tp 1 pp 2 dp 1: ep 1 alone, * 2 for sp.
    """
    assert len(list(raw_layouts(sparse(), load_engine("vllm-ascend"), 2))) == 6 + 6 + 2


def test_the_size_counts_what_rules_leave_out_too() -> None:
    """12 layouts of a dense model on 4 cards, 2 choices, 3 batches, 2 chunks.

    Four layers are cut into two stages in 3 ways, and two axes with ranks have 2 orders: tp 1 has
    1 + 3 * 2 + 1 ways with pp 1, 2 and 4, tp 2 has 2 + 3 * 2, tp 4 has 1, with sp and without.
    Sequence parallelism needs tp above 1, so of 12 layouts the 3 with tp 1 and sp are illegal;
    of the others vLLM has one order each.
    """
    space = build_space(
        dense(),
        load_cluster("atlas-800t-a2"),
        load_engine("vllm-ascend"),
        cards=4,
        choices=CHOICES,
        batches=(1, 2, 3),
        chunks=(256, 512),
    )
    assert space.size == 2 * (8 + 8 + 1) * 12
    assert space.broken_strategies == {"sp-tp": 8 * 12, "order-engine": (3 + 2 * (1 + 3)) * 12}
    assert space.per_layout == 12
    assert space.broken == {"sp-tp": 3}
    assert len(space.layouts) == 9
    assert space.dimensions()["tp"] == [1, 2, 4]
    assert space.dimensions()["attention"] == ["flash", "naive"]


@given(cases())
def test_every_layout_is_legal_or_counted_under_one_rule(case: Case) -> None:
    space = case.space()
    assert len(space.layouts) + sum(space.broken.values()) == space.raw_layouts
    legal = sum(map(space.strategies, space.layouts))
    assert space.size == legal + sum(space.broken_strategies.values())


@pytest.mark.parametrize("limit", [1, 5, 16, 17, 100, 256, 1024])
def test_batches_are_dense_below_sixteen_and_end_at_the_limit(limit: int) -> None:
    """Every number to 16, then steps of at most an eighth octave (2**(1/8) = 1.09, rounded)."""
    grid = batch_grid(limit)
    assert list(grid) == sorted(set(grid))
    assert grid[: min(limit, 16)] == tuple(range(1, min(limit, 16) + 1))
    assert grid[-1] == limit
    assert all(b <= 1.13 * a for a, b in itertools.pairwise(grid) if a >= 16)


def test_chunks_hold_the_engines_default_and_the_whole_prompt() -> None:
    engine = load_engine("vllm-ascend")
    grid = chunk_grid(engine, 3000, 500)
    assert list(grid) == sorted(set(grid))
    assert {engine.max_num_batched_tokens, 3000} <= set(grid)


def test_a_strategy_carries_its_stages() -> None:
    """Four layers on two stages are two and two."""
    space = build_space(
        dense(),
        load_cluster("atlas-800t-a2"),
        load_engine("vllm-ascend"),
        cards=4,
        choices=CHOICES,
        batches=(1,),
        chunks=(256,),
    )
    par = next(par for par in space.layouts if par.pp == 2)
    strategy = space.strategy(par, CHOICES[0], 1, 256)
    assert strategy.stage_layers == (2, 2)
    assert strategy.ranks == 4
