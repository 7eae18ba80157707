"""`shardplan.search(...)`: the Python face of the search."""

from __future__ import annotations

from typing import Any

import pytest

import shardplan
from shardplan.costmodel.catalog import load_cluster
from shardplan.models.catalog import load_model
from shardplan.models.errors import InfeasibleError, InputError

MODEL, CLUSTER = "llama-3.1-8b", "atlas-800t-a2"


def plan_of(**asked: Any) -> Any:
    """The plan of a question on one or two cards."""
    return shardplan.search(MODEL, CLUSTER, **{"cards": 2, "concurrency": 16, **asked}).plan


def test_names_and_what_they_name_ask_the_same() -> None:
    """A loaded model and cluster give the bytes that their names give."""
    cluster = load_cluster(CLUSTER)
    loaded = shardplan.search(load_model(MODEL), cluster, cards=2, concurrency=16)
    assert loaded.plan.dumps() == plan_of().dumps()


def test_progress_counts_layouts() -> None:
    """From one to all of them."""
    seen: list[tuple[int, int]] = []
    plan_of(progress=lambda done, total: seen.append((done, total)))
    assert seen
    total = seen[-1][1]
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_timing_is_of_this_run() -> None:
    """Its parts are within the whole."""
    timing = shardplan.search(MODEL, CLUSTER, cards=1, concurrency=2).timing
    parts = timing["search_s"] + timing["quantization_s"] + timing["proof_s"]
    assert 0 < parts <= timing["total_s"]
    assert timing["strategies_per_s"] > 0


@pytest.mark.parametrize("top", [0, 1, 3])
def test_top_bounds_the_alternatives(top: int) -> None:
    """None, one, some."""
    assert len(plan_of(top=top).alternatives) == min(top, len(plan_of(top=99).alternatives))


@pytest.mark.parametrize("top", [-1, True, 1.5, "x", None, 10**9])
def test_a_bad_top_is_refused(top: object) -> None:
    """It is a number of alternatives."""
    with pytest.raises(InputError, match="`top`"):
        plan_of(top=top)


def test_each_objective_is_best_at_its_own() -> None:
    """Latency gives the shortest request, throughput the most tokens."""
    fast = plan_of(objective="latency", concurrency=None).performance
    wide = plan_of(objective="throughput", concurrency=None).performance
    assert fast.end_to_end_s < wide.end_to_end_s
    assert wide.output_tokens_per_s > fast.output_tokens_per_s


def test_more_cards_never_hurt() -> None:
    """Of throughput without limits, from one card to a node."""
    rates = [
        shardplan.search(MODEL, CLUSTER, cards=cards, ttft_ms=1e6).plan.performance
        for cards in (1, 2, 4)
    ]
    assert [r.output_tokens_per_s for r in rates] == sorted(r.output_tokens_per_s for r in rates)


@pytest.mark.parametrize("engine", ["random", "tpe"])
def test_a_sampled_search_is_never_better_and_claims_no_bound(engine: str) -> None:
    """The exact optimum is an upper bound of what it finds; the same seed finds the same."""
    sampled = plan_of(engine=engine, trials=25, seed=3)
    assert sampled.performance.output_tokens_per_s <= plan_of().performance.output_tokens_per_s
    assert sampled.certificate.gap is None
    assert sampled.certificate.bound is None
    assert sampled.certificate.evaluated + sampled.certificate.pruned <= 25
    assert plan_of(engine=engine, trials=25, seed=3).dumps() == sampled.dumps()


def test_errors_come_before_a_search() -> None:
    """Bad input and no answer are told apart by their class and exit code."""
    with pytest.raises(InputError) as bad:
        plan_of(input_len=0)
    with pytest.raises(InfeasibleError) as none:
        plan_of(tpot_ms=0.001)
    assert (bad.value.exit_code, none.value.exit_code) == (2, 3)
