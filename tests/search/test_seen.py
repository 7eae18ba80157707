"""Limits that are dear to price, the queue of a rate and percentiles: judged where it matters."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.search.oracle import Case, Found, best_of, brute_force, small_case
from tests.search.small_models import dense, sparse

from shardplan.costmodel.cost_groups import HOST
from shardplan.models.errors import InfeasibleError
from shardplan.search.api import search
from shardplan.search.contenders import contenders_of
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.exact import search_exact
from shardplan.search.explain import explain
from shardplan.search.judged import Wanted
from shardplan.search.kept import Outcome, first_of_each
from shardplan.search.main import run
from shardplan.search.plan import Plan
from shardplan.search.seen import AT_RATE, Sight, seen
from shardplan.search.spare import Spare

ASKED: tuple[dict[str, Any], ...] = (
    {"request_rate": 20.0, "ttft_s": 0.06},
    {"request_rate": 25.0, "ttft_s": 0.04, "objective": "latency"},
    {"request_rate": 40.0, "ttft_p99_s": 0.05, "tpot_p99_s": 0.03},
    {"ttft_p99_s": 0.03},
    {"request_rate": 20.0, "ttft_s": 0.06, "spare": Spare(count=1)},
    {"request_rate": 40.0, "ttft_p99_s": 0.01},
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
    found = [asked(index)[2] for index in range(len(ASKED))]
    refused = [sum(slots.size for slots, _ in one.refused.values()) for one in found]
    assert sum(count > 0 for count in refused) >= 4
    assert sum(one.tally.pruned_by["queue"] > 0 for one in found) >= 4


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


@pytest.mark.parametrize("limits", [{"ttft_p99_s": 1e-3}, {"ttft_p99_s": 0.02, "tpot_p99_s": 1e-3}])
@pytest.mark.parametrize("rate", [None, 40.0])
def test_the_nearest_miss_is_that_of_judging_all(
    limits: dict[str, float], rate: float | None
) -> None:
    """Where nothing holds: the least factor by which any strategy misses its worst limit."""
    case = small_case(sparse(), cards=2, request_rate=rate, **limits)
    case = replace(case, choices=case.choices[:1], batches=(1, 2, 4, 8, 16, 64), chunks=(64, 1024))
    outcome = search_exact(case.question, case.space())
    assert outcome.best is None
    least, grid = np.inf, (np.array(case.batches, dtype=float), np.array(case.chunks, dtype=float))
    slots, tokens = (one.ravel() for one in np.meshgrid(*grid))
    for par, choice in outcome.refused:
        scorer = LayoutScorer(case.question, par)
        scores = scorer.score(choice, slots, tokens)
        far = [scores.columns[name] / most for name, most in limits.items()]
        least = min(least, float(np.nanmin(np.max(far, axis=0))))
    known = outcome.tally.nearest
    (nearest,) = (known[name[:-2]] for name in limits if name[:-2] in known)
    found = [nearest.columns[name] / most for name, most in limits.items()]
    assert max(found) == pytest.approx(least, rel=1e-9)


def all_points(case: Case, held: list[Found]) -> list[tuple[float, float]]:
    """Throughput and TPOT of strategies, priced one by one."""
    found = []
    for one in held:
        at = np.array([float(one.batch)]), np.array([float(one.chunk)])
        columns = LayoutScorer(case.question, one.parallel).score(one.choice, *at).columns
        found.append((float(columns["output_tokens_per_s"][0]), float(columns["tpot_s"][0])))
    return found


def test_strategies_of_many_layouts_are_priced_as_each_alone() -> None:
    """Stacked in a fleet, to rounding."""
    case, _, outcome = asked(0)
    grids = list(outcome.refused)[:3]
    slots, tokens = np.array([2.0, 8.0, 24.0]), np.array([256.0, 1024.0, 256.0])
    sights = [Sight(LayoutScorer(case.question, par), one, slots, tokens) for par, one in grids]
    assert len(sights) == 3
    for sight, together in zip(sights, seen(sights), strict=True):
        alone = seen([sight])[0]
        assert together.keys() == alone.keys() == {AT_RATE}
        assert together[AT_RATE] == pytest.approx(alone[AT_RATE], rel=1e-9)


@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_no_contender_of_a_study_beats_the_best_as_prices_are(index: int) -> None:
    """Strategies whose queue breaks a limit are not among its points."""
    case, _, outcome = asked(index)
    best = outcome.best
    assert best is not None
    for one in contenders_of(case.question, outcome, 3):
        found = one.objectives({HOST: np.ones(1)})
        assert found.max(initial=-np.inf) <= best.columns["objective"]


def planned(**asked: Any) -> Plan:
    """Qwen2.5-14B on cards of 32 GB, TPOT within 80 ms."""
    given = {"nodes": 2, "objective": "cards", "tpot_ms": 80.0, **asked}
    return search("qwen2.5-14b", "atlas-800i-a2", **given).plan


def test_the_fewest_cards_keep_the_limit_with_the_queue() -> None:
    """At 99 % of what eight cards serve the queue is longer than a second; without it 8 do."""
    assert planned(rate=9.72).cards == 8
    plan = planned(rate=9.72, ttft_ms=1000.0)
    assert plan.cards == 16
    assert plan.at_rate is not None
    assert plan.at_rate.requests_per_s == 9.72
    assert plan.at_rate.ttft.mean_s <= 1.0
    with pytest.raises(InfeasibleError, match=r"with the queue of 9\.72 requests/s") as caught:
        planned(rate=9.72, ttft_ms=1000.0, nodes=1, objective="throughput")
    assert "--ttft-ms" in caught.value.hint


def test_the_fewest_cards_keep_it_with_a_replica_lost() -> None:
    """What is left serves the rate, and its queue keeps the limit; full replicas do so sooner."""
    plan = planned(rate=5.0, ttft_ms=1000.0, spare=1)
    assert plan.capacity is not None
    assert plan.at_rate is not None
    none, card = plan.capacity.losses[:2]
    assert card.holds
    assert none.ttft_s == pytest.approx(plan.at_rate.ttft.mean_s)
    assert none.ttft_s is not None
    assert card.ttft_s is not None
    assert none.ttft_s < card.ttft_s <= 1.0
    assert 5.0 <= card.requests_per_s < none.requests_per_s < plan.performance.requests_per_s


def test_a_plan_tells_the_rate_and_people_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the figures of all slots in use: tables, report, explanation."""
    command = ["search", "--model", "llama-3.1-8b", "--cluster", "atlas-800t-a2", "--cards", "4"]
    command += [
        "--rate",
        "20",
        "--ttft-ms",
        "1000",
        "--tpot-ms",
        "60",
        "--out",
        str(tmp_path / "a"),
    ]
    assert run(command) == 0
    told = capsys.readouterr().out
    assert "performance, all slots in use" in told
    assert "at 20 requests/s" in told
    plan = Plan.load(tmp_path / "a" / "plan.json")
    assert plan.at_rate is not None
    assert plan.at_rate.used == pytest.approx(20.0 / plan.performance.requests_per_s)
    times = plan.at_rate.ttft
    assert times.mean_s <= times.p99_s <= 1.0
    assert times.p50_s <= times.p90_s <= times.p99_s
    assert "At 20 requests/s" in (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    found = {one.name: one for one in explain(plan, shadows=False).bindings}
    assert found["ttft_at_rate"].value == pytest.approx(times.mean_s)
    assert found["ttft_at_rate"].limit == 1.0


def test_without_a_rate_a_plan_is_as_it_was() -> None:
    """No part for it in the file."""
    plan = planned(objective="throughput", cards=8, nodes=1)
    assert plan.at_rate is None
    assert "at_rate" not in json.loads(plan.dumps())
