"""Traces: valid for Perfetto, nested without overlap, and as long as the plan's steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardplan.models.errors import InputError
from shardplan.search import trace as module
from shardplan.search.main import run
from shardplan.search.plan import Plan
from shardplan.search.predicted import Predicted, predicted_steps
from shardplan.search.trace import ranks_of, write_trace

PLANS = Path(__file__).resolve().parent.parent.parent / "results" / "plans"
FOLDERS = sorted(one.parent for one in PLANS.glob("*/plan.json"))
US = 1e6
NS = 1e-3


def written(plan: Plan, path: Path, ranks: str = "auto") -> dict[str, Any]:
    """The trace of a plan, read again."""
    write_trace(path, plan, predicted_steps(plan), ranks)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def check_valid(trace: dict[str, Any]) -> None:
    """What the Trace Event Format asks of the events that are used."""
    named = {e["pid"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    by_thread: dict[tuple[int, int], list[tuple[float, float]]] = {}
    arrows: dict[str, list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert event["pid"] in named
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
        elif event["ph"] == "X":
            assert event["ts"] >= 0.0
            assert event["dur"] >= 0.0
            thread = by_thread.setdefault((event["pid"], event["tid"]), [])
            thread.append((event["ts"], event["ts"] + event["dur"]))
        else:
            assert event["ph"] in ("s", "f")
            arrows.setdefault(event["id"], []).append(event)
    for slices in by_thread.values():
        open_ends: list[float] = []
        for begin, end in sorted(slices, key=lambda one: (one[0], -one[1])):
            while open_ends and open_ends[-1] <= begin + NS:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + NS
            open_ends.append(end)
    for pair in arrows.values():
        assert [one["ph"] for one in pair] == ["s", "f"]
        assert pair[0]["ts"] == pytest.approx(pair[1]["ts"], abs=NS)
    assert trace["otherData"]["events"] == len(trace["traceEvents"])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_trace_is_valid_and_sums_to_the_plans_steps(folder: Path, tmp_path: Path) -> None:
    """Kernels by kind, over one rank of each stage; stages and the host in all."""
    plan = Plan.load(folder / "plan.json")
    ranks = sorted({rank for some in _one_rank_a_stage(plan).values() for rank in some})
    trace = written(plan, tmp_path / "trace.json", ",".join(map(str, ranks)))
    check_valid(trace)
    first: dict[str, int] = {step.phase: _first_pid(plan, step) for step in predicted_steps(plan)}
    for phase, some in _one_rank_a_stage(plan).items():
        rows = {row.kind: row.total_s for row in plan.breakdown if row.phase == phase}
        pids = {first[phase] + rank for rank in some}
        begin, end = _span(trace, pids, phase)
        own = [
            event
            for event in trace["traceEvents"]
            if event["ph"] == "X" and event["pid"] in pids and begin <= event["ts"] < end
        ]
        kinds: dict[str, float] = {}
        for event in own:
            kind = event.get("args", {}).get("kind")
            if kind is not None:
                kinds[kind] = kinds.get(kind, 0.0) + event["dur"] / US
        kernels = {kind: value for kind, value in rows.items() if kind in kinds}
        assert set(rows) - set(kernels) <= {"host", "launch_gap"}
        assert kinds == pytest.approx(kernels, rel=1e-5, abs=1e-6)
        stages = [e["dur"] for e in own if "layers" in e.get("args", {})]
        hosts = [e["dur"] for e in own if e["name"] == f"host, before {phase}"]
        total_s = sum(rows.values())
        assert (sum(stages) + sum(hosts)) / US == pytest.approx(total_s, rel=1e-6)
        assert trace["otherData"][f"{phase}_step_s"] == pytest.approx(total_s, rel=1e-9)


def _first_pid(plan: Plan, step: Predicted) -> int:
    """Decode ranks of pools are numbered after all prefill instances."""
    pools = {pool.role: pool for pool in plan.pools}
    if step.phase == "prefill" or not pools:
        return 0
    return pools["prefill"].instances * pools["prefill"].strategy.ranks


def _one_rank_a_stage(plan: Plan) -> dict[str, list[int]]:
    """With the default order ranks of a stage follow one another."""
    ways = {pool.role: pool.strategy for pool in plan.pools}
    found = {}
    for phase in ("prefill", "decode"):
        way = ways.get(phase, plan.strategy)
        found[phase] = [stage * way.ranks // way.pp for stage in range(way.pp)]
    return found


def _span(trace: dict[str, Any], pids: set[int], phase: str) -> tuple[float, float]:
    """From the host's work to the end of the last stage."""
    own = [
        event
        for event in trace["traceEvents"]
        if event["ph"] == "X"
        and event["pid"] in pids
        and (event["name"].split(",")[0] == phase or event["name"] == f"host, before {phase}")
        and event["tid"] == 0
    ]
    return min(e["ts"] for e in own), max(e["ts"] + e["dur"] for e in own)


def test_a_pipeline_has_arrows_and_other_microbatches(tmp_path: Path) -> None:
    """An arrow from each stage to the next, and p - 1 others on the third thread."""
    plan = Plan.load(PLANS / "llama-65b_atlas-800t-a2" / "plan.json")
    way = plan.strategy.model_copy(update={"tp": 2, "pp": 4, "stage_layers": (20,) * 4})
    trace = written(plan.model_copy(update={"strategy": way}), tmp_path / "t.json")
    check_valid(trace)
    events = trace["traceEvents"]
    assert sum(event["ph"] == "s" for event in events) == 2 * 2 * 3  # phases, lines, joints
    others = [event["name"] for event in events if event["ph"] == "X" and event["tid"] == 2]
    assert others.count("decode, microbatch 3") == 8
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names[5] == "rank 5 (node 0, stage 2, tp 1)"


def test_ranks_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number; and the first of each stage where all would be too many, which is said."""
    plan = Plan.load(PLANS / "llama-65b_atlas-800t-a2" / "plan.json")
    pids = {event["pid"] for event in written(plan, tmp_path / "a.json", "1,4-5")["traceEvents"]}
    assert pids == {1, 4, 5}
    monkeypatch.setattr(module, "MOST_EVENTS", 5000)
    few = written(plan, tmp_path / "b.json")
    assert {event["pid"] for event in few["traceEvents"]} == {0}
    assert "same kernels" in few["otherData"]["decode_note"]
    every = written(plan, tmp_path / "c.json", "all")
    assert {event["pid"] for event in every["traceEvents"]} == set(range(8))


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "-1", "3-1", "8", "0-8", "1.5", "1,,2", "9" * 30, "\u0661"]
)
def test_ranks_that_are_none_are_refused(text: str) -> None:
    """With the value, the rule and what to try."""
    with pytest.raises(InputError, match="try 0") as told:
        ranks_of(text, 8)
    assert "ranks=" in str(told.value)


def test_the_command_writes_beside_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the same bytes; hostile names stay JSON strings."""
    plan = Plan.load(PLANS / "qwen3-32b_atlas-800i-a2" / "plan.json")
    odd = plan.cluster.model_copy(update={"name": 'a"}],\n<script>'})
    plan.model_copy(update={"cluster": odd}).save(tmp_path / "plan.json")
    words = ["trace", str(tmp_path / "plan.json"), "--cluster", "atlas-800i-a2"]
    assert run(words) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "trace.json")
    assert "decode: 55.503 ms, 8 of 8 ranks" in told.err
    first = (tmp_path / "trace.json").read_bytes()
    assert json.loads(first)["otherData"]["cluster"] == 'a"}],\n<script>'
    assert run([*words, "--json", "--out", str(tmp_path / "other.json")]) == 0
    assert json.loads(capsys.readouterr().out)["events"] > 1000
    assert (tmp_path / "other.json").read_bytes() == first


def test_bad_input_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cluster that is not at hand, a folder in place of a file, ranks beyond the last."""
    plan = Plan.load(PLANS / "qwen3-32b_atlas-800i-a2" / "plan.json")
    own = plan.cluster.model_copy(update={"name": "mine"})
    plan.model_copy(update={"cluster": own}).save(tmp_path / "plan.json")
    file = str(tmp_path / "plan.json")
    for words, part in (
        ([], "--cluster FILE"),
        (["--cluster", "atlas-800i-a2", "--ranks", "8"], "from 0 to 7"),
        (["--out", str(tmp_path)], "is a folder"),
    ):
        assert run(["trace", file, *words]) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "trace.json").exists()
