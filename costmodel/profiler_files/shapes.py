"""Operand shapes as profilers print them, and the products that they make.

`"41040,5120;320,200,16,16"`: operands by `;`, dims by `,`, the whole in one or more pairs of
quotes. A weight in FRACTAL_NZ has four dims, two blocks and a fractal of 16 x 16 (16-bit) or
16 x 32 (8-bit) elements; which block count belongs to which side differs by kernel, so

    {rows, columns} = {d0 d3, d1 d2} or {d0 d2, d1 d3}

and the side that is k (padded to a whole fractal) tells the other, n.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardplan.costmodel.profiler_files.measurement import MOST_SIZE

__all__ = ["Product", "grouped_product_of", "parse_list", "parse_shapes", "product_of"]

Shape = tuple[int, ...]
_MATRIX, _STACK, _NZ, _NZ_STACK = 2, 3, 4, 5
_SIZE = re.compile(r"[0-9]{1,16}")
_BLOCK = 32
"""The larger side of a fractal; a side is padded by less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """y[m, n] = x[m, k] @ w[k, n]; `groups` experts where the weights are stacked."""

    m: int
    n: int
    k: int
    groups: int = 1


def parse_list(cell: str) -> list[str]:
    """Entries of a cell, one an operand; quotes stripped."""
    return [part.strip().strip('"').strip() for part in cell.strip().strip('"').split(";")]


def parse_shapes(cell: str) -> list[Shape] | None:
    """Dims of each operand, () for a scalar or an absent one; None where they are no sizes."""
    out: list[Shape] = []
    for part in parse_list(cell):
        if part in ("", "N/A"):
            out.append(())
            continue
        sizes = part.split(",")
        if not all(_SIZE.fullmatch(size.strip()) for size in sizes):
            return None
        shape = tuple(int(size) for size in sizes)
        if math.prod(shape) > MOST_SIZE:
            return None
        out.append(shape)
    return out


def _padded(size: int, to: int) -> bool:
    """Whether `to` is `size`, or `size` padded to a fractal."""
    return size <= to < size + _BLOCK and (to == size or to % (_BLOCK // 2) == 0)


def _sides(weight: Shape) -> Iterator[tuple[int, int]]:
    """(k, n) that a two-dim weight may stand for, as stored or transposed; NZ unpacked."""
    if len(weight) == _NZ:
        a, b, c, d = weight
        pairs = [(a * d, b * c), (a * c, b * d)]
    else:
        pairs = [(weight[0], weight[1])]
    for one, two in pairs:
        yield one, two
        yield two, one


def product_of(x: Shape, weight: Shape, output: Shape | None) -> Product | None:
    """The product of an input and a weight; None where the shapes do not make one for certain.

    `output` settles n and m where it is known. An input of more than two dims counts its leading
    ones as rows.
    """
    if len(x) < _MATRIX or len(weight) not in (_MATRIX, _NZ) or 0 in x or 0 in weight:
        return None
    rows, k = math.prod(x[:-1]), x[-1]
    if output:
        rows = math.prod(output[:-1])
        if not rows:
            return None
        k, rest = divmod(math.prod(x), rows)
        if rest:
            return None
    sides = {n for other, n in _sides(weight) if _padded(k, other)}
    if output:
        sides = {output[-1]} if any(_padded(output[-1], n) for n in sides) else set()
    if len(sides) != 1:
        return None
    return Product(m=rows, n=sides.pop(), k=k)


def grouped_product_of(x: Shape, weight: Shape, output: Shape | None) -> Product | None:
    """The product of routed rows `[rows, k]` and stacked weights `[experts, ...]`."""
    if len(x) != _MATRIX or len(weight) not in (_STACK, _NZ_STACK):
        return None
    found = product_of(x, weight[1:], output)
    if found is None:
        return None
    return Product(m=found.m, n=found.n, k=found.k, groups=weight[0])


def operand(shapes: Sequence[Shape], place: int) -> Shape:
    """An operand's dims, () where there is none."""
    return shapes[place] if place < len(shapes) else ()
