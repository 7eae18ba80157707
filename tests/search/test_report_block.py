"""The picture of the sharded layer: every operator and every collective of the graph is in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe
from tests.search.plan_factory import make_plan, make_trials

from shardplan.models.accounting import transfers
from shardplan.models.apply import COLLECTIVES, apply
from shardplan.models.build import build_graph
from shardplan.models.graph import Phase
from shardplan.search.plan import Plan
from shardplan.search.proof import model_of
from shardplan.search.report.block import block_section
from shardplan.search.report.page import page

DEEPSEEK = moe(name="deepseek-v3", architecture="DeepseekV3ForCausalLM", layers=61)
CASES: list[dict[str, Any]] = [
    {"tp": 8},
    {"tp": 8, "sp": True},
    {"tp": 1},
    {"tp": 4, "cp": 2},
    {"tp": 8, "head_tp": 1, "o_tp": 1},
    {"tp": 4, "dp": 8, "ep": 32, "model": DEEPSEEK},
    {"tp": 4, "dp": 4, "ep": 16, "exchange": "alltoall", "model": DEEPSEEK, "mtp": 1},
    {"tp": 4, "pp": 2, "stage_layers": (40, 40)},
]


class _Pictures(HTMLParser):
    """The texts of each picture in order: [first lines, second lines]."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict[str, list[str]]] = []
        self.style = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        style = dict(attrs).get("class") or ""
        if tag == "svg":
            self.found.append({"what": [], "how": [], "move": []})
        if tag == "rect" and style == "move":
            self.found[-1]["move"].append("")
        self.style = style if tag == "text" else ""

    def handle_data(self, data: str) -> None:
        if self.style in ("what", "how"):
            self.found[-1][self.style].append(data)


def _graphs(plan: Plan) -> Any:
    phases: tuple[Phase, ...] = ("prefill", "decode")
    spec, way = model_of(plan), plan.strategy
    return [apply(build_graph(spec, p, mtp=bool(way.mtp)), way.parallelism()) for p in phases]


def _size(text: str) -> float:
    value, unit = text.split()
    power = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30}[unit]
    return float(value.replace(",", "")) * 2.0**power


@pytest.mark.parametrize("way", CASES)
def test_every_collective_of_the_graph_is_drawn(way: dict[str, Any]) -> None:
    """With its kind, its ranks and its bytes, in computing order, in both phases."""
    plan = emit_plan(**way)
    pictures = iter(_Pictures(block_section(plan)).found)
    graphs = _graphs(plan)
    strategy, work = plan.strategy, plan.request.workload
    sizes = [
        {"B": strategy.dp, "T": strategy.chunk, "S": strategy.chunk},
        {
            "B": strategy.dp * strategy.batch,
            "T": strategy.mtp + 1,
            "S": work.input_len + work.output_len,
        },
    ]
    for template in dict.fromkeys(graphs[0].model.layers):
        for graph, free in zip(graphs, sizes, strict=True):
            picture, block = next(pictures), graph.blocks[template]
            nodes = list(block.ops())
            assert len(picture["what"]) == len(picture["how"]) == len(nodes)
            moves = [node for node in nodes if node.kind in COLLECTIVES]
            assert len(picture["move"]) == len(moves)
            rows = {node.name: row for row, node in enumerate(nodes)}
            for node, one in zip(moves, transfers(graph, block), strict=True):
                what, how = (picture[key][rows[node.name]] for key in ("what", "how"))
                kind, _, moved = what.partition(" ")
                assert kind == one.kind
                expected = one.elements.at(free) * one.element_bytes
                assert _size(moved) == pytest.approx(expected, rel=0.06)
                assert how.startswith(f"{one.ranks:,} of {' '.join(one.axes)} ")
    assert next(pictures, None) is None


def test_each_operator_says_how_it_is_split() -> None:
    """Megatron's split in words: heads, then a partial sum that one collective makes whole."""
    picture = _Pictures(block_section(emit_plan(tp=8))).found[0]
    lines = dict(zip(picture["what"], picture["how"], strict=True))
    assert lines["q matmul [B T K G D]"] == "K/8 tp0"
    assert lines["o matmul [B T H]"] == "sum/8 tp0"
    assert lines["norm1 rmsnorm [B T H]"] == "whole on every rank"
    # 4096 tokens x 8192 x 2 bytes
    assert lines["all_reduce 64.0 MiB"] == "8 of tp0 \N{RIGHTWARDS ARROW} whole on every rank"


def test_lines_join_what_is_read_further_down() -> None:
    """Every reader of a row that is not the next has an arrow; no line leaves the picture."""
    plan = emit_plan(tp=4, dp=8, ep=32, model=DEEPSEEK)
    text = block_section(plan)
    far = 0
    for template in ("dense", "moe"):
        for graph in _graphs(plan):
            rows = {node.name: i for i, node in enumerate(graph.blocks[template].ops())}
            for node in graph.blocks[template].ops():
                far += sum(rows[one] < rows[node.name] - 1 for one in dict.fromkeys(node.inputs))
    assert text.count('class="tip"') == far
    across = [float(x) for x in re.findall(r'class="flow" x1="([\d.]+)%"', text)]
    assert min(across) > 0
    assert max(across) <= 50


def test_each_pool_has_its_own_strategy() -> None:
    """Prefill on tp 8, decode on tp 2."""
    plan = emit_plan(tp=2)
    pool = {
        "role": "prefill",
        "cluster": plan.cluster,
        "instances": 1,
        "strategy": plan.strategy.model_copy(update={"tp": 8}),
    }
    split = plan.model_copy(update={"pools": (type("Pool", (), pool)(),)})
    prefill, decode = _Pictures(block_section(split)).found
    assert "K/8 tp0" in prefill["how"]
    assert "K/2 tp0" in decode["how"]


def test_a_plan_whose_model_is_not_at_hand_has_no_picture() -> None:
    """The rest of the page stands."""
    text = page(make_plan(), make_trials(50))
    assert "One layer" not in text
    assert "Where the time goes" in text


def test_the_page_holds_the_picture() -> None:
    """Between the times and how sure they are."""
    text = page(emit_plan(tp=8), make_trials(50))
    assert text.index("Where the time goes") < text.index("One layer, as each rank runs it")
