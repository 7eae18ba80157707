"""Robustness of pools: contenders have the search's numbers, flips are where a search flips."""

from __future__ import annotations

import functools
import html
import io
import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given, settings
from rich.console import Console
from tests.search.disagg_cases import disagg_cases

import shardplan
from shardplan.costmodel.cost_groups import HOST, TRANSFER, ScaledModel
from shardplan.costmodel.load import Parts
from shardplan.search.disagg import DisaggOutcome, search_disagg
from shardplan.search.disagg_contenders import LIMITS, PairContender, pair_contenders
from shardplan.search.disagg_pools import Base
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.disagg_request import disagg_question, resolve_sides
from shardplan.search.disagg_robust import study_pools
from shardplan.search.report.page import page
from shardplan.search.request import Asked, resolve
from shardplan.search.robust import FULL, QUICK, bands_of, flips, robustness
from shardplan.search.robust_choice import choose, scenarios
from shardplan.search.robust_words import deployed_words, verdict
from shardplan.search.space import Choice
from shardplan.search.tables_robust import print_robustness

_ASKED: dict[str, Any] = {
    "model": "qwen3-30b-a3b",
    "cluster": "atlas-800t-a2",
    "serving": "disagg",
    "input_len": 2000,
    "output_len": 200,
    "ttft_ms": 1500.0,
    "tpot_ms": 40.0,
}


_DENSE = {"model": "qwen2.5-14b", "ttft_ms": 500.0, "tpot_ms": 25.0}


@functools.cache
def searched(**other: Any) -> DisaggOutcome:
    """Pools of eight cards, and what the exact search finds."""
    asked = Asked(**{**_ASKED, **other})
    return search_disagg(disagg_question(resolve_sides(asked, resolve(asked))))


@pytest.mark.slow
@settings(max_examples=40)
@given(disagg_cases())
def test_at_the_prices_as_they_are_contenders_have_the_searchs_numbers(
    question: DisaggQuestion,
) -> None:
    """The deployment as it is, and the best of all points of the winner's layouts."""
    outcome = search_disagg(question)
    assume(outcome.best is not None)
    assert outcome.best is not None
    for place, one in enumerate(pair_contenders(outcome, 5)):
        ones = {group: np.ones(2) for group in one.groups}
        objective = one.kept.columns["objective"]
        assert one.own(ones).tolist() == pytest.approx([objective] * 2, rel=1e-9)
        assert one.answers(ones).limit.tolist() == [-1, -1]
        best = one.tuned(ones).objective
        assert (best >= objective * (1.0 - 1e-9)).all()
        if place == 0:
            assert best.tolist() == pytest.approx([outcome.best.columns["objective"]] * 2, rel=1e-7)
        point = int(one.tuned(ones).point[0])
        places, x, y = one.place_of(point)
        ours = one.deployed(point)
        assert (ours.prefill_instances, ours.decode_instances) == (x, y)
        assert ours.strategy.batch == question.decode.grid[places[1]]
        assert ours.prefill is not None
        assert ours.prefill.chunk == question.prefill.grid[places[0]]


def search_scaled(group: str, factor: float) -> DisaggOutcome:
    """The exact search with a group's time scaled under it."""

    def scaled(base: Base, choice: Choice, stages: int) -> dict[str, Parts]:
        pricer = ScaledModel.of(base.model(choice), base.pool.cluster)
        return base.templates_at(choice, stages, pricer.at({group: np.array(factor)}))

    with patch.object(Base, "templates", scaled):
        return search_disagg(searched(**_DENSE).question)


@pytest.mark.parametrize("group", ["dense", "attention"])
def test_the_exact_search_flips_where_it_is_told(group: str) -> None:
    """On scaled prices its best is the runner-up just beyond, and the winner's before."""
    contenders = pair_contenders(searched(**_DENSE), 10_000)
    found = [one for one in flips(contenders, group, FULL, None) if one is not None]
    assert found
    for flip in found:
        best = search_scaled(group, flip.factor).best
        assert best is not None
        assert best.columns["objective"] == pytest.approx(flip.objective, rel=1e-9)
        nearer = math.exp(
            math.log(flip.factor) - math.copysign(math.log1p(FULL.resolution), flip.factor - 1)
        )
        before = search_scaled(group, nearer).best
        assert before is not None
        winner = contenders[0].tuned({group: np.array([nearer])}).objective[0]
        assert before.columns["objective"] == pytest.approx(winner, rel=1e-9)


def test_the_deployment_as_it_stands_breaks_its_limit_where_it_is_told() -> None:
    """Shares are of a request's time; the limit holds just before the factor and not there."""
    contenders = pair_contenders(searched(), 3)
    told = robustness(contenders, QUICK, contenders[0], "all")
    assert sum(row.share for row in told.groups) == pytest.approx(1.0, abs=1e-3)
    assert {row.group for row in told.groups} >= {TRANSFER, HOST, "dense", "experts"}
    broken = [row for row in told.groups if row.limit_factor is not None]
    assert broken
    for row in broken:
        assert row.limit_factor is not None
        factors = np.array([row.limit_factor / 1.0005, row.limit_factor])
        limit = contenders[0].answers({row.group: factors}).limit
        assert limit[0] == -1
        assert LIMITS[limit[1]] == row.limit


def test_the_robust_deployment_is_brute_forces() -> None:
    """Every point of every contender in every scenario, one at a time, by plain loops."""
    outcome = searched()
    contenders = pair_contenders(outcome, 2)
    bands = {name: bands_of(contenders)[name] for name in ("dense", "experts", TRANSFER)}
    chosen = choose(contenders, bands)
    table = scenarios(bands)
    values: dict[tuple[int, int | None], list[float]] = {}
    for place, one in enumerate(contenders):
        size = one.prefill.places.size * one.x.size * one.decode.places.size
        points: list[int | None] = [*range(0, size, 7), None]
        if place == chosen.contender and chosen.point is not None:
            points.append(chosen.point)
        for point in points:
            values[place, point] = _alone(one, point).own(table).tolist()
    count = len(table["dense"])
    best = [max(one.objectives(table)[at].max() for one in contenders) for at in range(count)]
    best = [max(top, values[0, None][at]) for at, top in enumerate(best)]
    regret = {
        key: max(1.0 - max(found[at], 0.0) / best[at] for at in range(count) if best[at] > 0.0)
        for key, found in values.items()
    }
    assert chosen.summary.robust_regret == pytest.approx(min(regret.values()), abs=1e-9)
    key = (chosen.contender, chosen.point)
    assert regret[key] == pytest.approx(min(regret.values()), abs=1e-9)
    assert chosen.summary.nominal_regret == pytest.approx(regret[0, None], abs=1e-9)


def _alone(one: PairContender, point: int | None) -> PairContender:
    """A contender whose deployment is one of its points."""
    if point is None:
        return one
    places, x, y = one.place_of(point)
    kept = replace(one.kept, prefill_instances=x, decode_instances=y)
    return one.moved(places, kept)


def test_a_study_leaves_the_winner_alone_and_a_robust_one_is_a_point_of_the_tables() -> None:
    """The robust deployment can be planned: its options are in the tables."""
    outcome = searched()
    assert study_pools(outcome, robust=False).best is outcome.best
    own = search_disagg(outcome.question)
    told = study_pools(own, robust=True)
    choice = told.robustness.choice
    assert choice is not None
    assert told.best.columns["objective"] == pytest.approx(choice.robust_objective, rel=1e-9)
    assert own.decode.options.choice(told.best.decode).kv_dtype == "bf16"
    assert not told.best.limit


def test_a_plan_of_pools_tells_how_robust_and_how_sure_it_is() -> None:
    """In the plan, the terminal and the report; a robust one says what it gives up."""
    result = shardplan.search(**_ASKED)
    plan = result.plan
    sure, told = plan.confidence, plan.robustness
    assert sure is not None
    assert told is not None
    rate, tpot_s = plan.performance.output_tokens_per_s, plan.performance.tpot_s
    assert sure.output_tokens_per_s_low < rate < sure.output_tokens_per_s_high
    assert sure.tpot_low_s < tpot_s < sure.tpot_high_s
    assert sum(sure.basis.model_dump().values()) == pytest.approx(1.0)
    console = Console(width=120, file=io.StringIO(), record=True)
    print_robustness(plan, console)
    report = html.unescape(page(plan, result.trials))
    for shown in (console.export_text(), report):
        assert verdict(plan) in " ".join(shown.split())
    robust = shardplan.search(**_ASKED, robust=True).plan
    choice = robust.robustness.choice if robust.robustness else None
    assert choice is not None
    assert choice.robust_strategy == robust.strategy
    assert choice.robust_prefill == robust.pools[0].strategy
    assert choice.nominal_prefill == plan.pools[0].strategy
    assert choice.robust_regret <= choice.nominal_regret
    assert robust.performance.output_tokens_per_s <= rate
    assert any(note.startswith("robust: ") for note in robust.notes)
    words = deployed_words(
        choice.robust_strategy,
        choice.robust_prefill,
        choice.robust_prefill_instances,
        choice.robust_decode_instances,
    )
    assert f"{robust.pools[0].instances} prefill x (" in words
    assert f"{robust.pools[1].instances} decode x (" in words
