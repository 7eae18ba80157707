"""Folded layers written out, and layers found alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.search.oplevel.graphs import Builder, Sizes, decoder

from shardplan.models.errors import InputError
from shardplan.models.opfold import alike_layers, unfolded
from shardplan.models.opgraph import OpGraph, check_graph

SMALL = Sizes(
    tokens=8, hidden=32, heads=4, kv_heads=2, dim=8, ffn=64, vocab=96, layers=3, cached=16
)


def test_a_folded_decoder_is_written_out_as_its_twin() -> None:
    """The same operators on the same shapes, in a row, with caches and weights of their own."""
    found, twin = unfolded(decoder(SMALL)), decoder(SMALL, folded=False)
    check_graph(found)
    assert found.parameters == twin.parameters == decoder(SMALL).parameters
    assert found.flop == twin.flop
    assert found.layers == 3
    assert [one.kind for one in found.operators] == [one.kind for one in twin.operators]
    assert [one.layer for one in found.operators] == [one.layer for one in twin.operators]
    made = [graph.producers() for graph in (found, twin)]
    places = [{op.name: i for i, op in enumerate(graph.operators)} for graph in (found, twin)]
    for one, other in zip(found.operators, twin.operators, strict=True):
        for a, b in zip(one.inputs, other.inputs, strict=True):
            assert (a in made[0]) == (b in made[1])
            if a in made[0]:
                assert places[0][made[0][a].name] == places[1][made[1][b].name]
    grown = [name for name in found.outputs if "grown" in name]
    assert len(grown) == len(set(grown)) == 6


def test_a_graph_without_folded_layers_is_itself() -> None:
    graph = decoder(SMALL, folded=False)
    assert unfolded(graph) is graph


def test_layers_are_alike_by_what_they_do() -> None:
    graph = decoder(SMALL, folded=False)
    assert alike_layers(graph) == {0: 0, 1: 0, 2: 0}
    odd = next(i for i, one in enumerate(graph.operators) if one.name == "1.down")
    operators = list(graph.operators)
    operators[odd] = replace(operators[odd], linear=())
    assert alike_layers(replace(graph, operators=tuple(operators))) == {0: 0, 1: 1, 2: 0}


def test_a_layer_that_hands_on_more_than_one_tensor_of_a_shape_is_refused() -> None:
    """Which of a and b the next copy reads in the place of x cannot be told."""
    b = Builder()
    x, y = (b.tensor(name, (4, 8), "input", "bfloat16") for name in "xy")
    b.layer = 0
    one = b.add("a", x, y)
    other = b.like("b", "pointwise", [x, one])
    b.layer = -1
    graph: OpGraph = b.graph("two", (b.add("out", one, other),), folded=3)
    with pytest.raises(InputError, match="hands on one tensor"):
        unfolded(graph)
