"""Captured graphs: loops, layouts and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardplan.models.errors import LayoutError
from shardplan.models.opgraph import (
    Access,
    Loop,
    Operator,
    OpGraph,
    Tensor,
    check_graph,
    layouts_of,
)
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL

_MESH = Mesh(("x", "y"), (2, 4), {})


def _tensor(name: str, shape: tuple[int, ...], kind: str) -> Tensor:
    return Tensor(name=name, shape=shape, dtype="float32", kind=kind)


def _linear() -> OpGraph:
    """y[t, n] = x[t, h] w[n, h]"""
    op = Operator(
        name="y",
        kind="matmul",
        reads=(
            Access(tensor="x", loops=("t", "h")),
            Access(tensor="w", loops=("n", "h")),
        ),
        writes=(Access(tensor="y", loops=("t", "n")),),
        loops={"t": Loop(size=8), "h": Loop(size=16), "n": Loop(size=12)},
        linear=(0,),
        flop=2.0 * 8 * 16 * 12,
        layer=0,
    )
    tensors = (
        _tensor("x", (8, 16), "input"),
        _tensor("w", (12, 16), "parameter"),
        _tensor("y", (8, 12), "result"),
    )
    return OpGraph(
        name="linear",
        tensors={one.name: one for one in tensors},
        operators=(op,),
        outputs=("y",),
        layers=1,
    )


def test_a_kept_loop_splits_the_output_and_a_contracted_one_leaves_a_partial_sum() -> None:
    graph = _linear()
    check_graph(graph)
    (op,) = graph.operators
    assert op.contracted == ("h",)
    reads, writes = layouts_of(op, {"x": "n"}, _MESH, graph.tensors)
    assert reads == ({}, {"x": 0})
    assert writes == ({"x": 1},)
    reads, writes = layouts_of(op, {"y": "h", "x": "t"}, _MESH, graph.tensors)
    assert reads == ({"x": 0, "y": 1}, {"y": 1})
    assert writes == ({"x": 0, "y": PARTIAL},)


@pytest.mark.parametrize("chosen", [{"x": "k"}, {"x": "n", "y": "n"}])
def test_a_loop_that_is_unknown_or_does_not_divide_is_refused(chosen: dict[str, str]) -> None:
    graph = _linear()
    with pytest.raises(LayoutError, match="y"):
        layouts_of(graph.operators[0], chosen, _MESH, graph.tensors)


def test_a_folded_layer_counts_as_often_as_it_stands() -> None:
    graph = replace(_linear(), folded={0: 5})
    assert graph.parameters == 5 * 12 * 16
    assert graph.flop == 5 * 2.0 * 8 * 16 * 12


def test_a_graph_that_reads_what_is_not_made_is_refused() -> None:
    graph = _linear()
    broken = replace(graph, outputs=("z",))
    with pytest.raises(LayoutError, match="z"):
        check_graph(broken)
    wrong = replace(graph.operators[0], reads=(Access(tensor="x", loops=("t",)),))
    with pytest.raises(LayoutError, match="every dim"):
        check_graph(replace(graph, operators=(wrong,)))


def test_the_graph_of_operators_says_who_reads_whom() -> None:
    graph = _linear().graph
    assert list(graph.nodes) == ["y"]
    assert graph.number_of_edges() == 0
