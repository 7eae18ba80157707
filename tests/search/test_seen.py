"""Limits that are dear to price, the queue of a rate and percentiles: judged where it matters."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.search.oracle import Case, Found, best_of, brute_force, small_case
from tests.search.small_models import dense, sparse

from shardplan.search.evaluate import LayoutScorer
from shardplan.search.exact import search_exact
from shardplan.search.judged import Wanted
from shardplan.search.kept import Outcome, first_of_each
from shardplan.search.spare import Spare

ASKED: tuple[dict[str, Any], ...] = (
    {"request_rate": 60.0, "ttft_s": 0.05},
    {"request_rate": 150.0, "ttft_s": 0.03, "objective": "latency"},
    {"request_rate": 100.0, "ttft_p99_s": 0.08, "tpot_p99_s": 0.02},
    {"ttft_p99_s": 0.1},
    {"request_rate": 60.0, "ttft_s": 0.05, "spare": Spare(count=1)},
    {"request_rate": 400.0, "ttft_s": 0.01},
)


@functools.cache
def asked(index: int) -> tuple[Case, list[Found], Outcome]:
    """A small question, every strategy of it, and what the search finds."""
    given = dict(ASKED[index])
    spare = given.pop("spare", None)
    case = small_case(sparse() if index == 2 else dense(), cards=2, **given)
    case = replace(
        case,
        question=replace(case.question, spare=spare),
        choices=case.choices[:1],
        batches=(1, 2, 4, 8, 12, 16, 24, 64),
        chunks=(64, 256, 1024),
    )
    found = search_exact(case.question, case.space(), wanted=Wanted(layouts=3, strategies=5))
    return case, brute_force(case), found


def traded(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """More of the first with less of the second: those that none beats, by plain loops."""
    best, found = np.inf, []
    for gain, cost in sorted(points, key=lambda one: (-one[0], one[1])):
        if cost < best:
            best = cost
            found.append((gain, cost))
    return found


@pytest.mark.parametrize("index", range(len(ASKED)))
def test_judging_where_it_matters_finds_what_judging_all_does(index: int) -> None:
    """The best, and that every strategy is accounted for."""
    _, every, outcome = asked(index)
    best = best_of(every)
    assert outcome.complete
    assert outcome.tally.evaluated + sum(outcome.tally.pruned_by.values()) == outcome.space.size
    if best is None:
        assert outcome.best is None
        assert not outcome.tally.pruned_by["queue"]
        return
    assert outcome.best is not None
    assert outcome.best.columns["objective"] == best.objective == outcome.bound
    held = {(one.parallel, one.batch, one.chunk) for one in every if one.feasible}
    for one in outcome.kept:
        assert one.feasible == ((one.parallel, one.batch, one.chunk) in held)


def test_some_are_judged_and_some_need_not_be() -> None:
    """Both happen in these questions; else they prove nothing."""
    refused = [outcome.tally.infeasible for _, _, outcome in map(asked, range(len(ASKED)))]
    assert sum(bool(one["ttft"] or one["ttft_p99"] or one["tpot_p99"]) for one in refused) >= 4
    assert sum(asked(i)[2].tally.pruned_by["queue"] > 0 for i in range(len(ASKED))) >= 4
    queued = [kept for i in (0, 1) for kept in asked(i)[2].refused.values()]
    assert sum(one[0].size for one in queued)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4])
def test_the_front_and_the_best_are_those_of_all(index: int) -> None:
    """Throughput against TPOT, the best strategies and the best of the best layouts."""
    case, every, outcome = asked(index)
    held = [one for one in every if one.feasible]
    columns = [one.columns for one in outcome.kept if one.feasible]
    points = [(one["output_tokens_per_s"], one["tpot_s"]) for one in columns]
    assert traded(points) == traded(all_points(case, held))
    best = sorted((one.objective for one in held), reverse=True)[:5]
    assert [one.columns["objective"] for one in outcome.kept[:5] if one.feasible] == best
    layouts: dict[Any, float] = {}
    for one in sorted(held, key=lambda each: -each.objective):
        layouts.setdefault(replace(one.parallel, stage_layers=()), one.objective)
    firsts: dict[Any, float] = {}
    for kept in first_of_each(outcome.kept):
        if kept.feasible:
            layout = replace(kept.parallel, stage_layers=())
            firsts.setdefault(layout, kept.columns["objective"])
    assert [*firsts.values()][:3] == [*layouts.values()][:3]


def all_points(case: Case, held: list[Found]) -> list[tuple[float, float]]:
    """Throughput and TPOT of strategies, priced one by one."""
    found = []
    for one in held:
        at = np.array([float(one.batch)]), np.array([float(one.chunk)])
        columns = LayoutScorer(case.question, one.parallel).score(one.choice, *at).columns
        found.append((float(columns["output_tokens_per_s"][0]), float(columns["tpot_s"][0])))
    return found
