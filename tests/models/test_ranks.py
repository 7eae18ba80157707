"""Numbering of ranks: against all rank ids, laid out as an array of the axes in their order."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.strategies import tiny, tiny_mla, tiny_moe

from shardplan.models.accounting import predict_communication, stage_weights, transfers
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.errors import LayoutError
from shardplan.models.parallel import AXES, Axis, Mesh, Parallelism, make_mesh
from shardplan.models.ranks import axis_stride, extents
from shardplan.models.spec import ModelSpec

ORDERS = tuple(permutations(AXES))
WIDE = tiny_moe(experts=8)


def members(mesh: Mesh, par: Parallelism, axes: tuple[str, ...]) -> list[int]:
    """Ids of the ranks that differ from rank 0 on `axes` alone, by counting all ranks."""
    parts: dict[str, list[str]] = {axis: [axis] if axis == "pp" else [] for axis in AXES}
    for name in mesh.axes:
        parts[name.rstrip("0123456789")].append(name)
    size = dict(zip(mesh.axes, mesh.shape, strict=True)) | {"pp": par.pp}
    names = [name for axis in par.order for name in parts[axis]]
    ids = np.arange(par.ranks).reshape([size[name] for name in names])
    chosen = tuple(slice(None) if name in axes else 0 for name in names)
    return sorted(np.ravel(ids[chosen]).tolist())


def sums(lies: tuple[tuple[int, int], ...]) -> list[int]:
    return sorted(sum(one) for one in product(*(range(0, n * s, s) for n, s in lies)))


@given(
    order=st.sampled_from(ORDERS),
    sizes=st.tuples(*(st.sampled_from([1, 2, 4]) for _ in range(3))),
    ep=st.sampled_from([1, 2, 4, 8]),
    chosen=st.sets(st.sampled_from(["dp0", "dp1", "tp0", "tp1", "tp2"]), min_size=1),
)
def test_a_group_lies_where_counting_all_ranks_puts_it(
    order: tuple[Axis, ...], sizes: tuple[int, int, int], ep: int, chosen: set[str]
) -> None:
    par = Parallelism(tp=sizes[0], pp=sizes[1], dp=sizes[2], ep=ep, order=order)
    try:
        mesh = make_mesh(WIDE, par)
    except LayoutError:
        return
    axes = tuple(one for one in mesh.axes if one in chosen)
    lies = extents(mesh, par, axes)
    assert sums(lies) == members(mesh, par, axes)
    assert math.prod(size for size, _ in lies) == mesh.size(axes)
    assert sums(extents(mesh, par, ("pp",))) == members(mesh, par, ("pp",))


def test_by_default_stages_are_apart_and_tensor_parallel_ranks_side_by_side() -> None:
    par = Parallelism(tp=2, pp=2, dp=4, ep=8)
    mesh = make_mesh(WIDE, par)
    assert extents(mesh, par, mesh.groups["tp"]) == ((2, 1),)
    assert extents(mesh, par, mesh.groups["ep"]) == ((8, 1),)
    assert extents(mesh, par, ("pp",)) == ((2, 8),)
    assert [axis_stride(par, axis) for axis in AXES] == [8, 2, 2, 1]


def test_experts_over_two_axes_with_stages_between_are_no_longer_evenly_spaced() -> None:
    par = Parallelism(tp=2, pp=2, dp=4, ep=8, order=("dp", "pp", "cp", "tp"))
    mesh = make_mesh(WIDE, par)
    assert extents(mesh, par, mesh.groups["ep"]) == ((4, 4), (2, 1))


@pytest.mark.parametrize("spec", [tiny(), tiny_moe(), tiny_mla()], ids=["gqa", "moe", "mla"])
def test_an_order_moves_groups_and_nothing_else(spec: ModelSpec) -> None:
    """The same applied blocks, weights of a stage and collectives; only `lies` differs."""
    base = Parallelism(tp=2, pp=2, dp=2, ep=4 if spec.moe else 1)
    graph = apply(build_graph(spec, "decode"), base)
    for order in ORDERS[1:]:
        other = apply(
            build_graph(spec, "decode"),
            Parallelism(tp=2, pp=2, dp=2, ep=base.ep, order=order),
        )
        assert other.blocks is graph.blocks
        assert predict_communication(other, 8, 1, 4) == predict_communication(graph, 8, 1, 4)
        for one, two in zip(other.stages, graph.stages, strict=True):
            assert list(stage_weights(other, one)) == list(stage_weights(graph, two))
        kinds = [one.kind for name in other.blocks for one in transfers(other, other.blocks[name])]
        assert kinds == [
            one.kind for name in graph.blocks for one in transfers(graph, graph.blocks[name])
        ]


def test_an_order_names_every_axis_once() -> None:
    with pytest.raises(LayoutError, match="order names every axis once"):
        make_mesh(tiny(), Parallelism(order=("tp", "pp", "dp", "dp")))
