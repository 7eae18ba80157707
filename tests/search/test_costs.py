"""Prices of cards: what a plan costs by hand, the cheapest plan, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.search.test_cli_bad_input import BOTH, refused

from shardplan.search.api import search
from shardplan.search.plan import Plan


def planned(**asked: Any) -> Plan:
    """Qwen2.5-14B on up to eight cards of 32 GB."""
    given: dict[str, Any] = {"cards": 8, "tpot_ms": 80.0, **asked}
    return search("qwen2.5-14b", "atlas-800i-a2", **given).plan


def mixed(**asked: Any) -> Plan:
    """Prompts on A2, decoding on A3."""
    given: dict[str, Any] = {
        "prefill_cluster": "atlas-800t-a2",
        "serving": "disagg",
        "input_len": 2048,
        "output_len": 256,
        "rate": 4.0,
        "ttft_ms": 2000.0,
        "tpot_ms": 40.0,
        **asked,
    }
    return search("qwen3-8b", "atlas-800i-a3", **given).plan


def test_cost_by_hand() -> None:
    """Cards times price an hour; over the tokens of the asked rate, and of the most."""
    plan = planned(rate=2.0, output_len=100, card_price=3.0)
    cost, rate = plan.cost, plan.performance.output_tokens_per_s
    assert cost is not None
    assert cost.per_hour == 3.0 * plan.strategy.ranks
    assert cost.per_million_tokens == pytest.approx(cost.per_hour / 3600 / 200.0 * 1e6)
    assert cost.per_million_tokens_full == pytest.approx(cost.per_hour / 3600 / rate * 1e6)


def test_only_a_question_with_a_price_has_a_cost() -> None:
    """Files of plans without it are as they were."""
    assert "cost" not in json.loads(planned().dumps())


def test_the_cheapest_for_a_rate_has_the_fewest_cards() -> None:
    """Where all cards cost alike."""
    cheap = planned(rate=3.0, objective="cost", card_price=2.0)
    few = planned(rate=3.0, objective="cards")
    assert cheap.strategy == few.strategy


def test_the_cheapest_token_is_that_of_the_most_tokens_a_card() -> None:
    """Every number of cards is searched, none of them does better a card."""
    cheap = planned(objective="cost", card_price=2.0)
    most = max(planned(cards=cards).performance.output_tokens_per_s_per_card for cards in (2, 4, 8))
    assert cheap.performance.output_tokens_per_s_per_card == pytest.approx(most, rel=1e-12)
    assert set(cheap.certificate.space["cards"]) == {1, 2, 4, 8}
    assert cheap.certificate.gap == 0.0


def test_mixed_pools_have_a_price_each() -> None:
    """A2 prefills, A3 decodes: the cheapest of either price is no dearer than the other's plan."""

    def spent(plan: Plan, prices: tuple[float, float]) -> float:
        cards = (pool.instances * pool.strategy.ranks for pool in plan.pools)
        return sum(count * price for count, price in zip(cards, prices, strict=True))

    asked = {"objective": "cost"}
    one = mixed(**asked, card_price=9.0, prefill_card_price=1.0)
    other = mixed(**asked, card_price=1.0, prefill_card_price=9.0)
    assert [pool.cluster.device[:2] for pool in one.pools] == ["91", "a3"]
    assert one.cost is not None
    assert one.cost.per_hour == spent(one, (1.0, 9.0))
    assert spent(one, (1.0, 9.0)) <= spent(other, (1.0, 9.0))
    assert spent(other, (9.0, 1.0)) <= spent(one, (9.0, 1.0))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--card-price", "nan"], ("above 0", "card_price=nan")),
        (["--card-price", "0"], ("above 0", "card_price=0")),
        (["--card-price", "-2"], ("above 0", "card_price=-2")),
        (["--card-price", "inf"], ("at most", "card_price=inf")),
        (["--objective", "cost"], ("card_price=None", "--card-price")),
        (["--prefill-card-price", "2"], ("card_price=None", "--card-price")),
        (
            ["--card-price", "1", "--prefill-card-price", "2"],
            ("prefill_card_price=2", "--prefill-cluster"),
        ),
        (
            ["--card-price", "1", "--objective", "cost", "--serving", "disagg"],
            ("rate=None", "--rate"),
        ),
    ],
)
def test_what_is_no_price_is_refused(
    more: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The value, the rule and what to try."""
    refused(["search", *BOTH, "--cards", "2", *more], capsys, *words)
