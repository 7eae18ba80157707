"""Loops of the ONNX operators that move data: shapes, pieces, gathers, quantized numbers.

A reshape gives the major part of each dim that it splits or joins a loop (the leading-dim rule);
dims along which tensors are joined, cut or searched run over no loop and stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from shardplan.models.frontends.drafts import expanded, reshaped
from shardplan.models.frontends.loops import Draft, Loops, names
from shardplan.models.frontends.onnx_node import Rule, View, follow

__all__ = ["MOVE"]


def reshape(view: View) -> Draft:
    """The same elements under another shape."""
    draft = reshaped(view.shape(0), view.out())
    if draft is None:
        raise view.error("a reshape keeps its elements, one or more")
    return draft


def transpose(view: View) -> Draft:
    """Dims in another order."""
    draft = follow(view, "reshape")
    rank = len(view.shape(0))
    order = view.attrs.get("perm", tuple(range(rank))[::-1])
    draft.writes = [tuple(f"d{index}" for index in order)]
    draft.linear = (0,)
    return draft


def expand(view: View) -> Draft:
    """Repeated along dims of one element."""
    return expanded(view.shape(0), view.out())


def concat(view: View) -> Draft:
    """Joined along one dim, which stays whole."""
    out = view.out()
    axis = view.axis(len(out), 0)
    loops = tuple("" if index == axis else n for index, n in enumerate(names(len(out))))
    return Draft(
        kind="reshape",
        reads=dict.fromkeys(range(len(view.node.input)), loops),
        writes=[loops],
        sizes={n: size for n, size in zip(loops, out, strict=True) if n},
        linear=tuple(range(len(view.node.input))),
    )


def pieces(view: View) -> Draft:
    """Cut along one dim into several outputs."""
    draft = follow(view, "reshape", without=(view.axis(len(view.shape(0)), 0),))
    draft.writes = [draft.reads[0] for name in view.node.output if name]
    draft.linear = (0,)
    return draft


def piece(view: View) -> Draft:
    """Part of a tensor (Slice, Pad, Tile, CumSum, Trilu): dims that change stay whole."""
    before, after = view.shape(0), view.out()
    changed = {index for index, size in enumerate(before) if after[index] != size}
    changed |= set(_moved(view, len(before)))
    draft = follow(view, "reshape", without=tuple(changed))
    draft.linear = (0,) if view.op in ("Slice", "Tile", "Trilu") else ()
    return draft


def _moved(view: View, rank: int) -> Iterator[int]:
    """Dims along which elements move though their number stays."""
    if view.op == "Slice":
        axes = view.axes(3, rank)
        yield from range(rank) if axes is None else axes
    elif view.op == "Trilu":
        yield from (rank - 2, rank - 1)
    elif view.op == "CumSum":
        value = view.value(1)
        yield from range(rank) if value is None else [int(value.reshape(-1)[0]) % rank]
    elif view.op == "Pad":
        yield from range(rank) if view.value(1) is None else _padded(view, rank)


def _padded(view: View, rank: int) -> list[int]:
    value = view.value(1)
    pads = [] if value is None else value.tolist()
    axes = view.axes(3, rank) or tuple(range(rank))
    return [dim for at, dim in enumerate(axes) if pads[at] or pads[at + len(axes)]]


def gather(view: View) -> Draft:
    """Rows of a table: the dim of a weight that is looked up is contracted."""
    data, ids, out = view.shape(0), view.shape(1), view.out()
    axis = view.axis(len(data), 0)
    before, after = names(axis, "a"), names(len(data) - axis - 1, "c")
    rows = names(len(ids), "i")
    table = axis == 0 and view.fixed(0) and len(data) == 2 and view.value(1) is None
    return Draft(
        kind="embedding" if table else "gather",
        reads={0: (*before, "v" if table else "", *after), 1: rows},
        writes=[(*before, *rows, *after)],
        sizes=dict(zip((*before, *rows, *after), out, strict=True)) | {"v": data[axis]},
        linear=() if table else (0,),
    )


def searched(view: View) -> Draft:
    """TopK, ArgMax and their like: the searched dim stays whole."""
    rank = len(view.shape(0))
    axis = view.axis(rank, -1 if view.op == "TopK" else 0)
    draft = follow(view, "topk" if view.op == "TopK" else "reduce", without=(axis,))
    if view.op != "TopK" and not view.attrs.get("keepdims", 1):
        draft.writes = [tuple(n for index, n in enumerate(draft.reads[0]) if index != axis)]
    draft.writes *= len([name for name in view.node.output if name])
    return draft


def scatter(view: View) -> Draft:
    """GatherElements and ScatterElements: dims other than the axis run together where equal."""
    shapes = [view.shape(slot) for slot in range(len(view.node.input))]
    out = view.out()
    axis = view.axis(len(out), 0)
    equal = [all(one[i] == out[i] for one in shapes) and i != axis for i in range(len(out))]
    loops = tuple(n if equal[i] else "" for i, n in enumerate(names(len(out))))
    return Draft(
        kind="scatter" if view.op == "ScatterElements" else "gather",
        reads=dict.fromkeys(range(len(shapes)), loops),
        writes=[loops],
        sizes={n: size for n, size in zip(loops, out, strict=True) if n},
    )


def onehot(view: View) -> Draft:
    """A new dim of `depth` elements that stays whole."""
    ids, out = view.shape(0), view.out()
    axis = view.axis(len(out), -1)
    loops = names(len(ids))
    rest = {slot: ("",) * len(view.shape(slot)) for slot in (1, 2)}
    return Draft(
        kind="scatter",
        reads={0: loops, **rest},
        writes=[(*loops[:axis], "", *loops[axis:])],
        sizes=dict(zip(loops, ids, strict=True)),
    )


def quantize(view: View) -> Draft:
    """QuantizeLinear, DequantizeLinear: scales run along the dims that they are given for.

    A scale for each block of a dim makes the loop as large as the scale's dim.
    """
    shape, scale = view.shape(0), view.shape(1)
    loops = names(len(shape))
    sizes = dict(zip(loops, shape, strict=True))
    if math.prod(scale) == 1:
        along: Loops = ("",) * len(scale)
    elif len(scale) == 1:
        along = (loops[view.axis(len(shape), 1)],)
    else:
        along = loops
        sizes = dict(zip(loops, map(math.gcd, shape, scale), strict=True))
    slots = [slot for slot in (1, 2) if view.has(slot)]
    return Draft(
        kind="quantize",
        reads={0: loops, **dict.fromkeys(slots, along)},
        writes=[loops],
        sizes=sizes,
    )


MOVE: dict[str, Rule] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    "Transpose": transpose,
    "Expand": expand,
    "Concat": concat,
    "Split": pieces,
    **dict.fromkeys(("Slice", "Pad", "Tile", "CumSum", "Trilu"), piece),
    "Gather": gather,
    **dict.fromkeys(("TopK", "ArgMax", "ArgMin"), searched),
    **dict.fromkeys(("GatherElements", "ScatterElements"), scatter),
    "OneHot": onehot,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), quantize),
}
