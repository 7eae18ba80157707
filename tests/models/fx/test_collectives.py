"""Moves as nodes of an FX graph: from every layout to every other, against plain cutting."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from shardplan.models.errors import ProofError
from shardplan.models.lockstep import Communication
from shardplan.models.opshard import Key, Move, route
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL

torch = pytest.importorskip("torch")

from shardplan.models.fx.collectives import Builder, axes_of, bind, group_name  # noqa: E402
from shardplan.models.fx.lockstep import groups_of_axes, run_in_step  # noqa: E402
from shardplan.models.fx.modules import cut  # noqa: E402

_MESH = Mesh(("a", "b"), (2, 3), {})
_SHAPE = (6, 12, 18)
_STATES: tuple[int | str | None, ...] = (None, 0, 1, 2, PARTIAL)


def _key(layout: dict[str, int | str]) -> Key:
    return tuple((axis, layout[axis]) for axis in _MESH.axes if axis in layout)


def _layouts() -> list[dict[str, int | str]]:
    found = []
    for states in itertools.product(_STATES, repeat=2):
        pairs = zip(_MESH.axes, states, strict=True)
        found.append({axis: state for axis, state in pairs if state is not None})
    return found


def _moved(
    have: dict[str, int | str], want: dict[str, int | str], log: list[Communication]
) -> tuple[list[Any], Any]:
    """(what each rank gets, the whole tensor)."""
    graph = torch.fx.Graph()
    value, rank = graph.placeholder("x"), graph.placeholder("rank")
    build = Builder(graph, _MESH, lambda: rank)
    before = have
    for kind, axes, after in route(have, want, _MESH):
        move = Move(tensor="x", kind=kind, axes=axes, before=_key(before), after=_key(after))
        value, before = build.move(value, _SHAPE, move), after
    graph.output((value,))
    whole = torch.arange(6 * 12 * 18).reshape(_SHAPE).double()
    given = [cut(whole, _key(have), _MESH, rank) for rank in range(_MESH.ranks)]
    ranks = [torch.tensor(rank) for rank in range(_MESH.ranks)]
    out = run_in_step(graph, _MESH, [given, ranks], {}, log=log)
    return [one[0] for one in out], whole


@pytest.mark.parametrize("have", _layouts(), ids=str)
def test_a_tensor_comes_to_lie_as_wanted(have: dict[str, int | str]) -> None:
    tried = 0
    for want in _layouts():
        if PARTIAL in want.values() and want != have:
            continue
        out, whole = _moved(have, want, [])
        tried += 1
        for rank, value in enumerate(out):
            expected = cut(whole, _key(want), _MESH, rank)
            if PARTIAL not in want.values():
                assert torch.equal(value, expected), (want, rank)
    assert tried >= 16


def test_what_crosses_ranks_is_written_down_in_elements_of_the_full_tensor() -> None:
    log: list[Communication] = []
    _moved({"a": PARTIAL, "b": 1}, {"b": 2}, log)
    size = 6 * 12 * 18
    assert [(one.kind, one.axes, one.ranks, one.elements) for one in log] == [
        ("all_to_all", ("b",), 3, size),
        ("all_reduce", ("a",), 2, size // 3),
    ]


def test_groups_hold_the_ranks_that_differ_on_their_axes_only() -> None:
    assert groups_of_axes(_MESH, ("b",)) == [[0, 1, 2], [3, 4, 5]]
    assert groups_of_axes(_MESH, ("a",)) == [[0, 3], [1, 4], [2, 5]]
    assert axes_of(group_name(("a", "b"))) == ("a", "b")


def test_process_groups_take_the_place_of_names() -> None:
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    build = Builder(graph, _MESH, lambda: value)
    move = Move(tensor="x", kind="all_reduce", axes=("a",), before=(("a", PARTIAL),), after=())
    graph.output(build.move(value, _SHAPE, move))
    bind(graph, {"a": "7"})
    assert [node.args[-1] for node in graph.nodes if "all_reduce" in node.name] == ["7"]


def test_rows_that_a_rank_does_not_expect_are_caught() -> None:
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    exchange = torch.ops._c10d_functional.all_to_all_single.default
    graph.output((graph.call_function(exchange, (value, [1, 1], [2, 0], "a")),))
    mesh = Mesh(("a",), (2,), {})
    with pytest.raises(ProofError, match="expected"):
        run_in_step(graph, mesh, [[torch.ones(2, 3)] * 2], {})
