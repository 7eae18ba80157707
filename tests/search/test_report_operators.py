"""report.html of a plan of operators: what it shows is the plan, and a browser draws it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.search.browser import Browser, chromium, open_browser
from tests.search.oplevel.graphs import Sizes, decoder, mlp
from tests.search.test_report import HOSTILE, _Reader

from shardplan.costmodel.catalog import load_cluster
from shardplan.models.opgraph import OpGraph
from shardplan.search.oplevel.against import BASELINES, OperatorRival, baseline
from shardplan.search.oplevel.api import search_operators
from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.oplevel.proof import prove_operators
from shardplan.search.report.operator_layer import MOST_ROWS, layer_section
from shardplan.search.report.operators import operators_page, write_operator_report
from shardplan.search.report.words import milliseconds, time

CLUSTER = "atlas-800t-a2"
SIZES = Sizes(tokens=2048, hidden=2048, heads=16, kv_heads=16, ffn=8192, vocab=32000, layers=4)
PROGRAM = chromium()


@functools.cache
def _graph(kind: str) -> OpGraph:
    return {
        "decoder": decoder(SIZES),
        "experts": decoder(replace(SIZES, batch=2, experts=8)),
        "mlp": mlp(64, 4096, 16384),
    }[kind]


@functools.cache
def _plan(kind: str) -> OperatorPlan:
    stages = 2 if kind == "decoder" else 1
    mesh = (2, 2) if kind == "experts" else (4,)
    graph = _graph(kind)
    plan = search_operators(graph, CLUSTER, mesh, stages=stages)
    return plan.model_copy(update={"proof": prove_operators(plan, graph)})


@functools.cache
def _rivals(kind: str) -> tuple[OperatorRival, ...]:
    cluster = load_cluster(CLUSTER)
    return tuple(baseline(_plan(kind), _graph(kind), name, cluster) for name in BASELINES)


@functools.cache
def _page(kind: str) -> str:
    return operators_page(_plan(kind), _graph(kind), _rivals(kind))


@pytest.mark.parametrize("kind", ["decoder", "experts", "mlp"])
def test_the_page_says_what_the_plan_says(kind: str) -> None:
    """Times, memory of each stage, every kind, every move, the proof; every element closed."""
    plan, reader = _plan(kind), _Reader(_page(kind))
    assert reader.open == []
    assert "proven fastest in its space" in reader.text
    for words in (
        time(plan.total_s),
        *(row.kind for row in plan.costs),
        *(milliseconds(row.total_s) for row in plan.costs),
        *(row.tensor for row in plan.moves),
        *(plan.proof.checks if plan.proof else ()),
        *(f"Stage {row.stage}, {row.layers}" for row in plan.stages if len(plan.stages) > 1),
        plan.digest,
    ):
        assert words in reader.text
    for rival in _rivals(kind):
        assert rival.how in reader.text
        assert time(rival.total_s) in reader.text
    sections = {one["id"] for name, one in reader.elements if one.get("class") == "part"}
    assert {"summary", "certificate", "rivals", "time", "memory", "layer", "proof"} <= sections


@pytest.mark.parametrize("kind", ["decoder", "experts", "mlp"])
def test_the_picture_has_each_operator_of_a_layer_and_the_moves_between(kind: str) -> None:
    """Once each, in order; shapes with what cuts them."""
    plan, graph = _plan(kind), _graph(kind)
    section = layer_section(plan, graph)
    drawn = [one.split() for one in re.findall(r'class="what"[^>]*>([^<]*)<', section)]
    own = [op for op in graph.operators if op.layer >= 0]
    order = [op.name for op in (*own, *(op for op in graph.operators if op.layer < 0))]
    operators = [one[0].partition("@")[0] for one in drawn if one[-1] not in ("before", "input")]
    assert [name for name in operators if name in order] == order
    kinds = [one[0] for one in drawn]
    for move in {row.kind for row in plan.moves if row.tensor not in plan.inputs}:
        assert move in kinds
    assert "/4 x" in section or "/2 x" in section


def test_a_long_graph_is_cut_off_and_says_so() -> None:
    """The rest is in the table."""
    graph = _graph("mlp")
    last = graph.operators[-1]
    more = [
        replace(last, name=f"more{place}", writes=(replace(last.writes[0], tensor=f"t{place}"),))
        for place in range(MOST_ROWS)
    ]
    like = graph.tensors[last.writes[0].tensor]
    tensors = {f"t{place}": replace(like, name=f"t{place}") for place in range(MOST_ROWS)}
    long = replace(graph, operators=(*graph.operators, *more), tensors={**graph.tensors, **tensors})
    plan = search_operators(long, CLUSTER, (2,))
    section = layer_section(plan, long)
    assert section.count('class="what"') == MOST_ROWS
    assert "more rows are in operators.csv" in section


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """Of the graph, its operators, the machine; the same bytes twice."""
    graph = _graph("mlp")
    named = replace(
        graph,
        name=HOSTILE,
        source=HOSTILE,
        operators=tuple(
            replace(op, name=HOSTILE + op.name, where=HOSTILE, kind=op.kind)
            for op in graph.operators
        ),
    )
    plan = search_operators(named, CLUSTER, (4,))
    machine = plan.cluster.model_copy(update={"title": HOSTILE, "name": HOSTILE})
    plan = plan.model_copy(update={"cluster": machine, "notes": (HOSTILE,)})
    rival = _rivals("mlp")[0].model_copy(update={"name": HOSTILE, "how": HOSTILE})
    write_operator_report(plan, named, [rival], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = _Reader(text)
    assert reader.open == []
    assert not {"script", "img"} & {name for name, _ in reader.elements}
    assert reader.text.count("<script>alert('x')</script>") > 5
    assert text == operators_page(plan, named, [rival])


def test_without_rivals_a_file_or_a_proof_their_sections_are_left_out() -> None:
    """And what fits nowhere says so."""
    plan = _plan("mlp").model_copy(update={"proof": None, "fits": False})
    reader = _Reader(operators_page(plan, _graph("mlp"), []))
    sections = {one["id"] for name, one in reader.elements if one.get("class") == "part"}
    assert not {"rivals", "proof", "next"} & sections
    assert "does not fit" in reader.text
    file = plan.model_copy(update={"source": "a b.onnx"})
    told = _Reader(operators_page(file, _graph("mlp"), [])).text
    assert "shardplan emit plan.json --target onnx" in told
    assert "shardplan search --model 'a b.onnx' --operators --cluster atlas-800t-a2" in told
    assert "--mesh x=4" in told


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all pages."""
    if PROGRAM is None:
        pytest.skip("needs Chromium on the path")
    with open_browser(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["decoder", "experts", "mlp"])
def test_a_browser_draws_it_and_complains_of_nothing(
    browser: Browser, tmp_path: Path, kind: str, width: int, dark: bool
) -> None:
    """Nothing fetched or wider than the screen, tables headed, pictures named, no dead link."""
    (tmp_path / "report.html").write_text(_page(kind), encoding="utf-8")
    browser.open(tmp_path / "report.html", width=width, dark=dark)
    assert browser.complaints() == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    boxes = browser.run(
        "[...document.querySelectorAll('section')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(boxes) > 7
    assert min(boxes) > 40
    paint = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", paint)[0]) < 64) == dark
    unnamed = [one for one in browser.tree() if one["role"] in ("image", "img") and not one["name"]]
    assert unnamed == []
    bare = browser.run(
        "[...document.querySelectorAll('table')].filter(t => !t.caption || "
        "[...t.querySelectorAll('tbody tr')].some(r => !r.querySelector('th[scope=row]'))).length"
    )
    dead = browser.run(
        "[...document.querySelectorAll('nav a')].filter("
        "a => !document.querySelector(a.getAttribute('href'))).length"
    )
    assert (bare, dead) == (0, 0)


@pytest.mark.slow
def test_it_prints(browser: Browser, tmp_path: Path) -> None:
    """On A4 nothing is cut off, on white."""
    (tmp_path / "report.html").write_text(_page("decoder"), encoding="utf-8")
    browser.open(tmp_path / "report.html", width=688, dark=True)
    browser.ask("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.run("document.documentElement.scrollWidth") <= 688
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(255, 255, 255)"
        assert len(browser.ask("Page.printToPDF")["data"]) > 50_000
    finally:
        browser.ask("Emulation.setEmulatedMedia", media="")
