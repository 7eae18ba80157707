"""Layouts of a tensor on a mesh, and the single redistributions between them.

A layout is a key: (axis, dim) in the order of the mesh, `PARTIAL` in place of a dim for a sum that
is not yet taken; axes that it leaves out hold the whole. A tensor moves from one layout to another
by a path of *steps*, each one collective (or slice) as `models.redistribute` has it, through
layouts that exist (every dim divides). Steps that `redistributions` refuses, for axes that do not
nest, and exchanges in which one axis joins a dim that another leaves are none.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.opcost import OperatorPrices
from shardplan.models.errors import LayoutError
from shardplan.models.opgraph import Layout, Tensor
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL, redistributions

__all__ = [
    "WHOLE",
    "Key",
    "Step",
    "is_partial",
    "key_of",
    "local_bytes",
    "local_elements",
    "message_bytes",
    "nodes_of",
    "step_seconds",
    "steps_of",
]

Key = tuple[tuple[str, int | str], ...]
WHOLE: Key = ()


class Step(NamedTuple):
    """One redistribution; `source` and `target` are places in a tensor's layouts."""

    source: int
    target: int
    kind: str
    axes: tuple[str, ...]


def key_of(layout: Layout, mesh: Mesh) -> Key:
    """A layout as a key."""
    return tuple((axis, layout[axis]) for axis in mesh.axes if axis in layout)


def is_partial(key: Key) -> bool:
    """Whether a sum is yet to be taken."""
    return any(dim == PARTIAL for _, dim in key)


def local_elements(tensor: Tensor, key: Key, mesh: Mesh) -> int:
    """Elements on one rank; 0 where a dim does not divide."""
    left = list(tensor.shape)
    for axis, dim in key:
        if isinstance(dim, int):
            left[dim], rest = divmod(left[dim], mesh.size((axis,)))
            if rest:
                return 0
    return math.prod(left)


def local_bytes(tensor: Tensor, key: Key, prices: OperatorPrices) -> float:
    """Bytes on one rank."""
    return local_elements(tensor, key, prices.mesh) * prices.width_bytes(tensor)


def nodes_of(tensor: Tensor, used: Iterable[Key], mesh: Mesh) -> tuple[Key, ...]:
    """Layouts that a tensor may lie in: on each axis whole or as some of `used` has it there."""
    states: dict[str, dict[int | str, None]] = {axis: {} for axis in mesh.axes}
    for key in used:
        for axis, state in key:
            states[axis][state] = None
    options = [(None, *sorted(states[axis], key=str)) for axis in mesh.axes]
    found = []
    for choice in itertools.product(*options):
        key = tuple((a, s) for a, s in zip(mesh.axes, choice, strict=True) if s is not None)
        if local_elements(tensor, key, mesh):
            found.append(key)
    return tuple(found)


def steps_of(nodes: tuple[Key, ...], mesh: Mesh) -> tuple[Step, ...]:
    """All single redistributions between layouts."""
    return _steps(nodes, mesh.axes, mesh.shape)


@functools.lru_cache(maxsize=4096)
def _steps(
    nodes: tuple[Key, ...], axes: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[Step, ...]:
    mesh = Mesh(axes, shape, {})
    names = [{axis: str(dim) for axis, dim in key} for key in nodes]
    found = []
    for (i, have), (j, want) in itertools.permutations(enumerate(names), 2):
        if any(dim == PARTIAL and have.get(axis) != PARTIAL for axis, dim in want.items()):
            continue
        try:
            made = list(itertools.islice(redistributions(have, want, mesh), 2))
        except LayoutError:
            continue
        if len(made) == 1 and not _tangled(made[0], have, want):
            found.append(Step(i, j, made[0][0], made[0][1]))
    return tuple(found)


def _tangled(
    step: tuple[str, tuple[str, ...], dict[str, str]],
    have: Mapping[str, str],
    want: Mapping[str, str],
) -> bool:
    """Whether an axis of an exchange joins a dim that another one leaves."""
    kind, axes, _ = step
    return kind == "all_to_all" and bool({have[a] for a in axes} & {want[a] for a in axes})


def message_bytes(
    tensor: Tensor, nodes: Sequence[Key], step: Step, prices: OperatorPrices
) -> float:
    """Bytes of the full tensor of the step's group; of a slice, what is kept.

    As `models.accounting` counts: gathered (all_gather), before the sum (all_reduce,
    reduce_scatter), of all ranks of the group together (all_to_all).
    """
    lies = nodes[step.target if step.kind in ("all_gather", "slice") else step.source]
    group = prices.mesh.size(step.axes) if step.kind == "all_to_all" else 1
    return local_bytes(tensor, lies, prices) * group


def step_seconds(
    tensor: Tensor, nodes: Sequence[Key], steps: Sequence[Step], prices: OperatorPrices
) -> Array:
    """Seconds of each step `[steps]`."""
    moved = np.array([message_bytes(tensor, nodes, one, prices) for one in steps])
    seconds = np.zeros(len(steps))
    alike: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for place, one in enumerate(steps):
        alike.setdefault((one.kind, one.axes), []).append(place)
    for (kind, axes), places in alike.items():
        seconds[places] = prices.move(kind, axes, moved[places])
    return seconds
