"""Deployments of pools chosen by the simulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardplan.search.api import search
from shardplan.search.plan import Plan
from shardplan.search.simulate import simulate_plan
from shardplan.search.simulate_demand import read_demand

FILES = Path(__file__).parent / "workloads"
ASKED: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "atlas-800t-a2",
    "weight_dtype": "bf16",
    "serving": "disagg",
    "refine_simulated": 4,
}
FEWEST: dict[str, Any] = {"objective": "cards", "refine_simulated": 2}


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer requests a step."""
    monkeypatch.setattr("shardplan.search.runner._REQUESTS", 60)


def asked(**changes: Any) -> Plan:
    """The plan of a search of pools."""
    return search(**ASKED | changes).plan


def test_bursts_take_more_instances_than_the_steady_state_says() -> None:
    plan = asked(workload=str(FILES / "bursts.toml"), ttft_p99_ms=2500.0, **FEWEST)
    told = plan.simulated
    assert told is not None
    assert told.first is not None
    assert not told.first_holds
    assert told.first.ttft_p99_s > 2.5 >= told.run.ttft_p99_s
    assert told.holds
    assert plan.cards > 2
    assert plan.certificate.gap == plan.cards / 2 - 1
    assert plan.notes[-1].startswith("refined: ")
    assert (
        plan.dumps()
        == asked(workload=str(FILES / "bursts.toml"), ttft_p99_ms=2500.0, **FEWEST).dumps()
    )


def test_what_was_simulated_is_what_the_plan_deploys() -> None:
    """The same requests through the plan's own engines and link take as long."""
    given = {"cards": 4, "input_len": 512, "output_len": 64, "rate": 6.0}
    plan = asked(**given)
    assert plan.dumps() == asked(**given).dumps()
    told = plan.simulated
    assert told is not None
    assert (told.chosen, told.pruned) == (1, told.tried - 1)
    demand = read_demand(None, {}, plan).demand
    warmup = told.run.requests // 20
    seen = simulate_plan(plan, replace(demand, count=told.run.requests), warmup=warmup).recorder
    assert seen.ttft.mean == pytest.approx(told.run.ttft_s, rel=0.05)
    assert seen.tpot.mean == pytest.approx(told.run.tpot_s, rel=0.02)


def test_both_ways_of_serving_are_refined_and_the_better_one_there_is_taken() -> None:
    given = {"cards": 4, "input_len": 512, "output_len": 128, "ttft_ms": 1000.0, "tpot_ms": 30.0}
    both, one, two = (asked(serving=name, **given) for name in ("auto", "agg", "disagg"))
    runs = [plan.simulated for plan in (both, one, two)]
    assert all(told is not None and told.holds for told in runs)
    rates = [told.run.output_tokens_per_s for told in runs if told is not None]
    assert rates[0] == max(rates[1:])
    assert [row.objective for row in both.servings] == rates[1:]
    assert any("in the simulator, limits first" in note for note in both.notes)
