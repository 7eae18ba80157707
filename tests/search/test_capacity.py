"""The fewest cards with headroom, and what is left of a plan after a loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardplan.models.errors import InfeasibleError
from shardplan.search.api import search
from shardplan.search.main import run
from shardplan.search.plan import Plan
from shardplan.search.plan_capacity import Capacity, LossRow

RATE = 5.0


def planned(**asked: Any) -> Plan:
    """Qwen2.5-14B on up to 32 cards of 32 GB, TPOT within 80 ms."""
    given = {"nodes": 4, "objective": "cards", "rate": RATE, "tpot_ms": 80.0, **asked}
    return search("qwen2.5-14b", "atlas-800i-a2", **given).plan


def part(plan: Plan) -> Capacity:
    """What it tells of losses."""
    assert plan.capacity is not None
    return plan.capacity


def row(plan: Plan, lost: str) -> LossRow:
    """One of its losses."""
    return next(one for one in part(plan).losses if one.lost == lost)


@pytest.fixture(scope="module")
def spared() -> Plan:
    """A card may be lost."""
    return planned(spare=1)


def test_only_a_question_that_asks_has_the_part() -> None:
    """Files of plans without it are as they were."""
    assert "capacity" not in json.loads(planned().dumps())


def test_headroom_holds_the_rate_and_fewer_cards_do_not(spared: Plan) -> None:
    """What is promised, and that it takes these cards: half as many are searched and refused."""
    found = part(spared)
    assert (found.spare, found.spare_unit, found.requests_per_s) == (1, "card", RATE)
    card = row(spared, "1 card")
    assert card.holds
    assert card.replicas_left == found.replicas - 1
    assert card.requests_per_s == pytest.approx(
        spared.performance.requests_per_s * card.replicas_left / found.replicas
    )
    assert found.headroom == pytest.approx(spared.performance.requests_per_s / RATE)
    with pytest.raises(InfeasibleError, match="with 1 card lost"):
        planned(spare=1, nodes=None, cards=found.cards // 2)


def test_more_headroom_takes_no_fewer_cards(spared: Plan) -> None:
    """None, a card, a node: 8, 8 and 16 cards here, each of them a different promise."""
    cards = [planned().strategy.ranks, spared.strategy.ranks]
    node = planned(spare=1, spare_unit="node")
    cards.append(node.strategy.ranks)
    assert cards == sorted(cards)
    assert row(node, "1 node").holds
    assert not row(spared, "1 node").holds


def test_a_lighter_load_is_served_sooner(spared: Plan) -> None:
    """TPOT at the rate grows with what is lost and stays within that of full slots."""
    none, card = row(spared, "nothing"), row(spared, "1 card")
    assert none.tpot_s is not None
    assert card.tpot_s is not None
    assert none.tpot_s < card.tpot_s <= spared.performance.tpot_s * (1 + 1e-9)
    assert card.tpot_s <= 0.08


def test_what_is_lost_whole_is_planned_again() -> None:
    """Sixteen cards of two nodes at their own rate: half of it is left, and the rest queues."""
    plan = planned(objective="throughput", cards=16, nodes=2, rate=None, losses=True)
    node = row(plan, "1 node")
    assert part(plan).spare == 0
    assert part(plan).headroom == pytest.approx(1.0)
    assert not node.holds
    assert node.ttft_s is None
    assert node.requests_per_s == pytest.approx(plan.performance.requests_per_s / 2)
    again = node.again
    assert again is not None
    assert again.cards == 8
    assert again.requests_per_s == pytest.approx(node.requests_per_s, rel=0.3)
    assert not again.holds


def test_pools_lose_instances_of_either_role() -> None:
    """Llama-3.1-70B: each role has an instance more than the rate needs, and holds without it."""
    asked: dict[str, Any] = {
        "nodes": 4,
        "serving": "disagg",
        "objective": "cards",
        "rate": 2.0,
        "ttft_ms": 1500.0,
        "tpot_ms": 60.0,
    }
    bare = search("llama-3.1-70b", "atlas-800t-a2", **asked).plan
    plan = search("llama-3.1-70b", "atlas-800t-a2", spare=1, **asked).plan
    for pool, one in zip(plan.pools, bare.pools, strict=True):
        assert pool.instances >= one.instances
        assert row(plan, f"1 card of {pool.role}").holds
        assert row(plan, f"1 card of {pool.role}").replicas_left == pool.instances - 1
    assert row(plan, "nothing").requests_per_s == pytest.approx(
        plan.performance.requests_per_s, rel=1e-6
    )


def test_the_same_question_gives_the_same_bytes(spared: Plan) -> None:
    """Planning again with it."""
    assert planned(spare=1).dumps() == spared.dumps()


def test_people_read_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of losses, within the width of the others."""
    command = ["search", "--model", "qwen2.5-14b", "--cluster", "atlas-800i-a2", "--cards", "8"]
    command += ["--rate", "5", "--tpot-ms", "80", "--losses", "--out", str(tmp_path / "run")]
    assert run(command) == 0
    told = capsys.readouterr().out
    assert "what is left, at 5" in told
    assert "1 card" in told
    table = told[told.index("what is left") : told.index("certificate")]
    assert max(len(line) for line in table.splitlines()) <= 100


def test_plans_without_the_part_load(spared: Plan) -> None:
    """As those written before it."""
    data = json.loads(spared.dumps())
    del data["capacity"]
    assert Plan.model_validate(data).capacity is None
