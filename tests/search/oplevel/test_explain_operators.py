"""Why a plan of operators: other splits are priced, other questions searched, by the same code."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.search.onnx_files import mlp as mlp_file
from tests.search.oplevel.graphs import Sizes, decoder, megatron, mlp
from tests.search.test_cli_bad_input import refused

from shardplan.models.errors import InputError
from shardplan.search.main import run
from shardplan.search.oplevel.api import price_operators, search_operators
from shardplan.search.oplevel.explain import explain_operators

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
    refused(["explain", f"{out}/plan.json", "--against", "tp=2"], capsys, "names a deployment")
