"""Switches of the engine from the question to the plan, its proof and the estimate of it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from shardplan.models.errors import InputError
from shardplan.search.api import estimate, search
from shardplan.search.estimate import estimate_one, price_points
from shardplan.search.plan import Plan
from shardplan.search.proof import verify_plan

ASKED: dict[str, Any] = {
    "model": "qwen3-8b",
    "cluster": "atlas-800t-a2",
    "cards": 8,
    "input_len": 2048,
    "output_len": 64,
}
POINT: dict[str, Any] = {
    "model": "qwen3-8b",
    "cluster": "atlas-800t-a2",
    "tp": 8,
    "phase": "prefill",
    "batch": 1,
    "tokens": 4096,
}


@pytest.fixture(scope="module")
def usual() -> Plan:
    """The plan of a question that says nothing of switches."""
    return search(**ASKED).plan


@pytest.fixture(scope="module")
def fused() -> Plan:
    """The same with fused collectives on."""
    return search(**ASKED, fused_collectives="on", weight_prefetch="off").plan


def test_a_plan_has_no_switch_on_unasked_and_tells_what_each_would_buy(usual: Plan) -> None:
    assert not usual.strategy.fused_collectives
    assert not usual.strategy.weight_prefetch
    told = {(row.weight_prefetch, row.fused_collectives): row for row in usual.switches}
    assert set(told) == {(True, False), (False, True)}
    row = told[False, True]
    assert row.strategy is not None
    assert row.strategy.fused_collectives
    assert row.gain == pytest.approx((row.objective or 0) / usual_objective(usual))


def usual_objective(plan: Plan) -> float:
    """Tokens a second: the objective of the question."""
    return plan.performance.output_tokens_per_s


def test_quantized_rows_beside_the_answer_keep_the_switches_off(usual: Plan) -> None:
    strategies = [row.strategy for row in usual.quantization if row.strategy is not None]
    assert strategies
    assert not any(one.fused_collectives or one.weight_prefetch for one in strategies)


def test_a_plan_with_a_switch_says_so_and_is_proven(fused: Plan) -> None:
    """Fused kernels stand in the breakdown with their basis, and are charged as the graph's."""
    assert fused.strategy.fused_collectives
    assert fused.strategy.tp in (2, 4, 8)
    assert fused.request.fused_collectives == "on"
    rows = {row.kind: row for row in fused.breakdown if row.phase == "prefill"}
    assert rows["matmul_all_reduce"].calls == 2 * 36
    assert rows["matmul_all_reduce"].basis == "derived"
    assert fused.certificate.space["fused_collectives"] == [True]
    again = verify_plan(fused, level=1)
    assert again.passed
    assert any("priced collectives are the graph's" in check for check in again.checks)


def test_what_is_told_beside_the_answer_is_what_the_search_finds(usual: Plan, fused: Plan) -> None:
    row = next(row for row in usual.switches if row.fused_collectives)
    assert row.objective == pytest.approx(usual_objective(fused))


def test_searching_both_ways_takes_the_better() -> None:
    both = search(**ASKED, fused_collectives="auto", weight_prefetch="auto").plan
    alone = [search(**ASKED, fused_collectives=state).plan for state in ("off", "on")]
    assert usual_objective(both) >= max(map(usual_objective, alone))
    assert both.switches == ()


def test_an_estimate_takes_the_same_switches() -> None:
    point = {**POINT, "engine_profile": "mindie"}
    off, on = estimate(**point), estimate(**point, fused_collectives="on")
    assert on["step_s"] < off["step_s"]
    assert on["compute_s"] == pytest.approx(off["compute_s"])
    assert estimate(**point, fused_collectives="off")["step_s"] == off["step_s"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cluster": "atlas-800i-a3", "fused_collectives": "on"}, "Atlas A2 and 950"),
        ({"weight_dtype": "w8a8", "fused_collectives": "on"}, "weights of this type"),
        ({"tp": 1, "fused_collectives": "on"}, "tp is 2, 4 or 8"),
        ({"weight_prefetch": "on"}, "sequence parallelism or fused"),
        ({"weight_prefetch": "maybe"}, "off, on"),
    ],
)
def test_an_estimate_refuses_a_switch_that_may_not_be_on(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        estimate(**{**POINT, **changes})


def test_a_plan_of_an_older_release_has_its_switches_off(usual: Plan) -> None:
    """plan.json without these fields is read as what it was: a plan without switches."""
    data = usual.model_dump(mode="json")
    for place in (data["strategy"], data["request"]):
        del place["weight_prefetch"], place["fused_collectives"]
    del data["switches"]
    again = Plan.model_validate(data)
    assert again.strategy == usual.strategy
    assert not again.switches


def test_experts_are_prefetched_alike_alone_and_in_a_table() -> None:
    """Layouts that hold different numbers of experts are priced in one go."""
    points: list[dict[str, Any]] = [
        {
            "model": "glm-4.5",
            "cluster": "atlas-800t-a2",
            "phase": "decode",
            "tp": tp,
            "dp": 4,
            "ep": ep,
            "weight_prefetch": "on",
        }
        for tp, ep in ((1, 4), (8, 1))
    ]
    table = price_points(pd.DataFrame(points))
    assert list(table["status"]) == ["ok"] * 2
    alone = [estimate_one(**point)["step_s"] for point in points]
    assert list(table["step_s"]) == pytest.approx(alone, rel=1e-12)
