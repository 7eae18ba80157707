"""Loops of the PyTorch operators that compute: products, norms, reductions, attention, pointwise.

Each rule reads the operator's documented meaning (docs.pytorch.org) and writes which loop each dim
of each tensor runs over. FLOP are those of matrix products, 2 a multiply-add, attention by its two
products over the whole context (a causal mask hides half of it: attribute `causal`), as
`torch.utils.flop_counter` counts them; pointwise work has none.
"""

from __future__ import annotations

import math

from shardplan.models.frontends.drafts import contracted, product
from shardplan.models.frontends.loops import Draft, Loops, aligned, names
from shardplan.models.frontends.torch_node import Rule, View, follow
from shardplan.models.fx.torch_lib import torch_lib

__all__ = ["COMPUTE", "pointwise"]


def linear(view: View) -> Draft:
    """y[.., n] = sum over k of x[.., k] w[n, k] (+ b[n]: k then stays whole, b is added once)."""
    x, w = view.shape("input"), view.shape("weight")
    lead = names(len(x) - 1)
    biased = view.has("bias")
    reads: dict[int, Loops] = {0: (*lead, "k"), 1: ("n", "k") if len(w) > 1 else ("k",)}
    if biased:
        reads[2] = ("n",) if view.shape("bias") else ()
    columns = ("n",) if len(w) > 1 else ()
    return Draft(
        kind="matmul",
        reads=reads,
        writes=[(*lead, *columns)],
        sizes=dict(zip(lead, x[:-1], strict=True)) | {"n": w[0], "k": x[-1]},
        whole=frozenset("k" if biased else ""),
        linear=() if biased else (0,),
        flop=2.0 * math.prod(view.out()) * x[-1],
    )


def matmul(view: View) -> Draft:
    """y[.., m, n] = sum over k of a[.., m, k] b[.., k, n]; 1-D inputs lack m or n."""
    return product(view.shape(0), view.shape(1), view.out())


def added(view: View) -> Draft:
    """y = beta c + alpha a b: k stays whole, since c is added once."""
    draft = product(view.shape(1), view.shape(2), view.out(), slots=(1, 2))
    draft.whole, draft.linear = frozenset("k"), ()
    draft.reads[0] = aligned(view.shape(0), view.out(), draft.writes[0])
    return draft


def einsum(view: View) -> Draft:
    """The equation's own letters."""
    equation = str(view.arg("equation")).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    ins = terms.split(",")
    if not arrow:
        counts = terms.replace(",", "")
        result = "".join(sorted(c for c in set(counts) if counts.count(c) == 1))
    if "." in equation or any(len(set(one)) < len(one) for one in [*ins, result]):
        raise view.error(
            "an einsum names each dim of a tensor once, without an ellipsis",
            "write the equation out, or use torch.matmul",
        )
    return contracted(ins, result, [view.shape(slot) for slot in range(len(ins))])


def embedding(view: View) -> Draft:
    """y[.., h] = sum over v of (x[..] = v) w[v, h]: a part of the table gives a partial sum."""
    table, ids = view.shape("weight"), view.shape("indices")
    rows = names(len(ids))
    return Draft(
        kind="embedding",
        reads={0: ("v", "h"), 1: rows},
        writes=[(*rows, "h")],
        sizes=dict(zip(rows, ids, strict=True)) | {"v": table[0], "h": table[1]},
    )


def conv(view: View) -> Draft:
    """y[b, n, ..] = sum over k and the window of x[b, k, ..] w[n, k, ..]: space stays whole."""
    x, w = view.shape("input"), view.shape("weight")
    batched = len(x) == len(w)
    space = ("",) * (len(w) - 2)
    grouped = int(view.arg("groups", 1)) > 1
    if view.arg("transposed"):
        raise view.error("a transposed convolution has no rule")
    k, n = ("", "") if grouped else ("k", "n")
    lead = ("b",) if batched else ()
    reads: dict[int, Loops] = {0: (*lead, k, *space), 1: (n, k, *space)}
    biased = view.has("bias")
    if biased:
        reads[view.slot("bias")] = (n,)
    return Draft(
        kind="conv",
        reads=reads,
        writes=[(*lead, n, *space)],
        sizes={"b": x[0], "k": w[1], "n": w[0]},
        whole=frozenset("k" if biased else ""),
        linear=() if biased else (0,),
        flop=2.0 * math.prod(view.out()) * math.prod(w[1:]),
    )


def grouped(view: View) -> Draft:
    """y[m, n] = x[m, k] w[e(m), k, n]: rows sorted by expert, `offsets[e]` where each ends.

    A rank with some of the experts gives the rows of others as zeros, a partial sum over e. Rows
    stay whole: offsets count those of all.
    """
    x, w = view.shape(0), view.shape(1)
    if len(x) != 2 or len(w) != 3:
        raise view.error("a grouped product has rows [m, k] and weights [experts, k, n]")
    return Draft(
        kind="grouped_matmul",
        reads={0: ("m", "k"), 1: ("e", "k", "n"), 2: ("",)},
        writes=[("m", "n")],
        sizes={"m": x[0], "k": x[1], "n": w[2], "e": w[0]},
        whole=frozenset("m"),
        linear=(0,),
        flop=2.0 * x[0] * x[1] * w[2],
        attrs={"experts": w[0]},
    )


def attention(view: View) -> Draft:
    """[.., heads, tokens, width]: sequences and kv heads are loops, queries with an explicit mask.

    Fewer kv heads than heads are a loop over blocks of the heads. A causal flag counts queries
    from the first one, so that they stay whole; the context is summed by the softmax.
    """
    q, k, v = view.shape("query"), view.shape("key"), view.shape("value")
    lead = ("b",) if len(q) == 4 else names(len(q) - 3, "b")
    heads, kv = (q[-3], k[-3]) if len(q) > 2 else (1, 1)
    if len(q) != len(k) or heads % kv:
        raise view.error("the number of kv heads divides the number of heads")
    head = ("h",) if len(q) > 2 else ()
    reads: dict[int, Loops] = {
        0: (*lead, *head, "t", "d"),
        1: (*lead, *head, "s", "d"),
        2: (*lead, *head, "s", "v"),
    }
    if view.has("attn_mask"):
        over = (*q[:-1], k[-2])
        dims = (*lead, *(("h",) if heads == kv else ("",)), "t", "s")[-len(over) :]
        reads[view.slot("attn_mask")] = aligned(view.shape("attn_mask"), over, dims)
    causal = bool(view.arg("is_causal", False))
    return Draft(
        kind="attention",
        reads=reads,
        writes=[(*lead, *head, "t", "v")],
        sizes=dict(zip(lead, q, strict=False))
        | {"h": kv, "t": q[-2], "s": k[-2], "d": q[-1], "v": v[-1]},
        whole=frozenset({"s", "d", "v", *("t" if causal else "")}),
        flop=2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]),
        attrs={
            "heads": heads,
            "kv_heads": kv,
            "head_dim": q[-1],
            "value_dim": v[-1],
            "context": k[-2],
            "causal": int(causal),
        },
    )


def softmax(view: View) -> Draft:
    """The summed dim stays whole."""
    draft = follow(view, "softmax")
    draft.whole = frozenset({f"d{view.dim(default=-1)}"})
    return draft


def norm(view: View) -> Draft:
    """The last dims are normalised and stay whole; scale and shift run along them."""
    shape = view.shape()
    count = len(view.arg("normalized_shape"))
    loops = names(len(shape))
    draft = follow(view, "norm")
    draft.whole = frozenset(loops[len(shape) - count :])
    for name in ("weight", "bias"):
        if view.has(name):
            draft.reads[view.slot(name)] = loops[len(shape) - count :]
    kept = (*loops[: len(shape) - count], *("",) * count)
    draft.writes = [loops, *[kept] * (view.results - 1)]
    return draft


def batch_norm(view: View) -> Draft:
    """x[b, c, ..] with statistics of each channel: inference alone, all dims are loops."""
    draft = follow(view, "norm")
    if view.arg("training"):
        raise view.error("a batch norm in training has no rule", "call .eval() before capture")
    for slot in range(1, len(view.tensors)):
        draft.reads[slot] = ("d1",)
    draft.writes = [draft.writes[0], *[("",)] * (view.results - 1)]
    return draft


def group_norm(view: View) -> Draft:
    """Groups of channels are normalised with all of space: sequences alone are a loop."""
    return follow(view, "norm", without=tuple(range(1, len(view.shape()))))


def reduction(view: View) -> Draft:
    """A sum leaves partial sums; means and extremes keep the reduced dims whole."""
    if view.op in ("aten::max", "aten::min") and len(view.tensors) > 1:
        return pointwise(view)
    shape = view.shape()
    dims = view.dims()
    loops = names(len(shape))
    kept = [n for i, n in enumerate(loops) if i not in dims]
    if len(view.out()) == len(shape):
        kept = ["" if i in dims else n for i, n in enumerate(loops)]
    summed = view.op == "aten::sum"
    return Draft(
        kind="reduce",
        reads={0: loops},
        writes=[tuple(kept)] * view.results,
        sizes=dict(zip(loops, shape, strict=True)),
        whole=frozenset() if summed else frozenset(loops[i] for i in dims),
        linear=(0,) if view.op in ("aten::sum", "aten::mean") else (),
    )


def pointwise(view: View) -> Draft:
    """Element by element, inputs broadcast to the output."""
    out = view.out()
    loops = names(len(out))
    return Draft(
        kind="pointwise",
        reads={i: aligned(view.shape(i), out, loops) for i in range(len(view.tensors))},
        writes=[loops],
        sizes=dict(zip(loops, out, strict=True)),
        linear=_linear(view),
    )


_SCALES = ("mul", "div", "neg", "clone", "contiguous", "alias", "detach", "view_as", "dropout")
_CASTS = ("to", "_to_copy", "type_as")


def _linear(view: View) -> tuple[int, ...]:
    """Sums pass partial sums in all tensors at once, products in one factor."""
    name = view.op.removeprefix("aten::")
    count = len(view.tensors)
    if name in ("add", "sub", "rsub"):
        return (0, 1) if count == 2 else ()
    if name in _CASTS:
        return (0,) if _keeps_sums(view) else ()
    if name == "mul" and count == 2:
        smaller = math.prod(view.shape(0)) < math.prod(view.shape(1))
        return (1,) if view.fixed(0) or smaller else (0,)
    if name == "div" and count == 2 and view.arg("rounding_mode") is None:
        return (0,)
    return (0,) if name in _SCALES and count == 1 else ()


def _keeps_sums(view: View) -> bool:
    """Whether a cast is between floating-point types."""
    value = view.node.meta["val"]
    torch = torch_lib()
    return bool(
        torch.empty(0, dtype=view.dtype(0), device="meta").is_floating_point()
        and value.is_floating_point()
    )


_POINTWISE = """to _to_copy type_as clone contiguous alias detach lift_fresh_copy lift_fresh dropout
feature_dropout where masked_fill clamp clamp_min clamp_max softplus polar complex real imag
floor_divide remainder fmod bitwise_and bitwise_or bitwise_xor bitwise_not logical_and logical_or
logical_not logical_xor __and__ __or__ __xor__ hardtanh hardsigmoid hardswish mish celu leaky_relu
elu selu relu6 prelu gelu silu relu tanh sigmoid logsigmoid pow sqrt rsqrt square exp log erf sin
cos neg abs add sub rsub mul div addcmul addcdiv lerp maximum minimum eq ne lt le gt ge isnan isinf
nan_to_num sign floor ceil round trunc reciprocal threshold fill isin"""
_REDUCE = "sum mean amax amin prod any all max min argmax argmin logsumexp var std norm var_mean"

COMPUTE: dict[str, Rule] = {
    "aten::linear": linear,
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::matmul", "aten::mv", "aten::dot"), matmul),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::addmv"), added),
    "aten::einsum": einsum,
    "aten::embedding": embedding,
    **dict.fromkeys(
        ("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution"),
        conv,
    ),
    **dict.fromkeys(("transformers::grouped_mm_fallback", "aten::_grouped_mm"), grouped),
    "aten::scaled_dot_product_attention": attention,
    **dict.fromkeys(
        ("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax"), softmax
    ),
    **dict.fromkeys(("aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm"), norm),
    "aten::batch_norm": batch_norm,
    "aten::group_norm": group_norm,
    **{f"aten::{name}": reduction for name in _REDUCE.split()},
    **{f"aten::{name}": pointwise for name in _POINTWISE.split()},
}
