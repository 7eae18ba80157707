"""`shardplan explain`: limits, what changes would buy, rivals, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import shardplan
from shardplan.models.errors import InputError
from shardplan.search.asked_again import known_of, objective_of
from shardplan.search.explain import explain
from shardplan.search.explanation import Explanation, Rival
from shardplan.search.main import run
from shardplan.search.plan import Plan
from shardplan.search.rival import rival_of, words_of


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Llama-3.1-8B on four cards whose TPOT binds."""
    return shardplan.search("llama-3.1-8b", "atlas-800t-a2", cards=4, tpot_ms=25).plan


@pytest.fixture(scope="module")
def told(plan: Plan) -> Explanation:
    """Its explanation, every change searched."""
    return explain(plan)


def against(plan: Plan, words: str) -> Rival:
    """A rival in words."""
    return rival_of(known_of(plan), words_of(words))


def test_the_limit_that_stops_more_slots_is_said_to_bind(told: Explanation) -> None:
    found = {one.name: one for one in told.bindings}
    assert found["tpot"].binds
    assert 0.9 < found["tpot"].used <= 1.0
    assert not found["memory"].binds
    assert found["memory"].used < 1.0


def test_each_change_is_the_best_plan_of_the_changed_question(
    plan: Plan, told: Explanation
) -> None:
    found = {one.change: one for one in told.shadows}
    looser = next(one for name, one in found.items() if name.startswith("TPOT"))
    again = shardplan.search("llama-3.1-8b", "atlas-800t-a2", cards=4, tpot_ms=25 * 1.25).plan
    assert looser.objective == pytest.approx(again.performance.output_tokens_per_s, rel=1e-12)
    own = plan.performance.output_tokens_per_s
    assert looser.gain == pytest.approx(again.performance.output_tokens_per_s / own, rel=1e-9)
    more = next(one for name, one in found.items() if name.startswith("8 cards"))
    assert more.gain is not None
    assert more.gain > 1.5
    for one in told.shadows:  # a change for the better never makes the best plan worse
        assert one.gain is None or one.gain >= 1.0 - 1e-9 or "weights" in one.change


def test_the_plan_against_itself_is_no_different(plan: Plan) -> None:
    way = plan.strategy
    rival = against(
        plan, f"tp={way.tp},pp={way.pp},dp={way.dp},batch={way.batch},chunk={way.chunk}"
    )
    assert rival.ratio == pytest.approx(1.0, rel=1e-12)
    assert rival.differences == ()
    assert rival.broken == ()


def test_a_rival_is_beaten_at_its_best_and_the_differences_add_up(plan: Plan) -> None:
    other = 4 if plan.strategy.tp != 4 else 1
    rival = against(plan, f"tp={other}")
    assert rival.ratio is not None
    assert rival.ratio <= 1.0 + 1e-9
    assert rival.strategy.tp == other
    assert rival.strategy.ranks == 4
    fixed = against(plan, f"tp={other},batch=1,chunk=2048")
    assert fixed.ratio is not None
    assert fixed.ratio <= rival.ratio + 1e-9
    for phase in ("decode", "prefill"):
        ours = sum(row.total_s for row in plan.breakdown if row.phase == phase)
        more = sum(one.more for one in rival.differences if one.what.startswith(phase))
        theirs = ours + more
        assert theirs > 0.0
    assert objective_of(plan) == plan.performance.output_tokens_per_s


def test_a_rival_that_cannot_run_says_why(plan: Plan) -> None:
    rival = against(plan, "tp=4,batch=4096,chunk=8192")
    assert any("limit" in sentence for sentence in rival.broken)
    with pytest.raises(InputError, match="ranks of"):
        against(plan, "tp=8,dp=4")


@pytest.mark.parametrize("words", ["", "tp", "tp=x", "speed=3", "tp=0", "8"])
def test_a_rival_in_wrong_words_is_refused(words: str) -> None:
    with pytest.raises(InputError):
        words_of(words)


def test_a_plan_of_another_model_is_refused(plan: Plan) -> None:
    with pytest.raises(InputError, match="other sizes"):
        explain(plan, model="llama-3.1-70b", shadows=False)


def test_the_command_prints_and_writes_json(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert run(["explain", str(path), "--no-shadows", "--against", "tp=1"]) == 0
    shown = capsys.readouterr().out
    assert "binds" in shown
    assert "against: tp1" in shown
    command = "vllm serve meta-llama/Llama-3.1-8B -tp 4 --max-num-seqs 8"
    assert run(["explain", str(path), "--no-shadows", "--json", "--against", command]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rival"]["strategy"]["tp"] == 4
    assert told["rival"]["strategy"]["batch"] == 8
    assert run(["explain", str(tmp_path / "none.json")]) == 2
    assert run(["explain", str(path), "--against", "wings=2"]) == 2
    assert "named by its axes" in capsys.readouterr().err
