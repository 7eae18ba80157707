"""Loops of the PyTorch operators that move data: shapes, pieces, lookups, constants.

A reshape gives the major part of each dim that it splits or joins a loop (the leading-dim rule);
dims along which tensors are joined, cut or searched run over no loop and stay whole.
"""

from __future__ import annotations

from shardplan.models.frontends.drafts import expanded, reshaped
from shardplan.models.frontends.loops import Draft, Loops, aligned, names
from shardplan.models.frontends.torch_node import Rule, View, follow

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
    rank = len(view.shape())
    draft.writes = [tuple(f"d{index}" for index in _order(view, rank))]
    draft.linear = (0,)
    return draft


def _order(view: View, rank: int) -> list[int]:
    """Which dim of the input each dim of the output is."""
    order = list(range(rank))
    if view.op == "aten::permute":
        return [int(one) % rank for one in view.arg("dims")]
    if view.op in ("aten::t", "aten::numpy_T"):
        return order[::-1]
    if view.op == "aten::movedim":
        return _moved(view, order)
    if view.op in ("aten::mT", "aten::adjoint"):
        a, b = rank - 2, rank - 1
    else:
        keys = ("dim0", "dim1") if view.op == "aten::transpose" else ("axis0", "axis1")
        a, b = (int(view.arg(key, 0)) % rank for key in keys)
    order[a], order[b] = order[b], order[a]
    return order


def _moved(view: View, order: list[int]) -> list[int]:
    def listed(name: str) -> list[int]:
        asked = view.arg(name, 0)
        many = asked if isinstance(asked, (list, tuple)) else [asked]
        return [int(one) % len(order) for one in many]

    source, target = listed("source"), listed("destination")
    rest = [one for one in order if one not in source]
    for place, dim in sorted(zip(target, source, strict=True)):
        rest.insert(place, dim)
    return rest


def expand(view: View) -> Draft:
    """Repeated along dims of one element."""
    return expanded(view.shape(0), view.out())


def repeat(view: View) -> Draft:
    """Copies end to end: a dim that is copied is a loop only where it has one element."""
    out = view.out()
    shape = (1,) * (len(out) - len(view.shape())) + view.shape()
    loops = names(len(out))
    kept = tuple(
        n if size in (1, wide) else "" for n, size, wide in zip(loops, shape, out, strict=True)
    )
    reads = tuple(n if size == wide else "" for n, size, wide in zip(kept, shape, out, strict=True))
    return Draft(
        kind="reshape",
        reads={0: reads[len(out) - len(view.shape()) :]},
        writes=[kept],
        sizes={n: wide for n, wide in zip(kept, out, strict=True) if n},
        linear=(0,),
    )


def repeat_interleave(view: View) -> Draft:
    """Each element of a dim several times in a row: the output's dim runs over its blocks."""
    if len(view.tensors) > 1 or view.arg("dim") is None:
        raise view.error("elements are repeated a fixed number of times along one dim")
    return follow(view, "reshape")


def join(view: View) -> Draft:
    """Joined along one dim, which stays whole."""
    out = view.out()
    stacked = view.op == "aten::stack"
    axis = view.dim(rank=len(out))
    loops = tuple("" if index == axis else n for index, n in enumerate(names(len(out))))
    read = tuple(n for index, n in enumerate(loops) if index != axis) if stacked else loops
    slots = range(len(view.tensors))
    return Draft(
        kind="reshape",
        reads={s: read if len(view.shape(s)) == len(read) else ("",) for s in slots},
        writes=[loops],
        sizes={n: size for n, size in zip(loops, out, strict=True) if n},
        linear=tuple(slots),
    )


def pieces(view: View) -> Draft:
    """Cut along one dim into one or several outputs: the dim stays whole unless all is taken."""
    axis = view.dim()
    same = view.op == "aten::slice" and view.shape() == view.out()
    draft = follow(view, "reshape", without=() if same else (axis,))
    if view.op in ("aten::select", "aten::unbind"):
        kept = tuple(n for index, n in enumerate(draft.reads[0]) if index != axis)
        draft.writes = [kept] * view.results
    draft.linear = (0,)
    return draft


def put(view: View) -> Draft:
    """A piece written over part of a tensor along one dim, which stays whole."""
    axis = view.dim(rank=len(view.out()))
    draft = follow(view, "reshape", without=(axis,))
    loops = draft.reads[0]
    one = tuple(n for index, n in enumerate(loops) if index != axis)
    draft.reads[1] = one if view.op == "aten::select_scatter" else loops
    draft.linear = (0, 1)
    return draft


def along(view: View) -> Draft:
    """What works along one dim (roll, flip, sums so far, sorting): it stays whole."""
    kinds = {"aten::topk": "topk", "aten::sort": "topk", "aten::argsort": "topk"}
    first = {"aten::flip": "dims", "aten::roll": "dims"}.get(view.op, "dim")
    rank = len(view.shape())
    last = view.arg(first) is None and view.op in kinds
    dims = (rank - 1,) if last else view.dims(first)
    draft = follow(view, kinds.get(view.op, "reshape"), without=dims)
    draft.linear = (0,) if view.op in ("aten::roll", "aten::flip", "aten::cumsum") else ()
    return draft


def triangle(view: View) -> Draft:
    """The last two dims decide what is kept."""
    rank = len(view.shape())
    draft = follow(view, "reshape", without=(rank - 2, rank - 1))
    draft.linear = (0,)
    return draft


def resized(view: View) -> Draft:
    """Padding and differences: dims whose size changes stay whole."""
    before, after = view.shape(), view.out()
    changed = tuple(index for index, size in enumerate(before) if after[index] != size)
    if view.op == "aten::diff":
        changed = (*changed, view.dim(default=-1))
    draft = follow(view, "reshape", without=changed)
    draft.reads |= dict.fromkeys(range(1, len(view.tensors)), draft.reads[0])
    return draft


def index(view: View) -> Draft:
    """x[i, j, ..]: searched dims stay whole, those of the indices and the others are loops."""
    data, out = view.shape("self"), view.out()
    asked = view.arg("indices")
    picked = [place for place, one in enumerate(asked) if one is not None]
    slots = view.slots["indices"]
    if any(str(view.dtype(slot)) == "torch.bool" for slot in slots):
        raise view.error("the size of what a mask picks depends on data", "use torch.where")
    wide = max(len(view.shape(slot)) for slot in slots)
    first = picked[0] if picked[-1] - picked[0] == len(picked) - 1 else 0
    loops = names(len(out))
    rest = iter((*loops[:first], *loops[first + wide :]))
    kept = tuple("" if place in picked else next(rest) for place in range(len(data)))
    over, inner = out[first : first + wide], loops[first : first + wide]
    reads = {slot: aligned(view.shape(slot), over, inner) for slot in slots}
    return Draft(
        kind="gather",
        reads={0: kept} | reads,
        writes=[loops],
        sizes=dict(zip(loops, out, strict=True)),
        linear=(0,),
    )


def index_select(view: View) -> Draft:
    """Rows of a dim, which stays whole; the rows picked are a loop."""
    out, axis = view.out(), view.dim()
    loops = names(len(out))
    kept = tuple("" if place == axis else n for place, n in enumerate(loops))
    return Draft(
        kind="gather",
        reads={0: kept, 1: (loops[axis],)},
        writes=[loops],
        sizes=dict(zip(loops, out, strict=True)),
        linear=(0,),
    )


def aside(view: View) -> Draft:
    """gather, scatter: dims other than the searched one run together where all are equal."""
    shapes = [view.shape(slot) for slot in range(len(view.tensors))]
    out, axis = view.out(), view.dim(rank=len(view.out()))
    equal = [i != axis and all(one[i] == out[i] for one in shapes) for i in range(len(out))]
    loops = tuple(n if equal[i] else "" for i, n in enumerate(names(len(out))))
    return Draft(
        kind="scatter" if "scatter" in view.op or "add" in view.op else "gather",
        reads=dict.fromkeys(range(len(shapes)), loops),
        writes=[loops],
        sizes={n: size for n, size in zip(loops, out, strict=True) if n},
    )


def whole(view: View) -> Draft:
    """What counts or places by value (histc, index_put, ..): computed from whole inputs."""
    ranks = [len(view.out(index)) for index in range(view.results)]
    return Draft(
        kind="scatter",
        reads={slot: ("",) * len(view.shape(slot)) for slot in range(len(view.tensors))},
        writes=[("",) * rank for rank in ranks],
        sizes={},
    )


def one_hot(view: View) -> Draft:
    """A new last dim that stays whole."""
    draft = follow(view, "scatter")
    draft.writes = [(*draft.reads[0], "")]
    return draft


def pairs(view: View) -> Draft:
    """Pairs of the last dim as complex numbers, or the reverse."""
    longer = max(view.shape(), view.out(), key=len)
    loops = names(len(longer) - 1)
    ends = {len(longer): (*loops, ""), len(longer) - 1: loops}
    return Draft(
        kind="reshape",
        reads={0: ends[len(view.shape())]},
        writes=[ends[len(view.out())]],
        sizes=dict(zip(loops, longer, strict=False)),
        linear=(0,),
    )


def filled(view: View) -> Draft:
    """A constant of a given shape: every dim is a loop; of what it is like nothing is read."""
    loops: Loops = names(len(view.out()))
    reads = {slot: ("",) * len(view.shape(slot)) for slot in range(len(view.tensors))}
    if view.tensors and view.shape() == view.out():
        reads[0] = loops
    return Draft(
        kind="constant",
        reads=reads,
        writes=[loops],
        sizes=dict(zip(loops, view.out(), strict=True)),
    )


def counted(view: View) -> Draft:
    """Numbers in a row (arange): each rank makes all of them."""
    return Draft(kind="constant", reads={}, writes=[("",) * len(view.out())], sizes={})


_RESHAPE = """view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as
_reshape_alias ravel"""
_CUT = "slice narrow select split split_with_sizes chunk unbind tensor_split"
_FILLED = """full zeros ones empty full_like zeros_like ones_like empty_like new_zeros new_ones
new_full new_empty scalar_tensor empty_permuted"""

MOVE: dict[str, Rule] = {
    **{f"aten::{name}": reshape for name in _RESHAPE.split()},
    **dict.fromkeys(
        (
            "aten::transpose",
            "aten::permute",
            "aten::t",
            "aten::numpy_T",
            "aten::mT",
            "aten::adjoint",
            "aten::swapaxes",
            "aten::movedim",
        ),
        transpose,
    ),
    **dict.fromkeys(("aten::expand", "aten::expand_as", "aten::broadcast_to"), expand),
    "aten::repeat": repeat,
    "aten::repeat_interleave": repeat_interleave,
    **dict.fromkeys(("aten::cat", "aten::concat", "aten::stack"), join),
    **{f"aten::{name}": pieces for name in _CUT.split()},
    **dict.fromkeys(("aten::slice_scatter", "aten::select_scatter"), put),
    **dict.fromkeys(
        (
            "aten::topk",
            "aten::sort",
            "aten::argsort",
            "aten::cumsum",
            "aten::cumprod",
            "aten::flip",
            "aten::roll",
        ),
        along,
    ),
    **dict.fromkeys(("aten::tril", "aten::triu"), triangle),
    **dict.fromkeys(("aten::constant_pad_nd", "aten::pad", "aten::diff"), resized),
    "aten::index": index,
    "aten::index_select": index_select,
    **dict.fromkeys(
        ("aten::gather", "aten::scatter", "aten::scatter_add", "aten::take_along_dim"), aside
    ),
    **dict.fromkeys(
        ("aten::index_put", "aten::index_add", "aten::index_copy", "aten::histc", "aten::bincount"),
        whole,
    ),
    "aten::one_hot": one_hot,
    **dict.fromkeys(("aten::view_as_complex", "aten::view_as_real"), pairs),
    **{f"aten::{name}": filled for name in _FILLED.split()},
    **dict.fromkeys(("aten::arange", "aten::linspace"), counted),
}
