"""Strategies laid on captured graphs: what is split, what follows, what moves."""

from __future__ import annotations

import pytest

from shardplan.models.errors import LayoutError
from shardplan.models.opgraph import Access, Loop, Operator, OpGraph, Tensor
from shardplan.models.opshard import Move, Placed, local_shape, place, transfers_of
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL

_MESH = Mesh(("x", "y"), (2, 2), {})
_SIZES = {"t": 8, "h": 16, "n": 12, "m": 16}


def _op(
    name: str, kind: str, reads: dict[str, str], writes: str, linear: tuple[int, ...]
) -> Operator:
    loops = {one: Loop(size=_SIZES[one]) for one in "".join([*reads.values(), writes])}
    return Operator(
        name=name,
        kind=kind,
        reads=tuple(Access(tensor=tensor, loops=tuple(dims)) for tensor, dims in reads.items()),
        writes=(Access(tensor=name, loops=tuple(writes)),),
        loops=loops,
        linear=linear,
    )


def _tensor(name: str, dims: str, kind: str) -> Tensor:
    shape = tuple(_SIZES[one] for one in dims)
    return Tensor(name=name, shape=shape, dtype="float32", kind=kind)


def _network() -> OpGraph:
    """up = x w1^T, act = silu(up), down = act w2^T, out = x + down; w1 is scaled first."""
    operators = (
        _op("scaled", "pointwise", {"w1": "nh", "s": "n"}, "nh", ()),
        _op("up", "matmul", {"x": "th", "scaled": "nh"}, "tn", (0,)),
        _op("act", "pointwise", {"up": "tn"}, "tn", ()),
        _op("down", "matmul", {"act": "tn", "w2": "hn"}, "th", (0,)),
        _op("out", "pointwise", {"x": "th", "down": "th"}, "th", (0, 1)),
    )
    tensors = [
        _tensor("x", "th", "input"),
        _tensor("w1", "nh", "parameter"),
        _tensor("s", "n", "parameter"),
        _tensor("w2", "hn", "parameter"),
        *(_tensor(one.name, "".join(one.writes[0].loops), "result") for one in operators),
    ]
    return OpGraph(
        name="network",
        tensors={one.name: one for one in tensors},
        operators=operators,
        outputs=("out",),
    )


_TP = {"up": {"x": "n"}, "down": {"x": "n"}}


def test_columns_then_rows_leave_one_sum() -> None:
    program = place(_network(), _TP, _MESH)
    assert list(transfers_of(program)) == [("all_reduce", ("x",), 8 * 16)]
    placed = {one.op.name: one for one in program.steps if isinstance(one, Placed)}
    assert placed["act"].chosen == {"x": "n"}, "what is not named follows its input"
    assert placed["down"].writes == ((("x", PARTIAL),),)
    assert placed["out"].chosen == {}


def test_what_comes_from_parameters_alone_is_computed_on_the_part_that_is_read() -> None:
    program = place(_network(), _TP, _MESH)
    assert set(program.held) == {("w1", (("x", 0),)), ("s", (("x", 0),)), ("w2", (("x", 1),))}


def test_a_sum_is_scattered_where_its_reader_is_split() -> None:
    strategy = {**_TP, "out": {"x": "t"}}
    program = place(_network(), strategy, _MESH, outputs={"out": {"x": 0}})
    assert list(transfers_of(program)) == [("reduce_scatter", ("x",), 8 * 16)]
    kinds = [one.kind for one in program.steps if isinstance(one, Move)]
    assert sorted(kinds) == ["reduce_scatter", "slice"]


def test_an_input_given_in_parts_is_gathered_once_for_all_its_readers() -> None:
    program = place(_network(), _TP, _MESH, inputs={"x": {"x": 0}})
    assert list(transfers_of(program)) == [
        ("all_gather", ("x",), 8 * 16),
        ("reduce_scatter", ("x",), 8 * 16),
        ("all_gather", ("x",), 8 * 16),
    ]
    splits = {one.op.name: one.chosen for one in program.steps if isinstance(one, Placed)}
    assert splits["out"] == {"x": "t"}


def test_two_axes_split_two_loops() -> None:
    strategy = {"up": {"x": "n", "y": "t"}, "down": {"x": "n", "y": "t"}}
    program = place(_network(), strategy, _MESH, inputs={"x": {"y": 0}}, outputs={"out": {"y": 0}})
    assert list(transfers_of(program)) == [("all_reduce", ("x",), 4 * 16)]


@pytest.mark.parametrize("strategy", [{"nothing": {"x": "n"}}, {"up": {"x": "k"}}])
def test_a_strategy_that_cannot_be_laid_is_refused(strategy: dict[str, dict[str, str]]) -> None:
    with pytest.raises(LayoutError, match=next(iter(strategy))):
        place(_network(), strategy, _MESH)


def test_a_dim_that_does_not_divide_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"shape=\[7, 4\]"):
        local_shape((7, 4), (("x", 0),), _MESH)
    assert local_shape((8, 4), (("x", 0), ("y", 0)), _MESH) == (2, 4)
