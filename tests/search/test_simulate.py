"""`shardplan simulate`: figures, files, the same bytes twice, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import shardplan
from shardplan.models.errors import InputError
from shardplan.search.main import run
from shardplan.search.plan import Plan
from shardplan.search.simulate_demand import read_demand

PLANS = Path(__file__).resolve().parent.parent.parent / "results" / "plans"
DENSE = str(PLANS / "llama-65b_atlas-800t-a2" / "plan.json")
EXPERTS = str(PLANS / "deepseek-v3_2x-atlas-800i-a3" / "plan.json")
POOLS = str(PLANS / "deepseek-v3_cloudmatrix-384_disagg" / "plan.json")
WORKLOAD = """
input_len = { mean = 600, cv = 0.8, max = 1500 }
output_len = { edges = [1, 50, 200], weights = [2, 1] }
rate = 2.5
num_prompts = 300
prefix_groups = 4
prefix_len = 512
ttft_ms = 1000
tpot_ms = 60
"""


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """What a command says as JSON."""
    assert run(["simulate", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_plan_serves_its_own_workload(capsys: pytest.CaptureFixture[str]) -> None:
    """As many in flight as it was made for: about the throughput that the plan states."""
    found = told(capsys, DENSE)
    plan = Plan.load(Path(DENSE))
    assert found["requests"] == 1000
    assert found["requests_per_s"] == pytest.approx(plan.performance.requests_per_s, rel=0.1)
    assert found["deployment"]["serve"]["slots"] == plan.strategy.batch
    assert 0.0 < found["kv"]["mean"] <= found["kv"]["peak"] <= 1.0
    assert found["saturated"] is None


def test_files_are_whole_and_the_same_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.toml").write_text(WORKLOAD, encoding="utf-8")
    words = ["simulate", DENSE, "--workload", str(tmp_path / "w.toml"), "--timeline"]
    for name in ("one", "two"):
        assert run([*words, "--out", str(tmp_path / name)]) == 0
    names = {"requests.csv", "summary.json", "cache.csv", "timeline.json"}
    assert {one.name for one in (tmp_path / "one").iterdir()} == names
    for name in names:
        texts = [(tmp_path / folder / name).read_bytes() for folder in ("one", "two")]
        assert texts[0] == texts[1], name
    with (tmp_path / "one" / "requests.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["request"]) for row in rows) == list(range(300))
    summary = json.loads((tmp_path / "one" / "summary.json").read_text("utf-8"))
    tokens = sum(int(row["output_tokens"]) for row in rows)
    assert summary["output_tokens_per_s"] * summary["duration_s"] == pytest.approx(tokens)
    waits = sorted(float(row["first_token_s"]) - float(row["arrival_s"]) for row in rows)
    assert summary["ttft_s"]["p50"] == pytest.approx(waits[149], rel=1e-3)
    events = json.loads((tmp_path / "one" / "timeline.json").read_text("utf-8"))["traceEvents"]
    assert {one["ph"] for one in events} == {"M", "X", "C", "b", "e"}
    assert "what requests see" in capsys.readouterr().out


def test_python_says_what_the_command_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file or a plan; the same files; notes are told, not printed; progress to the end."""
    found = told(capsys, DENSE, "--rate", "1.5", "--num-prompts", "200", "--seed", "3")
    calls: list[tuple[int, int]] = []
    asked: dict[str, Any] = {"rate": 1.5, "num_prompts": 200, "seed": 3}
    for plan in (DENSE, Plan.load(Path(DENSE))):
        served = shardplan.simulate(plan, **asked, progress=lambda *call: calls.append(call))
        assert json.loads(json.dumps(served.summary)) == found
        assert served.simulated.recorder.requests == 200
    assert capsys.readouterr() == ("", "")
    assert all(total == 200 for _, total in calls)
    shardplan.simulate(DENSE, **asked, out=tmp_path / "py", timeline=True)
    words = ["--rate", "1.5", "--num-prompts", "200", "--seed", "3", "--timeline"]
    assert run(["simulate", DENSE, *words, "--out", str(tmp_path / "cli")]) == 0
    for one in (tmp_path / "cli").iterdir():
        assert one.read_bytes() == (tmp_path / "py" / one.name).read_bytes()
    assert "no rate or concurrency" in " ".join(shardplan.simulate(DENSE, num_prompts=9).notes)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"router": "random"}, "router"),
        ({"replicas": 0}, "replicas"),
        ({"warmup": -1}, "warmup"),
        ({"timeline": True}, "`timeline` goes with `out`"),
        ({"rate": 1.0, "concurrency": 4}, "one of the two"),
        ({"workload": "none.toml"}, "none.toml"),
    ],
)
def test_python_refuses_what_the_command_refuses(asked: dict[str, Any], match: str) -> None:
    """With the same rules."""
    with pytest.raises(InputError, match=match):
        shardplan.simulate(DENSE, **asked)


def test_a_rate_above_capacity_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, DENSE, "--rate", "20", "--num-prompts", "2000")
    assert found["saturated"]["offered_requests_per_s"] == pytest.approx(20.0, rel=0.1)
    assert found["verdict"].startswith("saturated at ")
    assert found["goodput_requests_per_s"] < found["requests_per_s"]
    assert told(capsys, DENSE, "--rate", "1", "--num-prompts", "2000")["saturated"] is None


def test_groups_that_share_experts_are_one_unit(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, EXPERTS, "--num-prompts", "500", "--concurrency", "64")
    own = found["deployment"]["serve"]
    assert (own["engines"], own["step_together"]) == (4, 2)  # ep16 over tp8


def test_replicas_serve_as_much_more(capsys: pytest.CaptureFixture[str]) -> None:
    one = told(capsys, DENSE, "--concurrency", "32", "--num-prompts", "640")
    two = told(capsys, DENSE, "--concurrency", "64", "--num-prompts", "1280", "--replicas", "2")
    assert two["requests_per_s"] == pytest.approx(2 * one["requests_per_s"], rel=0.02)


@pytest.mark.slow
def test_pools_serve_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.load(Path(POOLS))
    rate = f"{plan.performance.requests_per_s * 0.9:.6g}"
    found = told(capsys, POOLS, "--rate", rate, "--num-prompts", "20000")
    assert found["saturated"] is None
    assert found["tpot_s"]["mean"] <= plan.performance.tpot_s
    assert found["deployment"]["prefill"]["engines"] == 15


def test_a_workload_is_described_without_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written as a trace it is the same workload; the printed page names its parts."""
    (tmp_path / "w.toml").write_text(WORKLOAD, encoding="utf-8")
    trace = tmp_path / "w.jsonl"
    first = told(
        capsys, "--describe", "--workload", str(tmp_path / "w.toml"), "--write-trace", str(trace)
    )
    again = told(capsys, "--describe", "--workload", str(trace))
    assert again["requests"] == first["requests"] == 300
    assert again["input_len"] == first["input_len"]
    assert again["prefix"] == first["prefix"]
    assert run(["simulate", "--describe", "--workload", str(trace)]) == 0
    assert "tokens of a request" in capsys.readouterr().out


def test_options_stand_before_the_file_and_the_plan(tmp_path: Path) -> None:
    (tmp_path / "w.toml").write_text(WORKLOAD, encoding="utf-8")
    plan = Plan.load(Path(DENSE))
    own = read_demand(str(tmp_path / "w.toml"), {"concurrency": 5, "input_len": 99}, plan)
    assert (own.demand.concurrency, own.demand.rate) == (5, None)
    assert own.demand.input_len.most == 99
    assert own.limits == (1.0, 0.06)
    bare = read_demand(None, {}, plan)
    assert bare.demand.concurrency == round(plan.performance.concurrency)
    assert bare.demand.input_len.most == plan.request.workload.input_len


REFUSED: dict[str, tuple[list[str], str]] = {
    "no plan": ([], "takes a plan"),
    "no such plan": (["none.json"], "cannot be read"),
    "both": ([DENSE, "--rate", "1", "--concurrency", "2"], "requests come at a rate"),
    "rate": ([DENSE, "--rate", "0"], "`rate` is a number above 0"),
    "nan": ([DENSE, "--rate", "nan"], "`rate` is a number above 0"),
    "flight": ([DENSE, "--concurrency", "0"], "`concurrency` is a whole number"),
    "length": ([DENSE, "--input-len", "0"], "`input_len` is a whole number"),
    "context": ([DENSE, "--input-len", "4000"], "within the model's context"),
    "prompts": ([DENSE, "--num-prompts", "0"], "`num_prompts` is a whole number"),
    "hit": ([DENSE, "--prefix-hit", "1"], "`prefix_hit` is a share"),
    "bursts": ([DENSE, "--rate", "1", "--burstiness", "-1"], "`burstiness` is a number above 0"),
    "router": ([DENSE, "--router", "random"], "`router` is one of"),
    "replicas": ([DENSE, "--replicas", "0"], "`replicas` is a whole number"),
    "warmup": ([DENSE, "--warmup", "10", "--num-prompts", "10"], "`warmup` is below"),
    "seed": ([DENSE, "--seed", "-1"], "`seed` is a whole number"),
    "timeline": ([DENSE, "--timeline"], "`--timeline` goes with `--out`"),
    "workload": ([DENSE, "--workload", "none.toml"], "a workload file exists"),
    "trace": ([DENSE, "--workload", "none.csv"], "a trace exists"),
    "written": (["--write-trace", "trace.parquet"], "`--write-trace` is a .csv or .jsonl"),
    "model": ([DENSE, "--model", "llama-3.1-8b"], "a model of other sizes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, rule = REFUSED[case]
    error = told(capsys, *words, code=2)["error"]
    assert rule in error["message"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("rats = 1", "a workload file has keys"),
        ("rate = 1\nconcurrency = 2", "requests come at a rate"),
        ("prefix_groups = 3", "given together"),
        ("trace = 5", "`trace` is a .csv"),
        ("trace = 'lost.csv'", "a trace exists"),
        ("input_len = 'x'", "`input_len` is a whole number"),
        ("output_len = { mean = -1 }", "`output_len` is a lognormal"),
        ("num_prompts = 1.5", "`num_prompts` is a whole number"),
        ("rate = ", "TOML"),
        ("tpot_ms = 0", "`tpot_ms` is a number above 0"),
    ],
)
def test_bad_workload_files_are_one_clear_line(
    text: str, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.toml").write_text(text, encoding="utf-8")
    error = told(capsys, DENSE, "--workload", str(tmp_path / "w.toml"), code=2)["error"]
    assert rule in error["message"]


def test_a_plan_of_another_machine_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.load(Path(DENSE))
    cluster = plan.cluster.model_copy(update={"name": "my own"})
    plan.model_copy(update={"cluster": cluster}).save(tmp_path / "plan.json")
    error = told(capsys, str(tmp_path / "plan.json"), code=2)["error"]
    assert "that ship" in error["message"]
