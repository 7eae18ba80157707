"""Drafts of what operators of every format have: products, reshapes, tensors that stay alike.

They are written from shapes alone, so that the rules of each format add only what its operators
say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardplan.models.frontends.loops import Draft, aligned, leading_dims, names

__all__ = ["alike", "contracted", "expanded", "product", "reshaped"]

Shape = tuple[int, ...]


def alike(kind: str, shape: Shape, *, results: int = 1, without: tuple[int, ...] = ()) -> Draft:
    """The first tensor and every result alike, dim by dim; dims in `without` stay whole."""
    loops = tuple("" if index in without else n for index, n in enumerate(names(len(shape))))
    return Draft(
        kind=kind,
        reads={0: loops},
        writes=[loops] * results,
        sizes={n: size for n, size in zip(loops, shape, strict=True) if n},
    )


def product(a: Shape, b: Shape, out: Shape, slots: tuple[int, int] = (0, 1)) -> Draft:
    """y[.., m, n] = sum over k of a[.., m, k] b[.., k, n]; 1-D inputs lack m or n."""
    rows = ("m",) if len(a) > 1 else ()
    columns = ("n",) if len(b) > 1 else ()
    batch_out = out[: len(out) - len(rows) - len(columns)]
    batch = names(len(batch_out), "b")
    sizes = dict(zip(batch, batch_out, strict=True)) | {"k": a[-1]}
    sizes |= {"m": a[-2]} if rows else {}
    sizes |= {"n": b[-1]} if columns else {}
    return Draft(
        kind="matmul",
        reads={
            slots[0]: (*aligned(a[:-2], batch_out, batch), *rows, "k"),
            slots[1]: (*aligned(b[:-2], batch_out, batch), "k", *columns),
        },
        writes=[(*batch, *rows, *columns)],
        sizes=sizes,
        linear=(0,),
        flop=2.0 * math.prod(out) * a[-1],
    )


def contracted(ins: Sequence[str], result: str, shapes: Sequence[Shape]) -> Draft:
    """An einsum, each dim a letter: y[result] = sum of the product of its inputs."""
    sizes: dict[str, int] = {}
    for one, shape in zip(ins, shapes, strict=True):
        for name, size in zip(one, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    reads = {
        slot: tuple(
            name if size == sizes[name] else "" for name, size in zip(one, shape, strict=True)
        )
        for slot, (one, shape) in enumerate(zip(ins, shapes, strict=True))
    }
    return Draft(
        kind="matmul",
        reads=reads,
        writes=[tuple(result)],
        sizes=sizes,
        linear=(0,),
        flop=2.0 * math.prod(sizes.values()) if len(ins) > 1 else 0.0,
    )


def reshaped(before: Shape, after: Shape) -> Draft | None:
    """The same elements under another shape; None where there are none, or not as many."""
    if not math.prod(before) or math.prod(before) != math.prod(after):
        return None
    left, right, sizes = leading_dims(before, after)
    return Draft(kind="reshape", reads={0: left}, writes=[right], sizes=sizes, linear=(0,))


def expanded(shape: Shape, out: Shape) -> Draft:
    """Repeated along dims of one element."""
    loops = names(len(out))
    return Draft(
        kind="reshape",
        reads={0: aligned(shape, out, loops)},
        writes=[loops],
        sizes=dict(zip(loops, out, strict=True)),
        linear=(0,),
    )
