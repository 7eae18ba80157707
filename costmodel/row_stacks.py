"""Rows of one formula side by side: what differs between them as arrays.

A formula reads of a row names (its kind, group, spans, window, dtype, the rows that it runs beside)
and sizes. Rows that agree in every name are priced by one call, their sizes stacked; what a formula
does with one number it does with an array of them, elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.rows import Row

__all__ = [
    "SPECIAL",
    "Places",
    "RowTable",
    "Stack",
    "alike",
    "row_table",
    "stack",
    "with_sizes",
]

_SIZES = (
    "ways",
    "n",
    "k",
    "width",
    "experts",
    "spread",
    "share",
    "heads",
    "kv_heads",
    "head_dim",
    "value_dim",
    "rope_dim",
    "parts",
)
"""Numbers of a row: stacked."""
_PLAIN = (
    "kind",
    "group",
    "context",
    "weight_class",
    "window",
    "spans",
    "quantized",
    "element_bytes",
    "settled",
)
"""What else a formula reads."""
_UNREAD = ("fuse",)
_BY_GROUP = "weight_group"
"""Read where weight types differ between groups; else it would only cut the stacks."""
_NAMES = tuple(name for name in Row._fields if name not in (*_SIZES, *_UNREAD, _BY_GROUP))
"""The same for all that are stacked."""
SPECIAL = tuple(name for name in _NAMES if name not in _PLAIN)
"""Fields that this module does not know: a row that has one may depend on every dtype."""
_sizes_of, _names_of = attrgetter(*_SIZES), attrgetter(*_NAMES)


class Stack(NamedTuple):
    """Rows that one call of a formula prices."""

    row: Row
    """Their names, and the sizes that are the same for all."""
    sizes: Mapping[str, Array]
    """The other sizes `[rows]`."""

    def at(self, which: Sequence[int], dims: int) -> Row:
        """Some of the rows as one, their sizes with `dims` dimensions of length 1 behind."""
        return with_sizes(self.row, self.sizes, list(which), dims)


def with_sizes(row: Row, sizes: Mapping[str, Array], which: Any, dims: int = 0) -> Row:
    """The row with sizes `which` of the stacked ones, `dims` dimensions of length 1 behind."""
    if not sizes:
        return row
    behind = (..., *(None,) * dims)
    chosen: Mapping[str, Any] = {name: size[which][behind] for name, size in sizes.items()}
    return row._replace(**chosen)


def alike(rows: Iterable[Row], by_group: bool) -> list[list[int]]:
    """Places of the rows that can be stacked, in the order of the first of each.

    `by_group`: weights of different groups apart, where those have types of their own.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows):
        names = (_names_of(row), row.weight_group if by_group else "")
        found.setdefault(names, []).append(place)
    return list(found.values())


def stack(rows: Sequence[Row]) -> Stack:
    """Stack rows that are `alike`."""
    first = rows[0]
    if len(rows) == 1:
        return Stack(first, {})
    stacked = np.asarray([_sizes_of(one) for one in rows], dtype=np.float64).T
    same = (stacked == stacked[:, :1]).all(axis=1)
    return Stack(first, {name: stacked[i] for i, name in enumerate(_SIZES) if not same[i]})


class Places(NamedTuple):
    """Rows of a table that are priced together, and where they stand in it."""

    places: tuple[int, ...]
    stack: Stack
    dtypes: tuple[str, ...]
    """What their prices depend on beside the arrays of a load (`formulas.dtypes_of`)."""


class RowTable(NamedTuple):
    """The rows of one group of a layout, in the order of its templates."""

    rows: tuple[Row, ...]
    numbers: tuple[int, ...]
    """What a memo calls them."""
    stacks: tuple[Places, ...]
    runs: Array
    """Times that each kind of stage runs a row `[kinds, rows]`."""
    kernels: tuple[float, ...]
    """Rows that each kind of stage runs."""
    stage: tuple[int, ...]
    """Kind of each stage of the pipeline."""


def row_table(
    rows: Mapping[str, Sequence[Row]],
    runs: Sequence[Mapping[str, int]],
    by_group: bool,
    number: Callable[[Row], int],
    dtypes: Callable[[Row], tuple[str, ...]],
) -> RowTable:
    """The table of each template's `rows`; `runs`: how often each stage runs a template.

    `number` and `dtypes`: what is told of a row, the second the same for all that are `alike`.
    """
    names = [name for name, ones in rows.items() for _ in ones]
    flat = tuple(row for ones in rows.values() for row in ones)
    kinds: dict[tuple[int, ...], int] = {}
    stage = tuple(
        kinds.setdefault(tuple(one.get(name, 0) for name in names), len(kinds)) for one in runs
    )
    return RowTable(
        rows=flat,
        numbers=tuple(map(number, flat)),
        stacks=tuple(
            Places(tuple(places), stack([flat[place] for place in places]), dtypes(flat[places[0]]))
            for places in alike(flat, by_group)
        ),
        runs=np.asarray(list(kinds), dtype=np.float64),
        kernels=tuple(float(sum(kind)) for kind in kinds),
        stage=stage,
    )
