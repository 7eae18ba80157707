"""`shardplan explain` and `lint` of plans of prefill and decode pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shardplan
from shardplan.models.errors import InputError
from shardplan.search.asked_again import known_of
from shardplan.search.cli_lint import read
from shardplan.search.explain import explain
from shardplan.search.explain_pools import known_pools
from shardplan.search.explanation import Explanation, Rival
from shardplan.search.main import run
from shardplan.search.plan import Plan
from shardplan.search.rival_pools import other_serving, rival_of_pools, rival_plan

ASKED: dict[str, Any] = {"cards": 8, "ttft_ms": 400, "tpot_ms": 30, "serving": "disagg"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Llama-3.1-8B in pools on eight cards."""
    found: Plan = shardplan.search("llama-3.1-8b", "atlas-800t-a2", **ASKED).plan
    return found


@pytest.fixture(scope="module")
def told(plan: Plan) -> Explanation:
    """Its explanation, every change searched."""
    return explain(plan)


@pytest.fixture(scope="module")
def plan_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plan as a file."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    return str(path)


def against(plan: Plan, words: str) -> Rival:
    """A rival of pools in words."""
    return rival_of_pools(known_pools(plan), words)


def test_each_pool_and_limit_is_told_and_what_binds_the_rate_binds(
    plan: Plan, told: Explanation
) -> None:
    found = {one.name: one for one in told.bindings}
    pools = {"prefill pool", "prefill memory", "decode pool", "decode memory"}
    assert set(found) == pools | {"transfer", "ttft", "tpot"}
    assert plan.transfer is not None
    for role in ("prefill", "decode"):
        assert found[f"{role} pool"].binds == (plan.transfer.bound == role)
    for pool in plan.pools:
        assert found[f"{pool.role} pool"].used == pytest.approx(pool.times.used)
        assert found[f"{pool.role} memory"].value == max(row.total_bytes for row in pool.memory)
    assert found["ttft"].value == plan.performance.ttft_s
    assert any(one.binds for one in told.bindings)
    assert [pool.role for pool in told.pools] == ["prefill", "decode"]
    assert sum(pool.cards for pool in told.pools) == plan.cards


def test_each_change_is_the_best_plan_of_the_changed_question(
    plan: Plan, told: Explanation
) -> None:
    found = {one.change: one for one in told.shadows}
    looser = next(one for name, one in found.items() if name.startswith("TPOT"))
    again = shardplan.search("llama-3.1-8b", "atlas-800t-a2", **{**ASKED, "tpot_ms": 37.5}).plan
    assert looser.objective == pytest.approx(again.performance.output_tokens_per_s, rel=1e-12)
    own = plan.performance.output_tokens_per_s
    assert looser.gain == pytest.approx(again.performance.output_tokens_per_s / own, rel=1e-9)
    more = next(one for name, one in found.items() if "cards in place of 8" in name)
    assert more.gain is not None
    assert more.gain > 1.5
    for one in told.shadows:
        assert one.gain is None or one.gain >= 1.0 - 1e-9 or "weights" in one.change


def test_the_plan_named_in_words_is_no_rival(plan: Plan) -> None:
    one, two = (pool.strategy for pool in plan.pools)
    words = (
        f"prefill.tp={one.tp},prefill.pp={one.pp},prefill.chunk={one.chunk},"
        f"decode.tp={two.tp},decode.batch={two.batch}"
    )
    rival = against(plan, words)
    assert rival.ratio == pytest.approx(1.0, rel=1e-12)
    assert rival.differences == ()


def test_other_instances_are_beaten_at_their_best(plan: Plan) -> None:
    other = 4 if plan.pools[1].strategy.tp != 4 else 2
    rival = against(plan, f"decode.tp={other}")
    assert rival.ratio is not None
    assert rival.ratio <= 1.0 + 1e-9
    assert rival.strategy.tp == other
    for phase in ("decode", "prefill"):
        assert rival.performance is not None
        more = sum(one.more for one in rival.differences if one.what.startswith(phase))
        ours = sum(row.total_s for row in plan.breakdown if row.phase == phase)
        assert ours + more > 0.0


def test_the_other_serving_is_searched(plan: Plan) -> None:
    rival = other_serving(known_of(plan), "agg")
    asked = {**ASKED, "serving": "agg"}
    again = shardplan.search("llama-3.1-8b", "atlas-800t-a2", **asked).plan
    assert rival.ratio == pytest.approx(
        again.performance.output_tokens_per_s / plan.performance.output_tokens_per_s, rel=1e-9
    )
    assert rival.ratio is not None
    back = other_serving(known_of(again), "disagg")
    assert back.ratio == pytest.approx(1.0 / rival.ratio, rel=1e-9)


def test_rivals_that_cannot_be_say_why(plan: Plan) -> None:
    with pytest.raises(InputError, match="no decode instance of the space"):
        against(plan, "decode.tp=7")
    with pytest.raises(InputError, match="axes of its instances"):
        against(plan, "prefill.tp=4,tp=2")
    small = against(plan, "decode.batch=1000000")
    assert small.performance is None
    assert small.broken


def test_a_plan_against_another_of_another_workload_says_so(plan: Plan) -> None:
    longer = shardplan.search("llama-3.1-8b", "atlas-800t-a2", output_len=64, **ASKED).plan
    assert any("another workload" in one for one in rival_plan(plan, longer).notes)


def test_the_command_prints_and_writes_json(
    plan: Plan, plan_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", plan_file, "--no-shadows", "--against"]
    assert run([*words, "prefill.tp=1,decode.tp=1"]) == 0
    shown = capsys.readouterr().out
    assert "binds" in shown
    assert "against: " in shown
    assert run([*words, plan_file, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rival"]["ratio"] == pytest.approx(1.0)
    assert [pool["role"] for pool in told["pools"]] == ["prefill", "decode"]
    assert run([*words, "tp=8"]) == 0
    assert "against: tp8" in capsys.readouterr().out
    assert run([*words, "prefill.wings=2"]) == 2
    assert "named by its axes" in capsys.readouterr().err


def test_percentiles_that_are_limited_are_told() -> None:
    """TTFT with its queue, TPOT of full slots."""
    found: Plan = shardplan.search(
        "llama-3.1-8b",
        "atlas-800t-a2",
        cards=4,
        serving="disagg",
        ttft_p99_ms=900,
        tpot_p99_ms=40,
    ).plan
    told = {one.name: one for one in explain(found, shadows=False).bindings}
    assert found.performance.ttft_s < told["ttft_p99"].value <= 0.9 * (1 + 1e-6)
    assert told["tpot_p99"].value == found.performance.tpot_s <= 0.04


def test_lint_judges_an_instance_of_each_pool(
    plan: Plan, plan_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [one.role for one in read(plan_file, "")] == ["prefill", "decode"]
    assert run(["lint", plan_file, "--cluster", "atlas-800t-a2", "--json"]) == 0
    prefill, decode = json.loads(capsys.readouterr().out)
    for report, pool in zip((prefill, decode), plan.pools, strict=True):
        assert report["performance"] is None
        assert report["best"] is None
        said = next(one["got"] for one in report["findings"] if "keeps up" in one["sentence"])
        assert float(said.split()[0]) == pytest.approx(pool.times.requests_per_s, rel=5e-3)
    late = ["lint", plan_file, "--cluster", "atlas-800t-a2", "--tpot-ms", "1", "--json"]
    assert run(late) == 0
    decode = json.loads(capsys.readouterr().out)[1]
    assert any(one["level"] == "warning" for one in decode["findings"])


def test_lint_knows_the_model_of_a_plan(
    plan_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preset by its name, another by the file that the plan was made of."""
    assert run(["lint", plan_file, "--cluster", "atlas-800t-a2", "--no-best"]) == 0
    assert "llama-3.1-8b" in capsys.readouterr().out
    config = tmp_path / "config.json"
    sizes = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    config.write_text(json.dumps(sizes), encoding="utf-8")
    own = shardplan.search(str(config), "atlas-800t-a2", cards=1).plan
    own.save(tmp_path / "plan.json")
    words = ["lint", str(tmp_path / "plan.json"), "--cluster", "atlas-800t-a2", "--no-best"]
    assert run(words) == 0
