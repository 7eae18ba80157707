"""plan.json: the same bytes for the same question, refused when broken, and true to the search."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from shardplan.models.errors import InputError
from shardplan.search.api import SearchResult, search
from shardplan.search.output import write_result
from shardplan.search.plan import Plan, plan_schema
from shardplan.search.plan_versions import MAX_PLAN_BYTES

REPRODUCIBLE = ("plan.json", "trials.csv", "pareto.csv", "report.html")


def ask() -> SearchResult:
    """Llama-3.1-8B on four cards: a space of a few thousand strategies."""
    return search("llama-3.1-8b", "atlas-800t-a2", cards=4)


@pytest.fixture(scope="module")
def result() -> SearchResult:
    """One search that the tests below look at."""
    return ask()


def broken(plan: Plan, tmp_path: Path, **changes: Any) -> Path:
    """A good plan.json with top-level parts replaced."""
    path = tmp_path / "plan.json"
    data = json.loads(plan.dumps())
    path.write_text(json.dumps({**data, **changes}), encoding="utf-8")
    return path


def test_a_plan_comes_back_byte_for_byte(result: SearchResult, tmp_path: Path) -> None:
    """Saving what was loaded changes nothing."""
    first, again = tmp_path / "plan.json", tmp_path / "again.json"
    result.plan.save(first)
    Plan.load(first).save(again)
    assert again.read_bytes() == first.read_bytes()


def test_the_same_question_gives_the_same_files(result: SearchResult, tmp_path: Path) -> None:
    """Measured times stand in timing.json alone."""
    write_result(result, tmp_path / "one")
    write_result(ask(), tmp_path / "two")
    for name in REPRODUCIBLE:
        one, two = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert one == two, name


def test_the_committed_schema_is_that_of_the_models() -> None:
    """Others validate against the file."""
    text = (resources.files("shardplan.search") / "data" / "plan.schema.json").read_text("utf-8")
    assert text == json.dumps(plan_schema(), indent=2) + "\n"


def test_a_real_plan_follows_the_schema(result: SearchResult) -> None:
    """And one with a key too many does not."""
    data = json.loads(result.plan.dumps())
    checker = jsonschema.Draft202012Validator(plan_schema())
    checker.validate(data)
    assert not checker.is_valid({**data, "more": 1})
    assert not checker.is_valid({**data, "strategy": {**data["strategy"], "tp": "four"}})


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "JSON"),
        (b"not json", "JSON"),
        (b"\xff\xfe\x00\x01", "JSON"),
        (bytes(range(256)), "JSON"),
        (b'{"schema_version": 1', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "JSON"),
        (b"[]", "schema version"),
        (b"null", "schema version"),
        (b"{}", "schema version"),
        (b'{"schema_version": 0}', "schema version"),
        (b'{"schema_version": true}', "schema version"),
        (b'{"schema_version": 2.0}', "schema version"),
        (b'{"schema_version": "1"}', "schema version"),
        (b'{"schema_version": 1}', "follows its schema"),
        (b'{"schema_version": 2}', "follows its schema"),
        (b" " * (MAX_PLAN_BYTES + 1), "16 MiB"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else value,
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes, rule: str) -> None:
    """The message has the rule and names the file."""
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rule) as caught:
        Plan.load(path)
    assert str(path) in caught.value.got


def test_a_plan_that_is_cut_short_is_refused(result: SearchResult, tmp_path: Path) -> None:
    """At whatever byte it ends."""
    path = tmp_path / "plan.json"
    text = result.plan.dumps()
    for end in range(0, len(text) - 2, len(text) // 30):
        path.write_text(text[:end], encoding="utf-8")
        with pytest.raises(InputError):
            Plan.load(path)


@pytest.mark.parametrize("name", ["nowhere.json", "."])
def test_a_path_without_a_file_is_refused(tmp_path: Path, name: str) -> None:
    """Missing, or a folder."""
    with pytest.raises(InputError, match="cannot be read"):
        Plan.load(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"more": 1}, "more"),
        ({"strategy": None}, "strategy"),
        ({"notes": "one"}, "notes"),
        ({"performance": {}}, "performance"),
        ({"schema_version": 10**400}, "schema_version"),
        ({"shardplan_version": 10**400}, "shardplan_version"),
        ({"largest_lever": ["x"]}, "largest_lever"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_part_that_breaks_the_schema_is_named(
    result: SearchResult, tmp_path: Path, changes: dict[str, Any], place: str
) -> None:
    """With the file."""
    with pytest.raises(InputError, match=place):
        Plan.load(broken(result.plan, tmp_path, **changes))


def test_nothing_is_left_behind_when_a_plan_cannot_be_written(
    result: SearchResult, tmp_path: Path
) -> None:
    """A folder stands where the file should."""
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        result.plan.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_certificate_accounts_for_every_strategy(result: SearchResult) -> None:
    """Priced and pruned add up to the space; the plan is at the bound."""
    proof = result.plan.certificate
    assert proof.space_size == proof.evaluated + proof.pruned
    assert proof.pruned == sum(proof.pruned_by.values())
    assert sum(proof.infeasible.values()) < proof.evaluated
    assert proof.gap == 0.0
    assert proof.bound == pytest.approx(result.plan.performance.output_tokens_per_s, rel=1e-12)
    sizes = [len(proof.space[name]) for name in ("batch", "chunk", "attention")]
    assert proof.space_size % math.prod(sizes) == 0


def test_the_wall_time_of_a_plan_is_a_power_of_ten(result: SearchResult) -> None:
    """An upper bound of what was measured, so that the file does not change from run to run."""
    wall_s = result.plan.certificate.wall_s
    assert wall_s >= max(100.0, result.timing["search_s"])
    assert math.log10(wall_s) == int(math.log10(wall_s))


def test_memory_adds_up_and_fits(result: SearchResult) -> None:
    """Every stage: its parts are its total, within what the engine may use of the card."""
    rows = result.plan.memory
    assert [row.layers for row in rows] == list(result.plan.strategy.stage_layers)
    for row in rows:
        parts = row.model_dump(exclude={"stage", "layers", "total_bytes", "capacity_bytes"})
        assert row.total_bytes == pytest.approx(sum(parts.values()), rel=1e-12)
        assert min(parts.values()) >= 0
        assert row.total_bytes <= row.capacity_bytes < result.plan.cluster.hbm_bytes
    fullest = max(row.total_bytes for row in rows)
    assert fullest == pytest.approx(result.trials["memory_bytes"][0], rel=1e-12)


def breakdown_s(plan: Plan, phase: str) -> float:
    """Seconds of all rows of a phase."""
    return sum(row.total_s for row in plan.breakdown if row.phase == phase)


def test_the_breakdown_is_the_step(result: SearchResult) -> None:
    """All of a decode step; of a prefill what is left when no decode token rides along."""
    plan = result.plan
    assert breakdown_s(plan, "decode") == pytest.approx(plan.performance.decode_step_s, rel=1e-9)
    assert 0.5 < breakdown_s(plan, "prefill") / plan.performance.prefill_step_s < 1.0
    assert {row.basis for row in plan.breakdown} <= {"measured", "fitted", "derived", "assumed"}


def test_the_breakdown_is_the_prefill_where_prompts_go_first() -> None:
    """An engine that never mixes the phases, one request in flight: both steps in full."""
    cluster = "atlas-800t-a2"
    plan = search(
        "llama-3.1-8b", cluster, cards=1, engine_profile="torch-graph", concurrency=1
    ).plan
    for phase, step_s in (
        ("prefill", plan.performance.prefill_step_s),
        ("decode", plan.performance.decode_step_s),
    ):
        assert breakdown_s(plan, phase) == pytest.approx(step_s, rel=1e-9)


def test_the_plan_is_proven(result: SearchResult) -> None:
    """Its proof passed, and proving the loaded plan again gives the same."""
    proof = result.plan.proof
    assert proof.passed
    assert proof.level == 1
    assert proof.checks
    assert proof.failures == ()
    assert result.plan.verify() == proof


def test_quantizing_is_shown_and_not_applied(result: SearchResult) -> None:
    """Every row has another pair of types than the plan, and its gain is what it says."""
    plan = result.plan
    own = (plan.strategy.weight_dtype, plan.strategy.kv_dtype)
    assert own == ("bf16", "bf16")
    pairs = [(row.weight_dtype, row.kv_dtype) for row in plan.quantization]
    assert len(set(pairs)) == len(pairs)
    assert own not in pairs
    assert ("bf16", "int8") in pairs
    for row in plan.quantization:
        assert row.objective is not None
        assert row.gain == pytest.approx(row.objective / plan.performance.output_tokens_per_s)
        assert row.strategy is not None
        assert (row.strategy.weight_dtype, row.strategy.kv_dtype) in pairs
    smaller_cache = plan.quantization[pairs.index(("bf16", "int8"))]
    assert smaller_cache.gain is not None
    assert smaller_cache.gain > 1.0


def test_what_was_not_given_is_stated(result: SearchResult) -> None:
    """Every default has a note."""
    text = "\n".join(result.plan.notes)
    for said in (
        "input_len was not given: 1024",
        "output_len was not given: 256",
        "prefix_hit was not given",
        "no concurrency or rate was given",
        "no limit on TTFT or TPOT was given: 2000 ms and 100 ms",
        "engine profile vllm-ascend",
        "weights keep the checkpoint's type: bf16",
        "KV cache keeps the 16 bits of the model's activations: bf16",
        "attention as vllm-ascend runs it",
        "aggregated serving",
        "trials.csv holds",
    ):
        assert said in text


def test_what_was_given_is_not_called_a_default() -> None:
    """A question with everything said has none of those notes."""
    plan = search(
        "llama-3.1-8b",
        "atlas-800t-a2",
        cards=1,
        input_len=128,
        output_len=16,
        concurrency=8,
        prefix_hit=0.0,
        weight_dtype="bf16",
        kv_dtype="bf16",
        attention="flash",
        engine_profile="vllm-ascend",
        serving="agg",
    ).plan
    text = "\n".join(plan.notes)
    for word in ("not given", "assumed", "keep", "the first that runs", "as vllm-ascend runs"):
        assert word not in text


def test_the_cache_is_of_the_checkpoints_type() -> None:
    """Llama-65B is published in fp16: weights and cache stay so where the device has it."""
    strategy = search("llama-65b", "atlas-800t-a2", concurrency=1).plan.strategy
    assert (strategy.weight_dtype, strategy.kv_dtype) == ("fp16", "fp16")


def test_the_plan_heads_the_trials(result: SearchResult) -> None:
    """Rank 1 of trials.csv is the plan's strategy; ranks go on without a hole."""
    strategy = result.plan.strategy.model_dump()
    first = result.trials.iloc[0]
    strategy["stage_layers"] = ",".join(map(str, strategy["stage_layers"]))
    strategy["order"] = "-".join(strategy["order"])
    assert {name: first[name] for name in strategy} == strategy
    ranks = result.trials["rank"][result.trials["feasible"]].tolist()
    assert ranks == list(range(1, len(ranks) + 1))
    assert result.trials["objective"][: len(ranks)].is_monotonic_decreasing


def test_alternatives_are_other_layouts(result: SearchResult) -> None:
    """Each the best of its layout, worse than the plan and than the one before."""
    chosen = result.plan.strategy
    layouts = [chosen.parallelism(), *(o.strategy.parallelism() for o in result.plan.alternatives)]
    assert len(layouts) > 2
    assert len(set(layouts)) == len(layouts)
    objectives = [one.objective for one in result.plan.alternatives]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[0] <= result.plan.performance.output_tokens_per_s
    for other in result.plan.alternatives:
        assert other.strategy.ranks == chosen.ranks


def test_no_point_of_the_front_beats_another(result: SearchResult) -> None:
    """More throughput costs TPOT, all along pareto.csv, which the plan holds too."""
    rates = result.pareto["output_tokens_per_s"].tolist()
    times = result.pareto["tpot_s"].tolist()
    assert rates == sorted(rates, reverse=True)
    assert times == sorted(times, reverse=True)
    assert len(set(rates)) == len(set(times)) == len(rates)
    assert [one.performance.tpot_s for one in result.plan.pareto] == times
