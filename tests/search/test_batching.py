"""Graph sizes of plans: made of what, better than what one might take instead, emitted how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.emit_cases import only
from tests.search.test_cli_bad_input import BOTH, refused

from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.simulate.lengths import Fixed, Histogram
from shardplan.models.errors import InputError
from shardplan.search.api import search
from shardplan.search.batching_sizes import Room, default_sizes, piece_shares
from shardplan.search.plan import MemoryRow, Plan
from shardplan.search.plan_batching import Batching, GraphSizes

LENGTHS = """
input_len = { mean = 900, cv = 1.0, max = 6000 }
output_len = { edges = [1, 100, 400], weights = [2, 3] }
rate = 3.0
num_prompts = 200
"""
TRACE = "".join(
    f'{{"timestamp": {1000 * at}, "input_length": {length}, "output_length": 20, "hash_ids": []}}\n'
    for at, length in enumerate([100, 100, 100, 700])
)


def planned(**asked: Any) -> Plan:
    """Qwen2.5-14B on four cards of 32 GB."""
    return search("qwen2.5-14b", "atlas-800i-a2", cards=4, **asked).plan


def part(plan: Plan) -> Batching:
    """What the plan tells of batching."""
    assert plan.batching is not None
    return plan.batching


def sizes(found: Batching) -> GraphSizes:
    """Those of decoding."""
    assert found.decode is not None
    return found.decode


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A workload whose lengths vary."""
    path = tmp_path_factory.mktemp("lengths") / "w.toml"
    path.write_text(LENGTHS, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def varied(lengths: str) -> Plan:
    """A plan with graphs for it."""
    return planned(lengths=lengths)


def test_only_a_question_that_asks_has_the_part() -> None:
    """Files of plans without it are as they were."""
    assert "batching" not in json.loads(planned().dumps())


def test_sizes_beat_what_one_might_take_instead(varied: Plan) -> None:
    """Of either phase: time and the price of the graphs together, and padding in between."""
    for one in (part(varied).prefill, sizes(part(varied))):
        own = one.expected_s + len(one.sizes) * one.price_s
        assert one.unpadded_s <= one.expected_s
        assert 0.0 < one.padding < 0.2
        assert len(one.sizes) <= one.most
        for other in one.others:
            if other.count <= one.most and "itself" not in other.name:
                assert own <= other.expected_s + other.count * one.price_s + 1e-12, other.name
    assert part(varied).prefill.sizes[-1] == varied.strategy.chunk
    assert sizes(part(varied)).sizes[-1] == varied.strategy.batch


def test_prompts_that_are_alike_take_one_graph() -> None:
    """1,000 tokens in blocks of 128: the length itself, without padding."""
    found = part(planned(auto_batching=True, input_len=1000, output_len=100))
    assert found.prefill.sizes == (1000,)
    assert found.prefill.padding == pytest.approx(0.0, abs=1e-12)
    assert found.prefill.loads == "all prompts alike"


def test_full_decode_steps_cost_what_the_plan_says() -> None:
    """One microbatch, all slots taken: the same step that the search has priced."""
    plan = planned(auto_batching=True, concurrency=16, max_graphs=1)
    found = sizes(part(plan))
    assert found.sizes == (plan.strategy.batch,)
    if plan.strategy.pp == 1:
        assert found.expected_s == pytest.approx(plan.performance.decode_step_s, rel=0.02)


def test_fewer_graphs_cost_more_time(lengths: str, varied: Plan) -> None:
    """A limit binds, and is said."""
    few = part(planned(lengths=lengths, max_graphs=3))
    assert len(few.prefill.sizes) <= 3
    assert few.prefill.bound == "graphs"
    assert few.prefill.expected_s > part(varied).prefill.expected_s


def test_large_graphs_are_few(lengths: str, varied: Plan) -> None:
    """Half a GiB each: as many as fit into what the plan leaves free, and a higher price."""
    found = part(planned(lengths=lengths, graph_mib=512))
    row = max(varied.memory, key=lambda one: one.total_bytes)
    fit = int((row.capacity_bytes - row.total_bytes) // 2**29)
    assert found.graph_bytes == 2**29
    assert found.graph_bytes_kind == "asked"
    assert max(len(found.prefill.sizes), len(sizes(found).sizes)) <= max(fit, 1)


def test_a_trace_counts_its_own_prompts(tmp_path: Path) -> None:
    """Lengths 100 (three of four) and 700, in blocks of 128: two graphs, 128 and 700."""
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE, encoding="utf-8")
    found = part(planned(lengths=str(path))).prefill
    assert found.sizes == (128, 700)
    assert found.padding == pytest.approx(1.0 - (3 * 128 + 700) / (3 * 128 + 700), abs=1e-12)
    assert found.loads == "4 prompts of trace.jsonl"


def test_an_engine_without_decode_graphs_has_no_sizes() -> None:
    """And says so."""
    found = part(planned(auto_batching=True, engine_profile="vllm-ascend-eager"))
    assert found.decode is None
    assert any("no decode graphs" in text for text in found.notes)


def test_settings_are_held_against_the_engines_own(varied: Plan) -> None:
    """The plan is at least as good as with any of them set back."""
    rows = {row.setting: row for row in part(varied).settings}
    assert set(rows) == {"max_num_seqs", "max_num_batched_tokens", "both"}
    engine = load_engine("vllm-ascend")
    assert rows["max_num_seqs"].default == engine.max_num_seqs
    assert rows["max_num_seqs"].value == varied.strategy.batch
    for row in rows.values():
        assert (row.gain is None) == (row.limit != "")
        assert row.gain is None or row.gain >= 1.0 - 1e-12


def test_emitted_sizes_are_the_plans(tmp_path: Path) -> None:
    """What vLLM captures, read back by its own parser."""
    plan = planned(auto_batching=True, concurrency=24, max_graphs=3)
    flags, _ = only(plan, tmp_path)
    config = json.loads(flags.compilation_config)
    width, step = 1 + plan.strategy.mtp, plan.strategy.tp if plan.strategy.sp else 1
    assert config["cudagraph_capture_sizes"] == sorted(
        {-(-size * width // step) * step for size in sizes(part(plan)).sizes}
    )


def test_pools_have_sizes_of_their_own() -> None:
    """Prompts of the prefill instances, batches of the decode instances."""
    plan = search(
        "llama-3.1-8b", "atlas-800t-a2", cards=8, serving="disagg", auto_batching=True
    ).plan
    found, pools = part(plan), {pool.role: pool for pool in plan.pools}
    assert sizes(found).sizes[-1] == pools["decode"].strategy.batch
    assert found.prefill.sizes[-1] == min(
        pools["prefill"].strategy.chunk, plan.request.workload.input_len
    )
    assert found.settings == ()


def test_the_same_question_gives_the_same_bytes(lengths: str, varied: Plan) -> None:
    """Simulated batches with it."""
    assert planned(lengths=lengths).dumps() == varied.dumps()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 40))
def test_pieces_are_those_of_cutting_prompts(prompts: list[int], chunk: int) -> None:
    """Whole pieces and the last one, counted one by one; cells of one token."""
    longest = max(prompts)
    chunk = min(chunk, longest)
    pieces = -(-longest // chunk)

    def below(tokens: np.ndarray) -> np.ndarray:
        return np.asarray((np.array(prompts) <= tokens[..., None]).mean(axis=-1))

    wanted = np.zeros((chunk, pieces))
    for length in prompts:
        for piece in range(-(-length // chunk)):
            wanted[min(length - piece * chunk, chunk) - 1, piece] += 1.0 / len(prompts)
    found = piece_shares(below, chunk, np.arange(1.0, chunk + 1.0), pieces, 0.0)
    assert found == pytest.approx(wanted, abs=1e-12)


def test_what_is_in_the_prefix_cache_is_not_computed() -> None:
    """Of 100 tokens half: pieces of 32 and 18."""
    found = piece_shares(Fixed(100).below, 32, np.arange(1.0, 33.0), 2, 0.5)
    assert np.argwhere(found).tolist() == [[17, 1], [31, 0]]
    halves = piece_shares(Histogram((1, 3), (1.0,)).below, 2, np.arange(1.0, 3.0), 1, 0.0)
    assert halves.ravel().tolist() == [0.5, 0.5]


def test_default_sizes_end_with_the_slots() -> None:
    """vLLM captures 1, 2, 4, 8, 16 ... up to twice the slots; a step of two tokens a sequence."""
    engine = load_engine("vllm-ascend")
    assert default_sizes(engine, 20, 1) == [1, 2, 4, 8, 16, 24]
    assert default_sizes(engine, 20, 2) == [1, 2, 4, 8, 12, 16, 20]
    assert default_sizes(load_engine("mindie"), 20, 1) == []


def test_memory_that_would_earn_nothing_costs_nothing() -> None:
    """Steps that take as much longer as they hold more: slots gain nothing, nor does cache."""
    row = MemoryRow(
        stage=0,
        layers=1,
        weights_bytes=0.0,
        kv_cache_bytes=8.0,
        activations_bytes=0.0,
        communicators_bytes=0.0,
        reserve_bytes=0.0,
        total_bytes=8.0,
        capacity_bytes=12.0,
    )
    cells = np.arange(1.0, 21.0)
    linear, flat = np.outer(cells, np.ones(20)), np.ones((20, 20))
    assert Room.of([row], 2.0, cells, linear, None).share == pytest.approx(0.0, abs=1e-12)
    room = Room.of([row], 2.0, cells, flat, None)
    assert room.share == pytest.approx(2.0 / 12.0)
    assert (room.fit, room.most, room.bound(2), room.bound(1)) == (2, 2, "memory", "price")
    assert room.less(5).fit == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max-graphs", "4"], ("max_graphs=4", "--auto-batching")),
        (["--graph-mib", "24"], ("graph_mib=24", "--auto-batching")),
        (["--auto-batching", "--max-graphs", "0"], ("from 1", "max_graphs=0")),
        (["--auto-batching", "--graph-mib", "nan"], ("above 0", "graph_mib=nan")),
        (["--auto-batching", "--graph-mib", "-1"], ("above 0", "graph_mib=-1")),
        (["--lengths", "nowhere.toml"], ("nowhere.toml", "exists")),
    ],
)
def test_bad_limits_are_refused(
    more: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The value, the rule and what to try."""
    refused(["search", *BOTH, "--cards", "2", *more], capsys, *words)


def test_sizes_that_do_not_ascend_are_refused(varied: Plan, tmp_path: Path) -> None:
    """A plan.json may come from anywhere."""
    data = json.loads(varied.dumps())
    data["batching"]["decode"]["sizes"] = [4, 4]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match="ascend"):
        Plan.load(path)
