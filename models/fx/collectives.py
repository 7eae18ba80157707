"""Moves between layouts as nodes of an FX graph.

    all_reduce       y = sum over the group
    all_gather       blocks of the group's ranks, joined along the dim that they split
    reduce_scatter   the sum, of which each rank keeps its block
    all_to_all       each axis leaves the dim that it splits and splits another
    slice            each rank keeps its block; nothing crosses ranks

The collectives are `torch.ops._c10d_functional`, which work on dim 0, so other dims pass through a
permutation. A group is named after the axes that it joins, "dp0.tp0"; `bind` puts the names of
real process groups in their place. Ranks of a group are numbered major to minor, as the blocks of
a dim are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardplan.models.fx.torch_lib import aten, functional
from shardplan.models.opshard import Key, Move, local_shape
from shardplan.models.parallel import Mesh

__all__ = ["GROUP_ARGUMENT", "Builder", "axes_of", "bind", "group_name"]

GROUP_ARGUMENT = {
    "all_reduce": 2,
    "all_gather_into_tensor": 2,
    "reduce_scatter_tensor": 3,
    "all_to_all_single": 3,
}
"""Position of the group's name among the arguments of a functional collective."""


def group_name(axes: Sequence[str]) -> str:
    """What a group over these axes is called in a graph."""
    return ".".join(axes)


def axes_of(name: str) -> tuple[str, ...]:
    """Axes of a group by its name."""
    return tuple(name.split("."))


def collective_of(node: Any) -> str:
    """Name of the functional collective that a node calls, "" for other nodes."""
    name = getattr(node.target, "_opname", "") if node.op == "call_function" else ""
    space = getattr(node.target, "namespace", "")
    return name if space == "_c10d_functional" and name in GROUP_ARGUMENT else ""


def bind(graph: Any, names: Mapping[str, str]) -> None:
    """Name real process groups in a graph: {group as named here: name of the process group}."""
    for node in graph.nodes:
        kind = collective_of(node)
        if kind:
            place = GROUP_ARGUMENT[kind]
            node.update_arg(place, names[node.args[place]])


class Builder:
    """Adds nodes to an FX graph; knows the rank's place on each axis from the input `rank`."""

    def __init__(self, graph: Any, mesh: Mesh, rank: Callable[[], Any]) -> None:
        self.graph, self.mesh, self._rank = graph, mesh, rank
        self._places: dict[tuple[str, ...], Any] = {}
        self.meta: dict[str, Any] = {}
        """What is noted on each new node."""

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A node that calls a function."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.meta)
        return node

    def place(self, axes: tuple[str, ...]) -> Any:
        """The rank's number in the group over some axes, major to minor: a 0-d integer tensor."""
        if axes not in self._places:
            found = None
            for axis in axes:
                own = self._coordinate(axis)
                if found is not None:
                    scaled = self.call(aten().mul.Tensor, found, self.mesh.size((axis,)))
                    own = self.call(aten().add.Tensor, scaled, own)
                found = own
            self._places[axes] = found
        return self._places[axes]

    def _coordinate(self, axis: str) -> Any:
        at = self.mesh.axes.index(axis)
        stride = math.prod(self.mesh.shape[at + 1 :])
        whole = self.call(aten().div.Tensor_mode, self._rank(), stride, rounding_mode="floor")
        return self.call(aten().remainder.Scalar, whole, self.mesh.shape[at])

    def move(self, value: Any, shape: Sequence[int], move: Move) -> Any:
        """The node of a move; `shape` is the whole tensor's."""
        local = local_shape(shape, move.before, self.mesh)
        return getattr(self, move.kind)(value, local, move)

    def all_reduce(self, value: Any, local: Sequence[int], move: Move) -> Any:
        """The sum over the group."""
        return self.crossed("all_reduce", value, "sum", group_name(move.axes))

    def all_gather(self, value: Any, local: Sequence[int], move: Move) -> Any:
        """Blocks of all ranks, joined along the dim that the axes split."""
        dim, ranks = _one_dim(move.before, move.axes), self.mesh.size(move.axes)
        whole = self.crossed(
            "all_gather_into_tensor", self.packed(value), ranks, group_name(move.axes)
        )
        return whole if dim == 0 else self.joined(whole, local, [ranks], [dim])

    def reduce_scatter(self, value: Any, local: Sequence[int], move: Move) -> Any:
        """The rank's block of the sum."""
        dim, ranks = _one_dim(move.after, move.axes), self.mesh.size(move.axes)
        if dim:
            value = self.divided(value, local, [ranks], [dim])
        out = self.crossed(
            "reduce_scatter_tensor", self.packed(value), "sum", ranks, group_name(move.axes)
        )
        return out if not dim else self.call(aten().view.default, out, _cut(local, dim, ranks))

    def all_to_all(self, value: Any, local: Sequence[int], move: Move) -> Any:
        """Blocks of the dims that the axes come to split, for blocks of those that they leave."""
        sizes = [self.mesh.size((axis,)) for axis in move.axes]
        before, after = dict(move.before), dict(move.after)
        joins = [_number(after[axis]) for axis in move.axes]
        leaves = [_number(before[axis]) for axis in move.axes]
        value = self.packed(self.divided(value, local, sizes, joins))
        even: list[int] = [math.prod(local) // math.prod(sizes)] * math.prod(sizes)
        value = self.call(aten().view.default, value, [-1])
        value = self.crossed("all_to_all_single", value, even, even, group_name(move.axes))
        part = list(local)
        for size, dim in zip(sizes, joins, strict=True):
            part[dim] //= size
        return self.joined(value, part, sizes, leaves)

    def slice(self, value: Any, local: Sequence[int], move: Move) -> Any:
        """The rank's block of each dim that the axes come to split."""
        after, shape = dict(move.after), list(local)
        for dim in dict.fromkeys(_number(after[axis]) for axis in move.axes):
            axes = tuple(axis for axis in move.axes if after[axis] == dim)
            value = self.block(value, shape, dim, axes)
            shape = _cut(shape, dim, self.mesh.size(axes))
        return value

    def block(self, value: Any, shape: Sequence[int], dim: int, axes: tuple[str, ...]) -> Any:
        """The rank's block of one dim."""
        ways = self.mesh.size(axes)
        blocks, _, _ = _nested(shape, [ways], [dim])
        number = self.call(aten().view.default, self.place(axes), [1])
        value = self.call(aten().reshape.default, value, blocks)
        value = self.call(aten().index_select.default, value, dim, number)
        return self.call(aten().view.default, value, _cut(shape, dim, ways))

    def divided(
        self, value: Any, local: Sequence[int], sizes: Sequence[int], dims: Sequence[int]
    ) -> Any:
        """Each dim cut into blocks, and the numbers of the blocks moved to the front, in order."""
        shape, front, rest = _nested(local, sizes, dims)
        value = self.call(aten().view.default, self.packed(value), shape)
        return self.call(aten().permute.default, value, [*front, *rest])

    def joined(
        self, value: Any, part: Sequence[int], sizes: Sequence[int], dims: Sequence[int]
    ) -> Any:
        """The reverse of `divided`: blocks numbered at the front, joined along their dims."""
        whole = list(part)
        for size, dim in zip(sizes, dims, strict=True):
            whole[dim] *= size
        _, front, rest = _nested(whole, sizes, dims)
        value = self.call(aten().view.default, value, [*sizes, *part])
        order = [*front, *rest]
        back = [order.index(i) for i in range(len(order))]
        value = self.packed(self.call(aten().permute.default, value, back))
        return self.call(aten().view.default, value, whole)

    def packed(self, value: Any) -> Any:
        """The same values, one after another in memory."""
        return self.call(aten().contiguous.default, value)

    def crossed(self, kind: str, *args: Any) -> Any:
        """A functional collective, and the wait for it."""
        value = self.call(getattr(functional(), kind).default, *args)
        return self.call(functional().wait_tensor.default, value)


def _number(dim: int | str) -> int:
    """A dim's number; a partial sum has none and is no end of an exchange."""
    return int(dim)


def _one_dim(lies: Key, axes: Sequence[str]) -> int:
    """The dim that all these axes split."""
    (dim,) = {_number(dim) for axis, dim in lies if axis in axes}
    return dim


def _cut(local: Sequence[int], dim: int, ways: int) -> list[int]:
    return [size // ways if i == dim else size for i, size in enumerate(local)]


def _nested(
    whole: Sequence[int], sizes: Sequence[int], dims: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """(shape with each dim cut into its blocks, places of the blocks' numbers, other places).

    Several cuts of one dim nest major to minor.
    """
    shape: list[int] = []
    front = [0] * len(sizes)
    rest = []
    for dim, size in enumerate(whole):
        within = size
        for i, at in enumerate(dims):
            if at == dim:
                front[i] = len(shape)
                shape.append(sizes[i])
                within //= sizes[i]
        rest.append(len(shape))
        shape.append(within)
    return shape, front, rest
