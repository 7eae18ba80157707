"""Nothing feasible: the message says what binds and by how much, and its hint works."""

from __future__ import annotations

import re
from typing import Any

import pytest

from shardplan.models.errors import InfeasibleError
from shardplan.search.api import search
from shardplan.search.plan import Plan

OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*) (\S+)")


def refused(model: str, cluster: str = "atlas-800t-a2", **asked: Any) -> InfeasibleError:
    """The error of a question without an answer."""
    with pytest.raises(InfeasibleError) as caught:
        search(model, cluster, **asked)
    assert caught.value.exit_code == 3
    assert caught.value.hint.startswith("try ")
    return caught.value


def value(text: str) -> Any:
    """A number where it is one."""
    text = text.rstrip(",;")
    if re.fullmatch(r"\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"[\d.e+-]+", text) else text


def options(hint: str) -> dict[str, Any]:
    """The options of (a part of) a hint, as arguments of `search`."""
    return {name.replace("-", "_"): value(text) for name, text in OPTION.findall(hint)}


def follow(hint: str, model: str, cluster: str = "atlas-800t-a2", **asked: Any) -> Plan:
    """The plan of the question changed as the hint says."""
    assert options(hint), hint
    return search(model, cluster, **{**asked, **options(hint)}).plan


@pytest.mark.parametrize(
    ("lengths", "option"),
    [
        ({"input_len": 2048}, "--input-len 1792"),
        ({"input_len": 2048, "output_len": 1}, "--input-len 2047"),
        ({"input_len": 100, "output_len": 5000}, "--output-len 1948"),
        ({"input_len": 2**24, "output_len": 2**24}, "--input-len 2047 --output-len 1"),
    ],
    ids=str,
)
def test_a_request_longer_than_the_context(lengths: dict[str, Any], option: str) -> None:
    """Llama-65B has 2,048 positions: prompt and output share them."""
    error = refused("llama-65b", **lengths)
    assert "context" in error.rule
    assert "2048 allowed" in error.got
    assert error.hint == f"try {option}"
    assert follow(error.hint, "llama-65b", **lengths).proof.passed


@pytest.mark.parametrize("lengths", [(1, 1), (1, 64), (2000, 1)], ids=str)
def test_the_shortest_requests_have_a_plan(lengths: tuple[int, int]) -> None:
    """One token in, one token out, or both."""
    plan = search("llama-65b", "atlas-800t-a2", input_len=lengths[0], output_len=lengths[1]).plan
    assert plan.performance.output_tokens_per_s > 0
    assert plan.performance.ttft_s > 0
    assert (plan.performance.tpot_s == 0.0) == (lengths[1] == 1)


@pytest.mark.parametrize(
    ("limits", "binding"),
    [
        ({"tpot_ms": 5}, "tpot"),
        ({"ttft_ms": 5}, "ttft"),
        ({"tpot_ms": 5, "ttft_ms": 5}, "ttft"),
        ({"tpot_ms": 5, "ttft_ms": 5, "rate": 1000}, "ttft"),
        ({"rate": 1000}, "rate"),
        ({"tpot_ms": 60, "rate": 1000}, "rate"),
        ({"objective": "latency", "tpot_ms": 1e-6}, "tpot"),
        ({"objective": "cards", "rate": 1000}, "rate"),
    ],
    ids=str,
)
def test_the_hint_of_a_limit_is_reached(limits: dict[str, Any], binding: str) -> None:
    """The values of the hint, put in place of what was asked, give a plan that keeps them all."""
    limits = {**limits, "weight_dtype": "fp16", "kv_dtype": "fp16"}
    error = refused("llama-65b", **limits)
    assert f"{binding} binds" in error.got
    values_alone = error.hint.split(" or about ")[0]
    plan = follow(values_alone, "llama-65b", **limits)
    kept = {**limits, **options(values_alone)}
    done = plan.performance
    assert done.ttft_s * 1e3 <= kept.get("ttft_ms", float("inf"))
    assert done.tpot_s * 1e3 <= kept.get("tpot_ms", float("inf"))
    assert done.requests_per_s >= kept.get("rate", 0.0)


def test_how_far_a_limit_is_missed() -> None:
    """The nearest strategy's time, the limit, and their ratio."""
    got = refused("llama-65b", tpot_ms=5).got
    found = re.search(r"nearest has ([\d.]+) ms, 5 ms allowed, ([\d.]+) times too slow", got)
    assert found
    assert float(found[1]) / 5 == pytest.approx(float(found[2]), rel=0.01)
    fastest = search("llama-65b", "atlas-800t-a2", objective="latency").plan
    assert fastest.performance.tpot_s * 1e3 == pytest.approx(float(found[1]), abs=0.06)


@pytest.mark.parametrize("rate", [5, 30, 100])
def test_the_cards_of_a_rate_serve_it(rate: float) -> None:
    """Throughput of a dense model grows with its replicas, so the number of the hint works."""
    error = refused("llama-65b", rate=rate)
    wider = error.hint.split(" or about ")[1]
    plan = follow(wider, "llama-65b", rate=rate)
    assert plan.performance.requests_per_s >= rate
    nodes = options(wider)["nodes"]
    with pytest.raises(InfeasibleError):
        search("llama-65b", "atlas-800t-a2", rate=rate, nodes=nodes - 1)


def test_a_rate_beyond_every_cluster_offers_no_cards() -> None:
    """The fabric joins 128 nodes."""
    assert "--cards" not in refused("llama-65b", rate=1e9).hint


@pytest.mark.parametrize(
    ("model", "cluster", "cards"),
    [
        ("deepseek-v3", "atlas-800t-a2", 8),
        ("llama-65b", "atlas-800t-a2", 1),
        ("llama-65b", "atlas-800t-a2", 2),
        ("llama-3.1-70b", "atlas-800i-a2", 2),
    ],
)
def test_a_model_that_does_not_fit(model: str, cluster: str, cards: int) -> None:
    """Needed and allowed memory; the number of cards and the types of the hint both work."""
    error = refused(model, cluster, cards=cards)
    assert f"does not fit on {cards} card" in error.rule
    found = re.search(r"memory binds: .* needs ([\d.]+) GiB .* ([\d.]+) GiB may be used", error.got)
    assert found
    assert float(found[1]) > float(found[2])
    more, narrower = error.hint.split(" or ")
    wider = follow(more, model, cluster, cards=cards)
    assert wider.request.cards == options(more)["cards"] > cards
    assert wider.strategy.weight_dtype not in ("w4a16", "w4a8")
    leaner = follow(narrower, model, cluster, cards=cards)
    assert leaner.request.cards == cards
    assert leaner.strategy.weight_dtype == options(narrower)["weight_dtype"]


def test_no_fewer_cards_than_the_hint_hold_the_model() -> None:
    """Llama-65B in 16 bits is 122 GiB: four of the cards with 57.6 GiB, three are no job."""
    hint = refused("llama-65b", cards=1).hint
    assert options(hint.split(" or ")[0]) == {"cards": 4}
    for cards in (1, 2):
        refused("llama-65b", cards=cards)


def test_the_types_of_the_hint_are_the_widest_that_fit() -> None:
    """On two cards 8-bit weights do; on one even those are 61 GiB, and w4a16 is for experts."""
    assert options(refused("llama-65b", cards=2).hint)["weight_dtype"] == "w8a16"
    assert options(refused("llama-65b", cards=1).hint)["weight_dtype"] == "w4a8"


def test_the_fewest_cards_are_found() -> None:
    """The objective `cards` against a search of every smaller count."""
    asked: dict[str, Any] = {"rate": 1.0, "tpot_ms": 100}
    plan = search("llama-65b", "atlas-800t-a2", objective="cards", nodes=2, **asked).plan
    feasible = []
    for cards in (1, 2, 4, 8, 16):
        try:
            search("llama-65b", "atlas-800t-a2", cards=cards, nodes=2, **asked)
        except InfeasibleError:
            continue
        feasible.append(cards)
    assert plan.strategy.ranks == min(feasible) == 4
    assert plan.certificate.space["cards"] == [1, 2, 4]
    assert plan.certificate.gap == 0.0


def test_default_limits_that_nothing_meets_are_dropped_and_said() -> None:
    """Nobody asked for them: a 120,000-token prompt takes longer than two seconds."""
    plan = search("llama-3.1-70b", "atlas-800t-a2", input_len=120_000, output_len=100).plan
    assert plan.performance.ttft_s > 2.0
    assert plan.request.limits.ttft_s is None
    assert any("so they were dropped" in note for note in plan.notes)
