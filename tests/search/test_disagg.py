"""Disaggregated search finds what brute force finds, and its certificate adds up."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tests.search.disagg_cases import disagg_cases, order_case
from tests.search.disagg_oracle import best_deployment, space_size
from tests.search.oracle import sparse

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg import search_disagg
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.disagg_space import prefill_grid
from shardplan.search.legality import first_broken_pair_rule
from shardplan.search.rulebook import Subject
from shardplan.search.spare import Spare


def _agrees(question: DisaggQuestion) -> None:
    """The best of the search is the oracle's, and every combination is accounted for."""
    outcome = search_disagg(question)
    tally = outcome.tally
    assert outcome.space_size == space_size(question)
    assert tally.evaluated + sum(tally.pruned_by.values()) == outcome.space_size
    assert min(tally.pruned_by.values(), default=0) >= 0
    best = best_deployment(question)
    cards = question.objective == "cards"
    own = -math.inf if best is None else -best.spent if cards else best.objective
    found = -math.inf if outcome.best is None else outcome.best.worth(question.objective)
    if not outcome.complete:
        assert found <= own or found == pytest.approx(own, rel=1e-7)
        assert own <= outcome.unreached or own == pytest.approx(outcome.unreached, rel=1e-7)
        event("a gap is left")
        return
    assert (outcome.best is None) == (best is None)
    if best is None or outcome.best is None:
        return
    assert outcome.best.columns["objective"] == pytest.approx(best.objective, rel=1e-7)
    if cards:
        assert outcome.best.columns["spent"] == best.spent


@settings(max_examples=6)
@given(disagg_cases())
def test_the_best_is_brute_forces_best(question: DisaggQuestion) -> None:
    _agrees(question)


@pytest.mark.slow
@settings(max_examples=30)
@given(disagg_cases())
def test_the_best_is_brute_forces_best_on_many_questions(question: DisaggQuestion) -> None:
    _agrees(question)


def _may_lose(
    question: DisaggQuestion, spare: Spare | None, rate: float, prices: tuple[float, float]
) -> DisaggQuestion:
    """The cheapest cards for a rate with so much lost."""
    pools = (
        replace(
            pool,
            workload=pool.workload.model_copy(update={"request_rate": rate, "concurrency": None}),
        )
        for pool in (question.prefill, question.decode)
    )
    prefill, decode = pools
    return replace(
        question, prefill=prefill, decode=decode, objective="cards", spare=spare, prices=prices
    )


SPARES = st.none() | st.builds(
    Spare, count=st.sampled_from([1, 1, 2]), unit=st.sampled_from(["card", "node"])
)
PRICES = st.sampled_from([(1.0, 1.0), (1.0, 4.0), (2.5, 0.5)])


@settings(max_examples=6)
@given(disagg_cases(), SPARES, st.sampled_from([1e-3, 2.0, 40.0]), PRICES)
def test_headroom_is_that_of_brute_force(
    question: DisaggQuestion, spare: Spare | None, rate: float, prices: tuple[float, float]
) -> None:
    _agrees(_may_lose(question, spare, rate, prices))


@pytest.mark.slow
@settings(max_examples=24)
@given(disagg_cases(), SPARES, st.sampled_from([1e-3, 2.0, 40.0]), PRICES)
def test_headroom_is_that_of_brute_force_on_many_questions(
    question: DisaggQuestion, spare: Spare | None, rate: float, prices: tuple[float, float]
) -> None:
    _agrees(_may_lose(question, spare, rate, prices))


def _is_true_when_cut_short(question: DisaggQuestion, ticks: int) -> None:
    """A search that ends after so many looks at the clock: its bound holds for all there is."""
    whole = search_disagg(question)
    looks = itertools.count()
    with patch("time.perf_counter", lambda: float(next(looks))):
        cut = search_disagg(question, time_limit_s=float(ticks))
    tally = cut.tally
    assert cut.space_size == whole.space_size
    assert min(tally.pruned_by.values(), default=0) >= 0
    counted = tally.evaluated + sum(tally.pruned_by.values())
    assert counted <= cut.space_size
    if cut.complete:
        assert (cut.best is None) == (whole.best is None)
    if whole.best is None:
        assert cut.best is None
        return
    own = whole.best.worth(question.objective)
    found = -math.inf if cut.best is None else cut.best.worth(question.objective)
    assert found <= own * (1 + 1e-9 if own > 0 else 1 - 1e-9)
    assert max(found, cut.unreached) >= own * (1 - 1e-9 if own > 0 else 1 + 1e-9)
    if cut.complete:
        assert found == pytest.approx(own, rel=1e-7)


@settings(max_examples=15)
@given(disagg_cases(), st.integers(0, 120))
def test_a_search_cut_short_bounds_what_it_did_not_reach(
    question: DisaggQuestion, ticks: int
) -> None:
    _is_true_when_cut_short(question, ticks)


@pytest.mark.slow
@settings(max_examples=150)
@given(disagg_cases(), st.integers(0, 120))
def test_searches_cut_short_bound_what_they_did_not_reach(
    question: DisaggQuestion, ticks: int
) -> None:
    _is_true_when_cut_short(question, ticks)


@given(
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.sampled_from([1, 4])),
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.sampled_from([1, 4])),
    st.sampled_from(["vllm-ascend", "mindie"]),
)
def test_the_pair_rule_looks_at_its_key_alone(
    one: tuple[int, int, int], other: tuple[int, int, int], engine: str
) -> None:
    """Options are grouped by it: layouts of one key have the same partners."""
    subject = Subject(
        spec=sparse(),
        cluster=load_cluster("atlas-800t-a2"),
        engine=load_engine(engine),
        parallel=Parallelism(),
    )

    def of(tp: int, pp: int, dp: int, *, sp: bool) -> Subject:
        return replace(subject, parallel=Parallelism(tp=tp, pp=pp, dp=dp, ep=tp * dp, sp=sp))

    plain = first_broken_pair_rule(
        of(one[0], one[1], 1, sp=False), of(other[0], other[1], 1, sp=False)
    )
    assert first_broken_pair_rule(of(*one, sp=True), of(*other, sp=True)) == plain
    if engine == "mindie":
        assert plain is None
    elif one[0] % other[0]:
        assert plain == "pd-tp"
    else:
        assert plain == ("pd-decode-pp" if other[1] > 1 else None)


@pytest.mark.parametrize("prompt", [1, 100, 1024, 5000, 10**6])
def test_step_sizes_hold_whole_prompts_or_equal_pieces(prompt: int) -> None:
    """The whole prompt is among them, none is wasteful, and there are not too many."""
    sizes = prefill_grid(load_engine("vllm-ascend"), prompt)
    assert prompt in sizes
    assert len(sizes) < 200
    for size in sizes:
        assert size % prompt == 0 or size == -(-prompt // -(-prompt // size)) or size == 2048


@pytest.mark.parametrize("engine", ["torch-graph", "vllm-ascend"])
def test_orders_of_the_ranks_are_searched_where_the_engine_has_them(engine: str) -> None:
    """Contexts on the fast link win where ranks may be ordered so."""
    question = order_case(engine)
    _agrees(question)
    outcome = search_disagg(question)
    assert outcome.best is not None
    order = outcome.prefill.options.layout(outcome.best.prefill).order
    free = engine != "vllm-ascend"
    assert (order.index("tp") < order.index("cp")) == free
    assert ("rule order-engine" in outcome.tally.pruned_by) != free
