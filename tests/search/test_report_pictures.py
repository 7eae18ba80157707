"""Pictures of the report: ranks on their nodes, steps over time, memory of pools, commands."""

from __future__ import annotations

import re
from pathlib import Path
from time import process_time

import pytest
from tests.search.plan_factory import make_plan, make_strategy, make_trials
from tests.search.test_report import HOSTILE, _Reader

from shardplan.search.plan import Plan
from shardplan.search.plan_batching import Batching, GraphSizes, OtherSizes, SettingRow
from shardplan.search.plan_capacity import Capacity, LossRow, Replanned
from shardplan.search.plan_cost import Cost
from shardplan.search.predicted import known_steps
from shardplan.search.report import write_report
from shardplan.search.report.cluster import MOST_RANKS, cluster_section
from shardplan.search.report.emitting import next_section
from shardplan.search.report.lanes import Lane, Slice, lanes
from shardplan.search.report.memory import memory_section
from shardplan.search.report.page import page
from shardplan.search.report.robust import robustness_section
from shardplan.search.report.timeline import timeline_section
from shardplan.search.report.tradeoffs import tradeoff_section
from shardplan.search.report.words import percent, time
from shardplan.search.targets import BUILT_IN
from shardplan.search.trial_table import TrialTable

PLANS = Path(__file__).resolve().parent.parent.parent / "results" / "plans"
TP8 = Plan.load(PLANS / "llama-65b_atlas-800t-a2" / "plan.json")
POOLS = Plan.load(PLANS / "deepseek-v3_cloudmatrix-384_disagg" / "plan.json")


def _titles(section: str) -> list[str]:
    """Tooltips of the rectangles."""
    return re.findall(r"<rect[^>]*><title>([^<]*)</title>", section)


def _timeline(plan: Plan) -> str:
    return timeline_section(plan, known_steps(plan))


def test_every_rank_stands_on_its_node_with_its_coordinates() -> None:
    """tp4 pp2 dp4 on nodes of 8: rank 21 = stage 1, dp 1, tp 1, on node 2."""
    plan = make_plan(strategy=make_strategy(tp=4, pp=2, dp=4))
    section = cluster_section(plan)
    titles = _titles(section)
    assert len(titles) == 3 * 32  # a picture an axis
    assert "rank 21 on node 2: stage 1, dp 1, tp 1" in titles
    assert "32 ranks on 4 nodes of 8" in section
    for words in ("By pipeline stage: 2 stages", "By data-parallel group: 4", "rank: 4 ranks"):
        assert words in section
    # neighbours in tp stand side by side; stages are 16 ranks apart, on other nodes
    text = _Reader(section).text
    assert "tp 4 0, 1, 2, ... inside a node 8" in text
    assert "pp 2 0, 16 over 2 nodes 16" in text
    assert "dp 4 0, 4, 8, ... over 2 nodes 8" in text


def test_the_order_of_the_ranks_is_the_plans() -> None:
    """With tp outermost its ranks are 8 apart."""
    plan = make_plan(strategy=make_strategy(tp=4, pp=2, dp=4, order=("tp", "pp", "dp", "cp")))
    assert "rank 21 on node 2: stage 1, dp 1, tp 2" in _titles(cluster_section(plan))


def test_free_ranks_are_grey_and_said() -> None:
    """16 of 32 cards."""
    section = cluster_section(make_plan(strategy=make_strategy(tp=4, pp=2, dp=2)))
    assert "Grey ones stay free (16)" in section
    assert "rank 31 on node 3: free" in _titles(section)


def test_one_rank_alone_is_drawn() -> None:
    """Nothing is split: no groups, and it says what it holds."""
    plan = make_plan(strategy=make_strategy(tp=1, pp=1, dp=1, stage_layers=(80,)))
    section = cluster_section(plan)
    assert "rank 0 on node 0: the whole model" in _titles(section)
    assert "<details" not in section


def test_pools_are_drawn_apart_and_large_ones_in_part() -> None:
    """Instances are numbered; of 4,096 ranks whole nodes up to a number are drawn."""
    titles = _titles(cluster_section(POOLS))
    assert "rank 37 on node 2: instance 2, stage 5" in titles
    assert "rank 37 on node 2: dp 37" in titles
    request = POOLS.request.model_copy(update={"cards": 4096})
    way = POOLS.strategy.model_copy(update={"dp": 4096, "ep": 256})
    large = POOLS.model_copy(update={"pools": (), "request": request, "strategy": way})
    section = cluster_section(large)
    assert len(_titles(section)) == MOST_RANKS
    assert "The first 32 nodes are drawn; the others go on alike." in section


def test_a_step_is_drawn_from_the_priced_kernels() -> None:
    """Seconds of both phases, of stages and of kernels are those of plan.json."""
    section = _timeline(TP8)
    text = _Reader(section).text
    for phase in ("prefill", "decode"):
        step_s = sum(row.total_s for row in TP8.breakdown if row.phase == phase)
        assert f"{phase.capitalize()} step, {time(step_s)}" in text
    assert "80 dense layers" in section
    attention = next(r for r in TP8.breakdown if (r.phase, r.kind) == ("decode", "attention"))
    assert f"attention (attention): {time(attention.total_s / 80)}" in section


def test_a_pipeline_is_drawn_with_its_microbatches() -> None:
    """A lane a stage; a stage is busy with every microbatch once, and nothing lies outside."""
    way = TP8.strategy.model_copy(update={"tp": 2, "pp": 4, "stage_layers": (20,) * 4})
    section = _timeline(TP8.model_copy(update={"strategy": way}))
    assert "4 microbatches share 4 stages" in section
    for stage in range(4):
        for microbatch in range(4):
            assert f"microbatch {microbatch} in stage {stage}: " in section
    for begin, width in re.findall(
        r'class="slice"[^>]* x="([\d.]+)%"[^>]* width="([\d.]+)%"', section
    ):
        assert 0.0 <= float(begin) <= float(begin) + float(width) <= 100.01
    prefill = _timeline(POOLS)
    assert "A prompt of one piece through 16 stages" in prefill


def test_a_report_of_many_trials_is_written_in_a_second(tmp_path: Path) -> None:
    """Of 100,000, with all its pictures: at most a second of a core and two megabytes."""
    trials = TrialTable.of(make_trials(100_000))
    for plan in (TP8, POOLS):
        begin_s = process_time()
        write_report(plan, trials, tmp_path / "report.html")
        assert process_time() - begin_s <= 1.0
        assert (tmp_path / "report.html").stat().st_size <= 2e6


def test_a_plan_whose_parts_are_not_at_hand_has_no_timeline() -> None:
    """The toy model has a preset's name and other sizes."""
    assert _timeline(make_plan()) == ""


def test_lanes_hold_their_slices() -> None:
    """100 ms to 200 ms of an axis that ends at 400 ms is a quarter of the width at a quarter."""
    drawn = lanes("a label", [Lane("a", [Slice(0.1, 0.1, "c0", "<told>", "<words>")])], 0.4)
    assert 'x="25%"' in drawn
    assert 'width="25%"' in drawn
    assert "&lt;told&gt;" in drawn
    assert "&lt;words&gt;" in drawn
    assert ">400 ms<" in drawn
    assert ">400 µs<" in lanes("a label", [Lane("a", [])], 0.0004)


def test_both_pools_show_their_memory() -> None:
    """The fullest stage of each."""
    text = _Reader(memory_section(POOLS)).text
    for pool in POOLS.pools:
        row = max(pool.memory, key=lambda one: one.total_bytes)
        assert f"{row.total_bytes / 2**30:.1f} of {row.capacity_bytes / 2**30:.1f} GiB" in text
        assert pool.largest_lever in text


def test_every_target_of_ours_has_its_command() -> None:
    """Of pools, those that serve them."""
    section = next_section(make_plan())
    for name in BUILT_IN:
        assert f"shardplan emit plan.json --target {name} --out deploy-{name}" in section
    apart = next_section(POOLS)
    assert "--target vllm-ascend" in apart
    assert "--target torch" not in apart


def test_dots_of_the_front_are_read_out_and_reached_by_keyboard() -> None:
    """The plan last, at most some dozens of stops, each with its words."""
    plan = make_plan()
    section = tradeoff_section(plan, TrialTable.of(make_trials()))
    marks = [found for name, found in _Reader(section).elements if found.get("class") == "spot"]
    assert len(marks) == len(plan.pareto) + 1
    stops = [found for found in marks if "tabindex" in found]
    assert 2 <= len(stops) <= 25
    assert str(marks[-1]["aria-label"]).startswith("This plan: tp")
    assert "tabindex" in marks[-1]


def test_the_bands_are_drawn() -> None:
    """Each group with its band; a plan that another beats within a band says so."""
    told = TP8.robustness
    assert told is not None
    section = robustness_section(TP8)
    flips = sum((row.slower is not None) + (row.faster is not None) for row in told.groups)
    assert section.count("<circle") == flips
    assert f"{percent(told.level)} band of the group" in section


def _asked() -> Plan:
    """A plan with graph sizes, losses and prices, as its options ask for them."""
    decode = GraphSizes(
        phase="decode",
        unit="sequences",
        sizes=(1, 8, 70),
        expected_s=0.058,
        unpadded_s=0.057,
        padding=0.021,
        step=1,
        most=100,
        bound="price",
        price_s=1e-6,
        loads="70 slots",
        others=(OtherSizes(name="powers <of> two", count=8, expected_s=0.0638, padding=0.1),),
    )
    prefill = decode.model_copy(
        update={"phase": "prefill", "unit": "tokens", "sizes": (1024,), "others": ()}
    )
    setting = SettingRow(
        setting="max_num_seqs", value=70, default=256, objective=None, gain=None, limit="memory"
    )
    batching = Batching(
        lengths=None,
        graph_bytes=24 * 2.0**20,
        graph_bytes_kind="assumed",
        graph_bytes_source="a guess",
        prefill=prefill,
        decode=decode,
        settings=(setting, setting.model_copy(update={"gain": 1.2, "limit": ""})),
        notes=("a note",),
    )
    again = Replanned(
        cards=4, words="tp4", requests_per_s=1.0, holds=False, ttft_s=None, tpot_s=None
    )
    capacity = Capacity(
        requests_per_s=2.0,
        spare=0,
        spare_unit="card",
        replicas=1,
        cards=8,
        headroom=1.375,
        losses=(
            LossRow(
                lost="nothing",
                replicas_left=1,
                requests_per_s=2.75,
                holds=True,
                ttft_s=0.2,
                tpot_s=0.09,
                again=None,
            ),
            LossRow(
                lost="1 card",
                replicas_left=0,
                requests_per_s=0.0,
                holds=False,
                ttft_s=None,
                tpot_s=None,
                again=again,
            ),
        ),
    )
    cost = Cost(card_price=2.5, per_hour=20.0, per_million_tokens=7.89, per_million_tokens_full=5.0)
    return TP8.model_copy(update={"batching": batching, "capacity": capacity, "cost": cost})


def test_what_was_asked_besides_is_shown() -> None:
    """Graph sizes with what others would take, losses against the rate, prices; else nothing."""
    text = _Reader(page(_asked(), make_trials(20))).text
    for told in (
        "Decode: 3 graphs, sequences",
        "Prefill: 1 graph, tokens",
        "powers <of> two 8 63.8 ms 10 % +1",
        "max_num_seqs 70 256 breaks memory",
        "max_num_seqs 70 256 +20 %",
        "a note",
        "Lost: 1 card",
        "nothing is left",
        "planned again on 4 cards (tp4): saturated at 1",
        "20 an hour, 7.89 a million output tokens",
    ):
        assert told in text, told
    bare = _Reader(page(TP8, make_trials(20))).text
    assert "Graph sizes" not in bare
    assert "What may be lost" not in bare
    assert "an hour" not in bare


@pytest.mark.parametrize("plan", [TP8, POOLS], ids=["one pool", "two pools"])
def test_hostile_names_stay_text_in_every_picture(plan: Plan) -> None:
    """Where the model is found by its digest, and the rest comes from a file."""
    machine = plan.cluster.model_copy(update={"title": HOSTILE, "device": HOSTILE})
    pools = tuple(
        pool.model_copy(update={"largest_lever": HOSTILE, "cluster": machine})
        for pool in plan.pools
    )
    hostile = plan.model_copy(
        update={"cluster": machine, "pools": pools, "largest_lever": HOSTILE, "notes": (HOSTILE,)}
    )
    reader = _Reader(
        page(hostile, make_trials(20), known_steps(hostile, device=plan.cluster.device))
    )
    assert reader.open == []
    assert not {"script", "img"} & {name for name, _ in reader.elements}
    assert reader.text.count("<script>alert('x')</script>") > 3
