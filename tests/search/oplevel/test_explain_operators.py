"""Why a plan of operators: other splits are priced, other questions searched, by the same code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.search.onnx_files import mlp as mlp_file
from tests.search.oplevel.graphs import Sizes, decoder, megatron, mlp
from tests.search.test_cli_bad_input import refused

from shardplan.models.errors import InputError
from shardplan.models.opfold import unfolded
from shardplan.models.parallel import Mesh
from shardplan.search.main import run
from shardplan.search.oplevel.against import BASELINES
from shardplan.search.oplevel.api import price_operators, search_operators
from shardplan.search.oplevel.explain import explain_operators
from shardplan.search.oplevel.known import megatron_splits

CLUSTER = "atlas-800t-a2"
SMALL = Sizes(tokens=2048, hidden=2048, heads=16, kv_heads=16, ffn=8192, vocab=32000, layers=4)


def test_each_change_is_an_exact_answer() -> None:
    """None is faster that asks for no more; Megatron's is as it is priced elsewhere."""
    graph = decoder(SMALL)
    plan = search_operators(graph, CLUSTER, (8,))
    found = explain_operators(plan, graph)
    rows = {one.change: one for one in found.changes}
    ours = rows["products by columns and rows over x"]
    known = price_operators(graph, CLUSTER, (8,), megatron(graph, "x"))
    assert ours.total_s == pytest.approx(known.total_s)
    assert ours.ratio == pytest.approx(known.total_s / plan.total_s)
    whole = rows["no operator is split"].total_s
    assert whole == price_operators(graph, CLUSTER, (8,), {}).total_s
    for name, one in rows.items():
        assert one.total_s is not None
        assert (one.total_s <= plan.total_s) is ("faster" in name)
    assert "every matmul whole" in rows
    assert sum(row.total_s for row in found.costs) == pytest.approx(plan.total_s)
    assert explain_operators(plan, graph, shadows=False).changes == ()


def test_what_does_not_fit_says_so() -> None:
    """A split that is known by how much, a search in the solver's words."""
    graph = mlp(64, 4096, 16384)
    plan = search_operators(graph, CLUSTER, (8,), memory_bytes=60e6)
    rows = {one.change: one for one in explain_operators(plan, graph).changes}
    assert "MiB more than a rank has" in rows["no operator is split"].note
    assert rows["every matmul whole"].total_s is None
    assert "least that any split needs" in rows["every matmul whole"].note
    rival = explain_operators(plan, graph, shadows=False, against="replicated").rival
    assert rival is not None
    assert (rival.fits, rival.capacity_bytes) == (False, 60e6)


def test_another_graph_is_refused() -> None:
    """As by the proof."""
    plan = search_operators(mlp(64, 512, 1024), CLUSTER, (8,))
    with pytest.raises(InputError, match="the graph that it was made of"):
        explain_operators(plan, mlp(64, 512, 2048))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints changes; a rival is one of deployments."""
    pytest.importorskip("onnx")
    model = str(mlp_file(tmp_path / "mlp.onnx"))
    out = str(tmp_path / "out")
    asked = ["search", "--model", model, "--cluster", CLUSTER, "--mesh", "4", "--out", out]
    assert run(asked) == 0
    capsys.readouterr()
    assert run(["explain", f"{out}/plan.json"]) == 0
    assert "no operator is split" in capsys.readouterr().out
    why = ["explain", f"{out}/plan.json", "--no-shadows", "--against"]
    assert run([*why, "megatron"]) == 0
    told = capsys.readouterr().out
    for words in ("against megatron: products by columns and rows over x", "time matmul"):
        assert words in told
    assert run([*why, f"{out}/plan.json", "--json"]) == 0
    same = json.loads(capsys.readouterr().out)["rival"]
    assert (same["ratio"], same["differences"]) == (1.0, [])
    refused([*why, "tp=2"], capsys, "megatron, replicated or another such plan.json", "tp=2")
    (tmp_path / "plan.json").write_text("{}")
    refused([*why, str(tmp_path / "plan.json")], capsys, "follows its schema")


def test_a_rival_says_where_each_millisecond_and_byte_goes() -> None:
    """Differences add up: of time to that of the run, of memory to that of the fullest rank."""
    graph = decoder(SMALL)
    plan = search_operators(graph, CLUSTER, (8,))
    for name in BASELINES:
        rival = explain_operators(plan, graph, shadows=False, against=name).rival
        assert rival is not None
        assert rival.total_s >= plan.total_s
        assert rival.ratio == pytest.approx(rival.total_s / plan.total_s)
        for what, whole in (
            ("time", rival.total_s - plan.total_s),
            ("memory", rival.memory_bytes - max(one.total_bytes for one in plan.stages)),
        ):
            rows = [one.more for one in rival.differences if one.what.startswith(what)]
            assert sum(rows) == pytest.approx(whole, rel=1e-6, abs=1e-12)
            assert rows == sorted(rows, key=lambda more: -abs(more))
    alone = explain_operators(plan, graph, shadows=False, against="replicated").rival
    assert alone is not None
    assert alone.total_s == price_operators(graph, CLUSTER, (8,), {}).total_s
    moves = {one.what: one.rival for one in alone.differences}
    assert all(spent == 0.0 for what, spent in moves.items() if what.endswith("all_reduce"))


def test_another_plan_of_the_graph_is_a_rival(tmp_path: Path) -> None:
    """Of another mesh, as its file has it; one of another graph is refused."""
    graph = decoder(SMALL)
    plan = search_operators(graph, CLUSTER, (8,))
    other = search_operators(graph, CLUSTER, (2, 2))
    other.save(tmp_path / "other.json")
    rival = explain_operators(
        plan, graph, shadows=False, against=str(tmp_path / "other.json")
    ).rival
    assert rival is not None
    assert (rival.mesh, rival.name) == ({"x": 2, "y": 2}, "other.json")
    assert rival.total_s == pytest.approx(other.total_s)
    search_operators(mlp(64, 512, 1024), CLUSTER, (8,)).save(tmp_path / "mlp.json")
    with pytest.raises(InputError, match="of the same graph"):
        explain_operators(plan, graph, shadows=False, against=str(tmp_path / "mlp.json"))


def test_megatron_splits_sequences_over_the_first_of_two_axes() -> None:
    """Where the inputs divide; else the last axis alone is split."""
    mesh = Mesh(("x", "y"), (2, 4), {})
    (how, split), *_ = megatron_splits(unfolded(decoder(replace(SMALL, batch=2))), mesh)
    assert how == "products by columns and rows over y, sequences over x"
    assert {axis for chosen in split.values() for axis in chosen} == {"x", "y"}
    (how, split), *_ = megatron_splits(unfolded(decoder(SMALL)), mesh)
    assert how == "products by columns and rows over y"
    assert {axis for chosen in split.values() for axis in chosen} == {"y"}
