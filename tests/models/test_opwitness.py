"""The numeric proof of captured graphs: what is laid rightly passes, what is not is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from tests.search.oplevel.graphs import MIXTRAL, Sizes, both, data_parallel, decoder, megatron, mlp

from shardplan.models.errors import ProofError
from shardplan.models.opgraph import OpGraph
from shardplan.models.opshard import Key, Move, Placed, Program, place
from shardplan.models.opwitness import witness
from shardplan.models.parallel import Mesh
from shardplan.models.verify import TOLERANCE

SMALL = Sizes(tokens=64, hidden=256, heads=8, kv_heads=8, dim=32, ffn=512, vocab=1024, layers=3)
TWO = Mesh(("x", "y"), (2, 4), {})
ONE = Mesh(("x",), (4,), {})
MLP: Mapping[str, Mapping[str, str]] = {
    "up": {"x": "n"}, "act": {"x": "n"}, "down": {"x": "k"}, "out": {},
}  # fmt: skip


def laid(graph: OpGraph, strategy: Mapping[str, Mapping[str, str]], mesh: Mesh) -> Program:
    """A program whose operators that are not named follow what they read."""
    return place(graph, strategy, mesh)


@pytest.mark.parametrize("sizes", [SMALL, replace(SMALL, batch=4, tokens=1, cached=32), MIXTRAL])
def test_what_is_laid_rightly_computes_the_same(sizes: Sizes) -> None:
    """Every result of every layer, on two axes."""
    graph = decoder(replace(sizes, layers=2, batch=4), folded=False)
    strategy = both(data_parallel(graph, "x"), megatron(graph, "y"))
    program = laid(graph, strategy, TWO)
    found = witness(program)
    assert found.error <= TOLERANCE, found
    assert found.compared >= len(graph.operators)
    assert found.moves == sum(isinstance(one, Move) for one in program.steps) > 0


def test_the_same_seed_finds_the_same() -> None:
    """And another one is no less right."""
    program = laid(mlp(64, 256, 512), MLP, ONE)
    assert witness(program) == witness(program)
    assert witness(program, seed=5).error <= TOLERANCE


def _steps(program: Program, change: Callable[[Move | Placed], Move | Placed | None]) -> Program:
    made = (change(one) for one in program.steps)
    return replace(program, steps=tuple(one for one in made if one is not None))


def _as_if(key: Key) -> Callable[[Move | Placed], Move | Placed]:
    """The all-reduce left out: what lies partial is taken for the sum."""

    def change(step: Move | Placed) -> Move | Placed:
        if isinstance(step, Placed) and step.op.name == "down":
            return replace(step, writes=(key,))
        return step

    return change


def test_a_collective_that_is_left_out_is_seen() -> None:
    """Taken for whole, or not there at all."""
    program = laid(mlp(64, 256, 512), MLP, ONE)
    summed = [one for one in program.steps if isinstance(one, Move)]
    assert [one.kind for one in summed] == ["all_reduce"]
    lost = _steps(program, lambda one: None if isinstance(one, Move) else one)
    with pytest.raises(ProofError, match="lies there as it is read"):
        witness(lost)
    assert witness(_steps(lost, _as_if(()))).error > 1e-3


def test_a_sum_counted_twice_is_seen() -> None:
    """The sum is taken for partial and reduced again."""
    program = laid(mlp(64, 256, 512), MLP, ONE)
    steps: list[Move | Placed] = []
    for one in program.steps:
        steps.append(one)
        if isinstance(one, Move):
            partial: Key = (("x", "+"),)
            steps.append(replace(one, before=(), after=partial, kind="slice", axes=()))
            steps.append(replace(one, before=partial, after=()))
    assert witness(replace(program, steps=tuple(steps))).error > 1e-3


def test_a_collective_over_another_axis_is_seen() -> None:
    """On a mesh of two axes, one of which holds copies."""
    graph = mlp(64, 256, 512)
    program = laid(graph, {**MLP, "out": {}}, TWO)
    wrong = _steps(program, lambda one: replace(one, axes=("y",)) if isinstance(one, Move) else one)
    assert witness(program).error <= TOLERANCE
    assert witness(wrong).error > 1e-3


@pytest.mark.parametrize("loop", ["k", "t"])
def test_an_operator_split_otherwise_than_it_says_is_seen(loop: str) -> None:
    """Its tensors lie as one loop would have them, it computes another."""
    program = laid(mlp(64, 256, 512), MLP, ONE)

    def change(step: Move | Placed) -> Move | Placed:
        if isinstance(step, Placed) and step.op.name == "up":
            return replace(step, chosen={"x": loop})
        return step

    try:
        error = witness(_steps(program, change)).error
    except ProofError:
        return
    assert error > 1e-3


def test_a_partial_sum_through_what_is_not_linear_is_seen() -> None:
    """An activation of parts of a sum is not the activation of the sum."""
    graph = mlp(64, 256, 512)
    strategy = {"up": {"x": "k"}, "act": {}, "down": {}, "out": {}}
    program = laid(graph, strategy, ONE)
    assert witness(program).error <= TOLERANCE
    partial: Key = (("x", "+"),)
    (summed,) = (one for one in program.steps if isinstance(one, Move) and one.tensor == "up")
    steps: list[Move | Placed] = []
    for one in program.steps:
        if isinstance(one, Placed) and one.op.name == "act":
            steps.append(replace(one, reads=(partial,), writes=(partial,)))
            steps.append(replace(summed, tensor="act"))
        elif one is not summed:
            steps.append(one)
    assert witness(replace(program, steps=tuple(steps))).error > 1e-3


@pytest.mark.parametrize("linear", [(0,), (0, 2)])
def test_a_bias_that_every_rank_adds_is_seen(linear: tuple[int, ...]) -> None:
    """A read that does not run over the contracted loop is counted once a rank."""
    graph = mlp(64, 256, 512)
    down = next(one for one in graph.operators if one.name == "down")
    biased = replace(down, reads=(*down.reads, replace(down.writes[0], tensor="x")), linear=linear)
    wrong = replace(graph, operators=tuple(biased if o is down else o for o in graph.operators))
    assert witness(laid(wrong, {**MLP, "down": {}}, ONE)).error <= TOLERANCE
    split = laid(graph, MLP, ONE)

    def change(step: Move | Placed) -> Move | Placed:
        if isinstance(step, Placed) and step.op.name == "down":
            return replace(step, op=biased, reads=(*step.reads, ()))
        return step

    assert witness(replace(_steps(split, change), graph=wrong)).error > 1e-3


def test_a_mesh_too_large_for_numbers_is_refused() -> None:
    """Before memory is asked for."""
    graph = mlp(2**14, 2**14, 2**15)
    huge = Mesh(("x", "y"), (2**12, 2**12), {})
    strategy = {"up": {"x": "t", "y": "n"}, "act": {"x": "t", "y": "n"}, "down": {}, "out": {}}
    with pytest.raises(ProofError, match="--level 0"):
        witness(laid(graph, strategy, huge))
